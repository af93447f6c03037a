"""Which names are those of secrets, among settings and among variables of the environment."""

import re

NAMED = re.compile(
    r"(?i)(?:(?:^|[._-])(?:key|token|secret|password|passwd|credentials?|authorization)|(?:api|access|private)key)$"
)
# Settings of verl's that name a column of the data or a teacher by it
COLUMNS = re.compile(r"(?:^|\.)(?:prompt|reward_fn|image|video|audio|teacher)_key$")


def is_secret(name: str) -> bool:
    """Whether a setting or variable of that name, with or without its sections, holds a secret."""
    return bool(NAMED.search(name)) and not COLUMNS.search(name)
