"""Whether the machine can carry a run, looked at before Ray starts: the order of the checks, and its cores.

Each check gives a Finding. check_config refuses a run with all that FAIL; the doctor prints all. gpu.py looks at driver
and compiler, fit.py at the memory of GPUs, host.py at that of the host and at the disk.
"""

import sys
from collections.abc import Iterator

import torch
from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.finding import FAIL, HINT, OK, WARN, Finding
from recipe.spin.checks.fit import check_device_memory, load_shape, spare_memory
from recipe.spin.checks.gpu import (
    Device,
    check_compiler,
    check_devices,
    check_driver,
    check_system,
    check_toolkit,
    devices,
)
from recipe.spin.checks.host import check_disk, check_host_memory, check_shared_memory
from recipe.spin.common.ray_address import joins_cluster
from recipe.spin.common.settings import Settings

UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
CPUS_A_RANK = 3  # verl's placement groups hold so many for each GPU (ResourcePoolManager.max_colocate_count)


# What driver, GPUs and compiler are looked at for, and what cores
CLUSTER = ("ray_kwargs.ray_init.address", "trainer.device", "trainer.nnodes")
CORES = (
    *CLUSTER,
    "ray_kwargs.ray_init.num_cpus",
    "reward.reward_model.enable",
    "reward.reward_model.enable_resource_pool",
    "reward.reward_model.n_gpus_per_node",
    "reward.reward_model.nnodes",
    "trainer.n_gpus_per_node",
    UNITS,
)


def machine_faults(settings: Settings) -> list[str]:
    """All reasons why this machine cannot carry the run that the settings describe; prints doubts and hints.

    Of settings that have faults only cores, driver and compiler are looked at, as far as they say what is needed: what
    memory and disk such a run would take is not known.
    """
    faults = []
    for finding in _despite_faults(settings) if settings.faults else findings(settings.config):
        if finding.verdict == FAIL:
            faults.append(finding.text)
        elif finding.verdict == WARN:
            sys.stderr.write(f"[spin] warning: {finding.text}\n")
        elif finding.verdict == HINT:
            sys.stderr.write(f"[spin] {finding.text}\n")
    return faults


def findings(config: DictConfig) -> Iterator[Finding]:
    """All checks that apply to the run, the quick ones first."""
    if not joins_cluster(config):
        yield check_cores(config)
    if not _is_only_a_head(config):
        yield check_shared_memory(config)
    gpus = None
    if config.trainer.device == "cuda" and not _is_only_a_head(config):
        gpus = devices()
        yield check_system()
        yield check_driver(gpus)
        yield check_devices(config, gpus)
        yield check_compiler()
        yield check_toolkit(config, gpus)
    if config.trainer.check_memory:
        yield from _estimates(config, gpus)


def _despite_faults(settings: Settings) -> Iterator[Finding]:
    config = settings.config
    if all(map(settings.is_usable, CORES)) and not joins_cluster(config):
        yield check_cores(config)
    if all(map(settings.is_usable, CLUSTER)) and config.trainer.device == "cuda" and not _is_only_a_head(config):
        yield check_system()
        yield check_driver(devices())
        yield check_compiler()


def _estimates(config: DictConfig, gpus: list[Device] | None) -> Iterator[Finding]:
    model, doubt = load_shape(config)
    if model is None:
        yield Finding("model's size", WARN, f"memory and disk were not checked: {doubt}")
        return
    yield check_disk(config, model)
    if _is_only_a_head(config):
        return
    yield check_host_memory(config, model)
    if config.trainer.device == "cuda":
        yield check_device_memory(config, model, gpus or [])
        yield from spare_memory(config, model, gpus or [])


def _is_only_a_head(config: DictConfig) -> bool:
    """Whether the GPUs are on the cluster's other machines, so that this one says nothing about them."""
    return joins_cluster(config) and torch.cuda.device_count() == 0


# ---- Cores -----------------------------------------------------------------------------------------------------------
def cpus_needed(config: DictConfig) -> int:
    """The CPUs that a run asks Ray for; with fewer it would wait for ever, and say nothing.

    TransferQueue's controller and storage units hold 1 each, the TaskRunner 1, every rank 3; all other actors hold
    none, but Ray wants 1 free where it places one.
    """
    reward = config.reward.reward_model
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if reward.enable and reward.enable_resource_pool:
        ranks += reward.nnodes * reward.n_gpus_per_node
    return 1 + OmegaConf.select(config, UNITS) + 1 + CPUS_A_RANK * ranks + 1


def check_cores(config: DictConfig) -> Finding:
    """Of the Ray cluster that the run will start."""
    from ray._private.utils import get_num_cpus  # heeds a container's quota

    there = config.ray_kwargs.ray_init.num_cpus or get_num_cpus(override_docker_cpu_warning=True)
    return judge_cores(config, there, "this machine's Ray will have")


def judge_cores(config: DictConfig, there: int, who: str) -> Finding:
    """Whether so many CPUs are enough; `who` begins a sentence that goes on with their number."""
    needed = cpus_needed(config)
    figures = {"needed": needed, "there": there}
    if there >= needed:
        return Finding("CPU cores", OK, f"{who} {there} CPUs; the run asks for {needed}", figures)
    units = OmegaConf.select(config, UNITS)
    fewer = f"lower {UNITS}={units}, " if units > 1 else ""
    return Finding(
        "CPU cores",
        FAIL,
        f"{who} {there} CPUs, and the run asks for {needed} (TransferQueue {1 + units}, the TaskRunner 1, each rank "
        f"{CPUS_A_RANK}, 1 to place others): it would wait for ever; {fewer}use fewer GPUs, or let processes share "
        f"cores with ray_kwargs.ray_init.num_cpus={needed} (on a cluster: `ray start --num-cpus=...`)",
        figures,
    )
