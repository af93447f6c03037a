"""verl's replay buffers with an order: what a step gets, when, and what is an error."""

import math

import numpy as np
import pytest
import torch
from verl.trainer.ppo.v1 import replay_buffer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.rollout.buffers import OldestFirst, WholeRounds
from recipe.spin.rollout.scoring import FAULT
from recipe.spin.rollout.staleness import staleness


def queued(monkeypatch, buffer, partition: str):
    """The buffer over a TransferQueue that holds in one partition what `buffer.queue` says."""

    def clear(partition_id, keys):
        for key in keys:
            buffer.queue.pop(key, None)

    buffer.queue = {}
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda: {partition: dict(buffer.queue)})
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", clear)
    return buffer


@pytest.fixture
def buffer(monkeypatch) -> WholeRounds:
    return queued(monkeypatch, WholeRounds("sync", None, None, "drop", None, poll_interval=0.0), "val")


@pytest.fixture
def asynchronous(monkeypatch) -> OldestFirst:
    """The buffer of asynchronous generation with a threshold of 3 steps."""
    return queued(monkeypatch, OldestFirst("colocate_async", None, 3, "drop", None, poll_interval=0.0), "train")


def prompt(status: str, step: int = 1) -> dict:
    return {"is_prompt": True, "status": status, "global_steps": step}


# ---- whole rounds ----------------------------------------------------------------------------------------------------


def test_answers_are_handed_out_in_the_order_of_their_prompts(buffer):
    uids = [f"uid{number}" for number in np.random.default_rng(0).permutation(20)]
    buffer.queue = {uid: prompt("finished") for uid in uids}
    for uid in sorted(uids):
        buffer.queue |= {f"{uid}_{session}_0": {"status": "success"} for session in (1, 0)}
    batch, _ = buffer.sample(global_steps=1, partition_id="val", batch_size=20)
    assert batch.keys == [f"{uid}_{session}_0" for uid in uids for session in (0, 1)]


def test_nothing_is_looked_at_while_a_prompt_is_being_answered(buffer):
    buffer.queue = {"a": prompt("finished"), "a_0_0": {"status": "success"}, "b": prompt("running")}

    def settle(seconds):
        buffer.queue["b"] = prompt("finished")
        buffer.queue["b_0_0"] = {"status": "success"}
        return True

    buffer.settle = settle
    batch, _ = buffer.sample(global_steps=1, partition_id="val", batch_size=1)
    assert batch.keys == ["a_0_0"] and buffer.finished_keys["val"] == {"a", "b"}


def test_a_prompt_that_nothing_works_on_is_an_error(buffer):
    buffer.queue = {"a": prompt("pending")}
    buffer.settle = lambda seconds: True
    with pytest.raises(RuntimeError, match="1 prompts were never answered"):
        buffer.sample(global_steps=1, partition_id="val", batch_size=1)


def test_held_out_prompts_that_all_failed_are_an_error_that_says_so(buffer):
    """Words by which run/failure.py looks for the cause."""
    buffer.queue = {"a": prompt("failure"), "b": prompt("failure")}
    with pytest.raises(RuntimeError, match="all held-out answers failed, of 2 prompts"):
        buffer.sample(global_steps=1, partition_id="val", batch_size=2)


# ---- dynamic sampling, where responses have no score -----------------------------------------------------------------
def give(buffer, uid: str, *rewards: float) -> None:
    """Answers a prompt; NaN is what a response has whose reward failed (algorithm.reward_error=skip)."""
    buffer.queue[uid] = prompt("finished")
    for number, reward in enumerate(rewards):
        buffer.queue[f"{uid}_{number}_0"] = {"status": "success"}
        failed = {FAULT: "the reward raised KeyError: 'answer'", "reward_extra_info": {}}
        info = {"reward_extra_info": {"acc": reward}}
        buffer.given[f"{uid}_{number}_0"] = (reward, failed if math.isnan(reward) else info)


@pytest.fixture(params=[(WholeRounds, "reward"), (WholeRounds, "acc"), (OldestFirst, "reward")])
def filtering(request, monkeypatch) -> ReplayBuffer:
    """A buffer that replaces prompts whose responses tie by others, which `refill` answers."""
    kind, metric = request.param
    mode = "sync" if kind is WholeRounds else "colocate_async"
    options = {"filter_groups_metric": metric, "train_batch_size": 2, "gen_batch_size": 1}
    buffer = kind(mode, None, None, "drop", None, poll_interval=0.0, refill_fn=lambda n: buffer.refill(n), **options)
    buffer.settle, buffer.count_answering, buffer.rewards_may_fail = lambda seconds: True, lambda: 1, True
    buffer.given, buffer.asked = {}, 0
    wait = buffer._wait_for_next_poll

    def answer_and_wait(*args):
        for uid, rewards in buffer.running.items():
            give(buffer, uid, *rewards)
        buffer.running.clear()
        return wait(*args)

    buffer.running, buffer._wait_for_next_poll = {}, answer_and_wait

    def get(keys, partition_id, select_fields):
        found = {
            "rm_scores": [torch.tensor([0.0, buffer.given[key][0]]) for key in keys],
            "extra_fields": [buffer.given[key][1] for key in keys],
        }
        return {name: found[name] for name in select_fields}

    monkeypatch.setattr(replay_buffer.tq, "kv_batch_get", get)
    return queued(monkeypatch, buffer, "train")


