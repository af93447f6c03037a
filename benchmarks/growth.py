"""How a training step grows: seconds by phase, memory of a device and network volume, from a few constants.

Pure arithmetic over a Machine, a Model and a Load; docs/scaling.md has the formulas' assumptions, sources and checks.
"""

from dataclasses import dataclass
from math import ceil

from benchmarks.arithmetic import Model, Work, causal, forward_flop, necessary

FP32, BF16 = 4, 2  # bytes of a number


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
    rollout_share: float = 0.5  # of a device's memory that the inference engine takes while it generates
    compute_bytes: int = BF16  # of a weight or an activation in arithmetic; masters, gradients and AdamW are fp32
    reference_bytes: int = BF16
    gather_bytes: int = FP32  # of a weight on its way to the inference engine
    sync_copies: int = 4  # times that a weight's bytes cross memory on that way, beside the gathering


H100 = Machine("H100 SXM, 80 GB", 989e12, 3.35e12, 80e9, node_bandwidth=450e9, network_bandwidth=50e9)

QWEN_0_5B = Model(24, 896, 4864, 14, 2, 64, 151936, tied=True)
QWEN_3B = Model(36, 2048, 11008, 16, 2, 128, 151936, tied=True)
QWEN_7B = Model(28, 3584, 18944, 28, 4, 128, 152064, tied=False)
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
    deferred_reduction: bool = True  # gradients reduced once an optimizer step: whole ones wait in every device
    most_sequences: int = 1024  # that a device generates at a time

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
    generating: while it does not, and weights, AdamW and reference wait beside it.
    """

    seconds: dict[str, float]
    network: dict[str, float]
    memory: dict[str, float]
    generating: float

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak_memory(self) -> float:
        return max(sum(self.memory.values()), self.generating)


def predict(machine: Machine, model: Model, load: Load, devices: int = 1) -> Prediction:
    """A step on so many devices, weights sharded over all of them, prompts split evenly."""
    per_device = ceil(load.prompts / devices)
    micro_batches = ceil(per_device * load.trained().tokens / load.tokens_per_micro_batch)
    network = network_volume(machine, model, load, devices, micro_batches)
    rate = network_rate(machine, devices)
    forward = per_device * forward_flop(model, load.trained())
    backward = forward * (3 if load.checkpointing else 2)
    seconds = {
        "generation": generation_seconds(machine, model, load, per_device),
        # Weights are gathered for a layer while the layer before it computes
        "reference": max(forward / machine.flops / machine.forward_share, network["reference"] / rate),
        "update": max((forward + backward) / machine.flops / machine.update_share, network["update"] / rate)
        + adamw_seconds(machine, model, devices),
        "weight sync": network["weight sync"] / rate
        + machine.sync_copies * model.parameters * machine.compute_bytes / machine.memory_bandwidth
        + machine.sync_seconds,
        "rest": machine.step_seconds + machine.response_seconds * load.prompts * load.n,
    }
    memory = memory_of_device(machine, model, load, devices, micro_batches)
    waiting = sum(memory[part] for part in ("weights", "AdamW", "reference"))
    return Prediction(seconds, network, memory, waiting + machine.rollout_share * machine.memory)


def refresh_seconds(machine: Machine, model: Model, devices: int = 1) -> float:
    """Copying the actor's shards into the reference's: read once, written once, no network."""
    return model.parameters / devices * (FP32 + machine.reference_bytes) / machine.memory_bandwidth


def adamw_seconds(machine: Machine, model: Model, devices: int) -> float:
    """Clipping reads gradients; AdamW reads weight, gradient and two moments, and writes all but the gradient."""
    return model.parameters / devices * FP32 * (1 + 4 + 3) / machine.memory_bandwidth


def generation_seconds(machine: Machine, model: Model, load: Load, prompts: int) -> float:
    """Prefill of each prompt once, then decoding steps that read all weights and the running sequences' keys."""
    sequences = prompts * load.n
    prefill = prompts * forward_flop(model, Work(load.prompt, causal(load.prompt), 0))
    waves = ceil(sequences / load.most_sequences)
    steps = waves * (load.longest or load.response)
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
        "weight sync": model.parameters * machine.gather_bytes * others,
    }


def memory_of_device(machine: Machine, model: Model, load: Load, devices: int, micro_batches: int) -> dict[str, float]:
    """Bytes in training, at the end of an update."""
    row = load.trained()
    tokens = min(load.tokens_per_micro_batch, ceil(load.prompts / devices) * row.tokens)
    logits = tokens * row.logits / row.tokens
    whole = devices == 1 or (load.deferred_reduction and micro_batches > 1)
    return {
        "weights": model.parameters * FP32 / devices,
        "gradients": model.parameters * FP32 / (1 if whole else devices),
        "AdamW": model.parameters * 2 * FP32 / devices,
        "reference": model.parameters * machine.reference_bytes / devices,
        # Two layers and both embeddings whole; on one device in fp32 nothing is gathered
        "gathered": gathered_bytes(machine, model, devices),
        "activations": activation_bytes(machine, model, tokens, load.checkpointing),
        "logits": logits_bytes(model, logits),
    }


def gathered_bytes(machine: Machine, model: Model, devices: int) -> float:
    if devices == 1 and machine.compute_bytes == FP32:
        return 0.0
    embeddings = model.hidden * model.vocabulary * (1 if model.tied else 2)
    return (2 * model.layer_parameters + embeddings) * machine.compute_bytes


def activation_bytes(machine: Machine, model: Model, tokens: float, checkpointing: bool) -> float:
    """Of a micro-batch: every layer's input, and of one layer (with recomputation) or all of them the inner values."""
    inner = 6 * model.hidden + 2 * model.head_size * (model.heads + model.kv_heads) + 4 * model.intermediate
    layers = 1 if checkpointing else model.layers
    return tokens * machine.compute_bytes * (model.layers * model.hidden + layers * inner)


def logits_bytes(model: Model, rows: float, chunk: int = 2048) -> float:
    """Logits and their gradient, fp32, of a chunk of response tokens."""
    return min(rows, chunk) * model.vocabulary * 2 * FP32
