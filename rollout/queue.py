"""Every call of TransferQueue, in which verl keeps prompts and responses: it may be dropped (verl's RFC 6988)."""

import asyncio
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

TRAINING = "train"  # the partition of training prompts and responses


def start(settings: DictConfig) -> None:
    """Starts the queue's processes, by the section `transfer_queue`; to be called in the task runner alone."""
    tq.init(settings)


def stop() -> None:
    tq.close()


def tags(partition: str) -> dict[str, dict]:
    """What verl notes of each key: whether it is a prompt, its status and lengths."""
    return (tq.kv_list(partition) or {}).get(partition, {})


def read(keys: list[str], partition: str, fields: list[str]) -> TensorDict:
    """These fields of the keys, an entry a key, in their order."""
    return tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=fields)


class _Entry(NamedTuple):
    key: str
    fields: dict[str, Any] | None
    tag: dict[str, Any] | None
    written: asyncio.Future


class Outbox:
    """Puts of many tasks that go to the queue together: what comes while a write is under way waits for the next.

    A write takes as long for one response as for dozens, and responses end by dozens. For one event loop.
    """

    def __init__(self):
        # By kind: the partition, and what one write can hold
        self._waiting: dict[tuple, list[_Entry]] = defaultdict(list)
        self._writers: dict[tuple, asyncio.Task] = {}

    async def put(self, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        """As TransferQueue's `async_kv_put` of a tag; returns, or raises, when it is done."""
        await self._hand_over(partition_id, [key], [None], [tag])

    async def batch_put(
        self, keys: list[str], fields: list[dict[str, Any]], tags: list[dict[str, Any]], partition_id: str
    ) -> None:
        """As TransferQueue's `async_kv_batch_put`, with the fields of each key in a dict of its own."""
        await self._hand_over(partition_id, keys, fields, tags)

    async def _hand_over(self, partition: str, keys: list, fields: list, tags: list) -> None:
        loop = asyncio.get_running_loop()
        entries = [_Entry(*entry, loop.create_future()) for entry in zip(keys, fields, tags, strict=True)]
        for entry in entries:
            kind = partition, _layout(entry.fields)
            self._waiting[kind].append(entry)
            if kind not in self._writers:
                self._writers[kind] = loop.create_task(self._write_all(kind))
        # All of them, as who is told of a fault may clear what another write has yet to bring
        for fault in await asyncio.gather(*(entry.written for entry in entries), return_exceptions=True):
            if fault is not None:
                raise fault

    async def _write_all(self, kind: tuple) -> None:
        entries: list[_Entry] = []
        try:
            while entries := self._waiting.pop(kind, []):
                await _write(kind[0], entries)
        finally:
            del self._writers[kind]
            for entry in [*entries, *self._waiting.pop(kind, [])]:  # where this task is given up: nobody waits for ever
                entry.written.cancel()


async def _write(partition: str, entries: list[_Entry]) -> None:
    fault = None
    try:
        rows = [entry.fields for entry in entries]
        fields = None if rows[0] is None else list_of_dict_to_tensordict(rows)
        keys, tags = [entry.key for entry in entries], [entry.tag for entry in entries]
        await tq.async_kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id=partition)
    except Exception as error:
        if len(entries) > 1:  # it may be the fault of one
            await asyncio.gather(*(_write(partition, [entry]) for entry in entries))
            return
        fault = error
    for entry in entries:
        if entry.written.done():  # whoever put it does not wait any more
            continue
        if fault is None:
            entry.written.set_result(None)
        else:
            entry.written.set_exception(fault)


def _layout(fields: dict[str, Any] | None) -> tuple | None:
    """Equal for fields that one write can hold: tensors of one name differ in length alone."""
    return None if fields is None else tuple((name, _kind(value)) for name, value in fields.items())


def _kind(value: Any) -> tuple | None:
    if not isinstance(value, torch.Tensor):
        return None
    return value.dtype, value.dim() if value.dim() < 2 else value.shape


async def write(rows: dict[str, dict]) -> None:
    """Puts fields of training responses in place of what they had, by key."""
    fields = list_of_dict_to_tensordict(list(rows.values()))
    await tq.async_kv_batch_put(keys=list(rows), fields=fields, partition_id=TRAINING)


def retag(changed: dict[str, dict], partition: str) -> None:
    """Replaces the tags of keys."""
    tq.kv_batch_put(keys=list(changed), partition_id=partition, tags=list(changed.values()))


def remove(keys: list[str], partition: str) -> None:
    tq.kv_clear(keys=keys, partition_id=partition)


def trajectory_place(key: str) -> tuple[str, int, int]:
    """A response's place by verl's key `uid_response_turn`: its prompt, its number and its turn; keys sort by it."""
    uid, response, turn = key.rsplit("_", 2)
    return uid, int(response), int(turn)
