"""What judges make of responses, asked through a real server, or through the policy's own."""

import json

import pytest
import torch
from judges import JSON, Rubbish, judge_of, number, scores
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import AutoTokenizer
from worker_harness import compose

from benchmarks.rule_judge import RuleJudge, is_sum
from recipe.spin.preferences.judge import JudgeFailed, JudgeSource
from recipe.spin.preferences.judge_settings import read_verdict


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the config's run folder lies."""
    monkeypatch.chdir(tmp_path)


def length(request: str, response: str) -> float:
    return len(response)


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
    assert values == [0, -1, 3, -1, -1] and len(server.questions) == 2 * 4


def test_a_tournaments_pair_is_none_that_a_judge_called_a_tie():
    """0 and 1 tie, 2 beats 3, and the final ties: the pair is 2 and 3, which met, and not 2 and 0."""
    with RuleJudge(lambda request, response: {"a": 2, "b": 2, "c": 2, "d": 1}[response]) as server:
        values, _ = scores(judge_of(server, comparisons="tournament"), ["a", "b", "c", "d"])
    assert values == [0, 0, 1, -1]


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


@pytest.mark.parametrize(("comparisons", "worth"), [("all_pairs", 0.5), ("tournament", 0.0)])
def test_a_judge_that_always_says_first_gives_no_pair(comparisons, worth):
    with Biased(number) as server:
        source = judge_of(server, comparisons=comparisons)
        values, metrics = scores(source)
    assert values == [worth] * 4 and metrics["judge/tie_rate"] == 1 and metrics["judge/first_rate"] == 1
    source.config.actor_rollout_ref.rollout.n = 4
    rewards, mask = torch.tensor(values)[:, None], torch.ones(4, 1)
    assert len(source.pair(TensorDict({}, [4]), rewards, mask, step=1).pairs.chosen) == 0


def test_several_judges_decide_by_majority():
    with RuleJudge(number) as good, RuleJudge(number) as too, RuleJudge(lambda *asked: -number(*asked)) as bad:
        assert scores(judge_of(good, bad, too), ["1", "2"])[0] == [0, 1]
        assert scores(judge_of(good, bad), ["1", "2"])[0] == [0.5, 0.5]


def test_unreadable_answers_count_as_ties_up_to_a_share(caplog):
    with RuleJudge(number, unreadable=1.0) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0))
        assert values == [0.5] * 4 and metrics["judge/unreadable_rate"] == 1
        assert "I would rather not say." in caplog.text
        words = rf"^judge {server.address}: 21 of its latest 21 .*\(21 without .*max_unreadable=0.2 .*rather not say"
        with pytest.raises(JudgeFailed, match=words):
            scores(judge_of(server), list("12345678"))
        assert f"judge {server.address}: an answer holds none" in caplog.text


def test_an_answer_that_was_cut_off_is_unreadable_whatever_it_holds():
    body = {"choices": [{"message": {"content": "End with [[A]], or [[C]] if"}, "finish_reason": "length"}]}
    with Rubbish(JSON, json.dumps(body)) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0), ["1", "2"])
        assert values == [0.5, 0.5] and metrics["judge/unreadable_rate"] == 1
        with pytest.raises(JudgeFailed, match=r"21 of its latest 21 .*\(0 without .* 21 cut off by"):
            scores(judge_of(server), list("12345678"))


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("[[A]]", "A"), ("not [[A]] but [[B]].", "B"), ("[[C]]\n", "C"), ("[A]", None), ("", None), ("[[D]]", None)],
)
def test_the_last_verdict_of_an_answer_counts(answer, verdict):
    assert read_verdict(answer) == verdict


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


def test_the_rule_of_the_benchmark_knows_sums():
    request = "user: What is 3 + 4? Answer with the number only."
    assert [is_sum(request, text) for text in ("7", "3 + 4 = 7.", "07", "8", "", "seven")] == [1, 1, 1, 0, 0, 0]
    assert OmegaConf.is_config(compose(device="cpu").algorithm.judge)
