"""Preferences and losses of online DPO: pure functions of tensors.

A step of training runs down this file: score the responses of each prompt and pair them (`compute_onlineDPO_pref`), sum
up the pairs' token log-probs (`sequence_logps`), and compare policy and reference (`compute_online_dpo_loss`).

Shapes: B prompts, n responses each, T response tokens, P preference pairs. Log-probs are in nats. Throughout,
h = [log pi(c|x) - log pi(r|x)] - [log ref(c|x) - log ref(r|x)] for a chosen response c and a rejected response r."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRINGS = ("best_worst", "random", "all")
TIE_POLICIES = ("drop", "first")
_BETA = "beta (algorithm.dpo_beta)"
BetaSchedule = float | Mapping[str, Any] | Sequence[float]


# ---- Preferences -----------------------------------------------------------------------------------------------------
class PreferencePairs(NamedTuple):
    """P preference pairs in the order of their prompts; responses are given as rows of the batch of B*n."""

    chosen: Tensor  # (P,) long
    rejected: Tensor  # (P,) long
    margin: Tensor  # (P,) float32: score of chosen - score of rejected; 0 where tie_policy, not the scores, decided
    weight: Tensor  # (P,) float32: 1 / number of pairs of the prompt, which is 1 unless pairing="all"


def compute_onlineDPO_pref(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    n: int = 2,
    *,
    pairing: str = "best_worst",
    tie_policy: str = "drop",
    min_margin: float = 0.0,
    generator: torch.Generator | None = None,
) -> PreferencePairs:
    """Pair the responses of each prompt by score: the higher is chosen, the lower rejected.

    Shapes: token_level_rewards, response_mask (B*n, T); rows i*n to i*n + n-1 answer prompt i. A row's score is the sum
    of its rewards over the mask, in the reward's units; what stands outside the mask is never read.
    pairing: "best_worst", the highest against the lowest score (the first of equals); "random", one of the prompt's
    untied pairs, each as likely, by `generator` (on the CPU); "all", every untied pair.
    Scores tie if they are equal or less than min_margin apart. Without an untied pair, a prompt gives none by
    tie_policy="drop"; by "first" its first response is preferred to its last.
    Errors: ValueError naming the setting, shape or row.
    Source: online DPO, arXiv 2402.04792, Algorithm 1; best against worst, ties dropped: arXiv 2401.10020, Section 2."""
    if n < 2:
        raise ValueError(f"n (actor_rollout_ref.rollout.n) is {n}: a preference takes at least 2 responses per prompt.")
    for key, value, known in (("pairing", pairing, PAIRINGS), ("tie_policy", tie_policy, TIE_POLICIES)):
        if value not in known:
            raise ValueError(f"{key} (algorithm.dpo_{key}) is {value!r}: choose one of {', '.join(known)}.")
    if not (_is_number(min_margin) and min_margin >= 0):
        raise ValueError(f"min_margin (algorithm.dpo_min_margin) is {min_margin!r}: give a number >= 0.")
    scores = _grouped_scores(token_level_rewards, response_mask, n)
    gap = scores[:, :, None] - scores[:, None, :]  # (B, n, n): by how much response i leads response j
    untied = (gap > 0) & (gap >= min_margin)

    if pairing == "all":
        keep = untied.clone()
    else:
        rank = gap if pairing == "best_worst" else torch.rand(gap.shape, dtype=gap.dtype, generator=generator).to(gap)
        first_largest = rank.masked_fill(~untied, -1.0).flatten(1).argmax(1)
        keep = untied & F.one_hot(first_largest, n * n).bool().view_as(gap)
    if tie_policy == "first":
        keep[~keep.any(dim=(1, 2)), 0, n - 1] = True

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
    if n < 1 or differs.dim() != 1 or len(differs) % n:
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


def penalize_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the score of every response that has no end token.

    Shapes: scores (N,), ended (N,), true where the end token is there; returns (N,). Units: the scores'.
    Errors: ValueError for unequal shapes or a negative penalty. Source: `missing_eos_penalty` of TRL's OnlineDPO."""
    _check_shapes("N", scores=scores, ended=ended)
    if not (_is_number(penalty) and penalty >= 0):
        raise ValueError(f"missing_eos_penalty is {penalty!r}: it is subtracted, so give a number >= 0.")
    return torch.where(ended.bool(), scores, scores - penalty)


