"""What a run makes of judges' answers that are late, cut off or not to be read; keys, cost, what judges are shown."""

import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkable_run import composed
from judges import group, judge_of, number, scores, settings

from benchmarks.rule_judge import QUESTION, Handler, RuleJudge
from recipe.spin import run_folder
from recipe.spin.preferences.judge import JudgeFailed, JudgeSource, Readable
from recipe.spin.preferences.source import Group, Score

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the config's run folder lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / composed("cpu").trainer.default_local_dir


def asked(source: JudgeSource, one: Group) -> tuple[list[float], dict[str, float]]:
    found = asyncio.run(source.score_group(one))
    return [score.value for score in found], source.metrics([score.info for score in found])


# ---------------------------------------------------------------------- both orders


class Biased(RuleJudge):
    def answer(self, question: str) -> str:
        text = super().answer(question)
        return "[[A]]" if "[[" in text else text


def test_a_judge_that_always_says_first_prefers_nothing_where_some_answers_cannot_be_read_either():
    with Biased(number, unreadable=0.3) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0), list("12345678"))
    assert 0.1 < metrics["judge/unreadable_rate"] < 0.5 and metrics["judge/first_rate"] == 1
    assert values == [0.5] * 8 and metrics["judge/tie_rate"] == 1


class InOneOrder(RuleJudge):
    """Prefers what stands first when it is the 1, and sees no difference in the other order."""

    def answer(self, question: str) -> str:
        return "[[A]]" if QUESTION.search(question)[2] == "1" else "[[C]]"


def test_a_response_that_is_preferred_in_one_order_alone_has_not_won():
    with InOneOrder(number) as server:
        assert scores(judge_of(server), ["1", "2"])[0] == [0.5, 0.5]


# ---------------------------------------------------------------------- answers that cannot be read


def unreadable(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / run_folder.UNREADABLE).read_text().splitlines()]


def test_answers_that_cannot_be_read_are_kept_in_the_runs_folder(folder):
    with RuleJudge(number, unreadable=1.0) as server:
        asked(judge_of(server, max_unreadable=1.0), group(["1", "2"]))
        asked(judge_of(server, max_unreadable=1.0), group(["1", "2"], step=4, held_out=True))
    fault = "holds none of [[A]], [[B]] and [[C]]"
    one = {"judge": server.address, "fault": fault, "text": "I would rather not say."}
    expected = [{"step": 1, "held_out": False} | one] * 2 + [{"step": 4, "held_out": True} | one] * 2
    assert unreadable(folder) == expected


class Cut(RuleJudge):
    """Answers at length, and is cut off."""

    def __init__(self, text: str):
        super().__init__(number)
        self.text, self.RequestHandlerClass = text, CutHandler


class CutHandler(Handler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, {"choices": [{"message": {"content": self.server.text}, "finish_reason": "length"}]})


def test_of_many_long_answers_that_cannot_be_read_a_part_is_kept(folder):
    with Cut("well, " * 1000) as server:
        scores(judge_of(server, max_unreadable=1.0), list(map(str, range(12))))
    kept = unreadable(folder)
    assert len(kept) == 100 and {len(one["text"]) for one in kept} == {2000}
    assert {one["fault"] for one in kept} == {"was cut off by its length"}


def test_answers_are_kept_where_they_stop_the_run_too_and_the_first_is_shown(folder):
    words = f"'I would rather not say.', and {run_folder.UNREADABLE} in the run's"
    with RuleJudge(number, unreadable=1.0) as server, pytest.raises(JudgeFailed, match=words):
        scores(judge_of(server), list("12345678"))
    assert len(unreadable(folder)) >= 21


def tell(readable: Readable, good: int, *texts: str) -> None:
    for _ in range(good):
        readable.count(None, "[[A]]")
    for text in texts:
        readable.count("", text)


def test_one_unreadable_answer_of_four_does_not_stop_a_run_that_goes_on_so_does():
    readable = Readable("http://a/v1", 0.2)
    for _ in range(20):
        tell(readable, 3, "hm")
    with pytest.raises(JudgeFailed, match=r"21 of its latest 84 answers .*max_unreadable=0.2 of 100 .*is 'hm', and"):
        tell(readable, 3, "so")


