"""The batch of preference pairs: which pair goes to which optimizer step and rank, and the rows in that order."""

from dataclasses import dataclass
from math import ceil

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

from recipe.spin.core_algos import PreferencePairs


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step: what every rank must know of the whole to scale its part.

    weight and mean_chosen_length are taken over the pairs of all ranks, padding left out.
    pairs_per_micro_batch is None when micro-batches are cut by tokens (use_dynamic_bsz).
    """

    pairs_per_rank: int
    weight: float
    mean_chosen_length: float
    pairs_per_micro_batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """Order of the pairs over ranks: rank by rank, within a rank mini-batch by mini-batch.

    `pairs` are indices of pairs, `real` tells padding (a copy of a short pair that weighs nothing) from pairs.
    """

    mini_batches: list[MiniBatch]
    pairs: list[int]
    real: list[bool]


def plan_mini_batches(
    prompts: list[int],
    tokens: list[int],
    weights: list[float],
    chosen_lengths: list[int],
    prompts_per_mini_batch: int,
    dp_size: int,
    micro_batch_pairs: int | None = None,
) -> Plan:
    """Plans the optimizer steps of a batch of pairs; what a step contains does not depend on the number of ranks.

    Args:
        prompts, tokens, weights, chosen_lengths: per pair the index of its prompt in the batch, the tokens of both
            sequences, its weight in the loss and the tokens of its chosen response.
        prompts_per_mini_batch: `ppo_mini_batch_size`. Prompts 0..m-1 make the first step, and so on; a step whose
            prompts gave no pair is left out.
        dp_size: number of data-parallel ranks; within a step they get equally many pairs and similar token counts.
        micro_batch_pairs: most pairs in a micro-batch, or None when the engine cuts micro-batches by tokens.
    """
    members: dict[int, list[int]] = {}
    for pair, prompt in enumerate(prompts):
        members.setdefault(prompt // prompts_per_mini_batch, []).append(pair)

    mini_batches: list[MiniBatch] = []
    ranks: list[list[tuple[int, bool]]] = [[] for _ in range(dp_size)]
    for _, pairs in sorted(members.items()):
        per_rank, per_micro = _even_split(ceil(len(pairs) / dp_size), micro_batch_pairs)
        shortest = min(pairs, key=lambda pair: tokens[pair])
        padded = [(pair, True) for pair in pairs] + [(shortest, False)] * (per_rank * dp_size - len(pairs))
        parts = get_seqlen_balanced_partitions([tokens[pair] for pair, _ in padded], dp_size, equal_size=True)
        for rank, part in zip(ranks, parts, strict=True):
            rank.extend(padded[i] for i in sorted(part))
        weight = sum(weights[pair] for pair in pairs)
        length = sum(weights[pair] * chosen_lengths[pair] for pair in pairs) / weight
        length = length or 1 / len(pairs)  # no chosen response has a token: count one, as core_algos does
        mini_batches.append(MiniBatch(per_rank, weight, length, per_micro))
    order = [entry for rank in ranks for entry in rank]
    return Plan(mini_batches, [pair for pair, _ in order], [real for _, real in order])


def _even_split(pairs: int, most: int | None) -> tuple[int, int | None]:
    """Rounds up to a number of pairs that equal micro-batches of at most `most` pairs can hold: (pairs, per micro)."""
    if most is None:
        return pairs, None
    micro_batches = ceil(pairs / most)
    per_micro = ceil(pairs / micro_batches)
    return micro_batches * per_micro, per_micro


CONVERSATION = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask")


def conversation_rows(prompts: list[torch.Tensor], responses: list[torch.Tensor]) -> TensorDict:
    """The model's inputs for N prompts and their responses, rows of tokens, with the fields of verl's agent loop."""
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    ones = [torch.ones_like(row) for row in responses]
    positions = [torch.arange(len(row)) for row in sequences]
    fields = zip(CONVERSATION, (prompts, responses, sequences, positions, ones, ones), strict=True)
    return TensorDict({name: nest(rows) for name, rows in fields}, batch_size=len(prompts))


def nest(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of unequal length as a jagged tensor."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def trajectory_place(key: str) -> tuple[str, int, int]:
    """Sorts verl's keys `uid_response_turn` of trajectories by prompt and response."""
    uid, response, turn = key.rsplit("_", 2)
    return uid, int(response), int(turn)


def pad_rows(nested: torch.Tensor) -> torch.Tensor:
    """A jagged tensor of B rows as (B, T), zeros behind the rows' ends.

    `to_padded_tensor` would do, but takes T from a cache that is wrong once rows were selected and sent to a worker.
    """
    return torch.nn.utils.rnn.pad_sequence(list(nested.unbind()), batch_first=True)


def build_pair_batch(responses: TensorDict, pairs: PreferencePairs, plan: Plan) -> TensorDict:
    """Gathers the rows of the pairs in the plan's order: 2P rows `[chosen0, rejected0, ...]`.

    Adds `pair_id` and `pair_weight` per row; a response that stands in several pairs is repeated.
    """
    order = torch.tensor(plan.pairs)
    rows = torch.stack([pairs.chosen[order], pairs.rejected[order]], dim=1).flatten()
    batch = tu.index_select_tensor_dict(responses, rows)
    weight = pairs.weight[order] * torch.tensor(plan.real, dtype=pairs.weight.dtype)
    batch["pair_id"] = torch.arange(len(order)).repeat_interleave(2)
    batch["pair_weight"] = weight.float().repeat_interleave(2)
    return batch
