"""Whether likelihood or length leave their bounds: what online DPO's users complain of most, found in the metrics.

DPO's loss asks for a margin alone. It is as content when both responses lose likelihood, the rejected one more, and
when responses grow because longer ones happen to be preferred. A step without a pair is told of as well.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from recipe.spin.rollout.answers import NO_PAIR, PAIR_REMEDY
from recipe.spin.rollout.validation_metrics import History, is_finite

# What is read of a step that had pairs
READ = (
    "logps/chosen_token",
    "kl/chosen",
    "training/reference_refreshed",
    "response_length/gap",
    "response_length/mean",
)
# Below, "the default run" is that of 2026-11-28 on a CPU, three seeds.
# Steps that a mean is taken over. Each step has other prompts: with 2 to 24 pairs a step (the default run) the log-prob
# per token jumps by up to 0.6 from one to the next, its mean over 4 by 0.3 at most.
WINDOW = 4
# Nats per token that the chosen responses may lose against their best: 0.5 makes a token 40% less likely. The default
# run goes from about -0.9 to -0.15; it and 27 others of 12 steps, by loss, learning rate and task, were never more than
# 0.15 below their best that day; a later one that was, by 0.5, unlearnt its task (discopop with tau 0.05).
LIKELIHOOD_LOSS = 0.5
# Nats that the chosen responses, as a whole, may be below the reference: 1 makes them 63% less likely. Responses of the
# policy's own are above it on average; in the default run by up to 1.6.
BELOW_REFERENCE = 1.0
# The gap between chosen and rejected lengths, and its change, as a share of a response. In the default run the chosen
# are shorter by 0.14 to 0.18 at first, and by up to 0.26 or longer by 0.01 later.
LENGTH_GAP = 0.25
# Growth of all responses, where the chosen are the longer ones. In the default run they shorten.
LENGTH_GROWTH = 1.5

LIKELIHOOD_REMEDY = (
    "add sft to algorithm.dpo_loss_type ([sigmoid,sft]), raise algorithm.dpo_beta, or lower "
    "actor_rollout_ref.actor.optim.lr (docs/losses.md)"
)
LENGTH_REMEDY = (
    "if the task does not ask for it, set algorithm.dpo_length_penalty (R-DPO) or algorithm.dpo_ld_alpha (LD-DPO), or "
    "raise algorithm.dpo_beta (docs/losses.md)"
)


class Drift:
    """The detector as a run uses it: takes each step's metrics, and says each thing once."""

    def __init__(self, history: History | None = None):
        """history: of the run's earlier parts, which may have gone beyond the step that this one begins at."""
        self._history: list[Mapping[str, float]] = [
            {"step": step, **metrics}
            for step, metrics in (history or {}).items()
            if all(is_finite(metrics.get(name)) for name in READ)
        ]
        self._step = 0
        self._told: set[str] = set()

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What there is to say after a step, for the first time; a step that was seen already says nothing."""
        if step <= self._step:
            return []
        self._step = step
        self._history = [one for one in self._history if one["step"] < step] + [{"step": step, **metrics}]
        found = find_drift(self._history)
        new = [text for kind, text in found.items() if kind not in self._told]
        self._told |= found.keys()
        return new


def find_drift(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Warnings by kind ("pairs", "likelihood", ...) for the metrics of a run's steps, the oldest first.

    Looks at whether the last step had a pair, and at the last WINDOW steps that had pairs, against those before them:
    the names of metrics are those of docs/metrics.md, with the steps' numbers under `step`.
    """
    steps = [one for one in history if "logps/chosen_token" in one]
    found = {
        "pairs": _no_pair(history),
        "likelihood": _lost_likelihood(steps),
        "reference": _below_the_reference(steps),
        "gap": _length_gap(steps),
        "growth": _length_growth(steps),
    }
    return {kind: text for kind, text in found.items() if text}


def _no_pair(history: Sequence[Mapping[str, float]]) -> str | None:
    if not history or history[-1].get("pairs/used") != 0:
        return None
    step = history[-1]
    text = (
        f"step {step['step']} gave no pair and trained nothing, as {NO_PAIR}. After trainer.max_steps_without_pairs "
        f"such steps in a row the run stops. {PAIR_REMEDY}"
    )
    rate = step.get("judge/first_rate")
    if rate is None:
        return text
    return (
        f"{text}. The judges' answers with a preference were for what stood first in {rate:.0%} (judge/first_rate; 50% "
        "is no leaning), and a judge that goes by place prefers nothing"
    )


def _lost_likelihood(steps: Sequence[Mapping[str, float]]) -> str | None:
    values = [one["logps/chosen_token"] for one in steps]
    # Until two whole means are there the first ones are of fewer steps: a fall from the start on shows in step 5 then
    first = WINDOW if len(values) >= 2 * WINDOW else 1
    before = [fmean(values[max(0, end - WINDOW) : end]) for end in range(first, len(values) - WINDOW + 1)]
    if not before or max(before) - fmean(values[-WINDOW:]) <= LIKELIHOOD_LOSS:
        return None
    return (
        f"the chosen responses lose likelihood: {fmean(values[-WINDOW:]):.2f} nats a token over {_span(steps)}, after "
        f"{max(before):.2f} at best (logps/chosen_token). To hold it up {LIKELIHOOD_REMEDY}"
    )


def _below_the_reference(steps: Sequence[Mapping[str, float]]) -> str | None:
    # Just refreshed the reference is the policy, and no response is below it
    apart = [one for one in steps if not one["training/reference_refreshed"]]
    means = _means([one["kl/chosen"] for one in apart])
    if not means or means[-1] >= -BELOW_REFERENCE:
        return None
    return (
        f"the chosen responses are less likely than under the reference: by {-means[-1]:.1f} nats each over "
        f"{_span(apart)} (kl/chosen). To hold them up {LIKELIHOOD_REMEDY}"
    )


def _length_gap(steps: Sequence[Mapping[str, float]]) -> str | None:
    gaps = [one["response_length/gap"] / max(one["response_length/mean"], 1) for one in steps]
    means = _means(gaps)
    if len(means) <= WINDOW or min(abs(means[-1]), abs(means[-1] - means[0])) <= LENGTH_GAP:
        return None
    which = "longer" if means[-1] > 0 else "shorter"
    return (
        f"chosen and rejected responses drift apart in length: over {_span(steps)} the chosen are {which} by "
        f"{abs(means[-1]):.0%} of a response, {means[0]:+.0%} at first (response_length/gap); {LENGTH_REMEDY}"
    )


def _length_growth(steps: Sequence[Mapping[str, float]]) -> str | None:
    means = _means([one["response_length/mean"] for one in steps])
    gaps = _means([one["response_length/gap"] for one in steps])
    if len(means) <= WINDOW or means[-1] < LENGTH_GROWTH * means[0] or gaps[-1] <= 0:
        return None
    return (
        f"responses grow, and the chosen are the longer ones: {means[-1]:.0f} tokens over {_span(steps)}, "
        f"{means[0]:.0f} at first (response_length/mean); {LENGTH_REMEDY}"
    )


def _means(values: Sequence[float]) -> list[float]:
    """Means over every WINDOW neighbouring values."""
    return [fmean(values[start : start + WINDOW]) for start in range(len(values) - WINDOW + 1)]


def _span(steps: Sequence[Mapping[str, float]]) -> str:
    return f"steps {steps[-WINDOW]['step']} to {steps[-1]['step']}"
