"""Paths that begin with `~`, which no shell expands within KEY=~/x: once, and before anything reads the settings."""

import os

from omegaconf import DictConfig, ListConfig, OmegaConf

MODEL, REWARD = "actor_rollout_ref.model", "reward"
PATHS = (
    f"{MODEL}.path",
    f"{MODEL}.tokenizer_path",
    f"{MODEL}.lora_adapter_path",
    f"{REWARD}.reward_model.model_path",
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


def expand_home(config: DictConfig) -> None:
    """Puts the user's folder in place of `~` in all settings of a resolved config that name files."""
    parts = OmegaConf.select(config, PARTS)
    parts = [f"{PARTS}.{name}.path" for name in parts] if isinstance(parts, DictConfig) else []
    for key in (*PATHS, *parts):
        value = OmegaConf.select(config, key)  # None too where a section is null, which check_config tells
        if isinstance(value, str | ListConfig):
            OmegaConf.update(config, key, _expanded(value))


def _expanded(value):
    if isinstance(value, ListConfig):
        return [_expanded(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value
