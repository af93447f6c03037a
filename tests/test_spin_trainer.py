"""What SpinTrainer decides by itself; its steps are run end to end in test_end_to_end."""

import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from worker_harness import nest

from recipe.spin.dp_actor import DPOSettings
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


@pytest.mark.parametrize(("average", "per_token"), [(False, -0.5), (True, -6.0)])
def test_metrics_that_show_likelihood_and_length_going(trainer, average, per_token):
    """The log-prob a token, which the mean is already, and by how much the chosen responses are longer."""
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"actor": {"ppo_epochs": 1, "calculate_entropy": False}}})
    trainer._dpo_settings = lambda: DPOSettings(beta=0.1, average_log_prob=average)
    lengths = {"response_length/chosen": [12.0], "response_length/rejected": [9.0]}
    update = {"loss": [0.5], "logps/chosen": [-6.0], "kl/sequence": [2.1], **lengths}
    output = tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": update})
    trainer._actor_rollout_wg = types.SimpleNamespace(update_actor=lambda rows: output)
    metrics = {}
    trainer._update_actor(TensorDict({}, batch_size=1), metrics)
    assert metrics["logps/chosen_token"] == per_token and metrics["logps/chosen"] == -6.0
    assert metrics["response_length/gap"] == 3.0 and metrics["kl/token"] == pytest.approx(0.2)


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