def test_answers_that_lie_back_do_not_count():
    readable = Readable("http://a/v1", 0.2)
    for _ in range(20):
        tell(readable, 100, "hm")
    with pytest.raises(JudgeFailed, match="201 of its latest 1000"):
        tell(readable, 0, *["hm"] * 1000)


def test_none_may_be_unreadable_where_none_is_allowed():
    with pytest.raises(JudgeFailed, match="1 of its latest 4 answers"):
        tell(Readable("http://a/v1", 0), 3, "hm")


def test_of_several_judges_each_has_its_share_of_answers_that_cannot_be_read():
    """Four that can be read would hide one that cannot: a fifth of all answers is no more than the limit."""
    with ExitStack() as stack:
        good = [stack.enter_context(RuleJudge(number)) for _ in range(4)]
        bad = stack.enter_context(RuleJudge(number, unreadable=1.0))
        with pytest.raises(JudgeFailed, match=f"^judge {bad.address}: 21 of its latest 21 answers"):
            scores(judge_of(*good, bad), list("12345678"))


class Filtered(RuleJudge):
    """Will not look at the number 4."""

    def answer(self, question: str) -> str:
        return "" if "4" in QUESTION.search(question).groups()[1:] else super().answer(question)


class FilteringHandler(Handler):
    def _send(self, status: int, body: dict) -> None:
        if status == 200 and self.command == "POST" and not body["choices"][0]["message"]["content"]:
            status, body = 400, {"error": {"message": "the content filter was triggered: [[A]]"}}
        super()._send(status, body)


def test_a_question_that_the_server_refuses_is_an_answer_that_cannot_be_read(folder):
    with Filtered(number) as server:
        server.RequestHandlerClass = FilteringHandler
        values, metrics = asked(judge_of(server), group(["3", "4", "5"]))
    assert values == [0.25, 0.5, 0.75] and metrics["judge/unreadable_rate"] == 4 / 6
    kept = unreadable(folder)
    assert len(kept) == 4 and {one["fault"] for one in kept} == {"was refused"}
    assert all("status 400" in one["text"] and "content filter" in one["text"] for one in kept)


@pytest.mark.parametrize(("servers", "itself"), [("[http://a/v1]", True), ("[http://a/v1,policy]", False)])
def test_the_policys_own_server_is_waited_for_as_a_reward_is(servers, itself):
    assert judge_of(servers=servers).limits_itself is itself


# ---------------------------------------------------------------------- the trial question


def test_a_judge_whose_answer_to_the_trial_question_is_cut_off_is_refused(run, capsys):
    with Cut("Let me think. [[A]] says") as server:
        message = run.refusal(*settings(server))
        assert message.startswith(f"judge {server.address}: its answer to a trial question was cut off by its length")
        assert "'Let me think. [[A]] says'; raise algorithm.judge.max_tokens=512" in message
        run.check(*settings(server, max_unreadable=1.0))
    assert "warning: judge" in capsys.readouterr().err


def test_a_judge_whose_answer_to_the_trial_question_holds_no_verdict_is_warned_of(run, capsys):
    with RuleJudge(number, unreadable=1.0) as server:
        run.check(*settings(server))
    said = capsys.readouterr().err
    assert f"warning: judge {server.address}: its answer to a trial question holds none of [[A]], [[B]] and" in said
    assert ": 'I would rather not say.'; such answers count as ties" in said
    with RuleJudge(number) as server:
        run.check(*settings(server))
    assert "warning: judge" not in capsys.readouterr().err


class BusyWithTheList(Handler):
    def do_GET(self) -> None:
        self.server.busy -= 1
        if self.server.busy >= 0:
            self._send(429, {"error": {"message": "too many requests"}})
        else:
            super().do_GET()


def test_a_busy_server_is_asked_again_what_it_serves(run):
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.busy = BusyWithTheList, 2
        run.check(*settings(server, retries=1))
        server.busy = 2
        message = run.refusal(*settings(server, retries=0))
    assert f"judge {server.address}: status 429" in message and "algorithm.judge.retries" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "asked up to 48 questions a step (4 prompts, 12 each), 576 in 12 steps\n"),
        (["algorithm.judge.comparisons=tournament"], "asked up to 24 questions a step (4 prompts, 6 each)"),
        (
            ["actor_rollout_ref.rollout.n=2", "trainer.total_training_steps=null"],
            "8 questions a step (4 prompts, 2 e",
        ),
        (["reward.custom_reward_function.path=null"], "; and up to 2 a held-out prompt at each validation"),
        (
            ["algorithm.filter_groups.enable=True"],
            ", as many again for each batch of prompts that dynamic",
        ),
    ],
)
def test_what_a_step_costs_at_most_is_said_before_the_run(run, capsys, changes, words):
    with RuleJudge(number) as server:
        run.check(*settings(server), *changes)
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------------- time


