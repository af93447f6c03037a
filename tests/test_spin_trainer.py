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
from recipe.spin.spin_trainer import SpinTrainer


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


def held_out(**val_kwargs):
    """The rows that a validation of two batches hands out."""
    batches = [{"raw_prompt": np.array(["p0", "p1"], dtype=object), "index": torch.tensor([0, 1])}]
    batches.append({"raw_prompt": np.array(["p2"], dtype=object), "index": torch.tensor([2])})
    rows = HeldOutRows(batches, OmegaConf.create({"temperature": 1.0, "do_sample": True, "n": 3} | val_kwargs))
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


def test_greedy_answers_have_metrics_of_their_own(trainer):
    """Three samples and a greedy answer for each of two prompts, in the order in which they came."""
    trainer._held_out = types.SimpleNamespace(greedy=[False, True, False, True])
    expected = {("sums", "a"): 3, ("sums", "a+"): 1, ("sums", "b"): 3, ("sums", "b+"): 1}
    uids = ["b", "b", "a", "b+", "a", "a+", "a", "b"]
    right = [1, 0, 0, 1, 0, 1, 1, 0]
    infos = {"reward": [2.0 * value for value in right], "acc": right}
    metrics = trainer._val_metrics_update(["sums"] * 8, uids, infos, [2] * 8, expected_acc_counts=expected)
    assert metrics["val-core/sums/acc/mean@3"] == pytest.approx(2 / 6)
    assert metrics["val-greedy-core/sums/acc/mean@1"] == 1
    assert metrics["val-aux/num_turns/mean"] == metrics["val-greedy-aux/num_turns/mean"] == 2
