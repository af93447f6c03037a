"""What judges make of responses, asked through a real server; the settings and servers that are refused."""

import asyncio
import functools
import json
import re
import shutil
import ssl
import subprocess
import threading
import time
import traceback
from pathlib import Path

import huggingface_hub
import pytest
from checkable_run import composed, override
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from worker_harness import compose

from benchmarks.rule_judge import Handler, RuleJudge, is_sum
from recipe.spin.preferences import judge_server
from recipe.spin.preferences.judge import JudgeFailed, JudgeSource, read_verdict
from recipe.spin.preferences.source import Group, PreferenceSource, Score, source_class
from recipe.spin.run.check import check_config
from recipe.spin.run.pinned_model import fetch_pinned_model

ROOT = Path(__file__).resolve().parents[1]
RESPONSES = ["3", "7", "11", "7"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the config's run folder lies."""
    monkeypatch.chdir(tmp_path)


def length(request: str, response: str) -> float:
    return len(response)


def number(request: str, response: str) -> float:
    return float(response)


def group(responses: list[str], generate=None) -> Group:
    return Group(1, [{"role": "user", "content": "What is 3 + 4?"}], responses, None, {}, generate)


def settings(*servers: RuleJudge, **changes) -> list[str]:
    addresses = ",".join(server.address for server in servers)
    overrides = {"servers": f"[{addresses}]", "retries": 0, "timeout_s": 5} | changes
    return [
        "algorithm.preference_source=judge",
        *(f"algorithm.judge.{key}={value}" for key, value in overrides.items()),
    ]


def judge_of(*servers: RuleJudge, tokenizer=None, **changes) -> JudgeSource:
    return JudgeSource(compose(*settings(*servers, **changes), device="cpu"), tokenizer)


def scores(source: JudgeSource, responses=RESPONSES, generate=None) -> tuple[list[float], dict[str, float]]:
    found = asyncio.run(source.score_group(group(responses, generate)))
    return [score.value for score in found], source.metrics([score.info for score in found])


def test_a_response_is_worth_the_share_of_its_comparisons_that_it_wins():
    with RuleJudge(number) as server:
        values, metrics = scores(judge_of(server))
    assert values == pytest.approx([0, 0.5, 1, 0.5])  # 7 wins against 3, loses to 11, ties with itself
    assert len(server.questions) == 10  # five comparisons in two orders; equal responses are not asked about
    assert metrics["judge/asked"] == 10 and metrics["judge/tie_rate"] == pytest.approx(1 / 6)
    assert metrics["judge/first_rate"] == 0.5 and metrics["judge/unreadable_rate"] == 0
    assert metrics["judge/tokens"] == 1000 and metrics["judge/seconds_per_prompt"] > 0


def test_a_tournament_asks_about_n_less_one_pairs():
    with RuleJudge(number) as server:
        values, _ = scores(judge_of(server, comparisons="tournament"), ["5", "3", "9", "1", "2"])
    assert values == [1, 0, 3, 0, 0] and len(server.questions) == 2 * 4


def test_the_request_and_both_responses_reach_the_judge_as_they_are():
    with RuleJudge(length) as server:
        scores(judge_of(server), ["$first {0}", "[[A]]"])
    first, second = sorted(server.questions)
    assert "user: What is 3 + 4?" in first and "$first {0}" in first and "[[A]]" in first
    assert first.index("$first {0}") < first.index("[Answer B]") < second.index("$first {0}")


class Biased(RuleJudge):
    def answer(self, question: str) -> str:
        super().answer(question)
        return "The first one, as always: [[A]]"


def test_a_judge_that_always_says_first_prefers_nothing():
    with Biased(number) as server:
        values, metrics = scores(judge_of(server))
    assert values == [0.5] * 4 and metrics["judge/tie_rate"] == 1 and metrics["judge/first_rate"] == 1


def test_several_judges_decide_by_majority():
    with RuleJudge(number) as good, RuleJudge(number) as too, RuleJudge(lambda *asked: -number(*asked)) as bad:
        assert scores(judge_of(good, bad, too), ["1", "2"])[0] == [0, 1]
        assert scores(judge_of(good, bad), ["1", "2"])[0] == [0.5, 0.5]


def test_unreadable_answers_count_as_ties_up_to_a_share(caplog):
    with RuleJudge(number, unreadable=1.0) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0))
        assert values == [0.5] * 4 and metrics["judge/unreadable_rate"] == 1
        assert "I would rather not say." in caplog.text
        words = rf"56 of the latest 56 answers .*max_unreadable=0.2.* of judge {server.address}, .*rather not say"
        with pytest.raises(JudgeFailed, match=words):
            scores(judge_of(server), list("12345678"))
        assert f"judge {server.address}: an answer holds none" in caplog.text


