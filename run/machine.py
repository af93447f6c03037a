"""Whether the machine can carry a run: cores, driver, compiler, memory and disk, looked at before Ray starts.

Each check gives a Finding. check_config refuses a run at the first FAIL; the doctor prints them all.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import ceil, inf
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from recipe.spin.run import cluster, memory
from recipe.spin.run.memory import Layout, Model
from recipe.spin.run.rules import longest_row
from recipe.spin.run_folder import checkpoints

OK, WARN, FAIL = "ok", "warn", "FAIL"
ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
CPUS_A_RANK = 3  # verl's placement groups hold so many for each GPU (ResourcePoolManager.max_colocate_count)
# The oldest driver for the CUDA that torch was built with, by its major version (NVIDIA's CUDA compatibility guide)
DRIVERS = {11: 450, 12: 525, 13: 580}
BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
LORA_RANK, SMALL_MICRO_BATCH = 32, 4096  # that the advice names


@dataclass(frozen=True)
class Finding:
    """What a check found: `text` says it, with the remedy where the verdict is not ok; `figures` are for the record."""

    name: str
    verdict: str
    text: str
    figures: dict = field(default_factory=dict)


def first_fault(config: DictConfig) -> str | None:
    """Why this machine cannot carry the run that the resolved config describes; None when nothing speaks against it."""
    for finding in findings(config):
        if finding.verdict == FAIL:
            return finding.text
        if finding.verdict == WARN:
            sys.stderr.write(f"[spin] warning: {finding.text}\n")
    return None


def findings(config: DictConfig) -> Iterator[Finding]:
    """All checks that apply to the run, the quick ones first."""
    if not cluster.joins(config):
        yield check_cores(config)
    if config.trainer.device == "cuda" and not _is_only_a_head(config):
        yield check_driver()
        yield check_compiler()
    if config.trainer.check_memory:
        yield from _estimates(config)


def _estimates(config: DictConfig) -> Iterator[Finding]:
    model, doubt = load_shape(config)
    if model is None:
        yield Finding("model's size", WARN, f"memory and disk were not checked: {doubt}")
        return
    yield check_disk(config, model)
    if config.trainer.device == "cuda" and not _is_only_a_head(config):
        yield check_host_memory(config, model)
        yield check_device_memory(config, model, devices())


def _is_only_a_head(config: DictConfig) -> bool:
    """Whether the GPUs are on the cluster's other machines, so that this one says nothing about them."""
    return cluster.joins(config) and torch.cuda.device_count() == 0


# ---- Cores -----------------------------------------------------------------------------------------------------------
def cpus_needed(config: DictConfig) -> int:
    """The CPUs that a run asks Ray for; with fewer it would wait for ever, and say nothing.

    TransferQueue's controller and storage units hold 1 each, the TaskRunner 1, every rank 3; all other actors hold
    none, but Ray wants 1 free where it places one.
    """
    queue, reward = config.transfer_queue.backend, config.reward.reward_model
    units = queue.SimpleStorage.num_data_storage_units if queue.storage_backend == "SimpleStorage" else 0
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if reward.enable and reward.enable_resource_pool:
        ranks += reward.nnodes * reward.n_gpus_per_node
    return 1 + units + 1 + CPUS_A_RANK * ranks + 1


def check_cores(config: DictConfig) -> Finding:
    """Of the Ray cluster that the run will start."""
    return _cores(config, config.ray_kwargs.ray_init.num_cpus or os.cpu_count(), "this machine's Ray will have")


def check_cluster(config: DictConfig) -> Finding:
    """The same of the cluster that Ray is connected to, and that each node has what its ranks take."""
    import ray

    ranks = config.trainer.n_gpus_per_node
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = sum(node.get("CPU", 0) >= CPUS_A_RANK * ranks and node.get("GPU", 0) >= ranks for node in nodes)
    if fit < config.trainer.nnodes:
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        return Finding(
            "nodes",
            FAIL,
            f"trainer.nnodes={config.trainer.nnodes}, trainer.n_gpus_per_node={ranks}: so many nodes with {ranks} GPUs "
            f"and {CPUS_A_RANK * ranks} CPUs are needed, and the Ray cluster has nodes with {have}; start Ray on more "
            "machines, lower the two keys, or give `ray start` a larger --num-cpus",
        )
    return _cores(config, int(ray.cluster_resources().get("CPU", 0)), "the Ray cluster has")


