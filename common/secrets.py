"""Secrets among settings, among variables of the environment and in addresses: which they are, and texts without."""

import re
from collections.abc import Sequence

NAMED = re.compile(
    r"(?i)(?:(?:^|[._-])(?:key|token|secret|password|passwd|credentials?|authorization)|(?:api|access|private)key)$"
)
# Settings that name a column of the data, or a teacher by it; and a variable that names a file
HARMLESS = re.compile(
    r"(?:^|\.)(?:prompt|question|messages|response|answer|completion|chosen|rejected|label|reward_fn|image|video|audio"
    r"|teacher)_key$|(?i:application_credentials)$"
)
# A user's name and password in an address; a password may hold an @, and no slash
ACCESS = re.compile(r"(?<=://)[^/\s]+@")
ENVIRONMENT = "env_vars"  # of Ray's workers; whatever the user puts there
# What the services want that metrics are logged to; only the process that drives the run talks to them
LOGGING = ("CLEARML_", "MLFLOW_", "MLP_", "SWANLAB_", "TENSORBOARD_", "TRACKIO_", "VOLC_", "WANDB_")


def is_secret(name: str) -> bool:
    """Whether a setting or variable of that name, with or without its sections, holds a secret."""
    return bool(NAMED.search(name)) and not HARMLESS.search(name)


def has_password(text: str) -> bool:
    """Whether a text holds an address with a user's name or password."""
    return bool(ACCESS.search(text))


def shown_address(text: str) -> str:
    """A text with addresses as messages show it: without the names and passwords in them."""
    return ACCESS.sub("***@", text)


def without_secrets(value, key: str = ""):
    """Settings without what is named like a secret, and without the name and password in an address."""
    if isinstance(value, dict):
        named = {name: f"{key}.{name}".lstrip(".") for name in value}
        shown = [name for name in value if name != ENVIRONMENT and not is_secret(named[name])]
        return {name: without_secrets(value[name], named[name]) for name in shown}
    if isinstance(value, list):
        return [without_secrets(entry, key) for entry in value]
    return ACCESS.sub("", value) if isinstance(value, str) else value


def judges_keys(named: str | Sequence[str | None] | None) -> set[str]:
    """The variables that `algorithm.judge.api_key_env` names, one or one a server, whatever they are called."""
    return {named} if isinstance(named, str) else set(named or ()) - {None}