SENT = 100


class Trickling(Handler):
    """Sends a byte of an answer now and then."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.trickle()

    def trickle(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(SENT):
            self.wfile.write(b" ")
            self.server.sent += 1
            time.sleep(0.1)


class TricklingList(Trickling):
    def do_GET(self) -> None:
        self.trickle()


def test_a_server_that_sends_a_byte_now_and_then_is_given_up():
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.sent, judge = Trickling, 0, judge_of(server, timeout_s=0.5)
        with pytest.raises(JudgeFailed, match=r"no answer within algorithm.judge.timeout_s=0.5 seconds; raise"):
            scores(judge, ["1", "2"])
        assert server.sent < SENT


def test_so_it_is_before_the_run(run, monkeypatch):
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.sent = Trickling, 0
        assert "no answer within algorithm.judge.timeout_s=0.5 seconds" in run.refusal(*settings(server, timeout_s=0.5))
        server.RequestHandlerClass = TricklingList
        monkeypatch.setattr("recipe.spin.preferences.judge_server.PROBE_SECONDS", 0.5)
        assert "did not say within 0.5 seconds what it serves" in run.refusal(*settings(server))
        assert server.sent < SENT


# ---------------------------------------------------------------------- keys


def test_each_server_gets_its_own_key_and_one_without_gets_none(run, monkeypatch):
    monkeypatch.setenv("ONE_KEY", "key-1")
    monkeypatch.setenv("OPENAI_API_KEY", "key-2")
    with (
        RuleJudge(number, key="key-1") as one,
        RuleJudge(number, key="none") as without,
        RuleJudge(number, key="key-2") as other,
    ):
        named = settings(one, without, other, api_key_env="[ONE_KEY,null,OPENAI_API_KEY]")
        run.check(*named)
        source = judge_of(one, without, other, api_key_env="[ONE_KEY,null,OPENAI_API_KEY]")
        assert scores(source, ["1", "2"])[0] == [0, 1]
        assert "status 401" in run.refusal(*settings(one, without, other))
        run.check(*settings(without, api_key_env="null"))
        message = run.refusal(*settings(other, api_key_env="null"))
        assert "status 401" in message and "algorithm.judge.api_key_env names no variable with a key to it" in message
        short = run.refusal(*settings(one, without, other, api_key_env="[ONE_KEY,null]"))
    assert "algorithm.judge.api_key_env=['ONE_KEY', None]: give one name, a name or null a server, or null" in short


# ---------------------------------------------------------------------- what is asked about, and what is given


def test_a_message_of_parts_reaches_the_judge_as_its_text():
    with RuleJudge(number) as server:
        parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]
        asked(judge_of(server), group(["1", "2"], content=parts))
    assert all("\nuser: What is 3 + 4?\n" in question for question in server.questions)


def test_a_score_needs_no_more_than_its_value():
    assert Score(1.0) == Score(1.0, {})


# ---------------------------------------------------------------------- a reward that asks a server


class Grader(Handler):
    """Compares the answer with what is expected."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(0.05)
        with self.server.lock:
            self.server.now -= 1
        self._send(200, {"score": float(body["answer"] == body["expected"])})


def test_the_documentations_reward_asks_a_server_for_several_responses_at_a_time(run, monkeypatch):
    text = (ROOT / "docs" / "preferences.md").read_text().split("```python")[2].split("```")[0]
    (run.folder / "asks.py").write_text(text)
    run.check(f"reward.custom_reward_function.path={run.folder / 'asks.py'}")
    names: dict = {}
    exec(text, names)
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.asked, server.now, server.most = Grader, [], 0, 0
        monkeypatch.setenv("GRADER", server.address)

        async def ask() -> list[float]:
            info = {"question": "3 + 4?"}
            return await asyncio.gather(*(names["compute_score"]("sums", str(n), "7", info) for n in range(20)))

        assert asyncio.run(ask()) == [float(n == 7) for n in range(20)]
    assert server.asked[0].keys() == {"question", "answer", "expected"} and 1 < server.most <= 8
