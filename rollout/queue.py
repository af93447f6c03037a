"""Every call of TransferQueue, in which verl keeps prompts and responses: it may be dropped (verl's RFC 6988)."""

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