def _grouped_scores(rewards: Tensor, mask: Tensor, n: int) -> Tensor:
    """Scores (B, n), in float64 so that rounding in the sum over tokens does not break ties."""
    _check_shapes("B*n, T", token_level_rewards=rewards, response_mask=mask)
    if len(rewards) % n:
        raise ValueError(f"token_level_rewards has {len(rewards)} rows, no multiple of n={n}: keep prompts complete.")
    scores = torch.where(mask.bool(), rewards.double(), 0.0).sum(dim=-1)
    if not scores.isfinite().all():
        row = int(scores.isfinite().long().argmin())
        where = f"row {row} (prompt {row // n}, response {row % n})"
        raise ValueError(f"{where} has score {scores[row]}: let the reward function return finite numbers only.")
    return scores.view(-1, n)


# ---- Log-probs, rewards, beta ----------------------------------------------------------------------------------------
def sequence_logps(token_logps: Tensor, response_mask: Tensor, average: bool = False) -> Tensor:
    """Log-prob of each response: the sum, or with `average` the mean, of its tokens' log-probs.

    Shapes: token_logps, response_mask (B, T); returns (B,), 0 for an empty response. Units: nats, or nats per token.
    What stands outside the mask (padding may hold NaN) reaches neither value nor gradient.
    Errors: ValueError for unequal shapes. Source: DPO, arXiv 2305.18290, Eq. 7; for the mean see `ipo_loss`."""
    _check_shapes("B, T", token_logps=token_logps, response_mask=response_mask)
    mask = response_mask.bool()
    total = torch.where(mask, token_logps, 0.0).sum(dim=-1)
    return total / mask.sum(dim=-1).clamp(min=1) if average else total


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """The reward that DPO sees in a response, up to a constant of the prompt: beta [log pi(y|x) - log ref(y|x)].

    Shapes: (N,) each; returns (N,). Units: those of beta times nats. Source: DPO, arXiv 2305.18290, Eq. 5."""
    return beta * (policy_logps - reference_logps)


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
        return share * _checked_beta(schedule["start"]) + (1.0 - share) * _checked_beta(schedule["end"])
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        betas = [_checked_beta(beta) for beta in schedule]
        if not betas or steps_per_epoch is None or steps_per_epoch < 1:
            raise ValueError(f"{_BETA} is {betas}, steps_per_epoch {steps_per_epoch}: give a value, and steps >= 1.")
        return betas[min((step - 1) // steps_per_epoch, len(betas) - 1)]
    return _checked_beta(schedule)


def _checked_beta(beta: Any) -> float:
    if not (_is_number(beta) and beta > 0):
        raise ValueError(f"{_BETA} is or contains {beta!r}: give a number > 0, for example 0.1.")
    return float(beta)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_shapes(axes: str, **tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != axes.count(",") + 1 for shape in shapes.values()):
        raise ValueError(f"shapes are {shapes}: each must be ({axes}), as unequal ones would broadcast.")


# ---- Losses ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairLogps:
    """What a loss may look at: the log-probs (P,) and lengths in tokens (P,) of P pairs, and the settings."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    mean_chosen_length: Tensor | float | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        return self.policy_rejected - self.reference_rejected

    @property
    def h(self) -> Tensor:
        return self.chosen_logratio - self.rejected_logratio


class Loss(NamedTuple):
    """A registered loss, and what it asks of its caller."""

    function: Callable[[PairLogps], Tensor]  # returns the pairs' losses (P,)
    batch_coupled: bool  # sorts across pairs: entry i is no longer pair i, and one call must see the whole mini-batch
    needs_lengths: bool  # divides by lengths itself: takes lengths, and log-probs that are sums


LOSSES: dict[str, Loss] = {}


def register_loss(name: str, *, batch_coupled: bool = False, needs_lengths: bool = False) -> Callable:
    """Decorator that enters a function of PairLogps into LOSSES. Errors: ValueError if the name is taken."""

    def register(function: Callable[[PairLogps], Tensor]) -> Callable[[PairLogps], Tensor]:
        if name in LOSSES:
            raise ValueError(f"loss {name!r} is registered already: choose another name.")
        LOSSES[name] = Loss(function, batch_coupled, needs_lengths)
        return function

    return register


def _log_loss(logits: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(logits) - eps * F.logsigmoid(-logits)


@register_loss("sigmoid")
def sigmoid_loss(p: PairLogps) -> Tensor:
    """-(1-eps) log sigma(beta h) - eps log sigma(-beta h), label_smoothing eps. DPO, arXiv 2305.18290, Eq. 7; with
    eps > 0 cDPO, ericmitchell.ai/cdpo.pdf, Eq. 3."""
    return _log_loss(p.beta * p.h, p.label_smoothing)


@register_loss("hinge")
def hinge_loss(p: PairLogps) -> Tensor:
    """max(0, 1 - beta h). SLiC-HF, arXiv 2305.10425, normalised by a reference as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - p.beta * p.h)


@register_loss("ipo")
def ipo_loss(p: PairLogps) -> Tensor:
    """(h - 1/(2 beta))^2. IPO, arXiv 2310.12036, Eq. 17. TRL's DPOTrainer divides log-ratios by lengths first: ours is
    equal to it on log-probs that are means (`average=True`)."""
    return (p.h - 1 / (2 * p.beta)) ** 2


@register_loss("robust")
def robust_loss(p: PairLogps) -> Tensor:
    """[-(1-eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps), label_smoothing eps. rDPO, arXiv 2403.00409:
    an unbiased estimate of the DPO loss when a share eps of the preferences is flipped."""
    eps, logits = p.label_smoothing, p.beta * p.h
    return (eps * F.logsigmoid(-logits) - (1 - eps) * F.logsigmoid(logits)) / (1 - 2 * eps)


@register_loss("exo_pair")
def exo_pair_loss(p: PairLogps) -> Tensor:
    """KL of (q, 1-q) from (1-eps, eps), q = sigma(beta h), label_smoothing eps. EXO, arXiv 2402.00856, Eq. 16."""
    eps, logits = p.label_smoothing, p.beta * p.h
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-eps))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(eps))
    return chosen + rejected


