"""Whether the run's model fits its GPUs by the estimate of memory.py, and which settings would make it fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf

from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks import memory
from recipe.spin.checks.derived import ACTOR, REF, ROLLOUT, computes_in, longest_row
from recipe.spin.checks.finding import FAIL, HINT, OK, WARN, Finding, gigabytes
from recipe.spin.checks.gpu import Device
from recipe.spin.checks.memory import Layout, Model
from recipe.spin.checks.model_config import language_model
from recipe.spin.engine.kernels import has_flash_attention_2
from recipe.spin.preferences.source import source_class

BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LORA_RANK, SMALL_MICRO_BATCH = 32, 4096  # that the advice names
SMALL_MODEL = "MODEL_PATH=Qwen/Qwen2.5-0.5B-Instruct"  # fits 24 GB as the GPU profile is


def load_shape(config: DictConfig) -> tuple[Model | None, str]:
    """The model's shape, or None and why there is none. A hub's config.json is fetched for GPUs alone."""
    settings = config.actor_rollout_ref.model
    try:
        found = language_model(settings.path, settings.trust_remote_code, config.trainer.device != "cuda")
    except ValueError as error:  # not downloaded, no network, unknown to transformers
        return None, f"actor_rollout_ref.model.path={settings.path!r}: {error}"
    if any(getattr(found, name, None) is None for name in SHAPE) or any(getattr(found, name, 0) for name in EXPERTS):
        return None, f"actor_rollout_ref.model.path={settings.path!r}: {found.model_type} is not a dense transformer"
    return Model.of(found), ""


def compute_bytes(config: DictConfig) -> int:
    """Of a weight as the actor computes with it and vLLM gets it."""
    return BYTES[computes_in(config.actor_rollout_ref.actor.fsdp_config.get("mixed_precision"))]


def layout_of(config: DictConfig) -> Layout:
    """How the run lays its model out."""
    actor, ref, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "ref", "rollout", "model"))
    fsdp = actor.fsdp_config
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    sequence = fsdp.ulysses_sequence_parallel_size
    row, answers, _ = longest_row(partial(OmegaConf.select, config))
    rows = ceil(actor.ppo_mini_batch_size * sequence / ranks)
    mini_batch = rows * row / sequence
    if actor.use_dynamic_bsz:
        tokens = min(actor.ppo_max_token_len_per_gpu, mini_batch)
    else:
        tokens = min(actor.ppo_micro_batch_size_per_gpu * row / sequence, mini_batch)
    devices = ranks if fsdp.fsdp_size < 1 else min(fsdp.fsdp_size, ranks)
    # Without sleep mode (verl's default has it) vLLM is told to sleep all the same, and frees nothing
    sleeps = rollout.free_cache_engine and rollout.get("enable_sleep_mode", True)
    # With LoRA the adapter is taken from the whole model
    gathers = model.lora_rank or "hf_model" in actor.checkpoint.save_contents
    reducing_frees = devices > 1 or fsdp.offload_policy  # of one device's gradients nothing leaves it otherwise
    deferred = reducing_frees and fsdp.use_no_sync_for_gradient_accumulation and mini_batch > tokens
    return Layout(
        devices=devices,
        tokens=tokens,
        rows=rows,
        row=row,
        logits=tokens * answers / row,
        compute_bytes=compute_bytes(config),
        reference_bytes=BYTES[ref.fsdp_config.model_dtype or "bf16"],
        checkpointing=model.enable_gradient_checkpointing,
        keeps_products=config.actor_rollout_ref.keep_products,
        ranks_per_sequence=sequence,
        kernel_caps_scores=has_flash_attention_2(),
        eager=not config.actor_rollout_ref.share_prompt and model.override_config.get("attn_implementation") == "eager",
        whole_gradients=deferred,
        param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload,
        offload_policy=fsdp.offload_policy,
        reference_offload=ref.fsdp_config.param_offload,
        flat=actor.strategy == "fsdp",
        gathers_on_host=bool(gathers and config.trainer.save_freq > 0),
        lora_rank=model.lora_rank,
        plays_reference=source_class(config.algorithm.preference_source).takes_reference(config),
        rollout_share=rollout.gpu_memory_utilization,
        rollout_devices=rollout.tensor_model_parallel_size,
        rollout_graphs=not rollout.enforce_eager,
        rollout_sequences=rollout.max_num_seqs,
        rollout_sleeps=sleeps,
        rollout_waits_on_host=bool(model.lora_rank and sleeps),
        bucket=rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20,
        sequence=config.data.max_prompt_length + config.data.max_response_length,
        longest=rollout.max_model_len,
    )


def smallest_micro_batch(config: DictConfig) -> float:
    """Tokens that ppo_max_token_len_per_gpu must allow; infinite where it has no say."""
    actor = config.actor_rollout_ref.actor
    row, _, _ = longest_row(partial(OmegaConf.select, config))
    return row / actor.fsdp_config.ulysses_sequence_parallel_size if actor.use_dynamic_bsz else inf


# ---- What makes it fit ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Remedy:
    """Settings that lower what a device holds, as they are typed, and what they make of a layout."""

    settings: str
    apply: Callable[[Layout], Layout]


def remedies(model: Model, layout: Layout, memory_bytes: float, row: float) -> list[Remedy]:
    """What can be set, the mildest first; `row` is the longest row's tokens, which a micro-batch must hold."""
    found = []
    if layout.sequence < memory.longest_sequence(model, layout) and not rollout_fits(model, layout, memory_bytes):
        found.append(_set(f"{ROLLOUT}.max_model_len={layout.sequence}", longest=layout.sequence))
    least = ceil(20 * memory.rollout_need(model, layout) / memory_bytes) / 20  # by twentieths
    shares = [share for share in (0.4, 0.3, 0.2) if least <= share < layout.rollout_share]
    for share in [least] if layout.rollout_share < least < 1 else shares:
        found.append(_set(f"{ROLLOUT}.gpu_memory_utilization={share:g}", rollout_share=share))
    if layout.whole_gradients:
        key = f"{ACTOR}.fsdp_config.use_no_sync_for_gradient_accumulation"
        found.append(_set(f"{key}=False", whole_gradients=False))
    if layout.keeps_products:
        found.append(_set("actor_rollout_ref.keep_products=False", keeps_products=False))
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
    device = _fullest(config, found)
    layout = layout_of(config)
    phases = memory.peaks(model, layout, device.total)
    peak = max(phases.values())
    told = ", ".join(f"{phase} {gigabytes(value)}" for phase, value in phases.items())
    room = f"{gigabytes(device.free)} of {gigabytes(device.total)} GB are free on the {device.name}"
    figures = {"phases": phases, "parts": memory.training(model, layout)}
    figures |= {"total": device.total, "free": device.free, "name": device.name}
    enough = rollout_fits(model, layout, device.total)
    if enough and peak <= device.free:
        text = f"the run takes an estimated {gigabytes(peak)} GB of a GPU ({told}); {room}"
        return Finding("GPU memory", OK, text, figures)
    if not enough:
        share = f"{ROLLOUT}.gpu_memory_utilization={layout.rollout_share:g}"
        cause = f"{share} gives vLLM {gigabytes(layout.rollout_share * device.total)} GB, and it needs an estimated "
        cause += f"{gigabytes(memory.rollout_need(model, layout))} GB for weights and a sequence of "
        cause += f"{memory.longest_sequence(model, layout)} tokens; {room}"
    else:
        cause = f"the run takes an estimated {gigabytes(peak)} GB of a GPU ({told}), and {room}"
    return Finding("GPU memory", FAIL, f"{cause}; {_advice(config, model, layout, device)}", figures)


