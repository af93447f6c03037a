"""What a check of the machine finds."""

import math
from dataclasses import dataclass, field

OK, HINT, WARN, FAIL = "ok", "hint", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """What a check found: `text` says it, with what to do where the verdict is not ok; `figures` are for the record."""

    name: str
    verdict: str
    text: str
    figures: dict = field(default_factory=dict)


def not_finite(figures: dict[str, float]) -> str:
    """Names of the figures that are NaN or infinite, as `max` and comparisons pass over a NaN; empty for none."""
    return ", ".join(name for name, value in figures.items() if not math.isfinite(value))


def gigabytes(value: float) -> str:
    """As findings show bytes."""
    return f"{value / 1e9:.1f}"
