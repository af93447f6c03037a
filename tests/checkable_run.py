"""A run that check_config accepts, for the tests that spoil one thing of it."""

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import httpx
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from worker_harness import compose

from recipe.spin.checks.check import check_config
from recipe.spin.common.settings import ConfigError

NOT_COMPOSED = (HydraException, OmegaConfBaseException)
SUM = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"


def row(number: int) -> dict:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
    }


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_classifier(model: str, folder: Path) -> Path:
    """A copy of a model that says it is a sequence classifier."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    return folder


@cache
def composed(device: str) -> DictConfig:
    return compose(device=device)


def override(config: DictConfig, overrides: list[str]) -> DictConfig:
    """What composing with the overrides gives, by Hydra's own parser; composing takes ten times as long."""
    config = copy.deepcopy(config)
    for change in OverridesParser.create().parse_overrides(overrides):
        if change.is_delete():
            take_out(config, change.key_or_group)
        else:
            OmegaConf.update(config, change.key_or_group, change.value(), force_add=change.is_add())
    return config


def take_out(config: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    section = OmegaConf.select(config, section) if section else config
    with open_dict(section):
        del section[name]


def hub_without_network(name: str, timeout: float):
    """Stands for huggingface_hub.model_info: knows what the hub lacks, and does not answer for what it has."""
    if name in ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct"):
        raise httpx.ConnectError("no network")
    raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))


class Run:
    """A run that could start: a model, 8 prompts to train on and 4 held out, a reward."""

    def __init__(self, folder: Path, model: str):
        self.folder = folder
        (folder / "reward.py").write_text(SUM)
        self.settings = {
            "actor_rollout_ref.model.path": model,
            "data.train_files": write_rows(folder / "train.parquet", [row(number) for number in range(8)]),
            "data.val_files": write_rows(folder / "test.parquet", [row(number) for number in range(4)]),
            "data.train_batch_size": 4,
            "reward.custom_reward_function.path": str(folder / "reward.py"),
        }

    def overrides(self, *more: str) -> list[str]:
        replaced = {override.split("=")[0] for override in more}
        return [f"{key}={value}" for key, value in self.settings.items() if key not in replaced] + list(more)

    def check(self, *more: str, device: str = "cpu") -> DictConfig:
        config = self.composed(*more, device=device)
        check_config(config)
        return config

    def composed(self, *more: str, device: str = "cpu") -> DictConfig:
        return override(composed(device), self.overrides(*more))

    def refusal(self, *more: str, device: str = "cpu") -> str:
        """What the check says; of what cannot be composed Hydra says it."""
        try:
            config = self.composed(*more, device=device)
        except NOT_COMPOSED as error:
            return str(error)
        with pytest.raises(ConfigError) as caught:
            check_config(config)
        return str(caught.value)
