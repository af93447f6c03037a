"""What SpinTrainer decides by itself; its steps are run end to end in test_end_to_end."""

import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from worker_harness import nest

from recipe.spin.rollout.agent_loop import GREEDY, SAMPLING_SEED
from recipe.spin.rollout.held_out import HeldOutRows
from recipe.spin.spin_trainer import SpinTrainer, _named_rewards


@pytest.fixture
def trainer() -> SpinTrainer:
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.global_steps = 7
    return trainer


def test_a_response_has_ended_if_its_last_token_says_so(trainer):
    trainer.__dict__["_end_tokens"] = {2, 5}
    rows = [[1, 2], [2, 1], [5], []]
    responses = TensorDict({"responses": nest([torch.tensor(row).long() for row in rows])}, batch_size=4)
    assert trainer._ended(responses).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("enable", "limit", "fetched", "stops"),
    [(True, 3, 12, True), (True, 3, 11, False), (True, 0, 1000, False), (False, 3, 1000, False)],
)
def test_dynamic_sampling_has_a_limit(trainer, enable, limit, fetched, stops):
    groups = {"enable": enable, "max_num_gen_batches": limit}
    trainer.config = OmegaConf.create({"algorithm": {"filter_groups": groups}, "data": {"train_batch_size": 4}})
    if not stops:
        trainer._check_filtering(fetched)
        return
    with pytest.raises(RuntimeError, match=r"(?s)step 7: 12 prompts .*max_num_gen_batches=3"):
        trainer._check_filtering(fetched)


def test_rewards_are_in_the_metrics_by_their_names():
    info = [{"score": 1.0, "acc": 1.0, "brief": -2, "right": True, "why": "a"}, {"score": 0.0, "brief": -4, "why": ""}]
    assert _named_rewards(info) == {"reward/brief": -3.0}
    assert _named_rewards([{}, {}]) == {}


def held_out(trainer, temperature: float):
    """The rows that a validation of two batches hands out."""
    batches = [{"raw_prompt": np.array(["p0", "p1"], dtype=object), "index": torch.tensor([0, 1])}]
    batches.append({"raw_prompt": np.array(["p2"], dtype=object), "index": torch.tensor([2])})
    rows = HeldOutRows(batches, OmegaConf.create({"temperature": temperature, "n": 3}))
    return rows, list(rows)


def test_each_held_out_prompt_is_sampled_and_answered_greedily_in_one_pass(trainer):
    rows, batches = held_out(trainer, temperature=1.0)
    assert batches[0]["raw_prompt"].tolist() == ["p0", "p0", "p1", "p1"]
    assert batches[0]["index"].tolist() == [0, 0, 1, 1]
    assert batches[0][GREEDY].tolist() == [False, True, False, True]
    assert batches[0]["__rollout_n__"].tolist() == [3, 1, 3, 1]
    assert [batch[SAMPLING_SEED].tolist()[::2] for batch in batches] == [["held-out-0", "held-out-1"], ["held-out-2"]]
    assert rows.greedy == [False, True] * 3


def test_held_out_prompts_are_answered_once_where_all_answers_are_greedy(trainer):
    rows, batches = held_out(trainer, temperature=0.0)
    assert batches[0]["raw_prompt"].tolist() == ["p0", "p1"] and rows.greedy == [False] * 3
    assert batches[0]["__rollout_n__"].tolist() == [3, 3]


RIGHT = [1, 0, 0, 1, 0, 1, 1, 0]


def validate(trainer, infos: dict[str, list], answers: int = 8, max_failed: float = 0.0) -> dict[str, float]:
    """Metrics of three samples and a greedy answer for each of two prompts, in the order in which they came."""
    trainer.config = OmegaConf.create({"trainer": {"max_failed_validation": max_failed}})
    trainer._held_out = types.SimpleNamespace(greedy=[False, True, False, True])
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


def test_a_reward_that_is_a_number_is_no_accuracy(trainer):
    """verl calls it `acc` as well, and beside it there is no `score`."""
    metrics = validate(trainer, {"reward": [0.5 * value for value in RIGHT], "acc": [0.5 * value for value in RIGHT]})
    assert metrics["val-core/sums/reward/mean@3"] == pytest.approx(1 / 6)
    assert metrics["val-greedy-core/sums/reward/mean@1"] == 0.5
    assert not [name for name in metrics if "/acc/" in name]
    response = torch.ones(1, 2)
    for info, expected in (({"acc": 0.5}, None), ({"acc": 1.0, "score": 0.5}, 1.0)):
        extra = [{"reward_extra_info": info}]
        assert trainer._response_metrics(response, response, response, {}, extra).get("score/accuracy") == expected


def test_held_out_answers_that_failed_stop_the_run_above_a_share(trainer):
    infos = {"reward": RIGHT, "score": RIGHT, "acc": RIGHT}
    with pytest.raises(RuntimeError, match=r"step 7: 2 of 8 held-out answers failed.*max_failed_validation=0\.0"):
        validate(trainer, infos, answers=6)
    with pytest.raises(RuntimeError, match="max_failed_validation=0.2"):
        validate(trainer, infos, answers=6, max_failed=0.2)
    assert validate(trainer, infos, answers=6, max_failed=0.25)["val-failed/answers"] == 0.25
