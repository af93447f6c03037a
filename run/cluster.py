"""The Ray cluster of a run: one of its own on this machine, or one that it joins."""

import os
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from omegaconf import DictConfig, open_dict

from recipe.spin import verl_patches
from recipe.spin.common.ray_address import cluster_address, joins_cluster
from recipe.spin.common.secrets import LOGGING, is_secret, judges_keys
from recipe.spin.rollout.weights import ONE_MACHINE, RUN_NAME

# What processes on other nodes need of the driver's environment; those of this machine inherit it
PASSED_ON = ("GLOO_", "HF_", "MALLOC_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_", "TRANSFORMERS_", "VERL_", "VLLM_")
OF_A_NODE = ("VLLM_HOST_IP",)
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

# Set by Ray for a job that is handed in (ray job submit, RayJob). Its variables are in this process, and so among those
# passed on, which Ray refuses to be told twice
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Ray's control service keeps an entry for each of so many task and actor calls, for a dashboard that no run has:
# 100,000 of its own accord, with which it gains 0.17 MB in each step of a tiny model
CALLS_KEPT, CALLS_KEPT_BY_A_RUN = "RAY_task_events_max_num_task_in_gcs", "1000"


def prepare(config: DictConfig) -> bool:
    """Completes `ray_kwargs.ray_init` for this run; returns whether it joins a cluster.

    The run gets a name, which is its namespace in Ray and tells its sockets from those of other runs.
    """
    ray_init = config.ray_kwargs.ray_init
    name = f"spin-{uuid4().hex[:8]}"
    with open_dict(config):
        ray_init.address = cluster_address(config)
        ray_init.setdefault("namespace", name)
        variables = {RUN_NAME: name, LOG_LEVEL: os.environ.get(LOG_LEVEL, "WARNING")}
        joined = joins_cluster(config)
        if joined:
            for key in ("num_cpus", "num_gpus", "object_store_memory"):  # the cluster's own, which a joiner cannot set
                ray_init.pop(key, None)
            variables |= passed_on(dict(os.environ), judges_keys(config.algorithm.judge.api_key_env))
            if SUBMITTED in os.environ:
                os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
            _warn_where_nobody_is_kept_out(ray_init.address)
        else:
            keep_to_loopback()
            os.environ.setdefault(CALLS_KEPT, CALLS_KEPT_BY_A_RUN)
            os.environ["PYTHONPATH"] = _worker_path(dict(os.environ))
        runtime_env = ray_init.setdefault("runtime_env", {})
        runtime_env.env_vars = variables | dict(runtime_env.get("env_vars") or {})
    return joined


def _warn_where_nobody_is_kept_out(address: str) -> None:
    """Ray asks for a token in this mode, or on a cluster that it finds itself where a token lies ready."""
    mode = os.environ.get("RAY_AUTH_MODE")
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    lies_ready = address == "auto" and (named or os.path.exists(os.path.expanduser("~/.ray/auth_token")))
    if (mode or "").lower() != "token" and (mode is not None or not lies_ready):
        sys.stderr.write(
            f"[spin] warning: the Ray cluster ({address}) is joined without a token: whoever reaches its ports can run "
            "code on its nodes; set RAY_AUTH_MODE=token on all of them and here (docs/clusters.md)\n"
        )


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


def logging_settings(environment: dict[str, str], run: Path) -> dict[str, str]:
    """The variables, keys among them, of the services that metrics are logged to.

    TensorBoard's files are the run's, unless the user says where: verl puts those of all runs into one folder.
    """
    given = {name: value for name, value in environment.items() if name.startswith(LOGGING)}
    return {"TENSORBOARD_DIR": str(run.absolute() / "tensorboard"), **given}


def keep_to_loopback() -> None:
    """Makes Ray, TransferQueue, vLLM, gloo and NCCL of a run on one machine listen on loopback alone."""
    for name, value in ON_LOOPBACK.items():
        os.environ.setdefault(name, value)
    verl_patches.keep_ray_on_loopback()