def test_an_answer_that_was_cut_off_is_unreadable_whatever_it_holds():
    body = {"choices": [{"message": {"content": "End with [[A]], or [[C]] if"}, "finish_reason": "length"}]}
    with Rubbish(JSON, json.dumps(body)) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0), ["1", "2"])
        assert values == [0.5, 0.5] and metrics["judge/unreadable_rate"] == 1
        with pytest.raises(JudgeFailed, match=r"56 of the latest 56 .*cut off by their length \(56 of them\)"):
            scores(judge_of(server), list("12345678"))


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("[[A]]", "A"), ("not [[A]] but [[B]].", "B"), ("[[C]]\n", "C"), ("[A]", None), ("", None), ("[[D]]", None)],
)
def test_the_last_verdict_of_an_answer_counts(answer, verdict):
    assert read_verdict(answer) == verdict


def test_a_busy_server_is_asked_again():
    with RuleJudge(number, refusals=2) as server:
        assert scores(judge_of(server, retries=3), ["1", "2"])[0] == [0, 1]


def test_a_server_that_stays_busy_is_named_with_the_remedy():
    with (
        RuleJudge(number, refusals=100) as server,
        pytest.raises(JudgeFailed, match=r"127.0.0.1.*status 429.*too many requests.*algorithm.judge.concurrency"),
    ):
        scores(judge_of(server))


def test_a_slow_server_ends_in_an_error():
    with RuleJudge(number, delay=2) as server:
        with pytest.raises(JudgeFailed, match="algorithm.judge.timeout_s"):
            scores(judge_of(server, timeout_s=0.1), ["1", "2"])
        with pytest.raises(JudgeFailed, match="step 1: .*algorithm.judge.step_timeout_s=0.1"):
            scores(judge_of(server, step_timeout_s=0.1), ["1", "2"])


class RubbishHandler(Handler):
    def write(self, status: int, kind: str, body: bytes) -> None:
        if status == 200 and self.command in self.server.commands:
            status, kind, body = self.server.rubbish
        super().write(status, kind, body)


class Rubbish(RuleJudge):
    """Answers requests of these methods with what OpenAI's API would not."""

    def __init__(self, kind: str, body: str, commands: tuple[str, ...] = ("POST",), **options):
        super().__init__(number, **options)
        self.rubbish, self.commands, self.RequestHandlerClass = (200, kind, body.encode()), commands, RubbishHandler


JSON, HTML = "application/json", "text/html; charset=utf-8"
RUBBISH = [
    (HTML, "<html>please log in</html>", "<html>please log in</html>"),
    (JSON, '{"error": {"message": "no such model"}}', "no such model"),
    (JSON, '{"choices": [{"message"', '{"choices": [{"message"'),
    (JSON, "", "''"),
    (JSON, "null", "'null'"),
    (JSON, "[]", "'[]'"),
]


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        *RUBBISH,
        (JSON, '{"choices": []}', '{"choices": []}'),
        (JSON, '{"choices": null}', '{"choices": null}'),
        (JSON, '{"choices": [{"text": "[[A]]"}]}', "[[A]]"),
        (JSON, '{"choices": [{"message": {"content": ["[[A]]"]}}]}', "[[A]]"),
    ],
)
def test_an_answer_that_is_none_is_shown_with_its_address(kind, body, said):
    with Rubbish(kind, body) as server, pytest.raises(JudgeFailed) as caught:
        scores(judge_of(server), ["1", "2"])
    message = str(caught.value)
    assert message.startswith(f"judge {server.address}: status 200, ") and said in message
    assert "after POST /v1/chat/completions, which is no answer of OpenAI's API" in message