def _cores(config: DictConfig, there: int, who: str) -> Finding:
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


# ---- What a GPU needs ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Device:
    """A GPU that the run may use; bytes."""

    name: str
    driver: str
    total: float
    free: float


def devices() -> list[Device]:
    """The visible GPUs, by nvidia-smi: CUDA itself would take memory of theirs. None where it has no answer."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free"]
    command += ["--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    if shutil.which(command[0]) is None:
        return []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rows = [line.split(", ") for line in answer.stdout.splitlines()]
    if answer.returncode != 0 or any(len(row) != 4 or not row[2].isdigit() for row in rows):
        return []  # a slice of a GPU (MIG), for one
    return [Device(name, driver, int(total) * 2**20, int(free) * 2**20) for name, driver, total, free in rows]


def check_driver() -> Finding:
    """Whether torch can use the GPUs, and if not, whether the driver is why."""
    built = torch.version.cuda
    driver = next((device.driver for device in devices()), None)
    figures = {"cuda": built, "driver": driver}
    if torch.cuda.is_available():
        return Finding("driver", OK, f"driver {driver or 'unknown'}, torch built for CUDA {built}", figures)
    if built is None:
        text = f"torch {torch.__version__} was built without CUDA; install the GPU profile (SPIN_PROFILE=gpu)"
        return Finding("driver", FAIL, text, figures)
    oldest = DRIVERS.get(int(built.split(".")[0]))
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        text = f"the NVIDIA driver is {driver}, and torch for CUDA {built} needs {oldest} or newer; install that driver"
        return Finding("driver", FAIL, text, figures)
    text = f"torch for CUDA {built} can use no GPU here (driver {driver or 'not found'})"
    return Finding("driver", FAIL, f"{text}; `nvidia-smi` and CUDA_VISIBLE_DEVICES say which there are", figures)


def check_compiler() -> Finding:
    """Triton compiles a small C program for every machine, against Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    missing = [] if compiler else ["a C compiler (gcc)"]
    missing += [] if headers.is_file() else [f"Python's headers ({headers})"]
    if missing:
        text = f"Triton needs {' and '.join(missing)}; install them (Debian, Ubuntu: apt-get install gcc {python}-dev)"
        return Finding("compiler", FAIL, text)
    return Finding("compiler", OK, f"{compiler}, {headers}")


def has_flash_attention_2() -> bool:
    """Whether flash-attn 2 is installed; version 4 has the same module's name and other functions."""
    try:
        return bool(find_spec("flash_attn")) and version("flash-attn").split(".")[0] == "2"
    except PackageNotFoundError:  # flash-attn-4
        return False


# ---- The model's size ------------------------------------------------------------------------------------------------
def load_shape(config: DictConfig) -> tuple[Model | None, str]:
    """The model's shape, or None and why there is none. A hub's config.json is fetched for GPUs alone."""
    from transformers import AutoConfig

    settings = config.actor_rollout_ref.model
    try:
        found = AutoConfig.from_pretrained(
            os.path.expanduser(settings.path),
            trust_remote_code=settings.trust_remote_code,
            local_files_only=config.trainer.device != "cuda",
        ).get_text_config()
    except (OSError, ValueError) as error:  # not downloaded, no network, unknown to transformers
        return None, f"actor_rollout_ref.model.path={settings.path!r}: {str(error).splitlines()[0]}"
    if any(getattr(found, name, None) is None for name in SHAPE) or any(getattr(found, name, 0) for name in EXPERTS):
        return None, f"actor_rollout_ref.model.path={settings.path!r}: {found.model_type} is not a dense transformer"
    return Model.of(found), ""