@register_loss("nca_pair")
def nca_pair_loss(p: PairLogps) -> Tensor:
    """-log sigma(r_c) - [log sigma(-r_c) + log sigma(-r_r)] / 2 of implicit rewards r. NCA, arXiv 2402.05369."""
    chosen, rejected = p.beta * p.chosen_logratio, p.beta * p.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@register_loss("bco_pair")
def bco_pair_loss(p: PairLogps) -> Tensor:
    """-log sigma(r_c) - log sigma(-r_r) of implicit rewards r. BCO, arXiv 2404.04656, less its reward shift, as TRL."""
    return -F.logsigmoid(p.beta * p.chosen_logratio) - F.logsigmoid(-p.beta * p.rejected_logratio)


@register_loss("sppo_hard")
def sppo_hard_loss(p: PairLogps) -> Tensor:
    """(log-ratio_c - 1/(2 beta))^2 + (log-ratio_r + 1/(2 beta))^2. SPPO, arXiv 2405.00675, Eq. 4.7, wins 1 and 0."""
    return (p.chosen_logratio - 0.5 / p.beta) ** 2 + (p.rejected_logratio + 0.5 / p.beta) ** 2


@register_loss("aot", batch_coupled=True)
def aot_loss(p: PairLogps) -> Tensor:
    """`sigmoid` between sorted policy and sorted reference log-ratios c/r. AOT, paired data, arXiv 2406.05882."""
    policy, reference = p.policy_chosen - p.policy_rejected, p.reference_chosen - p.reference_rejected
    return _log_loss(p.beta * (policy.sort().values - reference.sort().values), p.label_smoothing)


@register_loss("aot_unpaired", batch_coupled=True)
def aot_unpaired_loss(p: PairLogps) -> Tensor:
    """`sigmoid` between sorted chosen and sorted rejected log-ratios. AOT, unpaired data, arXiv 2406.05882."""
    return _log_loss(p.beta * (p.chosen_logratio.sort().values - p.rejected_logratio.sort().values), p.label_smoothing)


@register_loss("apo_zero")
def apo_zero_loss(p: PairLogps) -> Tensor:
    """sigma(-r_c) + sigma(r_r) of implicit rewards r: chosen up, rejected down. APO, arXiv 2408.06266, Eq. 7."""
    return torch.sigmoid(-p.beta * p.chosen_logratio) + torch.sigmoid(p.beta * p.rejected_logratio)


@register_loss("apo_down")
def apo_down_loss(p: PairLogps) -> Tensor:
    """sigma(r_c) + sigma(-beta h), r_c implicit reward: chosen down, rejected further. APO, arXiv 2408.06266, Eq. 8."""
    return torch.sigmoid(p.beta * p.chosen_logratio) + torch.sigmoid(-p.beta * p.h)


@register_loss("discopop")
def discopop_loss(p: PairLogps) -> Tensor:
    """-(1-m) log sigma(x) + m exp(-x), where x = beta h and m = sigma(x / tau). DiscoPOP, arXiv 2406.08414, Eq. 5."""
    x = p.beta * p.h
    # m exp(-x) in log space: for x << 0 exp(-x) overflows, though the product goes to 0.
    return torch.exp(F.logsigmoid(x / p.discopop_tau) - x) - torch.sigmoid(-x / p.discopop_tau) * F.logsigmoid(x)