def test_a_long_answer_that_is_none_is_shown_by_its_beginning():
    with Rubbish(HTML, "<html>" + 10_000 * "please log in ") as server, pytest.raises(JudgeFailed) as caught:
        scores(judge_of(server), ["1", "2"])
    assert "<html>please log in" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "message", [{"content": None}, {}, {"content": "[[A]]", "reasoning": "long"}], ids=["null", "none", "more"]
)
def test_answers_without_a_text_or_with_more_are_answers(message):
    with Rubbish(JSON, json.dumps({"choices": [{"message": message}], "usage": None, "more": 1})) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0), ["1", "2"])
    assert values == [0.5, 0.5] and metrics["judge/tokens"] == 0
    assert metrics["judge/unreadable_rate"] == (0 if message.get("content") else 1)


@pytest.mark.parametrize("model", ["null", "rule"])
@pytest.mark.parametrize(("kind", "body", "said"), [*RUBBISH, (JSON, '{"data": [{"name": "a"}]}', '{"name": "a"}')])
def test_a_list_of_models_that_is_none_is_said_before_anything_starts(run, model, kind, body, said):
    with Rubbish(kind, body, commands=("GET",)) as server:
        message = run.refusal(*settings(server, models=model))
        assert message.startswith(f"judge {server.address}: status 200, ") and said in message
        assert "after GET /v1/models, which is no answer of OpenAI's API" in message


@pytest.mark.parametrize("data", ["null", "[]"])
def test_a_server_without_models_is_said(run, data):
    with Rubbish(JSON, f'{{"data": {data}}}', commands=("GET",)) as server:
        assert run.refusal(*settings(server)) == f"judge {server.address}: serves no model; start it with one"


class Silent(Handler):
    def do_GET(self) -> None:
        self.server.end.wait()


def test_a_server_that_does_not_say_what_it_serves_is_given_up(run, monkeypatch):
    monkeypatch.setattr(judge_server, "PROBE_SECONDS", 0.2)
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.end = Silent, threading.Event()
        message = run.refusal(*settings(server))
        server.end.set()
    assert f"judge {server.address}: did not say within 0.2 seconds what it serves; wait until" in message
    assert "timeout_s" not in message


def test_only_so_many_questions_are_under_way_at_a_server_as_is_allowed():
    class Counting(RuleJudge):
        now = most = 0

        def answer(self, question: str) -> str:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.05)
            with self.lock:
                self.now -= 1
            return super().answer(question)

    workers = compose(device="cpu").actor_rollout_ref.rollout.agent.num_workers
    with Counting(number) as server:
        scores(judge_of(server, concurrency=3 * workers))
    assert len(server.questions) == 10 and server.most == 3


def test_the_key_comes_from_the_environment_and_is_never_shown(run, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "secret-key\n")  # as a file gives it
    with RuleJudge(number, key="secret-key") as server:
        asked = judge_of(server, api_key_env="MY_KEY")
        assert scores(asked, ["1", "2"])[0] == [0, 1]
        run.check(*settings(server, api_key_env="MY_KEY"))
        monkeypatch.setenv("MY_KEY", "another-key")
        with pytest.raises(
            JudgeFailed, match="status 401.*no such key.*MY_KEY .*holds a key that it refuses"
        ) as caught:
            scores(judge_of(server, api_key_env="MY_KEY"), ["1", "2"])
        message = run.refusal(*settings(server, api_key_env="MY_KEY"))
    assert "status 401" in message and "MY_KEY" in message
    shown = "".join(traceback.format_exception(caught.value)) + message + caplog.text
    assert "another-key" not in shown and "Bearer ***" in shown


def test_a_key_in_rubbish_is_not_shown_either(monkeypatch):
    monkeypatch.setenv("MY_KEY", "another-key")
    for body in ('{"error": "what is another-key?"}', f"<html>{190 * ' '}another-key"):
        with Rubbish(JSON, body) as server, pytest.raises(JudgeFailed) as caught:
            scores(judge_of(server, api_key_env="MY_KEY"), ["1", "2"])
        assert "anot" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", ["sécret", "sec\nret"])
