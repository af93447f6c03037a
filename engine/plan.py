"""Which row goes to which optimizer step and rank."""

from dataclasses import dataclass
from math import ceil

from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step: what every rank must know of the whole to scale its part.

    weight and mean_chosen_length are taken over the pairs of all ranks, copies left out.
    rows_per_micro_batch is None when micro-batches are cut by tokens (use_dynamic_bsz).
    reference_is_policy: at this step both are the same model to the bit, and the step's own log-probs serve for both.
    """

    rows_per_rank: int
    weight: float
    mean_chosen_length: float
    rows_per_micro_batch: int | None = None
    reference_is_policy: bool = False


@dataclass(frozen=True)
class Plan:
    """Order of the rows over ranks: rank by rank, within a rank mini-batch by mini-batch.

    `rows` are numbers of rows, `real` tells copies (of a short row, to make ranks equal) from rows.
    """

    mini_batches: list[MiniBatch]
    rows: list[int]
    real: list[bool]


def plan_mini_batches(
    prompts: list[int],
    tokens: list[int],
    weights: list[float],
    chosen_lengths: list[float],
    prompts_per_mini_batch: int,
    dp_size: int,
    micro_batch_rows: int | None = None,
) -> Plan:
    """Plans the optimizer steps of a batch of rows; what a step contains does not depend on the number of ranks.

    Args:
        prompts, tokens, weights, chosen_lengths: per row the number of its prompt in the batch, its tokens, the summed
            weight of its pairs, and the lengths of their chosen responses, summed with these weights.
        prompts_per_mini_batch: `ppo_mini_batch_size`. Prompts 0..m-1 make the first step, and so on; a step whose
            prompts gave no pair is left out.
        dp_size: number of data-parallel ranks; within a step they get equally many rows and similar token counts.
        micro_batch_rows: most rows in a micro-batch, or None when the engine cuts micro-batches by tokens.
    """
    members: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt // prompts_per_mini_batch, []).append(row)

    mini_batches: list[MiniBatch] = []
    ranks: list[list[tuple[int, bool]]] = [[] for _ in range(dp_size)]
    for _, rows in sorted(members.items()):
        per_rank, per_micro = _even_split(ceil(len(rows) / dp_size), micro_batch_rows)
        shortest = min(rows, key=lambda row: tokens[row])
        padded = [(row, True) for row in rows] + [(shortest, False)] * (per_rank * dp_size - len(rows))
        parts = get_seqlen_balanced_partitions([tokens[row] for row, _ in padded], dp_size, equal_size=True)
        for rank, part in zip(ranks, parts, strict=True):
            rank.extend(padded[i] for i in sorted(part))
        weight = sum(weights[row] for row in rows)
        length = sum(chosen_lengths[row] for row in rows) / weight
        length = length or 1 / len(rows)  # no chosen response has a token: count one, as core_algos does
        mini_batches.append(MiniBatch(per_rank, weight, length, per_micro))
    order = [entry for rank in ranks for entry in rank]
    return Plan(mini_batches, [row for row, _ in order], [real for _, real in order])


def _even_split(rows: int, most: int | None) -> tuple[int, int | None]:
    """Rounds up to a number of rows that equal micro-batches of at most `most` rows can hold: (rows, per micro)."""
    if most is None:
        return rows, None
    micro_batches = ceil(rows / most)
    per_micro = ceil(rows / micro_batches)
    return micro_batches * per_micro, per_micro
