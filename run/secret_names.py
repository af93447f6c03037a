"""Which names are those of secrets, among settings and among variables of the environment."""

import re

NAMED = re.compile(
    r"(?i)(?:(?:^|[._-])(?:key|token|secret|password|passwd|credentials?|authorization)|(?:api|access|private)key)$"
)
# Settings that name a column of the data, or a teacher by it; and a variable that names a file
HARMLESS = re.compile(
    r"(?:^|\.)(?:prompt|question|messages|response|answer|completion|chosen|rejected|label|reward_fn|image|video|audio"
    r"|teacher)_key$|(?i:application_credentials)$"
)


def is_secret(name: str) -> bool:
    """Whether a setting or variable of that name, with or without its sections, holds a secret."""
    return bool(NAMED.search(name)) and not HARMLESS.search(name)