def test_a_key_that_none_can_be_is_refused_without_being_shown(run, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with RuleJudge(number) as server:
        message = run.refusal(*settings(server, api_key_env="MY_KEY"))
    assert "MY_KEY (algorithm.judge.api_key_env) holds signs that no key has" in message and "ret" not in message


@pytest.fixture
def asks_policy(tiny_llama):
    """Scores of two responses by a policy that answers as told, and what it was asked: (prompt, sampling) each."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def ask(answer, *overrides: str) -> tuple[list[float], dict[str, float], list[tuple[str, dict]]]:
        asked = []

        async def generate(tokens: list[int], sampling: dict) -> list[int]:
            asked.append((tokenizer.decode(tokens), sampling))
            return tokenizer.encode(answer(asked[-1][0]))

        own = ["algorithm.preference_source=judge", f"actor_rollout_ref.model.path={tiny_llama}", *overrides]
        source = JudgeSource(compose(*own, device="cpu"), tokenizer)
        return *scores(source, ["no", "yes, it is"], generate), asked

    return ask


def longer(question: str) -> str:
    return "[[A]]" if "[Answer A]\nyes, it is\n" in question else "[[B]]"


def test_the_policy_judges_through_its_own_server(asks_policy):
    values, metrics, asked = asks_policy(
        lambda question: longer(question) + "<|im_end|>", "algorithm.judge.max_tokens=7"
    )
    assert values == [0, 1] and metrics["judge/asked"] == 2 and metrics["judge/tokens"] > 100
    assert [sampling for _, sampling in asked] == [{"temperature": 0.0, "max_tokens": 7}] * 2
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt, _ in asked)


def test_an_answer_of_the_policy_that_was_cut_off_is_unreadable(asks_policy):
    values, metrics, _ = asks_policy(longer, "algorithm.judge.max_unreadable=1.0")
    assert values == [0.5, 0.5] and metrics["judge/unreadable_rate"] == 1


TEMPLATE = "{{ messages[0]['content'] }}{% if enable_thinking is defined %} think: {{ enable_thinking }}{% endif %}"


def test_the_policy_is_asked_with_the_runs_options_to_the_chat_template(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    config = compose("+data.apply_chat_template_kwargs.enable_thinking=False", device="cpu")
    tokens = JudgeSource(config, tokenizer).prompt_tokens([{"role": "user", "content": "well?"}])
    assert tokenizer.decode(tokens) == "well? think: False"


def test_the_reference_judges_when_all_responses_are_there():
    reference = compose("algorithm.preference_source=judge", "algorithm.judge.servers=[reference]", device="cpu")
    policy = compose("algorithm.preference_source=judge", device="cpu")
    assert JudgeSource(reference, None).scoring_model == "reference"
    assert JudgeSource(policy, None).scoring_model == "actor"


# ---------------------------------------------------------------------- before Ray starts


def test_a_server_is_asked_once_before_anything_starts(run):
    with RuleJudge(number) as server:
        run.check(*settings(server))
        run.check(*settings(server, models="rule"))
        assert len(server.questions) == 2 and "What is 1 + 1?" in server.questions[0]


class Strict(Handler):
    """Refuses a parameter, as OpenAI's reasoning models do."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if "max_tokens" in body:
            self._send(400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens'"}})
        else:
            message = {"role": "assistant", "content": "[[A]]"}
            self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})


def test_parameters_that_a_server_refuses_are_said_before_anything_starts_and_can_be_changed(run):
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.asked = Strict, []
        message = run.refusal(*settings(server))
        assert "status 400" in message and "max_completion_tokens" in message
        assert "algorithm.judge.extra_body replaces" in message
        changes = {"extra_body": "{max_tokens:null,max_completion_tokens:9,temperature:null,reasoning:{effort:low}}"}
        run.check(*settings(server, **changes))
        scores(judge_of(server, **changes), ["1", "2"])
    assert [sorted(body) for body in server.asked[1:]] == 3 * [
        ["max_completion_tokens", "messages", "model", "reasoning"]
    ]
    assert server.asked[1]["reasoning"] == {"effort": "low"} and server.asked[0]["temperature"] == 0


def test_the_model_that_is_taken_where_none_is_named_is_said(run, capsys):
    with RuleJudge(number) as server:
        run.check(*settings(server))
        assert f"judge {server.address} is asked for rule, the first of the 1 models" in capsys.readouterr().err
        run.check(*settings(server, models="rule"))
        assert "is asked for" not in capsys.readouterr().err


# ---------------------------------------------------------------------- on the way to a server