def _fullest(config: DictConfig, found: list[Device]) -> Device:
    return min(found[: config.trainer.n_gpus_per_node], key=lambda one: one.free)  # Ray hands them out in order


def spare_memory(config: DictConfig, model: Model, found: list[Device]) -> Iterator[Finding]:
    """A hint where results that are computed twice would fit the GPU with the least memory by the same estimate."""
    layout = layout_of(config)
    offloads = config.actor_rollout_ref.model.enable_activation_offload  # goes with no other choice of what is kept
    if not found or not layout.checkpointing or layout.keeps_products or offloads:
        return
    device, kept = _fullest(config, found), replace(layout, keeps_products=True)
    if fits(model, layout, device.total, device.free) and fits(model, kept, device.total, device.free):
        yield Finding(
            "spare memory",
            HINT,
            "actor_rollout_ref.keep_products=True would spare an update up to a quarter of its arithmetic, as matrix "
            f"products are then computed once: an estimated {gigabytes(highest(model, kept, device.total))} of the "
            f"{gigabytes(device.free)} GB that are free on the {device.name} (tried on a CPU alone)",
        )


def _advice(config: DictConfig, model: Model, layout: Layout, device: Device) -> str:
    row = smallest_micro_batch(config)
    single = [
        f"{remedy.settings} ({gigabytes(highest(model, remedy.apply(layout), device.total))} GB)"
        for remedy in remedies(model, layout, device.total, row)
    ]
    fit = fitting(model, layout, device.total, row, device.free)
    if fit is None:
        larger = f"{ROLLOUT}.tensor_model_parallel_size={2 * layout.rollout_devices}"
        return (
            f"no setting makes it fit: use more GPUs (and {larger}), larger ones or a smaller model, such as "
            f"{SMALL_MODEL}; or for a small model SPIN_PROFILE=cpu, which trains without GPUs"
        )
    settings, new = fit
    together = f"{' '.join(settings)} makes it {gigabytes(highest(model, new, device.total))} GB"
    smaller = f"or {SMALL_MODEL}; " if layout.lora_rank == 0 < new.lora_rank else ""
    return (
        f"{together}; {smaller}by themselves: {', '.join(single)}; trainer.check_memory=False leaves the estimate out"
    )
