"""Self-rewarding: the policy's vLLM server judges its own answers, with the policy's weights or the reference's."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import pytest
from judging_model import QUESTION, JudgingModel, question, train
from whole_runs import metrics, succeed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judging(tiny_llama, one_thread) -> JudgingModel:
    return train(tiny_llama)


@pytest.fixture(scope="module")
def folder(judging, tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judging_model")
    judging.model.save_pretrained(folder)
    judging.tokenizer.save_pretrained(folder)
    return folder


def shares_won(judging: JudgingModel, request: str, responses: list[str]) -> list[float]:
    """What transformers makes of the comparisons with the weights that the run began with."""
    points = [0.0] * len(responses)
    for a, b in itertools.combinations(range(len(responses)), 2):
        there, back = (
            judging.answer(question(f"user: {request}", responses[one], responses[other]))
            for one, other in ((a, b), (b, a))
        )
        won = {("[[A]]", "[[B]]"): 1.0, ("[[B]]", "[[A]]"): 0.0}.get((there, back), 0.5)
        points[a] += won
        points[b] += 1 - won
    return [each / (len(responses) - 1) for each in points]


def groups_of(file: Path) -> dict[str, list[tuple[str, float]]]:
    """Responses with their scores, by the prompt that they answer."""
    found = defaultdict(list)
    for one in map(json.loads, file.read_text().splitlines()):
        found[one["input"].split("user\n")[1].split("\n")[0]].append((one["output"], one["score"]))
    return found


@pytest.mark.parametrize(("judge", "steps"), [("policy", 1), pytest.param("reference", 2, marks=pytest.mark.long)])
def test_a_model_that_can_judge_makes_its_own_pairs(judge, steps, judging, folder, task, tmp_path):
    """The reference judges as the model did that the run began with, the policy before its first update."""
    run = tmp_path / "run"
    (tmp_path / "question.txt").write_text(QUESTION.template)
    succeed(
        task,
        folder,
        run,
        "algorithm.preference_source=judge",
        f"algorithm.judge.servers=[{judge}]",
        f"algorithm.judge.prompt={tmp_path}/question.txt",
        "algorithm.judge.max_tokens=8",
        "reward.custom_reward_function.path=null",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.max_model_len=512",
        "actor_rollout_ref.rollout.max_num_batched_tokens=4096",
        f"trainer.rollout_data_dir={tmp_path}/answers",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.ref_update_freq=0",
        f"trainer.total_training_steps={steps}",
    )
    history = metrics(run)
    for step in range(1, steps + 1):
        assert history[step]["judge/asked"] > 10 and history[step]["judge/unreadable_rate"] == 0
        groups = groups_of(tmp_path / "answers" / f"{step}.jsonl")
        assert len(groups) == 4
        for request, group in groups.items():
            responses, scores = zip(*group, strict=True)
            assert scores == pytest.approx(shares_won(judging, request, responses), abs=1e-6)
    assert history[1]["pairs/used"] >= 3 and history[1]["pairs/score_margin"] >= 0.5
