"""The Ray cluster of a run: one of its own on this machine, or one that it joins."""

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from omegaconf import DictConfig, open_dict

from recipe.spin.common.secrets import has_password, is_secret
from recipe.spin.common.settings import ConfigError
from recipe.spin.rollout.weights import ONE_MACHINE, RUN_NAME

# What processes on other nodes need of the driver's environment; those of this machine inherit it
PASSED_ON = ("GLOO_", "HF_", "MALLOC_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_", "TRANSFORMERS_", "VERL_", "VLLM_")
OF_A_NODE = ("VLLM_HOST_IP",)
# What the services want that metrics are logged to; only the process that drives the run talks to them
LOGGING = ("CLEARML_", "MLFLOW_", "MLP_", "SWANLAB_", "TENSORBOARD_", "TRACKIO_", "VOLC_", "WANDB_")
# A package of vLLM's sets the root logger and its handlers to this level, ERROR without it, in every process that
# imports vLLM: warnings of the recipe, and of a user's reward, would be lost there
LOG_LEVEL = "SAGEMAKER_CONTAINER_LOG_LEVEL"

# Nothing of a run on one machine listens on the network, unless the user names an interface
ON_LOOPBACK = {
    ONE_MACHINE: "1",
    # Ray's own switch for systems whose firewall asks about every listening process
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}


def address(config: DictConfig) -> str:
    """The address of the cluster that a run joins; "local" for one that it starts for itself."""
    named = config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")
    return named or ("auto" if config.trainer.nnodes > 1 else "local")


def joins(config: DictConfig) -> bool:
    """Whether the run joins a Ray cluster that is there, rather than start its own."""
    return address(config) != "local"


def prepare(config: DictConfig) -> bool:
    """Completes `ray_kwargs.ray_init` for this run; returns whether it joins a cluster.

    The run gets a name, which is its namespace in Ray and tells its sockets from those of other runs.

    Raises:
        ConfigError: when secrets stand among the settings that Ray or a logger would show.
    """
    check_secrets(config)
    ray_init = config.ray_kwargs.ray_init
    name = f"spin-{uuid4().hex[:8]}"
    with open_dict(config):
        ray_init.address = address(config)
        ray_init.setdefault("namespace", name)
        variables = {RUN_NAME: name, LOG_LEVEL: os.environ.get(LOG_LEVEL, "WARNING")}
        joined = joins(config)
        if joined:
            for key in ("num_cpus", "num_gpus", "object_store_memory"):  # the cluster's own, which a joiner cannot set
                ray_init.pop(key, None)
            variables |= passed_on(dict(os.environ), _judges_keys(config))
        else:
            keep_to_loopback()
            os.environ["PYTHONPATH"] = _worker_path(dict(os.environ))
        runtime_env = ray_init.setdefault("runtime_env", {})
        runtime_env.env_vars = variables | dict(runtime_env.get("env_vars") or {})
    return joined


def check_secrets(config: DictConfig) -> None:
    """Raises ConfigError where a secret is a variable of Ray's runtime environment, or part of wandb's proxy."""
    variables = (config.ray_kwargs.ray_init.get("runtime_env") or {}).get("env_vars") or {}
    secrets = [name for name in variables if is_secret(name) or name in _judges_keys(config)]
    if secrets:
        raise ConfigError(
            f"ray_kwargs.ray_init.runtime_env.env_vars.{secrets[0]}: Ray prints its runtime environment, logs it and "
            "shows it in its dashboard, so no secret may stand there. Take it out, and set the variable in the "
            "environment: of this command, for a run on one machine and for the keys of "
            f"{', '.join(f'{name}*' for name in LOGGING)}; else on each node before `ray start` (docs/clusters.md)"
        )
    if has_password(str(config.trainer.get("wandb_proxy"))):
        raise ConfigError(
            "trainer.wandb_proxy holds a password, which would be logged with the settings: take it out, and set "
            "WANDB_HTTPS_PROXY in this command's environment"
        )


def _judges_keys(config: DictConfig) -> set[str]:
    """The variables that hold the keys to judges, whatever they are called."""
    named = config.algorithm.judge.api_key_env
    return {named} if isinstance(named, str) else set(named or ())


def passed_on(environment: dict[str, str], keys: Collection[str] = ()) -> dict[str, str]:
    """The part of the driver's environment that the processes of other nodes get.

    No secrets, by their names or named in `keys`: Ray prints and stores its runtime environment.
    """
    found = {
        name: value
        for name, value in environment.items()
        if name.startswith(PASSED_ON) and name not in OF_A_NODE and not is_secret(name) and name not in keys
    }
    return found | {"PYTHONPATH": _worker_path(environment)}


def _worker_path(environment: dict[str, str]) -> str:
    return os.pathsep.join(import_paths(environment.get("PYTHONPATH", "")))


def import_paths(pythonpath: str) -> list[str]:
    """Where workers look for modules, as the driver does, in absolute paths: they may run in other folders.

    The driver's PYTHONPATH with the folder that holds the package `recipe` before it unless it is installed, and last
    the script's folder and that of the call (`python -m`) where the driver looks there.
    """
    paths = [os.path.abspath(path) for path in pythonpath.split(os.pathsep) if path]
    folder = str(Path(next(iter(find_spec("recipe.spin").submodule_search_locations))).absolute().parents[1])
    if folder not in paths and Path(folder).name != "site-packages":
        paths.insert(0, folder)
    looked_in = {os.path.abspath(path) for path in sys.path}
    of_the_command = (os.path.dirname(os.path.realpath(sys.argv[0])), os.getcwd())
    return list(dict.fromkeys([*paths, *(path for path in of_the_command if path in looked_in)]))


@contextmanager
def without_folder_of_the_call() -> Iterator[None]:
    """Lets workers import by `import_paths` alone. Held around verl's run_ppo, which calls `ray.init`.

    It would put the folder of the call before all others, and a `recipe/spin` in there, which older trees of verl have,
    would be run in place of this one. Ray leaves it out where it is told of a working folder, and has no other switch.
    """
    from ray.job_config import JobConfig

    original = JobConfig._runtime_env_has_working_dir
    JobConfig._runtime_env_has_working_dir = lambda job: True
    try:
        yield
    finally:
        JobConfig._runtime_env_has_working_dir = original


def logging_settings(environment: dict[str, str], run: Path) -> dict[str, str]:
    """The variables, keys among them, of the services that metrics are logged to.

    TensorBoard's files are the run's, unless the user says where: verl puts those of all runs into one folder.
    """
    given = {name: value for name, value in environment.items() if name.startswith(LOGGING)}
    return {"TENSORBOARD_DIR": str(run.absolute() / "tensorboard"), **given}


def keep_to_loopback() -> None:
    """Makes Ray, TransferQueue, vLLM, gloo and NCCL of a run on one machine listen on loopback alone."""
    from ray._private import ray_constants

    for name, value in ON_LOOPBACK.items():
        os.environ.setdefault(name, value)
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read its switch when Hydra, looking for verl's config, imported it
