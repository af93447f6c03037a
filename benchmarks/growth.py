"""How a training step grows: seconds by phase, memory of a device and network volume, from a few constants.

Pure arithmetic over a Machine, a Model and a Load; docs/scaling.md has the formulas' assumptions, sources and checks.
Memory is checks/memory.py's, which the check before a run asks too.
"""

from dataclasses import dataclass
from math import ceil

from benchmarks.arithmetic import Work, causal, forward_flop, necessary
from recipe.spin.checks import memory
from recipe.spin.checks.memory import BF16, FP32, Layout, Model


@dataclass(frozen=True)
class Machine:
    """Devices and what connects them; rates per device and second, in operations and bytes.

    The shares are what programs reach of these rates: matrix products in the update, in the reference pass and in
    prefill, memory while decoding, the network in collectives.
    """

    name: str
    flops: float
    memory_bandwidth: float
    memory: float
    devices_per_node: int = 8
    node_bandwidth: float = 0.0  # between devices of a node, one direction
    network_bandwidth: float = 0.0  # of a device's share of its node's network, one direction
    update_share: float = 0.35
    forward_share: float = 0.40
    prefill_share: float = 0.50
    decode_share: float = 0.60
    network_share: float = 0.80
    token_seconds: float = 0.005  # of a decoding step beside arithmetic: scheduling, sampling, launches
    sync_seconds: float = 1.0  # of a weight sync beside its bytes: hundreds of tensors, gathered one by one
    step_seconds: float = 1.0  # of a training step beside all phases
    response_seconds: float = 0.002  # and of each response in the one process that drives: reward, pairs, moving data
    rollout_share: float = 0.5  # of a device's memory that the inference engine takes while it generates,
    lone_rollout_share: float = 0.4  # and of that of a single device, which has whole what others share
    compute_bytes: int = BF16  # of a weight or an activation in arithmetic; masters, gradients and AdamW are fp32
    reference_bytes: int = BF16
    sync_copies: int = 4  # times that a weight's bytes cross memory on that way, beside the gathering
    host_bandwidth: float = 20e9  # between a device and its host, one direction


A10 = Machine("A10, 24 GB", 125e12, 600e9, 24e9, node_bandwidth=25e9, network_bandwidth=3e9)
A100 = Machine("A100 SXM, 40 GB", 312e12, 1.555e12, 40e9, node_bandwidth=300e9, network_bandwidth=25e9)
H100 = Machine("H100 SXM, 80 GB", 989e12, 3.35e12, 80e9, node_bandwidth=450e9, network_bandwidth=50e9)

QWEN_0_5B = Model(24, 896, 4864, 14, 2, 64, 151936, tied=True, positions=32768)
QWEN_3B = Model(36, 2048, 11008, 16, 2, 128, 151936, tied=True, positions=32768)
QWEN_7B = Model(28, 3584, 18944, 28, 4, 128, 152064, tied=False, positions=32768)
MODELS = {"Qwen2.5-0.5B": QWEN_0_5B, "Qwen2.5-3B": QWEN_3B, "Qwen2.5-7B": QWEN_7B}


@dataclass(frozen=True)
class Load:
    """One training step: prompts with n responses each, of which `paired` take part in the update, all of a length."""

    prompts: int
    n: int
    prompt: int
    response: int
    paired: int = 2
    longest: int | None = None  # the longest response, at which generation ends; without, `response`
    tokens_per_micro_batch: int = 16384
    checkpointing: bool = True  # activations recomputed in the backward pass
    share_prompt: bool = True
    deferred_reduction: bool = False  # gradients reduced once an optimizer step: whole ones wait in every device
    most_sequences: int = 512  # that a device generates at a time

    def rows(self, paired: int) -> list[tuple[int, list[int]]]:
        """One prompt's rows of (prompt, responses)."""
        responses = [self.response] * paired
        return [(self.prompt, responses)] if self.share_prompt else [(self.prompt, [one]) for one in responses]

    def trained(self) -> Work:
        """A prompt's work in the reference pass, and in the update's forward."""
        return necessary(self.rows(self.paired))


@dataclass(frozen=True)
class Prediction:
    """Seconds by phase, bytes that a device receives by phase, and bytes of memory of a device.

    memory: in training, by what holds them; the inference engine sleeps then.
    peaks: by phase; while that engine generates, weights, AdamW and reference wait beside it.
    """

    seconds: dict[str, float]
    network: dict[str, float]
    memory: dict[str, float]
    peaks: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak_memory(self) -> float:
        return max(self.peaks.values())


