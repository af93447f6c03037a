"""Losses of preference pairs: pure functions of log-probs, entered by name into LOSSES; core_algos offers them too.

Shapes: P preference pairs. Log-probs are in nats. Throughout,
h = [log pi(c|x) - log pi(r|x)] - [log ref(c|x) - log ref(r|x)] for a chosen response c and a rejected response r, and
|c|, |r| are their lengths in tokens. What can be set beside beta stands in LossOptions."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_CHOOSE_DIVERGENCE = f"choose one of {', '.join(F_DIVERGENCES)}"
LARGEST_EXPONENT = 80.0  # as TRL: exp of more has no place in float32, and no use as a score
# Names of options that not every loss takes
F_DIVERGENCE, LENGTH, LD = EVERY_OPTION = ("f_divergence_type", "length_penalty", "ld_alpha")


# ---- Settings --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LossOptions:
    """What can be set beside beta, in the config with `algorithm.dpo_` before the name; TRL's names where it has them.

    simpo_gamma: the margin that simpo asks for, in the reward's units (beta times nats). arXiv 2405.14734.
    dpop_lambda: weight of the chosen response's lost likelihood in dpop. arXiv 2402.13228.
    length_penalty: R-DPO's alpha, reward taken off each token of a response; see `PairLogps.logits`.
    f_divergence_type, f_alpha_divergence_coef: the divergence from the reference that is held small; see `f_score`.
    ld_alpha: LD-DPO's weight of the tokens by which a response is longer than the other; see
        core_algos.length_desensitized_logps, which gives the log-probs to call the loss with. None: 1, as DPO.
    use_weighting: whether WPO's weights multiply the pairs' losses; see core_algos.wpo_weights, which gives them.

    A loss is computed of sums, in which tokens are no longer to be seen. With ld_alpha and use_weighting
    `compute_online_dpo_loss` therefore takes what its caller computed by token, and refuses to go without."""

    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    length_penalty: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False

    @classmethod
    def of(cls, algorithm: Mapping[str, Any]) -> "LossOptions":
        """The options of the config's section `algorithm`."""
        return cls(**{field.name: algorithm[f"dpo_{field.name}"] for field in fields(cls)})

    def asked_for(self) -> dict[str, Any]:
        """Those that not every loss takes and that change something, by name."""
        asked = {
            F_DIVERGENCE: self.f_divergence_type != "reverse_kl",
            LENGTH: self.length_penalty > 0,
            LD: self.ld_alpha is not None,
        }
        return {name: getattr(self, name) for name in EVERY_OPTION if asked[name]}