@register_loss("sigmoid_norm", needs_lengths=True)
def sigmoid_norm_loss(p: PairLogps) -> Tensor:
    """-log sigma(beta [log-ratio_c / length_c - log-ratio_r / length_r]). Tulu 3, arXiv 2411.15124."""
    chosen, rejected = p.chosen_lengths.clamp(min=1), p.rejected_lengths.clamp(min=1)
    return -F.logsigmoid(p.beta * (p.chosen_logratio / chosen - p.rejected_logratio / rejected))


@register_loss("sft", needs_lengths=True)
def sft_loss(p: PairLogps) -> Tensor:
    """-log pi(c|x) / mean length of the chosen; averaged, the cross-entropy per chosen token. As TRL's sft, from MPO,
    arXiv 2411.10442. Micro-batches of one mini-batch agree if they get its mean_chosen_length."""
    mean_length = p.mean_chosen_length
    if mean_length is None:
        mean_length = p.chosen_lengths.to(p.policy_chosen).sum().clamp(min=1) / len(p.chosen_lengths)
    return -p.policy_chosen / mean_length


def check_loss_settings(
    loss_type: str | Sequence[str],
    beta: float,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
    *,
    discopop_tau: float = 0.05,
    average_log_prob: bool = False,
) -> list[tuple[str, float]]:
    """Check the loss's settings; return its parts as (name, weight). Errors: ValueError naming key, cause and remedy.

    average_log_prob says that log-probs are means over tokens; losses that divide by lengths themselves refuse them."""
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names or any(name not in LOSSES for name in names):
        raise ValueError(f"loss_type (algorithm.dpo_loss_type) is {loss_type!r}: choose from {', '.join(LOSSES)}.")
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(names) or not all(map(_is_number, weights)):
        raise ValueError(f"loss_weights (algorithm.dpo_loss_weights) is {weights}: give a number for each of {names}.")
    _checked_beta(beta)
    valid = _is_number(label_smoothing) and 0 <= label_smoothing <= 0.5
    if not valid or (label_smoothing == 0 and "exo_pair" in names) or (label_smoothing == 0.5 and "robust" in names):
        need = "give a share from 0 to 0.5, above 0 for exo_pair (its logarithm), below 0.5 for robust (1 - 2x divides)"
        raise ValueError(f"label_smoothing (algorithm.dpo_label_smoothing) is {label_smoothing!r}: {need}.")
    if not (_is_number(discopop_tau) and 0 < discopop_tau <= 1):
        raise ValueError(f"discopop_tau is {discopop_tau!r}: give a number in (0, 1].")
    for name in names:
        if average_log_prob and LOSSES[name].needs_lengths:
            raise ValueError(f"dpo_average_log_prob is true, but the loss {name} averages by itself: set it to false.")
    return list(zip(names, weights, strict=True))


def compute_online_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    reference_free: bool = False,
    *,
    loss_weights: Sequence[float] | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    discopop_tau: float = 0.05,
    reduction: str = "mean",
) -> Tensor:
    """The preference loss of P pairs: one of LOSSES, or the sum of several, times loss_weights (default 1 each).

    Shapes: log-probs (P,) in nats, lengths (P,) in tokens; returns a scalar, or (P,) with reduction="none".
    reference_free counts the reference's log-probs, which may then be None, as 0. label_smoothing is read by sigmoid,
    robust, exo_pair, aot and aot_unpaired; lengths by sigmoid_norm and sft. See `Loss` for what batch-coupled means.
    Errors: ValueError for settings, shapes, missing lengths, and for the mean of no pairs.
    Source: DPO, arXiv 2305.18290, Eq. 7, online as in arXiv 2402.04792, Algorithm 1; each other loss names its own."""
    parts = check_loss_settings(loss_type, beta, label_smoothing, loss_weights, discopop_tau=discopop_tau)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose mean or none.")
    if reference_free:
        reference_chosen_logps = reference_rejected_logps = torch.zeros_like(policy_chosen_logps)
    elif reference_chosen_logps is None or reference_rejected_logps is None:
        raise ValueError("the reference's log-probs are missing: pass them, or set reference_free.")
    for name, _ in parts:
        if LOSSES[name].needs_lengths and (chosen_lengths is None or rejected_lengths is None):
            raise ValueError(f"the loss {name} divides by lengths: pass chosen_lengths and rejected_lengths.")
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    pairs = PairLogps(*logps, beta, label_smoothing, discopop_tau, chosen_lengths, rejected_lengths, mean_chosen_length)
    _check_shapes("P", **{k: x for k, x in vars(pairs).items() if isinstance(x, Tensor) and k != "mean_chosen_length"})
    if reduction == "mean" and not len(policy_chosen_logps):
        raise ValueError("there are no preference pairs, so their loss has no mean: skip the update of this step.")
    losses = sum(weight * LOSSES[name].function(pairs) for name, weight in parts)
    return losses.mean() if reduction == "mean" else losses