@pytest.fixture
def proxies(monkeypatch):
    """Sets the environment's proxies and certificates, and no others."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_proxy_does_not_lead_to_a_judge_on_this_machine(run, proxies):
    proxies(HTTP_PROXY="http://127.0.0.1:1", ALL_PROXY="socks://127.0.0.1:1", SSL_CERT_FILE="/absent")
    with RuleJudge(number) as server:
        run.check(*settings(server))
        assert scores(judge_of(server), ["1", "2"])[0] == [0, 1]


@pytest.fixture
def https_judge(tmp_path):
    """A judge at https://localhost, and the file of its certificate, which no public authority vouches for."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = RuleJudge(number)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.address = f"https://localhost:{server.server_port}/v1"
    with server:
        yield server, certificate


def test_a_judge_on_this_machine_is_trusted_by_the_environments_certificates_alone(run, proxies, https_judge):
    server, certificate = https_judge
    assert "CERTIFICATE_VERIFY_FAILED" in run.refusal(*settings(server))
    proxies(SSL_CERT_FILE=str(certificate), HTTPS_PROXY="http://127.0.0.1:1")
    run.check(*settings(server))
    assert scores(judge_of(server), ["1", "2"])[0] == [0, 1]


JUDGE = ["algorithm.preference_source=judge", "algorithm.judge.servers=[http://judge.invalid:8000/v1]"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"HTTP_PROXY": "http://me:secret@127.0.0.1:1"},
            ["cannot be reached through the proxy http://***@127.0.0.1:1", "NO_PROXY"],
        ),
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, ["no connection can be set up (ImportError: ", "ALL_PROXY"]),
        ({"ALL_PROXY": "socks://me:secret@127.0.0.1:1"}, ["no connection can be set up (ValueError: ", "ALL_PROXY"]),
        ({"HTTP_PROXY": "http://proxy:80a"}, ["no connection can be set up (InvalidURL: ", "HTTP_PROXY"]),
        ({"SSL_CERT_FILE": "/absent"}, ["no connection can be set up (FileNotFoundError: ", "SSL_CERT_FILE"]),
    ],
    ids=["proxy", "socks5", "socks", "port", "certificates"],
)
def test_a_way_to_a_judge_that_cannot_be_taken_is_named(run, proxies, variables, words):
    proxies(**variables)
    message = run.refusal(*JUDGE)
    assert message.startswith("judge http://judge.invalid:8000/v1: ") and "secret" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_password_in_a_judges_address_is_not_shown(run, caplog):
    with RuleJudge(number, unreadable=1.0) as server:
        address = server.address.replace("://", "://me:sec%40ret@")
        named = ["algorithm.preference_source=judge", f"algorithm.judge.servers=['{address}']"]
        source = JudgeSource(compose(*named, device="cpu"), None)
        with pytest.raises(JudgeFailed) as caught:
            scores(source, list("12345678"))
        other = run.refusal(*named, "algorithm.judge.models=other")
    gone = run.refusal(*named, "algorithm.judge.models=rule")
    shown = str(caught.value) + caplog.text + other + gone
    assert "sec%40ret" not in shown and shown.count("http://***@127.0.0.1") >= 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"servers": "[]"}, "algorithm.judge.servers=[]: must be a list"),
        ({"servers": "[127.0.0.1:8000]"}, "algorithm.judge.servers"),
        ({"servers": "http://127.0.0.1:1/v1"}, "algorithm.judge.servers"),
        ({"servers": "['http://127.0.0.1:port/v1']"}, "algorithm.judge.servers=['http://127.0.0.1:port/v1']: give"),
        ({"servers": "['http://127.0.0.1:99999/v1']"}, "algorithm.judge.servers=['http://127.0.0.1:99999/v1']: give"),
        ({"servers": "['http://']"}, "algorithm.judge.servers=['http://']: give addresses"),
        ({"servers": "[http://127.0.0.1:1/v1]"}, "judge http://127.0.0.1:1/v1: cannot be reached"),
        ({"models": "[a,b]"}, "algorithm.judge.models"),
        ({"models": "other"}, "serves rule, and not algorithm.judge.models='other'"),
        ({"comparisons": "best"}, "algorithm.judge.comparisons='best': must be one of all, tournament"),
        ({"concurrency": 0}, "algorithm.judge.concurrency=0"),
        ({"max_tokens": "many"}, "algorithm.judge.max_tokens='many'"),
        ({"retries": -1}, "algorithm.judge.retries=-1"),
        ({"timeout_s": 0}, "algorithm.judge.timeout_s=0"),
        ({"step_timeout_s": "soon"}, "algorithm.judge.step_timeout_s='soon'"),
        ({"extra_body": "[a]"}, "algorithm.judge.extra_body=['a']: must be a section of keys or null"),
        ({"extra_body": "{top_p:nan}"}, "algorithm.judge.extra_body: cannot be sent as JSON (Out of range float"),
        ({"max_unreadable": 2}, "algorithm.judge.max_unreadable=2"),
        ({"prompt": "/no/such/file"}, "algorithm.judge.prompt='/no/such/file': cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_refused(run, changes, words):
    with RuleJudge(number) as server:
        assert words in run.refusal(*settings(server, **changes))


def test_a_steps_limit_is_refused_where_its_comparisons_do_not_come_together(run):
    with RuleJudge(number) as server:
        asked = settings(server, step_timeout_s=60)
        run.check(*asked)
        assert "algorithm.judge.step_timeout_s=60: with asynchronous generation" in run.refusal(
            *asked, "trainer.v1.trainer_mode=colocate_async"
        )


@pytest.mark.parametrize(
    "text", ["Which is better, $first or $second?", "$request $first $second $third", "$request $first $second $"]
)
def test_a_question_must_hold_what_is_asked_about(run, text):
    (run.folder / "question.txt").write_text(text)
    with RuleJudge(number) as server:
        message = run.refusal(*settings(server, prompt=run.folder / "question.txt"))
    assert "must hold $request, $first and $second" in message


def test_a_missing_key_is_said_before_anything_starts(run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with RuleJudge(number, key="secret-key") as server:
        message = run.refusal(*settings(server))
    assert "status 401" in message and "OPENAI_API_KEY" in message and "has no value" in message


def test_a_policy_that_judges_needs_room_for_the_question(run):
    message = run.refusal("algorithm.preference_source=judge")
    assert "actor_rollout_ref.rollout.max_model_len=128" in message and "algorithm.judge.max_tokens" in message
    room = "actor_rollout_ref.rollout.max_model_len=512"
    run.check("algorithm.preference_source=judge", room, "algorithm.judge.max_tokens=16")


def test_the_room_for_a_question_is_measured_with_the_runs_chat_template(run):
    def needed(*overrides: str) -> int:
        return int(re.search(r"up to (\d+) tokens", run.refusal(OWN, *overrides))[1])

    template = "actor_rollout_ref.model.custom_chat_template="
    plain, longer = template + '"{{ messages[0].content }}"', template + '"{{ messages[0].content }} x x x{{ more }}"'
    more = "+data.apply_chat_template_kwargs.more=' and more'"
    assert needed(plain) < needed() and needed(plain) < needed(longer) < needed(longer, more)
    message = run.refusal(OWN, template + "\"{{ raise_exception('never') }}\"", "data.filter_overlong_prompts=True")
    assert "the chat template does not take the messages (never) of the preference source, by: user" in message


OWN = "algorithm.preference_source=judge"
ROOM = ["actor_rollout_ref.rollout.max_model_len=512", "algorithm.judge.max_tokens=16"]
MODEL, TOKENIZER = "actor_rollout_ref.model.path", "actor_rollout_ref.model.tokenizer_path"


@pytest.mark.parametrize("own", ["policy", "reference"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"{MODEL}=/no/such/folder", f"{MODEL}='/no/such/folder': there is no such folder"),
        (f"{MODEL}=no/model", f"{MODEL}='no/model': there is no such folder, and the hub has no such model"),
        (f"{MODEL}=a--b", f"{MODEL}='a--b': there is no such folder, and the hub has no such model"),
        (f"{TOKENIZER}=no/model", f"{TOKENIZER}='no/model': there is no such folder, and the hub has no such model"),
        (f"{TOKENIZER}=/no/such/folder", f"{TOKENIZER}='/no/such/folder': there is no such folder"),
        ("actor_rollout_ref.model.lora_rank=few", "actor_rollout_ref.model.lora_rank='few'"),
        ("actor_rollout_ref.rollout.max_model_len=2k", "actor_rollout_ref.rollout.max_model_len='2k'"),
        ("data.max_prompt_length=x", "data.max_prompt_length='x'"),
        ("trainer.v1=sync", "trainer.v1='sync'"),
        ("algorithm.judge.servers=5", "algorithm.judge.servers=5"),
        ("algorithm.judge.prompt='~nobody/question'", "algorithm.judge.prompt='~nobody/question': cannot be read"),
    ],
)
def test_a_fault_beside_a_policy_that_judges_is_said_as_ever(run, own, change, words):
    message = run.refusal(OWN, f"algorithm.judge.servers=[{own}]", *ROOM, change)
    assert words in message and "faults" not in message


def test_a_policy_that_judges_may_be_pinned(run, tiny_models, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: tiny_models["llama"])
    config = override(composed("cpu"), run.overrides(OWN, *ROOM, f"{MODEL}=a/b@0123abc"))
    fetch_pinned_model(config)
    check_config(config)
    assert config.actor_rollout_ref.model.path == tiny_models["llama"]


def test_the_room_is_measured_with_the_tokenizer_that_writes_prompts(run, tiny_llama, monkeypatch):
    loaded = []
    load = AutoTokenizer.from_pretrained

    def noted(path, **options):
        loaded.append((path, options["trust_remote_code"]))
        return load(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noted)
    tokenizer = shutil.copytree(tiny_llama, run.folder / "tokenizer")
    trusted = [f"actor_rollout_ref.model.tokenizer_path={tokenizer}", "actor_rollout_ref.model.trust_remote_code=True"]
    assert "actor_rollout_ref.rollout.max_model_len=128" in run.refusal(OWN, *trusted)
    assert loaded == [(str(tokenizer), True)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "actor_rollout_ref.rollout.max_model_len=128"),
        (["algorithm.judge.servers=[policy,reference]"], "one model's weights at a time; name policy or reference"),
        (["actor_rollout_ref.model.lora_rank=4", "trainer.ref_update_freq=0"], "no second model"),
        (["algorithm.filter_groups.enable=True"], "algorithm.filter_groups.enable=True: which prompts tie"),
    ],
)
def test_a_reference_that_cannot_judge_is_refused(run, changes, words):
    judge = ["algorithm.preference_source=judge", "algorithm.judge.servers=[reference]"]
    message = run.refusal(*judge, *changes)
    assert "algorithm.judge.servers" in message or "max_model_len" in message
    assert words in message
    room = ["actor_rollout_ref.rollout.max_model_len=512", "algorithm.judge.max_tokens=16"]
    run.check(*judge, *room)