def predict(machine: Machine, model: Model, load: Load, devices: int = 1, layout: Layout | None = None) -> Prediction:
    """A step on so many devices, prompts split evenly, weights sharded over all of them unless `layout` says else."""
    layout = layout or layout_of(machine, load, devices)
    per_device = ceil(load.prompts / devices)
    micro_batches = ceil(per_device * load.trained().tokens / layout.tokens)
    network = network_volume(machine, model, load, devices, micro_batches)
    rate = network_rate(machine, devices)
    forward = per_device * forward_flop(model, load.trained())
    # By inputs, by weights unless these are an adapter's, and the forward pass once more
    backward = forward * (1 + (not layout.lora_rank) + layout.checkpointing)
    seconds = {
        "generation": generation_seconds(machine, model, load, per_device),
        # Weights are gathered for a layer while the layer before it computes
        "reference": max(forward / machine.flops / machine.forward_share, network["reference"] / rate)
        + fetch_seconds(machine, model, layout, micro_batches),
        "update": max((forward + backward) / machine.flops / machine.update_share, network["update"] / rate)
        + adamw_seconds(machine, model, devices)
        + offload_seconds(machine, model, layout),
        "weight sync": network["weight sync"] / rate
        + machine.sync_copies * model.parameters * machine.compute_bytes / machine.memory_bandwidth
        + machine.sync_seconds,
        "rest": machine.step_seconds + machine.response_seconds * load.prompts * load.n,
    }
    memory_peaks = memory.peaks(model, layout, machine.memory)
    return Prediction(seconds, network, memory.training(model, layout), memory_peaks)


def layout_of(machine: Machine, load: Load, devices: int) -> Layout:
    """How the recipe's GPU profile lays a model out, with this load."""
    row = load.trained()
    of_device = ceil(load.prompts / devices) * row.tokens
    tokens = min(load.tokens_per_micro_batch, of_device)
    return Layout(
        devices=devices,
        tokens=tokens,
        logits=tokens * row.logits / row.tokens,
        compute_bytes=machine.compute_bytes,
        reference_bytes=machine.reference_bytes,
        checkpointing=load.checkpointing,
        whole_gradients=load.deferred_reduction and of_device > tokens,
        rollout_share=machine.lone_rollout_share if devices == 1 else machine.rollout_share,
        rollout_sequences=load.most_sequences,
        sequence=load.prompt + (load.longest or load.response),
        longest=None,  # as the profile, whose rollout.max_model_len is null
    )


def refresh_seconds(machine: Machine, model: Model, devices: int = 1) -> float:
    """Copying the actor's shards into the reference's: read once, written once, no network."""
    return model.parameters / devices * (FP32 + machine.reference_bytes) / machine.memory_bandwidth


def adamw_seconds(machine: Machine, model: Model, devices: int) -> float:
    """Clipping reads gradients; AdamW reads weight, gradient and two moments, and writes all but the gradient."""
    return model.parameters / devices * FP32 * (1 + 4 + 3) / machine.memory_bandwidth


def fetch_seconds(machine: Machine, model: Model, layout: Layout, micro_batches: int) -> float:
    """A reference on the host comes to the device once a micro-batch; counted as if no arithmetic hid it."""
    shard = model.parameters * layout.reference_bytes / layout.devices
    return layout.reference_offload * micro_batches * shard / machine.host_bandwidth


def offload_seconds(machine: Machine, model: Model, layout: Layout) -> float:
    """What waits on the host comes to the device once a step, and goes back."""
    held = memory.training(model, layout)
    moved = layout.param_offload * held["weights"] + layout.optimizer_offload * held["AdamW"]
    return 2 * moved / machine.host_bandwidth


def decoding_steps(load: Load, prompts: int) -> int:
    """Until the longest response has ended, once for each so many sequences as run at a time."""
    return ceil(prompts * load.n / load.most_sequences) * (load.longest or load.response)


def generation_seconds(machine: Machine, model: Model, load: Load, prompts: int) -> float:
    """Prefill of each prompt once, then decoding steps that read all weights and the running sequences' keys."""
    sequences = prompts * load.n
    prefill = prompts * forward_flop(model, Work(load.prompt, causal(load.prompt), 0))
    steps = decoding_steps(load, prompts)
    running = sequences * load.response / steps  # in the mean over the steps
    context = load.prompt + load.response // 2
    token_flop = forward_flop(model, Work(1, context, 1))
    compute = running * token_flop / machine.flops / machine.prefill_share
    cache = running * context * 2 * model.layers * model.kv_heads * model.head_size * machine.compute_bytes
    weights = model.parameters * machine.compute_bytes
    reading = (weights + cache) / machine.memory_bandwidth / machine.decode_share
    return prefill / machine.flops / machine.prefill_share + steps * (max(compute, reading) + machine.token_seconds)


def network_rate(machine: Machine, devices: int) -> float:
    """Bytes a second that each device receives in a collective over so many devices.

    Within a node its links; over nodes what the node's network adapters bring in together is handed on by those links.
    """
    if devices <= machine.devices_per_node:
        rate = machine.node_bandwidth
    else:
        rate = min(machine.node_bandwidth, machine.devices_per_node * machine.network_bandwidth)
    return rate * machine.network_share if devices > 1 else float("inf")


def network_volume(machine: Machine, model: Model, load: Load, devices: int, micro_batches: int) -> dict[str, float]:
    """Bytes that a device receives in a step: weights gathered for every pass, gradients reduced, weights to vLLM."""
    others = (devices - 1) / devices
    gathered = model.parameters * machine.compute_bytes * others
    reductions = 1 if load.deferred_reduction else micro_batches
    return {
        "reference": gathered * micro_batches,
        # Gathered again for the backward pass
        "update": 2 * gathered * micro_batches + model.parameters * FP32 * others * reductions,
        "weight sync": gathered,
    }
