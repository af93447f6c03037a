"""Preferences and losses of online DPO: pure functions of tensors.

A step of training runs down this file: score the responses of each prompt and pair them (`compute_onlineDPO_pref`), sum
up the pairs' token log-probs (`sequence_logps`), and compare policy and reference (`compute_online_dpo_loss`, which
stands with all losses in losses.py and is offered here).

Shapes: B prompts, n responses each, T response tokens, P preference pairs. Log-probs are in nats."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.spin.losses import (
    LOSSES,
    Loss,
    LossOptions,
    PairLogps,
    at_least_float32,
    check_beta,
    check_loss_settings,
    check_shapes,
    compute_online_dpo_loss,
    f_score,
    is_number,
    register_loss,
)

__all__ = [  # with the losses': other recipes import this file
    "LOSSES",
    "Loss",
    "LossOptions",
    "PairLogps",
    "PreferencePairs",
    "beta_at",
    "check_loss_settings",
    "compute_onlineDPO_pref",
    "compute_online_dpo_loss",
    "compute_self_play_pref",
    "f_score",
    "has_score",
    "implicit_rewards",
    "length_desensitized_logps",
    "penalize_missing_eos",
    "register_loss",
    "sequence_logps",
    "wpo_weights",
]

PAIRINGS = ("best_worst", "random", "all")
TIE_POLICIES = ("drop", "first")
_BETA = "beta (algorithm.dpo_beta)"
# Rewards come in float32, in which 0.4 - 0.3 is less than 0.1: what a score of size 1 may be off by, with some to spare
SCORE_ROUNDING = 1e-6
BetaSchedule = float | Mapping[str, Any] | Sequence[float]


# ---- Preferences -----------------------------------------------------------------------------------------------------
class PreferencePairs(NamedTuple):
    """P preference pairs in the order of their prompts; responses are given as rows of the batch of B*n."""

    chosen: Tensor  # (P,) long
    rejected: Tensor  # (P,) long
    margin: Tensor  # (P,) float32: score of chosen - score of rejected; 0 where tie_policy, not the scores, decided
    weight: Tensor  # (P,) float32: 1 / number of pairs of the prompt, so that prompts count alike


def compute_onlineDPO_pref(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    n: int = 2,
    *,
    pairing: str = "best_worst",
    tie_policy: str = "drop",
    min_margin: float = 0.0,
    scored: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> PreferencePairs:
    """Pair the responses of each prompt by score: the higher is chosen, the lower rejected.

    Shapes: token_level_rewards, response_mask (B*n, T); rows i*n to i*n + n-1 answer prompt i. A row's score is the sum
    of its rewards over the mask, in the reward's units; what stands outside the mask is never read.
    pairing: "best_worst", the highest against the lowest score (the first of equals); "random", one of the prompt's
    untied pairs, each as likely, by `generator` (on the CPU); "all", every untied pair.
    Scores tie if they are equal or less than min_margin apart, where float32's rounding of the scores does not count.
    Without an untied pair, a prompt gives none by tie_policy="drop"; by "first" its first response is preferred to its
    last.
    scored (B*n,) bool, false where a response has no score: it takes part in no pair. None: all have one.
    No gradient passes through the margins. Errors: ValueError naming the setting, shape or row.
    Source: online DPO, arXiv 2402.04792, Algorithm 1; best against worst, ties dropped: arXiv 2401.10020, Section 2."""
    if not (_is_count(n) and n >= 2):
        raise ValueError(
            f"n (actor_rollout_ref.rollout.n) is {n!r}: a preference takes a whole number of responses per prompt, at "
            "least 2."
        )
    for key, value, known in (("pairing", pairing, PAIRINGS), ("tie_policy", tie_policy, TIE_POLICIES)):
        if value not in known:
            raise ValueError(f"{key} (algorithm.dpo_{key}) is {value!r}: choose one of {', '.join(known)}.")
    if not (is_number(min_margin) and min_margin >= 0):
        raise ValueError(f"min_margin (algorithm.dpo_min_margin) is {min_margin!r}: give a number >= 0.")
    scores, scored = _grouped_scores(token_level_rewards, response_mask, n, scored)
    gap = scores[:, :, None] - scores[:, None, :]  # (B, n, n): by how much response i leads response j
    rounding = SCORE_ROUNDING * torch.maximum(scores[:, :, None].abs(), scores[:, None, :].abs())
    untied = (gap > 0) & (gap >= min_margin - rounding) & scored[:, :, None] & scored[:, None, :]

    if pairing == "all":
        keep = untied.clone()
    else:
        rank = gap if pairing == "best_worst" else torch.rand(gap.shape, dtype=gap.dtype, generator=generator).to(gap)
        first_largest = rank.masked_fill(~untied, -1.0).flatten(1).argmax(1)
        keep = untied & F.one_hot(first_largest, n * n).bool().view_as(gap)
    if tie_policy == "first":
        tied = ~keep.any(dim=(1, 2)) & (scored.sum(1) >= 2)
        first, last = scored.long().argmax(1), n - 1 - scored.flip(1).long().argmax(1)
        keep[tied, first[tied], last[tied]] = True

    prompt, better, worse = keep.nonzero(as_tuple=True)
    return PreferencePairs(
        chosen=prompt * n + better,
        rejected=prompt * n + worse,
        margin=gap.masked_fill(~untied, 0.0)[prompt, better, worse].float(),
        weight=1.0 / keep.sum(dim=(1, 2))[prompt].float(),
    )


def compute_self_play_pref(differs: Tensor, n: int = 1) -> PreferencePairs:
    """Pair the data's response to each prompt, chosen, with each of the opponent's that differs from it, rejected.

    Shapes: differs (B*n,) bool, false where the opponent gave the data's own response, which makes no pair. Rows i*n to
    i*n + n-1 are the opponent's responses to prompt i, row B*n + i is the data's. margin counts the data's response 1
    and the opponent's 0. Errors: ValueError if the rows are not complete prompts.
    Source: SPIN, arXiv 2401.01335, Algorithm 1."""
    if not (_is_count(n) and n >= 1) or differs.dim() != 1 or len(differs) % n:
        raise ValueError(f"differs has shape {tuple(differs.shape)}, no multiple of n={n} rows: keep prompts complete.")
    keep = differs.bool().view(-1, n)
    rejected = keep.flatten().nonzero().squeeze(1)
    prompt = rejected.div(n, rounding_mode="floor")
    return PreferencePairs(
        chosen=len(differs) + prompt,
        rejected=rejected,
        margin=torch.ones(len(rejected)),
        weight=1.0 / keep.sum(dim=1)[prompt].float(),
    )


def has_score(token_level_rewards: Tensor) -> Tensor:
    """Which responses (N,) have a score: those of finite rewards (N, T); a reward that failed gave NaN."""
    return token_level_rewards.isfinite().all(-1)


def penalize_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the score of every response that has no end token.

    Shapes: scores (N,), ended (N,), true where the end token is there; returns (N,). Units: the scores'.
    Errors: ValueError for unequal shapes or a negative penalty. Source: `missing_eos_penalty` of TRL's OnlineDPO."""
    check_shapes("N", scores=scores, ended=ended)
    if not (is_number(penalty) and penalty >= 0):
        raise ValueError(f"missing_eos_penalty is {penalty!r}: it is subtracted, so give a number >= 0.")
    return torch.where(ended.bool(), scores, scores - penalty)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _grouped_scores(rewards: Tensor, mask: Tensor, n: int, scored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores (B, n), in float64 so that rounding in the sum over tokens does not break ties, and which there are."""
    check_shapes("B*n, T", token_level_rewards=rewards, response_mask=mask)
    if len(rewards) % n:
        raise ValueError(f"token_level_rewards has {len(rewards)} rows, no multiple of n={n}: keep prompts complete.")
    if scored is None:
        scored = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
    check_shapes("B*n", scored=scored, responses=mask.sum(dim=-1))
    if scored.dtype != torch.bool:
        raise ValueError(f"scored is of dtype {scored.dtype}: pass booleans, false where a response has no score.")
    scores = torch.where(mask.bool() & scored[:, None], rewards.detach().double(), 0.0).sum(dim=-1)
    if not scores.isfinite().all():
        row = int(scores.isfinite().long().argmin())
        where = f"row {row} (prompt {row // n}, response {row % n})"
        raise ValueError(f"{where} has score {scores[row]}: let the reward function return finite numbers only.")
    return scores.view(-1, n), scored.view(-1, n)


# ---- Log-probs, rewards, beta ----------------------------------------------------------------------------------------
def sequence_logps(token_logps: Tensor, response_mask: Tensor, average: bool = False) -> Tensor:
    """Log-prob of each response: the sum, or with `average` the mean, of its tokens' log-probs.

    Shapes: token_logps, response_mask (B, T); returns (B,), 0 for an empty response. Units: nats, or nats per token.
    Summed in float32, or float64 where the log-probs are: in half precision 2000 tokens are past what it can hold.
    What stands outside the mask (padding may hold NaN) reaches neither value nor gradient.
    Errors: ValueError for unequal shapes. Source: DPO, arXiv 2305.18290, Eq. 7; for the mean see `ipo_loss`."""
    check_shapes("B, T", token_logps=token_logps, response_mask=response_mask)
    mask = response_mask.bool()
    total = torch.where(mask, at_least_float32(token_logps), 0.0).sum(dim=-1)
    return total / mask.sum(dim=-1).clamp(min=1) if average else total


def length_desensitized_logps(token_logps: Tensor, response_mask: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Log-prob of each response in its pair for LD-DPO: the first |shared| tokens count whole, those after them alpha.

    Shapes: token_logps, response_mask (N, T), shared (N,), the length of the pair's shorter response; returns (N,).
    Units: nats. alpha 1 gives `sequence_logps`, 0 compares responses of equal length. Masked tokens are not counted.
    Errors: ValueError for unequal shapes. Source: LD-DPO, arXiv 2409.06411: log p(y_1..s) + alpha log p(y_s+1..|y|)."""
    check_shapes("N, T", token_logps=token_logps, response_mask=response_mask)
    check_shapes("N", shared=shared, responses=response_mask.sum(dim=-1))
    token_logps = at_least_float32(token_logps)
    inside = response_mask.cumsum(dim=-1) <= shared[:, None]
    return sequence_logps(torch.where(inside, token_logps, alpha * token_logps), response_mask)


def wpo_weights(token_logps: Tensor, log_expected_probs: Tensor, response_mask: Tensor) -> Tensor:
    """WPO's weight of each response: how likely the policy would be to give it; its own have 1 at most, on average.

    exp of the mean over tokens of log pi(y_t) - log sum_v pi(v)^2, both at the token's place. The loss of a pair is
    multiplied by both its responses' weights; there is no gradient through them.
    Shapes: all (N, T); returns (N,). log_expected_probs = log sum_v pi(v)^2: a token drawn from pi has it in the mean.
    Errors: ValueError for unequal shapes. Source: WPO, arXiv 2406.11827, Eq. 2, "sampled alignment", as in TRL."""
    check_shapes("N, T", token_logps=token_logps, log_expected_probs=log_expected_probs, response_mask=response_mask)
    lead = at_least_float32(token_logps) - at_least_float32(log_expected_probs)
    return sequence_logps(lead, response_mask, average=True).exp().detach()


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """The reward that DPO sees in a response, up to a constant of the prompt: beta [log pi(y|x) - log ref(y|x)].

    Shapes: (N,) each; returns (N,), in float32 or float64. Units: those of beta times nats.
    Errors: ValueError for unequal shapes. Source: DPO, arXiv 2305.18290, Eq. 5."""
    check_shapes("N", policy_logps=policy_logps, reference_logps=reference_logps)
    return beta * (at_least_float32(policy_logps) - at_least_float32(reference_logps))


def beta_at(schedule: BetaSchedule, step: int, total_steps: int, steps_per_epoch: int | None = None) -> float:
    """The value of beta at a step; steps count from 1 to total_steps.

    schedule: a number; or {"schedule": "linear" or "cosine", "start": a, "end": b}, a at the first step (also if it is
    the only one) and b at the last; or a list with a value per epoch of steps_per_epoch steps, the last holding on.
    Errors: ValueError naming the key; every value is checked at every step. Source of the list: TRL's OnlineDPO."""
    if not 1 <= step <= total_steps:
        raise ValueError(f"step is {step}: steps count from 1 to total_steps={total_steps}.")
    if isinstance(schedule, Mapping):
        if set(schedule) != {"schedule", "start", "end"} or schedule["schedule"] not in ("linear", "cosine"):
            raise ValueError(f"{_BETA} is {dict(schedule)}: give it schedule (linear or cosine), start and end.")
        progress = (step - 1) / max(total_steps - 1, 1)
        share = 1.0 - progress if schedule["schedule"] == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
        return share * check_beta(schedule["start"]) + (1.0 - share) * check_beta(schedule["end"])
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        betas = [check_beta(beta) for beta in schedule]
        if not betas or steps_per_epoch is None or steps_per_epoch < 1:
            raise ValueError(f"{_BETA} is {betas}, steps_per_epoch {steps_per_epoch}: give a value, and steps >= 1.")
        return betas[min((step - 1) // steps_per_epoch, len(betas) - 1)]
    return check_beta(schedule)
