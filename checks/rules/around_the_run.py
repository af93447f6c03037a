"""Loggers, the run's folder, and what a run goes on from."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from recipe.spin.checks.derived import ACTOR, compares_held_out
from recipe.spin.common.secrets import LOGGING, has_password, is_secret, judges_keys
from recipe.spin.common.settings import ConfigError, Settings
from recipe.spin.run_folder import TRACKER, nearest_existing

# Packages that verl's loggers import
LOGGER_PACKAGES = {name: name for name in ("wandb", "tensorboard", "mlflow", "swanlab", "clearml", "trackio")}


def loggers_are_installed(settings: Settings) -> None:
    names = settings["trainer.logger"]
    for name in [names] if isinstance(names, str) else names:
        package = LOGGER_PACKAGES.get(name)
        settings.require(
            package is None or find_spec(package) is not None,
            "trainer.logger",
            f"the package {package} is not installed; install it or leave {name} out",
        )


def the_run_folder_can_be_written(settings: Settings) -> None:
    key, folder = "trainer.default_local_dir", Path(settings["trainer.default_local_dir"]).absolute()
    existing = nearest_existing(folder)
    settings.require(existing.is_dir(), key, f"{existing} is no folder; name another folder (RUN_DIR)")
    if existing.is_dir():
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            settings.require(False, key, f"nothing can be written in {existing} ({error}); name another (RUN_DIR)")


def rays_files_go_with_the_run(settings: Settings) -> None:
    key = "ray_kwargs.ray_init._temp_dir"
    settings.require(
        settings[key] is None,
        key,
        "the run's own Ray has its files in the run's temporary folder, which is removed with it, and a cluster that "
        "is joined has them where it was started to; take it out, and set RAY_TMPDIR for another disk",
    )


def rays_variables_hold_no_secret(settings: Settings) -> None:
    key = "ray_kwargs.ray_init.runtime_env.env_vars"
    variables = settings[key]
    keys = judges_keys(settings["algorithm.judge.api_key_env"])
    names = variables if isinstance(variables, dict) else ()
    secrets = [name for name in names if is_secret(str(name)) or name in keys]
    if secrets:
        raise ConfigError(
            f"{key}.{secrets[0]}: Ray prints its runtime environment, logs it and shows it in its dashboard, so no "
            "secret may stand there. Take it out, and set the variable in the environment: of this command, for a run "
            f"on one machine and for the keys of {', '.join(f'{name}*' for name in LOGGING)}; else on each node before "
            "`ray start` (docs/clusters.md)"
        )


def the_proxy_of_wandb_holds_no_password(settings: Settings) -> None:
    if has_password(str(settings["trainer.wandb_proxy"])):
        raise ConfigError(
            "trainer.wandb_proxy holds a password, which would be logged with the settings: take it out, and set "
            "WANDB_HTTPS_PROXY in this command's environment"
        )


def an_evaluation_has_a_reward(settings: Settings) -> None:
    """A judge compares answers with those before training, and an evaluation has none before it."""
    settings.require(
        not settings["trainer.val_only"] or not compares_held_out(settings),
        "trainer.val_only",
        "the source of preferences says what answers are worth beside those before training, which an evaluation does "
        "not have; name a reward function (REWARD_PATH) or a reward model",
    )


def an_evaluation_finishes_no_run(settings: Settings) -> None:
    """It ends with a summary, by which the run of its folder would count as finished."""
    folder = Path(settings["trainer.default_local_dir"])
    settings.require(
        not settings["trainer.val_only"] or not (folder / TRACKER).exists(),
        "trainer.val_only",
        f"{folder} holds a training run; name another folder (RUN_DIR), and the checkpoint's actor/huggingface as "
        "model (MODEL_PATH)",
    )


def a_path_to_resume_from_is_there(settings: Settings) -> None:
    path = settings["trainer.resume_from_path"]
    settings.require(
        settings["trainer.resume_mode"] != "resume_path"
        or (path is not None and "global_step_" in path and Path(path).is_dir()),
        "trainer.resume_from_path",
        "trainer.resume_mode=resume_path needs a folder global_step_N of a run; name one",
    )


def what_is_loaded_was_saved(settings: Settings) -> None:
    """A resumed run looks for all of load_contents in its checkpoint; without the model it would begin anew."""
    if settings["trainer.save_freq"] <= 0:
        return
    key = f"{ACTOR}.checkpoint"
    saved, loaded = settings[f"{key}.save_contents"], settings[f"{key}.load_contents"]
    if missing := [part for part in loaded if part not in saved]:
        settings.require(
            False,
            f"{key}.save_contents",
            f"a run that goes on would look for {missing[0]} in the checkpoint; add it, or take it out of "
            f"{key}.load_contents as well",
        )
    settings.require("model" in loaded, f"{key}.load_contents", "a run would go on from the first model; add model")


RULES = (
    loggers_are_installed,
    what_is_loaded_was_saved,
    the_run_folder_can_be_written,
    rays_files_go_with_the_run,
    rays_variables_hold_no_secret,
    the_proxy_of_wandb_holds_no_password,
    an_evaluation_has_a_reward,
    an_evaluation_finishes_no_run,
    a_path_to_resume_from_is_there,
)
