"""A run's settings as checks read them, and the faults of settings and files, told all at once."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.spin.common.secrets import shown_address

MODEL_LENGTH = "actor_rollout_ref.rollout.max_model_len"  # of a prompt with its response, in vLLM


class ConfigError(ValueError):
    """Settings, files or rows that a run cannot use; each fault names the thing, the cause and the remedy."""

    def __init__(self, *faults: str):
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return self.faults[0]
        numbered = [f"\n  {number}. {fault}" for number, fault in enumerate(self.faults, start=1)]
        return f"{len(self.faults)} faults" + "".join(numbered)


class Unusable(Exception):
    """A check asked for a setting that is faulty by itself, and has nothing to judge."""


class Settings:
    """A composed config, read by key, and the faults found in it.

    A check is a function of Settings. It notes a fault with `require` and goes on, or raises ConfigError where there is
    nothing to go on with. A setting with a fault is not handed out: who asks for it is left, so that one fault does not
    bring others with it.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.values = OmegaConf.to_container(config, resolve=True)
        self.faults: list[str] = []
        self._faulty: set[str] = set()

    def run(self, *checks: Callable[["Settings"], None]) -> None:
        """Runs checks and notes what they raise."""
        for check in checks:
            try:
                check(self)
            except Unusable:
                continue
            except ConfigError as error:
                self.faults += [fault for fault in error.faults if fault not in self.faults]  # two may find the same

    def __getitem__(self, key: str) -> Any:
        """The value of a key; None where the config has no such key."""
        if not self.is_usable(key):
            raise Unusable(key)
        return self.value(key)

    def is_usable(self, key: str) -> bool:
        """Whether neither a setting nor a section that it is in has a fault."""
        return not any(faulty == key or key.startswith(f"{faulty}.") for faulty in self._faulty)

    def is_sound(self, section: str) -> bool:
        """Whether no setting of a section has a fault."""
        return not any(faulty.startswith(f"{section}.") for faulty in self._faulty)

    def value(self, key: str) -> Any:
        """The value of a key, faulty or not."""
        value = self.values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def has(self, key: str) -> bool:
        """Whether the config has a key, whatever its value."""
        section, _, name = key.rpartition(".")
        found = self.value(section) if section else self.values
        return isinstance(found, dict) and name in found

    def require(self, condition: bool, key: str, remedy: str) -> None:
        """Notes a fault of a key unless the condition holds; passwords in its addresses are not shown."""
        if not condition and key not in self._faulty:
            self._faulty.add(key)
            shown = f"{key}={shown_address(repr(self.value(key)))}" if self.has(key) else f"{key} is missing"
            self.faults.append(f"{shown}: {remedy}")