def layout_of(config: DictConfig) -> Layout:
    """How the run lays its model out."""
    actor, ref, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "ref", "rollout", "model"))
    fsdp = actor.fsdp_config
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    sequence = fsdp.ulysses_sequence_parallel_size
    row, answers, _ = longest_row(partial(OmegaConf.select, config))
    mini_batch = ceil(actor.ppo_mini_batch_size * sequence / ranks) * row / sequence
    if actor.use_dynamic_bsz:
        tokens = min(actor.ppo_max_token_len_per_gpu, mini_batch)
    else:
        tokens = min(actor.ppo_micro_batch_size_per_gpu * row / sequence, mini_batch)
    devices = ranks if fsdp.fsdp_size < 1 else min(fsdp.fsdp_size, ranks)
    deferred = devices > 1 and fsdp.use_no_sync_for_gradient_accumulation and mini_batch > tokens
    return Layout(
        devices=devices,
        tokens=tokens,
        logits=tokens * answers / row,
        compute_bytes=BYTES[(fsdp.get("mixed_precision") or {}).get("param_dtype", "bf16")],
        reference_bytes=BYTES[ref.fsdp_config.model_dtype or "bf16"],
        checkpointing=model.enable_gradient_checkpointing,
        whole_gradients=devices == 1 or deferred,
        param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload,
        offload_policy=fsdp.offload_policy,
        reference_offload=ref.fsdp_config.param_offload,
        lora_rank=model.lora_rank,
        plays_reference=takes_reference(config.algorithm),
        rollout_share=rollout.gpu_memory_utilization,
        rollout_devices=rollout.tensor_model_parallel_size,
        rollout_sleeps=rollout.free_cache_engine,
        bucket=rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20,
        longest=config.data.max_prompt_length + config.data.max_response_length,
    )


def takes_reference(algorithm: DictConfig) -> bool:
    """Whether vLLM takes the reference's weights: as the opponent, or as the judge."""
    source = algorithm.preference_source
    return source == "self_play" or (source == "judge" and "reference" in algorithm.judge.servers)


def smallest_micro_batch(config: DictConfig) -> float:
    """Tokens that ppo_max_token_len_per_gpu must allow; infinite where it has no say."""
    actor = config.actor_rollout_ref.actor
    row, _, _ = longest_row(partial(OmegaConf.select, config))
    return row / actor.fsdp_config.ulysses_sequence_parallel_size if actor.use_dynamic_bsz else inf


# ---- Memory of a device ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Remedy:
    """Settings that lower what a device holds, as they are typed, and what they make of a layout."""

    settings: str
    apply: Callable[[Layout], Layout]


def remedies(model: Model, layout: Layout, memory_bytes: float, row: float) -> list[Remedy]:
    """What can be set, the mildest first; `row` is the longest row's tokens, which a micro-batch must hold."""
    found = []
    least = ceil(20 * memory.rollout_need(model, layout) / memory_bytes) / 20  # by twentieths
    shares = [share for share in (0.4, 0.3, 0.2) if least <= share < layout.rollout_share]
    for share in [least] if layout.rollout_share < least < 1 else shares:
        found.append(_set(f"{ROLLOUT}.gpu_memory_utilization={share:g}", rollout_share=share))
    if layout.whole_gradients and layout.devices > 1:
        key = f"{ACTOR}.fsdp_config.use_no_sync_for_gradient_accumulation"
        found.append(_set(f"{key}=False", whole_gradients=False))
    tokens = max(row, SMALL_MICRO_BATCH)
    if tokens < layout.tokens:
        logits = tokens * layout.logits / layout.tokens
        found.append(_set(f"{ACTOR}.ppo_max_token_len_per_gpu={ceil(tokens)}", tokens=tokens, logits=logits))
    if not layout.reference_offload and not layout.lora_rank:
        found.append(_set(f"{REF}.fsdp_config.param_offload=True", reference_offload=True))
    if not layout.optimizer_offload:
        found.append(_set(f"{ACTOR}.fsdp_config.optimizer_offload=True", optimizer_offload=True))
    if not layout.param_offload:
        found.append(_set(f"{ACTOR}.fsdp_config.param_offload=True", param_offload=True))
    if layout.rollout_devices == 1 and layout.devices % 4 == 0:
        found.append(_set(f"{ROLLOUT}.tensor_model_parallel_size=4", rollout_devices=4))
    if not layout.lora_rank and not layout.plays_reference:
        settings = f"actor_rollout_ref.model.lora_rank={LORA_RANK} trainer.ref_update_freq=0"
        found.append(_set(settings, lora_rank=LORA_RANK))
    return found


