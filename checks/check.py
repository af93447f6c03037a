"""Checks of the settings, the data and the model before Ray starts: all faults in one message, each with its remedy.

schema.py says what each setting may be, rules/ what ties settings together, and model_files.py, reward_file.py and
data_files.py look at the files that the settings name. machine.py looks at what the run would need.
"""

from omegaconf import DictConfig

from recipe.spin.checks.data_files import check_data
from recipe.spin.checks.machine import machine_faults
from recipe.spin.checks.model_files import check_model, the_source_can_use_the_model
from recipe.spin.checks.paths import names_can_be_looked_up
from recipe.spin.checks.reward_file import check_reward
from recipe.spin.checks.rules import RULES
from recipe.spin.checks.schema import check_kinds
from recipe.spin.common.settings import ConfigError, Settings


def check_settings(config: DictConfig) -> None:
    """Raises ConfigError with what settings and the reward alone show, before a model is fetched for the run."""
    settings = Settings(config)
    check_kinds(settings)
    settings.run(names_can_be_looked_up, *RULES, check_reward)
    if settings.faults:
        raise ConfigError(*settings.faults)


def check_config(config: DictConfig) -> None:
    """Raises ConfigError with everything in the composed config that could not work.

    Looks at the recipe's keys, at verl's keys that the recipe relies on, and at the files they name; starts neither
    verl nor Ray.
    """
    settings = Settings(config)
    check_kinds(settings)
    settings.run(names_can_be_looked_up, *RULES)
    settings.run(check_model, the_source_can_use_the_model, check_reward, check_data)
    if faults := settings.faults + machine_faults(settings):
        raise ConfigError(*faults)