def refill(buffer, *rewards: float) -> None:
    """Other prompts, which are being answered until the buffer looks again."""

    def ask(count: int) -> None:
        for _ in range(count):
            uid = f"new{buffer.asked}"
            buffer.queue[uid] = prompt("running")
            buffer.running[uid] = rewards
            buffer.asked += 1

    buffer.refill = ask


def test_a_prompt_ties_if_those_of_its_responses_that_have_a_score_do(filtering):
    refill(filtering, 0.0, 1.0)
    for uid, rewards in {
        "one": (math.nan, 1.0, math.nan),
        "none": (math.nan, math.nan, math.nan),
        "same": (1.0, math.nan, 1.0),
        "apart": (math.nan, 0.0, 1.0),
    }.items():
        give(filtering, uid, *rewards)
    batch, metrics = filtering.sample(global_steps=1, partition_id="train", batch_size=2)
    assert {key.split("_")[0] for key in batch.keys} == {"apart", "new0"}
    assert metrics["training/filter_groups/evicted_samples"] == 3
    assert metrics["training/filter_groups/responses_without_score"] == 7
    for uid in ("b", "c"):
        give(filtering, uid, 0.0, 1.0)
    _, metrics = filtering.sample(global_steps=2, partition_id="train", batch_size=2)
    assert "training/filter_groups/responses_without_score" not in metrics


@pytest.mark.parametrize("reads", [1, 2])
def test_rewards_are_read_by_verl_alone_where_none_may_fail(filtering, monkeypatch, reads):
    filtering.rewards_may_fail, read, get = reads == 2, [], replay_buffer.tq.kv_batch_get
    monkeypatch.setattr(replay_buffer.tq, "kv_batch_get", lambda **options: read.append(options) or get(**options))
    for uid in ("a", "b"):
        give(filtering, uid, 0.0, 1.0)
    filtering.sample(global_steps=1, partition_id="train", batch_size=2)
    assert len(read) == reads


def test_a_reward_that_fails_for_all_is_not_asked_without_end(filtering):
    refill(filtering, math.nan, math.nan)
    for uid in ("a", "b"):
        give(filtering, uid, math.nan, math.nan)
    with pytest.raises(RewardError, match="no response to 2 prompts has a score.*raised KeyError: 'answer'"):
        filtering.sample(global_steps=1, partition_id="train", batch_size=2)


def test_a_metric_that_the_reward_does_not_give_is_verls_to_name(filtering):
    filtering.filter_groups_metric = "brevity"
    give(filtering, "a", 1.0, math.nan)
    with pytest.raises(RuntimeError, match="missing DAPO metric 'brevity'"):
        filtering.sample(global_steps=1, partition_id="train", batch_size=1)


# ---- asynchronous generation -----------------------------------------------------------------------------------------
def finish(buffer: OldestFirst, uid: str, version: int = 0, status: str = "finished") -> None:
    buffer.queue[uid]["status"] = status
    buffer.queue[f"{uid}_0_0"] = {"status": "success", "min_global_steps": version, "max_global_steps": version}


def test_finished_prompts_are_handed_out_while_others_are_answered_the_oldest_first(asynchronous):
    asynchronous.queue = {"a": prompt("running"), "b": prompt("running"), "c": prompt("running", 2)}
    finish(asynchronous, "c")
    finish(asynchronous, "a")
    batch, _ = asynchronous.sample(global_steps=2, partition_id="train", batch_size=1)
    assert batch.keys == ["a_0_0"]
    batch, _ = asynchronous.sample(global_steps=2, partition_id="train", batch_size=1)
    assert batch.keys == ["c_0_0"] and asynchronous.queue["b"]["status"] == "running"


def test_a_failed_prompt_ends_the_run(asynchronous):
    """verl would ask for another in its place, and so on."""
    asynchronous.queue = {"a": prompt("running"), "b": prompt("running")}
    finish(asynchronous, "b")
    finish(asynchronous, "a", status="failure")
    with pytest.raises(RuntimeError, match="step 1: generating or scoring failed for 1 prompts"):
        asynchronous.sample(global_steps=1, partition_id="train", batch_size=1)


def test_a_lost_prompt_is_an_error_in_asynchronous_generation_too(asynchronous):
    asynchronous.queue = {"a": prompt("pending")}
    asynchronous.count_answering = lambda: 0
    with pytest.raises(RuntimeError, match="1 prompts were never answered"):
        asynchronous.sample(global_steps=1, partition_id="train", batch_size=1)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_no_response_that_is_trained_on_is_staler_than_the_bound(asynchronous, every):
    """Prompts are answered in any number of steps, under weights that are pushed every so many."""
    chance = np.random.default_rng(every)
    step = version = made = 0
    worst, dropped = 0, 0

    def ask(count: int) -> None:
        nonlocal made
        for _ in range(count):
            asynchronous.queue[f"{made:08d}"] = prompt("running", step) | {"version": version}
            made += 1

    def answer(share: float) -> None:
        for uid, tag in list(asynchronous.queue.items()):
            if tag.get("status") == "running" and chance.random() < share:
                finish(asynchronous, uid, tag["version"])

    asynchronous.refill_fn = ask
    asynchronous._wait_for_next_poll = lambda partition_id, last: answer(0.5)
    for step in range(1, 200):
        ask(8 if step == 1 else 4)
        answer(0.3)
        batch, metrics = asynchronous.sample(global_steps=step, partition_id="train", batch_size=4)
        worst = max(worst, *staleness(batch.tags, step))
        dropped += metrics.get("training/off_policy/evicted_samples", 0)
        for key in batch.keys:
            del asynchronous.queue[key]
        version = step if step % every == 0 else version
    assert worst == 3 + every - 2 and dropped > 0
