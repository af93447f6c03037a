"""What SpinTrainer decides by itself; its steps are run end to end in test_end_to_end."""

import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from worker_harness import nest

from recipe.spin.rollout.agent_loop import GREEDY, SAMPLING_SEED
from recipe.spin.rollout.held_out import HeldOutRows
from recipe.spin.rollout.scoring import FAULT, RewardError
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


@pytest.mark.parametrize(("buffer", "seconds"), [(ReplayBuffer, 0.05), (type("Sampler", (ReplayBuffer,), {}), 0.25)])
def test_a_buffer_that_asks_all_the_time_does_so_four_times_a_second(trainer, monkeypatch, buffer, seconds):
    """The recipe's own waits for the answers and asks once; thousands of keys make a question long."""
    built = buffer.__new__(buffer)
    monkeypatch.setattr(PPOTrainerSync, "_build_replay_buffer", lambda self: built)
    assert trainer._build_replay_buffer().poll_interval == seconds


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


# ---------------------------------------------------------------------- rewards that fail, steps that are skipped
NAN = float("nan")


def test_metrics_of_scores_leave_out_responses_without_one(trainer):
    rewards = torch.tensor([[0.0, 1.0], [0.0, NAN], [3.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    extra = [{"reward_extra_info": {"acc": 1.0}}, {FAULT: "broken"}, {"reward_extra_info": {"acc": 0.0}}]
    metrics = trainer._response_metrics(rewards, mask, torch.ones(3), TensorDict({}, batch_size=3), extra)
    assert metrics["score/mean"] == 2.0 and metrics["score/std"] == 1.0 and metrics["score/accuracy"] == 0.5
    assert metrics["response_length/mean"] == pytest.approx(5 / 3)
    assert trainer._count_missing(rewards, extra) == 1


def test_a_reward_that_gives_no_score_at_all_stops_the_run(trainer):
    with pytest.raises(RewardError, match="step 7: no response has a score. The first: broken"):
        trainer._count_missing(torch.tensor([[NAN], [NAN]]), [{FAULT: "broken"}, {FAULT: "too"}])


def test_held_out_prompts_without_a_score_are_left_out_and_counted(trainer):
    trainer._held_out = types.SimpleNamespace(greedy=[False, True, False, True])
    expected = {("sums", "a"): 2, ("sums", "a+"): 1, ("sums", "b"): 2, ("sums", "b+"): 1}
    infos = {"reward": [1.0, NAN, 1.0, 0.0, 1.0, NAN], "acc": [1, None, 1, 0, 1, None]}
    uids = ["a", "a", "a+", "b", "b", "b+"]
    metrics = trainer._val_metrics_update(["sums"] * 6, uids, infos, [2] * 6, expected_acc_counts=expected)
    assert metrics["val-core/sums/acc/mean@2"] == 0.5 and metrics["val-greedy-core/sums/acc/mean@1"] == 1
    assert metrics["val-aux/prompts_without_score"] == 2


def test_skipped_steps_in_a_row_stop_the_run(trainer):
    trainer.config = OmegaConf.create({"trainer": {"max_skipped_steps": 3}})
    trainer._skipped_in_a_row = 0
    for skipped in ([True, True, False], [False, True], [True, False], [True, True]):
        trainer._check_skipped(skipped)
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 optimizer steps in a row .*max_skipped_steps=3"):
        trainer._check_skipped([True])
