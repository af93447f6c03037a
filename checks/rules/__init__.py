"""The rules that tie settings together, in the order in which their faults are told.

What a setting may be by itself stands in schema.py. A rule is a function of Settings, and stands in its file's RULES.
"""

from collections.abc import Callable

from recipe.spin.checks.rules import around_the_run, batches, generation, preferences, ranks, reference
from recipe.spin.common.settings import Settings

RULES: tuple[Callable[[Settings], None], ...] = (
    *preferences.RULES,
    *reference.RULES,
    *batches.RULES,
    *ranks.RULES,
    *generation.RULES,
    *around_the_run.RULES,
)
