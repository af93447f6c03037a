"""Settings that name files: made absolute, `~` in them too, and names that no file can have."""

import os
from collections.abc import Iterable

from omegaconf import DictConfig, ListConfig, OmegaConf

from recipe.spin.common.settings import Settings

MODEL, REWARD = "actor_rollout_ref.model", "reward"
# Folders, or names on the hub
MODELS = (
    f"{MODEL}.path",
    f"{MODEL}.tokenizer_path",
    f"{MODEL}.lora_adapter_path",
    f"{REWARD}.reward_model.model_path",
)
PATHS = (
    *MODELS,
    f"{REWARD}.custom_reward_function.path",
    f"{REWARD}.reward_manager.module.path",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
    "algorithm.judge.prompt",
    "data.custom_cls.path",
    "data.train_files",
    "data.val_files",
    "trainer.default_local_dir",
    "trainer.resume_from_path",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
)
PARTS = f"{REWARD}.custom_reward_function.reward_kwargs.functions"  # of preferences/weighted.py, each with a path


def make_absolute(config: DictConfig) -> None:
    """Makes all settings of a resolved config that name files absolute.

    Shells expand no `~` within KEY=~/x, and the processes of a cluster that is joined are in the folder of its start.
    """
    parts = OmegaConf.select(config, PARTS)
    for key in _keys(parts if isinstance(parts, DictConfig) else ()):
        value = OmegaConf.select(config, key)  # None too where a section is null, which check_config tells
        if isinstance(value, str | ListConfig):
            OmegaConf.update(config, key, _absolute(value, key in MODELS))


def files_read(config: DictConfig) -> list[str]:
    """The files and folders that a run reads, of a config that make_absolute has seen, as far as they are there."""
    parts = OmegaConf.select(config, PARTS)
    keys = [key for key in _keys(parts or ()) if not key.startswith("trainer.")]
    values = [OmegaConf.select(config, key) for key in keys]
    names = [name for value in values for name in (value if isinstance(value, ListConfig) else [value])]
    return [name for name in names if isinstance(name, str) and os.path.isabs(name) and os.path.exists(name)]


def names_can_be_looked_up(settings: Settings) -> None:
    """A name that is too long, or leads through a folder that may not be entered, is a fault of its key."""
    parts = settings.value(PARTS)
    for key in _keys(parts if isinstance(parts, dict) else ()):
        value = settings.value(key)
        for name in value if isinstance(value, list) else [value]:
            fault = _fault(name) if isinstance(name, str) else None
            settings.require(not fault, key, f"no file can be looked for by this name ({fault}); correct it")


def _fault(name: str) -> str | None:
    """Why the system refuses to look for a file; None where it finds it, or finds that it is not there."""
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        return error.strerror
    return None


def _keys(parts: Iterable[str]) -> list[str]:
    return [*PATHS, *(f"{PARTS}.{name}.path" for name in parts)]


def _absolute(value, of_a_model: bool):
    if isinstance(value, ListConfig):
        return [_absolute(one, of_a_model) for one in value]
    if not isinstance(value, str) or not value or "://" in value:
        return value
    path = os.path.expanduser(value)
    # A user who is not there, and names on the hub
    if path.startswith("~") or (of_a_model and not os.path.exists(path)):
        return path
    return os.path.abspath(path)