def check_beta(beta: Any) -> float:
    if not (is_number(beta) and beta > 0):
        raise ValueError(f"beta (algorithm.dpo_beta) is or contains {beta!r}: give a number > 0, for example 0.1.")
    return float(beta)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_shapes(axes: str, **tensors: Tensor) -> None:
    """Errors: ValueError for what is no tensor, has other axes than these ("B, T") or another shape than the others."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is of type {type(tensor).__name__}: pass a tensor.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != axes.count(",") + 1 for shape in shapes.values()):
        raise ValueError(f"shapes are {shapes}: each must be ({axes}), as unequal ones would broadcast.")


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is: in half precision sums over tokens lose digits or overflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- What losses look at ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairLogps:
    """What a loss may look at: the log-probs (P,) and lengths in tokens (P,) of P pairs, and the settings."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.2
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    mean_chosen_length: Tensor | float | None = None
    options: LossOptions = LossOptions()
    whole_chosen: Tensor | None = None  # the policy's, where policy_chosen leaves a part out (ld_alpha)

    @property
    def chosen_logratio(self) -> Tensor:
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        return self.policy_rejected - self.reference_rejected

    @property
    def chosen_score(self) -> Tensor:
        """The chosen response's reward in units of beta, up to a constant of the prompt; without f-divergence its
        log-ratio."""
        return f_score(self.chosen_logratio, self.options.f_divergence_type, self.options.f_alpha_divergence_coef)

    @property
    def rejected_score(self) -> Tensor:
        return f_score(self.rejected_logratio, self.options.f_divergence_type, self.options.f_alpha_divergence_coef)

    @property
    def h(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def logits(self) -> Tensor:
        """beta h; with a length_penalty alpha beta h + alpha (|c| - |r|), as each token costs alpha of the reward that
        the policy is to have learnt. R-DPO, arXiv 2403.19159: the optimum of E[reward - alpha |y|] - beta KL."""
        logits, alpha = self.beta * self.h, self.options.length_penalty
        return logits + alpha * (self.chosen_lengths - self.rejected_lengths).to(logits) if alpha else logits


def f_score(logratio: Tensor, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5) -> Tensor:
    """f'(u) at u = pi(y|x) / ref(y|x), up to a constant: the reward, in units of beta, that DPO under the divergence
    E_ref[f(u)] sees in a response.

    Shapes: logratio = log u (N,); returns (N,). reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence: log 2u/(1+u).
    alpha_divergence: (u^(coef-1) - 1) / (coef - 1), which is reverse_kl at coef 1 and forward_kl at 0; the paper's
    alpha is 1 - coef. Errors: ValueError for another divergence.
    Source: f-DPO, arXiv 2309.16240; coef and the bound on exponents as in TRL's DPOTrainer."""
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type is {f_divergence_type!r}: {_CHOOSE_DIVERGENCE}.")
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    coef = {"reverse_kl": 1.0, "forward_kl": 0.0, "alpha_divergence": f_alpha_divergence_coef}[f_divergence_type]
    power = coef - 1.0
    if abs(power) < 1e-6:
        return logratio
    return torch.expm1((power * logratio).clamp(max=LARGEST_EXPONENT)) / power


class Loss(NamedTuple):
    """A registered loss, and what it asks of its caller."""

    function: Callable[[PairLogps], Tensor]  # returns the pairs' losses (P,)
    batch_coupled: bool  # sorts across pairs: entry i is no longer pair i, and one call must see the whole mini-batch
    needs_lengths: bool  # divides by lengths itself: takes lengths, and log-probs that are sums
    needs_reference: bool  # means nothing where the reference's log-probs count as 0
    takes: frozenset[str]  # which of EVERY_OPTION it heeds, or is right beside


LOSSES: dict[str, Loss] = {}


def register_loss(
    name: str,
    *,
    batch_coupled: bool = False,
    needs_lengths: bool = False,
    needs_reference: bool = False,
    takes: Collection[str] = (),
) -> Callable:
    """Decorator that enters a function of PairLogps into LOSSES.

    Errors: ValueError if the name is taken, or if `takes` names what is not in EVERY_OPTION."""
    unknown = sorted(set(takes) - set(EVERY_OPTION))
    if unknown:
        raise ValueError(f"loss {name!r} takes {', '.join(unknown)}: choose from {', '.join(EVERY_OPTION)}.")

    def register(function: Callable[[PairLogps], Tensor]) -> Callable[[PairLogps], Tensor]:
        if name in LOSSES:
            raise ValueError(f"loss {name!r} is registered already: choose another name.")
        LOSSES[name] = Loss(function, batch_coupled, needs_lengths, needs_reference, frozenset(takes))
        return function

    return register


# ---- Losses ----------------------------------------------------------------------------------------------------------
def _log_loss(logits: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(logits) - eps * F.logsigmoid(-logits)


@register_loss("sigmoid", takes=EVERY_OPTION)
def sigmoid_loss(p: PairLogps) -> Tensor:
    """-(1-eps) log sigma(beta h) - eps log sigma(-beta h), label_smoothing eps. DPO, arXiv 2305.18290, Eq. 7; with
    eps > 0 cDPO, ericmitchell.ai/cdpo.pdf, Eq. 3."""
    return _log_loss(p.logits, p.label_smoothing)


@register_loss("hinge", takes=EVERY_OPTION)
def hinge_loss(p: PairLogps) -> Tensor:
    """max(0, 1 - beta h). SLiC-HF, arXiv 2305.10425, normalised by a reference as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - p.logits)


@register_loss("ipo", takes={F_DIVERGENCE, LD})
def ipo_loss(p: PairLogps) -> Tensor:
    """(h - 1/(2 beta))^2. IPO, arXiv 2310.12036, Eq. 17. TRL's DPOTrainer divides log-ratios by lengths first: ours is
    equal to it on log-probs that are means (`average=True`)."""
    return (p.h - 1 / (2 * p.beta)) ** 2


@register_loss("robust", takes=EVERY_OPTION)
def robust_loss(p: PairLogps) -> Tensor:
    """[-(1-eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps), label_smoothing eps. rDPO, arXiv 2403.00409:
    an unbiased estimate of the DPO loss when a share eps of the preferences is flipped."""
    eps, logits = p.label_smoothing, p.logits
    return (eps * F.logsigmoid(-logits) - (1 - eps) * F.logsigmoid(logits)) / (1 - 2 * eps)


@register_loss("exo_pair", takes=EVERY_OPTION)
def exo_pair_loss(p: PairLogps) -> Tensor:
    """KL of (q, 1-q) from (1-eps, eps), q = sigma(beta h), label_smoothing eps. EXO, arXiv 2402.00856, Eq. 16."""
    eps, logits = p.label_smoothing, p.logits
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-eps))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(eps))
    return chosen + rejected


@register_loss("nca_pair", takes={LD})
def nca_pair_loss(p: PairLogps) -> Tensor:
    """-log sigma(r_c) - [log sigma(-r_c) + log sigma(-r_r)] / 2 of implicit rewards r. NCA, arXiv 2402.05369."""
    chosen, rejected = p.beta * p.chosen_logratio, p.beta * p.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@register_loss("bco_pair", takes={LD})
def bco_pair_loss(p: PairLogps) -> Tensor:
    """-log sigma(r_c) - log sigma(-r_r) of implicit rewards r. BCO, arXiv 2404.04656, less its reward shift, as TRL."""
    return -F.logsigmoid(p.beta * p.chosen_logratio) - F.logsigmoid(-p.beta * p.rejected_logratio)


@register_loss("sppo_hard", takes={LD})
def sppo_hard_loss(p: PairLogps) -> Tensor:
    """(log-ratio_c - 1/(2 beta))^2 + (log-ratio_r + 1/(2 beta))^2. SPPO, arXiv 2405.00675, Eq. 4.7, wins 1 and 0."""
    return (p.chosen_logratio - 0.5 / p.beta) ** 2 + (p.rejected_logratio + 0.5 / p.beta) ** 2


@register_loss("aot", batch_coupled=True)
def aot_loss(p: PairLogps) -> Tensor:
    """`_log_loss` of beta [sorted log pi(c)/pi(r) - sorted log ref(c)/ref(r)], both over the mini-batch's pairs. AOT,
    paired data, arXiv 2406.05882; label smoothing as TRL."""
    policy, reference = p.policy_chosen - p.policy_rejected, p.reference_chosen - p.reference_rejected
    return _log_loss(p.beta * (policy.sort().values - reference.sort().values), p.label_smoothing)


@register_loss("aot_unpaired", batch_coupled=True)
def aot_unpaired_loss(p: PairLogps) -> Tensor:
    """`_log_loss` of beta [sorted log pi(c)/ref(c) - sorted log pi(r)/ref(r)], both over the mini-batch's pairs. AOT,
    unpaired data, arXiv 2406.05882; label smoothing as TRL."""
    return _log_loss(p.beta * (p.chosen_logratio.sort().values - p.rejected_logratio.sort().values), p.label_smoothing)


@register_loss("apo_zero", takes={LD})
def apo_zero_loss(p: PairLogps) -> Tensor:
    """sigma(-r_c) + sigma(r_r) of implicit rewards r: chosen up, rejected down. APO, arXiv 2408.06266, Eq. 7."""
    return torch.sigmoid(-p.beta * p.chosen_logratio) + torch.sigmoid(p.beta * p.rejected_logratio)


@register_loss("apo_down", takes={LD})
def apo_down_loss(p: PairLogps) -> Tensor:
    """sigma(r_c) + sigma(-beta h), r_c implicit reward: chosen down, rejected further. APO, arXiv 2408.06266, Eq. 8."""
    return torch.sigmoid(p.beta * p.chosen_logratio) + torch.sigmoid(-p.beta * p.h)


@register_loss("discopop", takes=EVERY_OPTION)
def discopop_loss(p: PairLogps) -> Tensor:
    """-(1-m) log sigma(x) + m exp(-x), where x = beta h and m = sigma(x / tau). DiscoPOP, arXiv 2406.08414, Eq. 5.

    At x = 0 its slope is (1 - log 2) / (4 tau) - 3/4: with tau below 0.102, as the paper's and TRL's 0.05, the loss
    rises there with the chosen response's lead, and pairs whose reference is the policy are trained the wrong way."""
    x = p.logits
    # m exp(-x) in log space: for x << 0 exp(-x) overflows, though the product goes to 0.
    return torch.exp(F.logsigmoid(x / p.discopop_tau) - x) - torch.sigmoid(-x / p.discopop_tau) * F.logsigmoid(x)


@register_loss("sigmoid_norm", needs_lengths=True, takes={F_DIVERGENCE, LD})
def sigmoid_norm_loss(p: PairLogps) -> Tensor:
    """-log sigma(beta [log-ratio_c / length_c - log-ratio_r / length_r]). Tulu 3, arXiv 2411.15124."""
    chosen, rejected = p.chosen_lengths.clamp(min=1), p.rejected_lengths.clamp(min=1)
    return -F.logsigmoid(p.beta * (p.chosen_score / chosen - p.rejected_score / rejected))


@register_loss("sft", needs_lengths=True, takes=EVERY_OPTION)
def sft_loss(p: PairLogps) -> Tensor:
    """-log pi(c|x) / mean length of the chosen; averaged, the cross-entropy per chosen token. As TRL's sft, from MPO,
    arXiv 2411.10442. Micro-batches of one mini-batch agree if they get its mean_chosen_length. With ld_alpha too the
    likelihood is that of the whole response."""
    mean_length = p.mean_chosen_length
    if mean_length is None:
        mean_length = p.chosen_lengths.to(p.policy_chosen).sum().clamp(min=1) / len(p.chosen_lengths)
    return -(p.policy_chosen if p.whole_chosen is None else p.whole_chosen) / mean_length


@register_loss("simpo", needs_lengths=True)
def simpo_loss(p: PairLogps) -> Tensor:
    """`_log_loss` of beta [log pi(c|x) / |c| - log pi(r|x) / |r|] - gamma, gamma simpo_gamma; no reference. SimPO,
    arXiv 2405.14734, Eq. 6; label smoothing as TRL's CPOTrainer."""
    chosen, rejected = p.chosen_lengths.clamp(min=1), p.rejected_lengths.clamp(min=1)
    margin = p.beta * (p.policy_chosen / chosen - p.policy_rejected / rejected) - p.options.simpo_gamma
    return _log_loss(margin, p.label_smoothing)


@register_loss("dpop", needs_reference=True, takes={LENGTH})
def dpop_loss(p: PairLogps) -> Tensor:
    """`sigmoid` of h - lambda max(0, log ref(c|x) - log pi(c|x)), lambda dpop_lambda. DPO-Positive, arXiv 2402.13228,
    Eq. 3: what the chosen response has lost of its likelihood counts lambda times."""
    lost = torch.relu(-p.chosen_logratio)
    return _log_loss(p.logits - p.beta * p.options.dpop_lambda * lost, p.label_smoothing)


# ---- Checks and the call ---------------------------------------------------------------------------------------------
def check_loss_settings(
    loss_type: str | Sequence[str],
    beta: float,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
    *,
    discopop_tau: float = 0.2,
    average_log_prob: bool = False,
    reference_free: bool = False,
    options: LossOptions = LossOptions(),
) -> list[tuple[str, float]]:
    """Check the loss's settings; return its parts as (name, weight). Errors: ValueError naming key, cause and remedy.

    average_log_prob says that log-probs are means over tokens; losses that divide by lengths themselves refuse them."""
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names or any(name not in LOSSES for name in names):
        raise ValueError(f"loss_type (algorithm.dpo_loss_type) is {loss_type!r}: choose from {', '.join(LOSSES)}.")
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(names) or not all(map(is_number, weights)):
        raise ValueError(f"loss_weights (algorithm.dpo_loss_weights) is {weights}: give a number for each of {names}.")
    if not any(weights):
        raise ValueError(
            f"loss_weights (algorithm.dpo_loss_weights) is {weights}: nothing would be trained, give one > 0."
        )
    check_beta(beta)
    valid = is_number(label_smoothing) and 0 <= label_smoothing <= 0.5
    if not valid or (label_smoothing == 0 and "exo_pair" in names) or (label_smoothing == 0.5 and "robust" in names):
        need = "give a share from 0 to 0.5, above 0 for exo_pair (its logarithm), below 0.5 for robust (1 - 2x divides)"
        raise ValueError(f"label_smoothing (algorithm.dpo_label_smoothing) is {label_smoothing!r}: {need}.")
    if not (is_number(discopop_tau) and 0 < discopop_tau <= 1):
        raise ValueError(f"discopop_tau (algorithm.dpo_discopop_tau) is {discopop_tau!r}: give a number in (0, 1].")
    _check_options(options)
    _check_combination(names, options, average_log_prob, reference_free)
    return list(zip(names, weights, strict=True))


def _check_options(options: LossOptions) -> None:
    """Each option by itself."""
    if not isinstance(options, LossOptions):
        raise ValueError(f"options is of type {type(options).__name__}: pass LossOptions(name=value, ...).")
    ranges = {
        "simpo_gamma": (lambda value: is_number(value) and value >= 0, "give a number >= 0"),
        "dpop_lambda": (lambda value: is_number(value) and value >= 0, "give a number >= 0, the paper's is 50"),
        LENGTH: (lambda value: is_number(value) and value >= 0, "it is taken off, so give a number >= 0"),
        F_DIVERGENCE: (lambda value: value in F_DIVERGENCES, _CHOOSE_DIVERGENCE),
        "f_alpha_divergence_coef": (is_number, "give a number, for example 0.5"),
        LD: (
            lambda value: value is None or (is_number(value) and 0 <= value <= 1),
            "give a share from 0 to 1, or null",
        ),
        "use_weighting": (lambda value: isinstance(value, bool), "must be true or false"),
    }
    for name, (valid, need) in ranges.items():
        value = getattr(options, name)
        if not valid(value):
            raise ValueError(f"{name} (algorithm.dpo_{name}) is {value!r}: {need}.")


def _check_combination(names: list[str], options: LossOptions, average_log_prob: bool, reference_free: bool) -> None:
    """Losses with the options, and options with each other."""
    asked = options.asked_for()
    for name in names:
        if average_log_prob and LOSSES[name].needs_lengths:
            raise ValueError(f"dpo_average_log_prob is true, but the loss {name} averages by itself: set it to false.")
        if reference_free and LOSSES[name].needs_reference:
            raise ValueError(f"dpo_reference_free is true, but the loss {name} needs the reference: set it to false.")
        if options.use_weighting and LOSSES[name].batch_coupled:
            raise ValueError(f"dpo_use_weighting is true, but the loss {name} sorts pairs: set it to false.")
        for option in sorted(asked.keys() - LOSSES[name].takes):
            able = ", ".join(other for other, loss in LOSSES.items() if option in loss.takes)
            raise ValueError(
                f"dpo_{option} is {asked[option]!r}, which the loss {name} does not take; these do: {able}."
            )
    for option in sorted(asked.keys() & {F_DIVERGENCE, LD}):
        if average_log_prob:
            raise ValueError(f"dpo_{option} is {asked[option]!r} and takes sums: set dpo_average_log_prob to false.")
    if reference_free and F_DIVERGENCE in asked:
        raise ValueError(
            f"dpo_f_divergence_type is {asked[F_DIVERGENCE]!r}, but dpo_reference_free is true: set it to false."
        )


def _check_needs(
    names: list[str],
    options: LossOptions,
    lengths: Mapping[str, Tensor | None],
    whole_chosen_logps: Tensor | None,
    wpo_weight: Tensor | None,
) -> None:
    """What the losses and options need and the log-probs of responses do not hold."""
    asking = [f"the loss {name}" for name in names if LOSSES[name].needs_lengths]
    asking += ["a length_penalty"] if options.length_penalty else []
    if asking and any(one is None for one in lengths.values()):
        raise ValueError(f"{asking[0]} needs lengths: pass {' and '.join(lengths)}.")
    if options.ld_alpha is not None and whole_chosen_logps is None:
        raise ValueError(
            f"ld_alpha is {options.ld_alpha}, which weighs tokens: pass log-probs of length_desensitized_logps, and as "
            "whole_chosen_logps those that sequence_logps gives of the chosen responses."
        )
    if options.use_weighting != (wpo_weight is not None):
        presence = "wpo_weight is missing" if wpo_weight is None else "wpo_weight is there"
        raise ValueError(
            f"use_weighting is {options.use_weighting}, {presence}: set it "
            "and pass for each pair the product of both responses' wpo_weights, or do neither."
        )


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
    whole_chosen_logps: Tensor | None = None,
    wpo_weight: Tensor | None = None,
    discopop_tau: float = 0.2,
    options: LossOptions = LossOptions(),
    reduction: str = "mean",
) -> Tensor:
    """The preference loss of P pairs: one of LOSSES, or the sum of several, times loss_weights (default 1 each).

    Shapes: log-probs (P,) in nats, lengths (P,) in tokens; returns a scalar, or (P,) with reduction="none". Computed
    in float32, or float64 where the log-probs are.
    reference_free counts the reference's log-probs, which may then be None, as 0. label_smoothing is read by sigmoid,
    robust, exo_pair, aot, aot_unpaired, simpo and dpop; lengths by sigmoid_norm, simpo, sft and a length_penalty.
    ld_alpha: the log-probs must be those of core_algos.length_desensitized_logps, and whole_chosen_logps (P,), which
    sft holds up, those of the whole chosen responses. use_weighting: wpo_weight (P,) multiplies the losses, of each
    pair both responses' core_algos.wpo_weights multiplied. See `Loss` for what batch-coupled means.
    Errors: ValueError for settings, shapes, what an option needs and is missing, and for the mean of no pairs.
    Source: DPO, arXiv 2305.18290, Eq. 7, online as in arXiv 2402.04792, Algorithm 1; each other loss names its own."""
    parts = check_loss_settings(
        loss_type,
        beta,
        label_smoothing,
        loss_weights,
        discopop_tau=discopop_tau,
        reference_free=reference_free,
        options=options,
    )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose mean or none.")
    if not reference_free and (reference_chosen_logps is None or reference_rejected_logps is None):
        raise ValueError("the reference's log-probs are missing: pass them, or set reference_free.")
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check_needs([name for name, _ in parts], options, lengths, whole_chosen_logps, wpo_weight)

    logps = {"policy_chosen": policy_chosen_logps, "policy_rejected": policy_rejected_logps}
    if not reference_free:
        logps |= {"reference_chosen": reference_chosen_logps, "reference_rejected": reference_rejected_logps}
    if whole_chosen_logps is not None:
        logps["whole_chosen"] = whole_chosen_logps
    others = {name: tensor for name, tensor in (*lengths.items(), ("wpo_weight", wpo_weight)) if tensor is not None}
    check_shapes("P", **{f"{name}_logps": tensor for name, tensor in logps.items()}, **others)
    if isinstance(mean_chosen_length, Tensor) and mean_chosen_length.dim():
        raise ValueError(f"mean_chosen_length has shape {tuple(mean_chosen_length.shape)}: pass a single number.")
    if reduction == "mean" and not len(policy_chosen_logps):
        raise ValueError("there are no preference pairs, so their loss has no mean: skip the update of this step.")

    logps = {name: at_least_float32(tensor) for name, tensor in logps.items()}
    if reference_free:
        zeros = torch.zeros_like(logps["policy_chosen"])
        logps |= {"reference_chosen": zeros, "reference_rejected": zeros}
    pairs = PairLogps(
        **logps,
        **lengths,
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        mean_chosen_length=mean_chosen_length,
        options=options,
    )
    losses = sum(weight * LOSSES[name].function(pairs) for name, weight in parts)
    if wpo_weight is not None:
        losses = losses * wpo_weight
    return losses.mean() if reduction == "mean" else losses
