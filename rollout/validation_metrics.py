"""What the metrics of a validation say, by verl's names: accuracy or score held out, and what of it failed."""

import math
import re

WIN_RATE = "win_rate"  # in names of metrics
# Metrics of a validation that should be 0, in words
HELD_OUT_FAULTS = {
    "val-failed/answers": "{:.1%} of the held-out answers failed",
    "val-aux/prompts_without_score": "{:g} held-out prompts have a response without a score",
}
History = dict[int, dict[str, float | None]]  # metrics by step; None is no number


def held_out_accuracy(metrics: dict[str, float | None]) -> dict[str, float | None]:
    """Greedy and sampled accuracy (the reward where there is none) of one step, averaged over data sources.

    None where a source's is no number: the mean of the others would be another measure.
    """
    found = {}
    for name, prefix in (("greedy", "val-greedy-core/"), ("sampled", "val-core/")):
        values = [value for key, value in metrics.items() if key.startswith(prefix) and "/mean@" in key]
        if values:
            found[name] = sum(values) / len(values) if all(map(is_finite, values)) else None
    return found


def as_win_rate(metrics: dict[str, float]) -> dict[str, float]:
    """verl's metrics of a validation in which answers are worth what they are beside those of the first one."""
    return {re.sub("/reward(?=/[^/]+$)", f"/{WIN_RATE}", name): value for name, value in metrics.items()}


def held_out_measure(history: History) -> str:
    """What `held_out_accuracy` finds: "accuracy", "score" where the reward gives no `acc`, or "win rate"."""
    names = [
        name for metrics in history.values() for name in metrics if name.startswith(("val-core/", "val-greedy-core/"))
    ]
    variables = {name.split("/")[-2] for name in names}
    return "accuracy" if "acc" in variables else "win rate" if WIN_RATE in variables else "score"


def held_out_faults(metrics: dict[str, float | None]) -> dict[str, float]:
    """What a validation had of HELD_OUT_FAULTS."""
    return {name: metrics[name] for name in HELD_OUT_FAULTS if is_finite(metrics.get(name)) and metrics[name] > 0}


def in_words(faults: dict[str, float]) -> str:
    """What `held_out_faults` found, as the end of a sentence."""
    return "; ".join(HELD_OUT_FAULTS[name].format(value) for name, value in faults.items())


def is_finite(value) -> bool:
    """Whether a metric can be drawn and compared."""
    return isinstance(value, int | float) and math.isfinite(value)