def _set(settings: str, **changes) -> Remedy:
    return Remedy(settings, lambda layout: replace(layout, **changes))


def highest(model: Model, layout: Layout, memory_bytes: float) -> float:
    """Bytes of a device in the phase that takes most."""
    return max(memory.peaks(model, layout, memory_bytes).values())


def fits(model: Model, layout: Layout, memory_bytes: float, free: float) -> bool:
    """Whether a device with so much memory, of which so much is free, holds the run."""
    return highest(model, layout, memory_bytes) <= free and rollout_fits(model, layout, memory_bytes)


def fitting(
    model: Model, layout: Layout, memory_bytes: float, row: float, free: float | None = None
) -> tuple[list[str], Layout] | None:
    """The settings to add, and the layout then, with which a device holds the run; [] as it is, None for nothing helps.

    One remedy if one is enough, else as many as it takes, those left out again that are not missed.
    """
    device = (memory_bytes, memory_bytes if free is None else free)
    if fits(model, layout, *device):
        return [], layout
    known = remedies(model, layout, memory_bytes, row)
    tried = [[remedy] for remedy in known] + [known[:count] for count in range(2, len(known) + 1)]
    for chosen in tried:
        if not fits(model, _applied(layout, chosen), *device):
            continue
        for spare in chosen[::-1]:
            rest = [one for one in chosen if one is not spare]
            if fits(model, _applied(layout, rest), *device):
                chosen = rest
        return [remedy.settings for remedy in chosen], _applied(layout, chosen)
    return None


def _applied(layout: Layout, chosen: list[Remedy]) -> Layout:
    for remedy in chosen:
        layout = remedy.apply(layout)
    return layout


def rollout_fits(model: Model, layout: Layout, memory_bytes: float) -> bool:
    """Whether vLLM's share of a device holds its weights and one sequence."""
    return memory.rollout_need(model, layout) <= layout.rollout_share * memory_bytes


def check_device_memory(config: DictConfig, model: Model, found: list[Device]) -> Finding:
    """Whether the fullest phase fits the GPU with the least memory; with what would make it fit."""
    if not found:
        text = "the memory of GPUs was not checked: nvidia-smi did not say how much there is"
        return Finding("GPU memory", WARN, text)
    device = min(found[: config.trainer.n_gpus_per_node], key=lambda one: one.free)  # Ray hands them out in order
    layout = layout_of(config)
    phases = memory.peaks(model, layout, device.total)
    peak = max(phases.values())
    told = ", ".join(f"{phase} {_gb(value)}" for phase, value in phases.items())
    room = f"{_gb(device.free)} of {_gb(device.total)} GB are free on the {device.name}"
    figures = {"phases": phases, "parts": memory.training(model, layout)}
    figures |= {"total": device.total, "free": device.free, "name": device.name}
    enough = rollout_fits(model, layout, device.total)
    if enough and peak <= device.free:
        text = f"the run takes an estimated {_gb(peak)} GB of a GPU ({told}); {room}"
        return Finding("GPU memory", OK, text, figures)
    if not enough:
        share = f"{ROLLOUT}.gpu_memory_utilization={layout.rollout_share:g}"
        cause = f"{share} gives vLLM {_gb(layout.rollout_share * device.total)} GB, and it needs an estimated "
        cause += f"{_gb(memory.rollout_need(model, layout))} GB; {room}"
    else:
        cause = f"the run takes an estimated {_gb(peak)} GB of a GPU ({told}), and {room}"
    return Finding("GPU memory", FAIL, f"{cause}; {_advice(config, model, layout, device)}", figures)


