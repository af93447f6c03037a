"""Whether the host's memory and the disk suffice for a run by the estimate of memory.py."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path

import psutil
from omegaconf import DictConfig

from recipe.spin.checks import memory
from recipe.spin.checks.derived import ACTOR
from recipe.spin.checks.finding import FAIL, OK, WARN, Finding, gigabytes
from recipe.spin.checks.fit import BYTES, layout_of
from recipe.spin.checks.memory import Model
from recipe.spin.checks.model_files import weight_bucket
from recipe.spin.run_folder import checkpoints, nearest_existing

SAVE_CONTENTS = f"{ACTOR}.checkpoint.save_contents"
SHARED_MEMORY = "/dev/shm"
NCCL_SHARED_MEMORY = 1e9  # what NVIDIA's documentation of NCCL advises to give a container (docker's --shm-size=1g)
OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Files of a cgroup's limit and of what it holds, and what of that are pages of files, which the kernel gives up, by
# cgroups' version
CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


def available_memory() -> float:
    """Bytes that processes may still take: the machine's, or what the limit of a container or a job leaves of them."""
    return min([psutil.virtual_memory().available, *_left_by_limits()])


def _left_by_limits() -> Iterator[float]:
    """Bytes that this process's cgroup, and each that it lies in, leaves where it has a limit.

    A container may be told its path on the host, and see its own cgroup at the top of all.
    """
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (CGROUPS / "memory", CGROUP_FILES[1]) if controllers else (CGROUPS, CGROUP_FILES[2])
        names = Path(path).parts[1:]
        for depth in range(len(names) + 1):
            yield from _left(top.joinpath(*names[:depth]), *files)


def _left(cgroup: Path, limit: str, held: str, of_files: tuple[str, str]) -> list[float]:
    """Bytes that a cgroup leaves; [] without a limit, or where it is not to be seen."""
    most = _read(cgroup / limit)
    if not most.isdigit():
        return []
    counts = dict(line.split() for line in _read(cgroup / "memory.stat").splitlines())
    return [int(most) - int(_read(cgroup / held) or 0) + sum(int(counts.get(name, 0)) for name in of_files)]


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def check_host_memory(config: DictConfig, model: Model) -> Finding:
    """Of this machine, while its ranks load the model, or with what waits on the host; without GPUs with all that runs.

    Too little for the latter is a warning: it is a measurement of one run, carried over to others.
    """
    ranks, cpu = config.trainer.n_gpus_per_node, config.trainer.device == "cpu"
    needed = memory.cpu_bytes(model, ranks) if cpu else memory.host_bytes(model, layout_of(config), ranks)
    there = available_memory()
    figures = {"needed": needed, "there": there}
    who = f"{ranks} rank{'s' * (ranks > 1)} take{'s' * (ranks == 1)}"
    text = f"{gigabytes(there)} GB of host memory are free, and {who} an estimated {gigabytes(needed)} GB"
    if needed <= there:
        return Finding("host memory", OK, text, figures)
    if cpu:
        remedy = "Ray ends processes when memory runs short; close other programs, or take a smaller model"
        return Finding("host memory", WARN, f"{text}; {remedy}", figures)
    why = " (each loads the whole model in fp32, for its embeddings are tied)" if model.tied and ranks > 1 else ""
    remedy = "use a machine with more memory or fewer GPUs of it (trainer.n_gpus_per_node)"
    shards_alone = replace(layout_of(config), gathers_on_host=False)
    if not shards_alone.lora_rank and memory.host_bytes(model, shards_alone, ranks) <= there:
        remedy += f", or leave hf_model, for which one rank gathers all weights, out of {SAVE_CONTENTS}"
    return Finding("host memory", FAIL, f"{text}{why}; {remedy}", figures)


def free_shared_memory() -> int:
    """Bytes; 0 where the machine has none."""
    return shutil.disk_usage(SHARED_MEMORY).free if Path(SHARED_MEMORY).is_dir() else 0


def check_shared_memory(config: DictConfig) -> Finding:
    """Room for what ranks and vLLM exchange there; a container has 64 MB unless it is given more.

    On a CPU each rank's bucket of weights lies there, and a write beyond the room kills the process. On GPUs NCCL takes
    some for several ranks, how much depends on the machine: too little there is a warning.
    """
    ranks, there = config.trainer.n_gpus_per_node, free_shared_memory()
    if config.trainer.device == "cpu":
        needed, who = ranks * weight_bucket(config) * 2**20, "weights on their way to vLLM take"
    else:
        needed, who = NCCL_SHARED_MEMORY if ranks > 1 else 0, "NCCL should have"
    figures = {"needed": needed, "there": there}
    text = f"{there / 1e6:.0f} MB of shared memory are free in {SHARED_MEMORY}"
    if needed <= there:
        return Finding("shared memory", OK, text, figures)
    remedy = "give the container more (docker's --shm-size=2g; in Kubernetes an emptyDir with medium: Memory)"
    verdict = FAIL if config.trainer.device == "cpu" else WARN
    return Finding("shared memory", verdict, f"{text}, and {who} {needed / 1e6:.0f} MB; {remedy}", figures)


def check_disk(config: DictConfig, model: Model) -> Finding:
    """Room for the run's checkpoints: those that are kept, and the one that is written before the oldest goes."""
    trainer, actor = config.trainer, config.actor_rollout_ref.actor
    folder = Path(trainer.default_local_dir).absolute()
    if trainer.save_freq <= 0:
        return Finding("disk", OK, "no checkpoints are saved (trainer.save_freq)")
    refreshed = trainer.ref_update_freq > 0
    reference = BYTES[config.actor_rollout_ref.ref.fsdp_config.model_dtype or "bf16"] if refreshed else 0
    lora_rank = config.actor_rollout_ref.model.lora_rank
    size = memory.checkpoint_bytes(model, list(actor.checkpoint.save_contents), reference, lora_rank)
    count = (trainer.max_actor_ckpt_to_keep or 1) + 1
    if steps := trainer.total_training_steps:
        count = min(count, ceil(steps / trainer.save_freq))
    missing = max(count - len(checkpoints(folder)), 1) if folder.is_dir() else count
    needed, there = missing * size, shutil.disk_usage(nearest_existing(folder)).free
    figures = {"needed": needed, "there": there, "checkpoint": size, "checkpoints": missing}
    text = f"{gigabytes(there)} GB are free for trainer.default_local_dir={str(folder)!r}, and {missing} more "
    text += f"{'checkpoint' if missing == 1 else 'checkpoints'} of {gigabytes(size)} GB must fit"
    if needed <= there:
        return Finding("disk", OK, text, figures)
    remedy = "free some, name another folder, lower trainer.max_actor_ckpt_to_keep, or leave hf_model out "
    return Finding("disk", FAIL, f"{text}; {remedy}of {SAVE_CONTENTS}", figures)