def test_a_source_of_ones_own_is_named_by_its_module():
    assert source_class("recipe.spin.preferences.judge:JudgeSource") is JudgeSource
    assert JudgeSource.scores_groups() and not source_class("reward").scores_groups()


class Plain(PreferenceSource):
    def score_group(self, group: Group) -> list[Score]:
        return []


def noted(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)

    return call


class Decorated(PreferenceSource):
    @noted
    async def score_group(self, group: Group) -> list[Score]:
        return []


def test_a_decorated_source_is_one():
    assert source_class("test_judge:Decorated").__name__ == "Decorated"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jury", "choose one of reward, judge, self_play, or name a class of your own as module:Class"),
        ("no_such_module:Source", "cannot be imported"),
        ("recipe.spin.preferences.judge:NoSuch", "cannot be imported"),
        ("recipe.spin.preferences.judge:Group", "derived from"),
        ("test_judge:Plain", "score_group is no coroutine function, and is awaited; write async def score_group"),
        (5, "must be a text"),
    ],
)
def test_a_source_that_is_none_is_refused(run, name, words):
    message = run.refusal(f"algorithm.preference_source={name}")
    assert "algorithm.preference_source=" in message and words in message


def test_the_example_of_the_documentation_prefers_the_shorter_of_two_right_responses():
    text = (ROOT / "docs" / "preferences.md").read_text()
    names: dict = {}
    exec(text.split("```python")[1].split("```")[0], names)
    asked = Group(1, [], ["12345", "123", "1"], [1.0, 1.0, 0.0], {}, None)
    source = names["ShortestRight"](None, None)
    found = asyncio.run(source.score_group(asked))
    assert [score.value for score in found] == pytest.approx([1.0, 1.04, 0.0])
    assert source.metrics([score.info for score in found]) == {"mine/length": 3.0}


def test_the_rule_of_the_benchmark_knows_sums():
    request = "user: What is 3 + 4? Answer with the number only."
    assert [is_sum(request, text) for text in ("7", "3 + 4 = 7.", "07", "8", "", "seven")] == [1, 1, 1, 0, 0, 0]
    assert OmegaConf.is_config(compose(device="cpu").algorithm.judge)