def _advice(config: DictConfig, model: Model, layout: Layout, device: Device) -> str:
    row = smallest_micro_batch(config)
    single = [
        f"{remedy.settings} ({_gb(highest(model, remedy.apply(layout), device.total))} GB)"
        for remedy in remedies(model, layout, device.total, row)
    ]
    fit = fitting(model, layout, device.total, row, device.free)
    if fit is None:
        larger = f"{ROLLOUT}.tensor_model_parallel_size={2 * layout.rollout_devices}"
        return f"no setting makes it fit: use more GPUs (and {larger}), larger ones or a smaller model"
    settings, new = fit
    together = f"{' '.join(settings)} makes it {_gb(highest(model, new, device.total))} GB"
    return f"{together}; by themselves: {', '.join(single)}; trainer.check_memory=False leaves the estimate out"


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


# ---- Memory of the host, and disk ------------------------------------------------------------------------------------
def available_memory() -> float:
    """Bytes that processes may still take: the machine's, or what the container's limit leaves of them."""
    limits = [int(text) for file in CGROUP_LIMITS if (text := _read(file)).isdigit()]
    own = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(limit - own for limit in limits)])


def _read(file: str) -> str:
    path = Path(file)
    return path.read_text().strip() if path.is_file() else ""


def check_host_memory(config: DictConfig, model: Model) -> Finding:
    """Of this machine, while its ranks load the model, or with what waits on the host."""
    ranks = config.trainer.n_gpus_per_node
    needed, there = memory.host_bytes(model, layout_of(config), ranks), available_memory()
    figures = {"needed": needed, "there": there}
    text = f"{_gb(there)} GB of host memory are free, and {ranks} ranks take an estimated {_gb(needed)} GB"
    if needed <= there:
        return Finding("host memory", OK, text, figures)
    why = " (each loads the whole model in fp32, for its embeddings are tied)" if model.tied and ranks > 1 else ""
    remedy = "use a machine with more memory or fewer GPUs of it (trainer.n_gpus_per_node)"
    return Finding("host memory", FAIL, f"{text}{why}; {remedy}", figures)


def check_disk(config: DictConfig, model: Model) -> Finding:
    """Room for the run's checkpoints: those that are kept, and the one that is written before the oldest goes."""
    trainer, actor = config.trainer, config.actor_rollout_ref.actor
    folder = Path(trainer.default_local_dir).absolute()
    if trainer.save_freq <= 0:
        return Finding("disk", OK, "no checkpoints are saved (trainer.save_freq)")
    refreshed = trainer.ref_update_freq > 0
    reference = BYTES[config.actor_rollout_ref.ref.fsdp_config.model_dtype or "bf16"] if refreshed else 0
    size = memory.checkpoint_bytes(model, list(actor.checkpoint.save_contents), reference)
    count = (trainer.max_actor_ckpt_to_keep or 1) + 1
    if steps := trainer.total_training_steps:
        count = min(count, ceil(steps / trainer.save_freq))
    missing = max(count - len(checkpoints(folder)), 1) if folder.is_dir() else count
    needed, there = missing * size, free_disk(folder)
    figures = {"needed": needed, "there": there, "checkpoint": size, "checkpoints": missing}
    text = f"{_gb(there)} GB are free for trainer.default_local_dir={str(folder)!r}, and {missing} more "
    text += f"{'checkpoint' if missing == 1 else 'checkpoints'} of {_gb(size)} GB must fit"
    if needed <= there:
        return Finding("disk", OK, text, figures)
    remedy = "free some, name another folder, lower trainer.max_actor_ckpt_to_keep, or leave optimizer or hf_model out "
    return Finding("disk", FAIL, f"{text}; {remedy}of {ACTOR}.checkpoint.save_contents", figures)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
