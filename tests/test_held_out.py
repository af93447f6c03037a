"""How held-out prompts are answered, and what their metrics are."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from recipe.spin import run_folder
from recipe.spin.preferences.source import PreferenceSource, source_class
from recipe.spin.rollout import answers
from recipe.spin.rollout.agent_loop import FIRST_ANSWER, GREEDY, SAMPLING_SEED
from recipe.spin.rollout.held_out import HeldOutRows, HeldOutValidation
from recipe.spin.rollout.validation_metrics import held_out_measure
from recipe.spin.spin_trainer import SpinTrainer


@pytest.fixture
def trainer() -> SpinTrainer:
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.global_steps = 7
    return trainer


# ---- rows ------------------------------------------------------------------------------------------------------------
def held_out(compares: bool = False, first: list | None = None, **val_kwargs):
    """The rows that a validation of two batches hands out."""
    batches = [{"raw_prompt": np.array(["p0", "p1"], dtype=object), "index": torch.tensor([0, 1])}]
    batches.append({"raw_prompt": np.array(["p2"], dtype=object), "index": torch.tensor([2])})
    val_kwargs = OmegaConf.create({"temperature": 1.0, "do_sample": True, "n": 3} | val_kwargs)
    rows = HeldOutRows(batches, val_kwargs, compares, first)
    return rows, list(rows)


def test_each_held_out_prompt_is_sampled_and_answered_greedily_in_one_pass():
    rows, batches = held_out()
    assert batches[0]["raw_prompt"].tolist() == ["p0", "p0", "p1", "p1"]
    assert batches[0]["index"].tolist() == [0, 0, 1, 1]
    assert batches[0][GREEDY].tolist() == [False, True, False, True]
    assert batches[0]["__rollout_n__"].tolist() == [3, 1, 3, 1]
    assert [batch[SAMPLING_SEED].tolist()[::2] for batch in batches] == [["held-out-0", "held-out-1"], ["held-out-2"]]
    assert rows.greedy == [False, True] * 3


@pytest.mark.parametrize("val_kwargs", [{"temperature": 0.0}, {"do_sample": False}])
def test_held_out_prompts_get_one_greedy_answer_where_no_samples_are_asked_for(val_kwargs):
    rows, batches = held_out(**val_kwargs)
    assert batches[0]["raw_prompt"].tolist() == ["p0", "p1"] and rows.greedy == [True] * 3
    assert batches[0][GREEDY].tolist() == [True, True] and batches[0]["__rollout_n__"].tolist() == [1, 1]


def test_answers_that_are_compared_are_greedy_and_stand_beside_those_of_the_first_validation():
    rows, batches = held_out(compares=True)
    assert rows.greedy == [True] * 3 and FIRST_ANSWER not in batches[0]
    rows, batches = held_out(compares=True, first=[(["p", "1"], "one"), (["p", "2"], "two")])
    assert rows.prompts == [["p", "0"], ["p", "1"], ["p", "2"]]
    assert [batch[FIRST_ANSWER].tolist() for batch in batches] == [[None, "one"], ["two"]]


# ---- metrics ---------------------------------------------------------------------------------------------------------
RIGHT = [1, 0, 0, 1, 0, 1, 1, 0]


def validate(trainer, infos: dict[str, list], answers: int = 8, max_failed: float = 0.0) -> dict[str, float]:
    """Metrics of three samples and a greedy answer for each of two prompts, in the order in which they came."""
    trainer.config = OmegaConf.create({"trainer": {"max_failed_validation": max_failed}})
    trainer._held_out = types.SimpleNamespace(greedy=[False, True, False, True], compares=False)
    expected = {("sums", "a"): 3, ("sums", "a+"): 1, ("sums", "b"): 3, ("sums", "b+"): 1}
    uids = ["b", "b", "a", "b+", "a", "a+", "a", "b"]
    infos = {name: values[:answers] for name, values in infos.items()}
    sources, turns = ["sums"] * answers, [2] * answers
    return trainer._val_metrics_update(sources, uids[:answers], infos, turns, expected_acc_counts=expected)


def test_greedy_answers_have_metrics_of_their_own(trainer):
    infos = {"reward": [2.0 * value for value in RIGHT], "score": RIGHT, "acc": RIGHT}
    metrics = validate(trainer, infos)
    assert metrics["val-core/sums/acc/mean@3"] == pytest.approx(2 / 6)
    assert metrics["val-greedy-core/sums/acc/mean@1"] == 1
    assert metrics["val-aux/num_turns/mean"] == metrics["val-greedy-aux/num_turns/mean"] == 2
    assert metrics["val-failed/answers"] == 0


def test_what_is_no_number_beside_a_score_is_left_out(trainer):
    """As in training; a word may be what verl votes by, and what is missing for some counts for the others."""
    infos = {"reward": RIGHT, "score": RIGHT, "acc": RIGHT, "details": [{"a": 1}] * 8, "pred": list("abcdefgh")}
    metrics = validate(trainer, infos | {"mixed": [1, "a"] * 4, "some": [1.0, None] * 4})
    assert metrics["val-core/sums/acc/mean@3"] == pytest.approx(2 / 6)
    assert not [name for name in metrics if "/details/" in name or "/mixed/" in name]
    assert [name for name in metrics if "/some/" in name]


def test_a_reward_that_is_a_number_is_no_accuracy(trainer):
    """verl calls it `acc` as well, and beside it there is no `score`."""
    metrics = validate(trainer, {"reward": [0.5 * value for value in RIGHT], "acc": [0.5 * value for value in RIGHT]})
    assert metrics["val-core/sums/reward/mean@3"] == pytest.approx(1 / 6)
    assert metrics["val-greedy-core/sums/reward/mean@1"] == 0.5
    assert not [name for name in metrics if "/acc/" in name]
    response = torch.ones(1, 2)
    for info, expected in (({"acc": 0.5}, None), ({"acc": 1.0, "score": 0.5}, 1.0)):
        extra = [{"reward_extra_info": info}]
        assert answers.response_metrics(response, response, response, {}, extra).get("score/accuracy") == expected


def test_held_out_answers_that_failed_stop_the_run_above_a_share(trainer):
    infos = {"reward": RIGHT, "score": RIGHT, "acc": RIGHT}
    with pytest.raises(RuntimeError, match=r"step 7: 2 of 8 held-out answers failed.*max_failed_validation=0\.0"):
        validate(trainer, infos, answers=6)
    with pytest.raises(RuntimeError, match="max_failed_validation=0.2"):
        validate(trainer, infos, answers=6, max_failed=0.2)
    assert validate(trainer, infos, answers=6, max_failed=0.25)["val-failed/answers"] == 0.25


def test_held_out_prompts_without_a_score_are_left_out_and_counted(trainer):
    trainer._held_out = types.SimpleNamespace(greedy=[False, True, False, True], compares=False)
    expected = {("sums", "a"): 2, ("sums", "a+"): 1, ("sums", "b"): 2, ("sums", "b+"): 1}
    trainer.config = OmegaConf.create({"trainer": {"max_failed_validation": 0.0}})
    right = [1, None, 1, 0, 1, None]
    infos = {"reward": [1.0, math.nan, 1.0, 0.0, 1.0, math.nan], "score": right, "acc": right}
    uids = ["a", "a", "a+", "b", "b", "b+"]
    metrics = trainer._val_metrics_update(["sums"] * 6, uids, infos, [2] * 6, expected_acc_counts=expected)
    assert metrics["val-core/sums/acc/mean@2"] == 0.5 and metrics["val-greedy-core/sums/acc/mean@1"] == 1
    assert metrics["val-aux/prompts_without_score"] == 2


# ---- compared with the first validation's answers --------------------------------------------------------------------
class Compares(PreferenceSource):
    compares_held_out = classmethod(lambda cls, config: True)

    def metrics(self, infos: list[dict]) -> dict[str, float]:
        return {"mine/asked": sum(info["asked"] for info in infos)}


class VerlsValidation(PPOTrainerSync):
    """Answers each held-out prompt but the last, in an order of its own."""

    def _validate(self) -> dict[str, float]:
        [batch] = self.val_dataloader
        self.columns.append(batch)
        texts = [f"{message['content']}: {self.says}" for [message] in batch["raw_prompt"]]
        self._maybe_log_val_generations(inputs=["", ""], outputs=[texts[1], texts[0]], scores=[1.0, 0.5])
        expected = {("chat", uid): 1 for uid in ("u0", "u1", "u2")}
        infos = {"reward": [1.0, 0.5], "preference": [[{"asked": 2}, {"asked": 1}] if self.global_steps else [], []]}
        return self._val_metrics_update(["chat"] * 2, ["u1", "u0"], infos, [2] * 2, expected_acc_counts=expected)

    def _maybe_log_val_generations(self, inputs, outputs, scores):
        self.logged = outputs


class Validates(HeldOutValidation, VerlsValidation):
    source = Compares(None, None)

    def __init__(self, folder: Path):
        val_kwargs = {"n": 3, "do_sample": True, "temperature": 1.0}
        trainer = {"default_local_dir": str(folder), "max_failed_validation": 0.5}
        self.config = OmegaConf.create(
            {"actor_rollout_ref": {"rollout": {"val_kwargs": val_kwargs}}, "trainer": trainer}
        )
        prompts = np.empty(3, dtype=object)
        prompts[:] = [[{"role": "user", "content": f"p{number}"}] for number in range(3)]
        self.val_dataloader = [{"raw_prompt": prompts}]
        self.progress, self.columns = {}, []

    def at(self, step: int, says: str) -> list | None:
        """Validates after a step; the first answers that the rows had beside them."""
        self.global_steps, self.says = step, says
        self.metrics = self._validate()
        beside = self.columns[-1].get(FIRST_ANSWER)
        return None if beside is None else beside.tolist()


def test_later_answers_meet_those_of_the_first_validation(tmp_path):
    trainer = Validates(tmp_path)
    assert trainer.at(0, "before\u2028") is None
    assert trainer.at(2, "after") == ["p0: before\u2028", "p1: before\u2028", None]
    assert Validates(tmp_path).at(4, "resumed") == ["p0: before\u2028", "p1: before\u2028", None]
    assert trainer.at(0, "a new start") is None and trainer.at(2, "after")[0] == "p0: a new start"
    assert trainer.logged == ["p1: after", "p0: after"]


def test_a_run_that_begins_without_a_validation_compares_with_its_first(tmp_path):
    trainer = Validates(tmp_path)
    assert trainer.at(4, "late") is None and trainer.at(6, "after") == ["p0: late", "p1: late", None]
    assert list(run_folder.answers_files(tmp_path)) == [4]


def test_other_held_out_prompts_begin_anew(tmp_path):
    trainer = Validates(tmp_path)
    trainer.at(2, "before")
    trainer.val_dataloader[0]["raw_prompt"][:] = [[{"role": "user", "content": f"q{number}"}] for number in range(3)]
    assert trainer.at(4, "other") == [None] * 3
    assert trainer.at(6, "later") == ["q0: other", "q1: other", None]


def test_what_the_source_says_of_held_out_answers_is_a_win_rate(tmp_path):
    trainer = Validates(tmp_path)
    trainer.at(0, "before")
    assert "val-mine/asked" not in trainer.metrics
    trainer.at(2, "after")
    assert trainer.metrics["val-mine/asked"] == 3
    assert trainer.metrics["val-greedy-core/chat/win_rate/mean@1"] == 0.75
    assert trainer.metrics["val-failed/answers"] == pytest.approx(1 / 3)
    assert not [name for name in trainer.metrics if name.startswith("val-core/") or "reward" in name]
    assert held_out_measure({0: trainer.metrics}) == "win rate"


@pytest.mark.parametrize(
    ("source", "path", "model", "compares"),
    [
        ("judge", None, False, True),
        ("judge", "reward.py", False, False),
        ("judge", None, True, False),
        ("reward", None, False, False),
        ("self_play", None, False, False),
    ],
)
def test_sources_that_score_compare_where_no_reward_is_named(source, path, model, compares):
    reward = {"custom_reward_function": {"path": path}, "reward_model": {"enable": model}}
    config = OmegaConf.create({"reward": reward, "algorithm": {"judge": {"servers": ["http://a/v1"]}}})
    assert source_class(source).compares_held_out(config) is compares
    config.algorithm.judge.servers = ["reference"]  # vLLM has the policy's weights in a validation
    assert not source_class(source).compares_held_out(config)
