"""The outbox: what a worker's tasks put into TransferQueue goes there together, and each hears of its own."""

import asyncio
import types

import pytest
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.v1 import agent_loop_tq

from recipe.spin import verl_patches
from recipe.spin.rollout import queue
from recipe.spin.rollout.agent_loop import VerlWorker


class Store:
    """A TransferQueue that takes time for a write, refuses some keys, and keeps the fields and tags of the others."""

    def __init__(self, refuses: str = ""):
        self.writes: list[list[str]] = []
        self.rows: dict[tuple[str, str], dict] = {}
        self.tags: dict[tuple[str, str], dict] = {}
        self._refuses = refuses

    async def async_kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        await asyncio.sleep(0.01)
        self.writes.append(keys)
        if self._refuses in keys:
            raise ConnectionError(f"no room for {self._refuses}")
        self.tags.update(zip(((partition_id, key) for key in keys), tags, strict=True))
        for number, key in enumerate(keys if fields is not None else ()):
            self.rows[partition_id, key] = {name: fields[number][name] for name in fields.keys()}  # noqa: SIM118


@pytest.fixture
def store(monkeypatch, request) -> Store:
    store = Store(getattr(request, "param", ""))
    monkeypatch.setattr(queue, "tq", store)
    return store


def run(*puts) -> list:
    """What each of these returns or raises, begun at once."""

    async def all_of_them():
        return await asyncio.gather(*puts, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(all_of_them(), 5))


def test_what_comes_while_a_write_is_under_way_goes_together(store):
    outbox = queue.Outbox()

    async def later(number: int) -> None:
        await asyncio.sleep(0.002)
        await outbox.put(f"k{number}", "train", {"status": "running"})

    assert run(outbox.put("first", "train", {"status": "running"}), *map(later, range(20))) == [None] * 21
    assert store.writes == [["first"], [f"k{number}" for number in range(20)]]
    assert store.tags["train", "k7"] == {"status": "running"}


def test_an_outbox_that_was_empty_writes_again(store):
    outbox = queue.Outbox()

    async def one_after_the_other():
        for number in range(3):
            await outbox.put(str(number), "train", {})

    assert run(one_after_the_other()) == [None]
    assert store.writes == [["0"], ["1"], ["2"]]


def test_partitions_and_fields_that_no_write_can_hold_together_go_apart_and_whole(store):
    outbox = queue.Outbox()
    rows = {
        "short": {"ids": torch.tensor([1]), "text": "a"},
        "long": {"ids": torch.tensor([2, 3, 4]), "text": "b"},
        "none": {"ids": torch.tensor([], dtype=torch.long), "text": "c"},
        "floats": {"ids": torch.tensor([0.5]), "text": "d"},
        "wide": {"ids": torch.ones(2, 3), "text": "e"},
        "wider": {"ids": torch.ones(2, 4), "text": "f"},
        "more": {"ids": torch.tensor([5]), "text": "g", "extra": {"x": 1}},
    }
    puts = [outbox.batch_put(keys=[key], fields=[row], tags=[{}], partition_id="train") for key, row in rows.items()]
    held_out = outbox.batch_put(keys=["short"], fields=[rows["short"]], tags=[{}], partition_id="val")
    assert run(*puts, held_out) == [None] * 8
    assert ["short", "long", "none"] in store.writes and len(store.writes) == 6
    assert store.rows.keys() == {*(("train", key) for key in rows), ("val", "short")}
    for key, row in rows.items():
        found = store.rows["train", key]
        assert found["ids"].dtype == row["ids"].dtype and torch.equal(found["ids"], row["ids"])
        assert {name: found[name] for name in row if name != "ids"} == {k: v for k, v in row.items() if k != "ids"}


@pytest.mark.parametrize("store", ["b"], indirect=True)
def test_a_row_that_cannot_be_written_fails_alone(store):
    """Nor does who put it hear of it before the rest of what it put is written, which it may clear then."""
    outbox = queue.Outbox()
    fields = [{"n": 1}, {"n": 2}, {"other": 3}]
    several = outbox.batch_put(keys=["a", "b", "late"], fields=fields, tags=[{}, {}, {}], partition_id="train")
    one = outbox.batch_put(keys=["d"], fields=[{"n": 4}], tags=[{}], partition_id="train")
    fault, none, nothing = run(several, one, outbox.put("c", "train", {}))
    assert isinstance(fault, ConnectionError) and str(fault) == "no room for b" and none is nothing is None
    assert {key for _, key in store.tags} == {"a", "c", "d", "late"}


def test_a_write_that_is_given_up_keeps_nobody_waiting(store, monkeypatch):
    async def given_up(**options):
        raise asyncio.CancelledError

    monkeypatch.setattr(store, "async_kv_batch_put", given_up)
    outbox = queue.Outbox()
    assert all(isinstance(one, asyncio.CancelledError) for one in run(*(outbox.put(k, "train", {}) for k in "ab")))
    monkeypatch.undo()
    monkeypatch.setattr(queue, "tq", store)
    assert run(outbox.put("c", "train", {})) == [None] and store.writes == [["c"]]


def test_a_task_that_is_given_up_leaves_the_others_theirs(store):
    outbox = queue.Outbox()

    async def given_up():
        await asyncio.wait_for(outbox.put("a", "train", {}), 0.005)

    first, second = run(given_up(), outbox.put("b", "train", {}))
    assert isinstance(first, asyncio.TimeoutError) and second is None
    assert run(outbox.put("c", "train", {})) == [None]


def test_verls_worker_writes_its_responses_through_it(store, monkeypatch):
    monkeypatch.setattr(agent_loop_tq, "tq", types.SimpleNamespace(init=None))
    monkeypatch.setattr(agent_loop_tq, "list_of_dict_to_tensordict", None)
    verl_patches.write_together(queue.Outbox())

    async def nothing(*args, **kwargs) -> None:
        pass

    worker = VerlWorker.__new__(VerlWorker)
    worker._compute_score = worker._compute_teacher_logprobs = nothing
    worker._compute_multi_modal_inputs = lambda output, ids: {}
    worker._compute_position_ids = lambda ids, mask, inputs: torch.arange(ids.shape[1])[None]

    def hand_on(number: int):
        response = [7] * (number + 1)
        output = AgentLoopOutput(
            prompt_ids=[1, 2], response_ids=response, response_mask=[1] * len(response), metrics=AgentLoopMetrics()
        )
        output.reward_score, output.extra_fields = float(number), {"reward_extra_info": {}}
        return worker._agent_loop_postprocess(output, False, uid="p", session_id=number, global_steps=3)

    assert run(*map(hand_on, range(4))) == [None] * 4
    assert store.writes == [[f"p_{number}_0" for number in range(4)]]
    assert [store.tags["train", f"p_{number}_0"]["seq_len"] for number in range(4)] == [3, 4, 5, 6]
    assert store.rows["train", "p_2_0"]["input_ids"].tolist() == [1, 2, 7, 7, 7]
    assert store.rows["train", "p_2_0"]["rm_scores"].tolist() == [0, 0, 2]
