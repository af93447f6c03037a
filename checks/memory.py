"""What a run holds on a device, on its host and on disk, from the model's shape and how it is laid out.

One formula for the check before a run (fit.py, host.py), the doctor and docs/scaling.md (benchmarks/growth.py). Pure
arithmetic in bytes; docs/scaling.md says where each part comes from. What the trainer holds of a device was counted on
a pretended one (tests/test_pretended_gpu.py); no run on a GPU has confirmed the rest yet.
"""

from dataclasses import dataclass
from math import ceil, inf, log2

from recipe.spin.engine.kernels import HEAD_STEP

FP32, BF16 = 4, 2  # bytes of a number
# Of the trainer and vLLM on one device beside their tensors: CUDA contexts, CUDA graphs, NCCL's buffers (assumed)
PROCESSES = 2.5e9
# Of what the trainer holds in an update, what its allocator holds beside it in pieces too small to use (assumed)
FRAGMENTS = 0.05
# Of vLLM's share beside weights and cache: activations of its largest batch (assumed), or what its sampler holds of a
# sequence for each token of the vocabulary, whichever is more: logits in bf16 and fp32, log-probs, probabilities, noise
ROLLOUT_WORKSPACE, SAMPLER_ENTRY = 1.5e9, BF16 + 4 * FP32
# Of vLLM's share as well: its CUDA graphs, which it sets aside before it counts the room for keys and values (assumed)
CUDA_GRAPHS = 1e9
# Tokens whose log-probs are computed at a time (engine/logps.py, which imports more than a check may), and of each for
# each token of the vocabulary: logits in fp32, scaled, and the terms of their sum
CHUNK, CHUNK_ENTRY = 128, 3 * FP32
# An attention score where all are kept: capped, and as a probability in fp32 and rounded; gradients in a layer at work
KEPT_SCORE, SCORE = 8, 16
# Host memory of a rank with its vLLM (assumed), and of everything else that runs on a node: eight agent loop workers of
# 0.58 GB each and eight of the reward of 0.36 (docs/log.md, 2026-11-25), the task runner, the command and the queue
RANK_PROCESSES, NODE_PROCESSES = 6e9, 10e9
# Host memory of a run without GPUs beside its weights: the default run's 6.7 GB less the 3.2 GB that cpu_bytes counts
# there, and a little for what differs between machines
CPU_PROCESSES = 3.8e9


@dataclass(frozen=True)
class Model:
    """The shape of a Llama-like model (grouped-query attention, gated MLP)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = True  # input and output embedding are one matrix
    positions: int = 0  # that it was made for
    whole_layers: int | None = None  # those that see all positions, not a window of the last; None: all
    caps_scores: bool = False  # of attention, as Gemma 2 does

    @classmethod
    def of(cls, config) -> "Model":
        """From a transformers config."""
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ()
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size,
            config.vocab_size,
            config.tie_word_embeddings,
            getattr(config, "max_position_embeddings", None) or 0,
            len(kinds) - kinds.count("sliding_attention") if kinds else None,
            bool(getattr(config, "attn_logit_softcapping", None)),
        )

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """Shapes of one layer's: query, key, value, output, gate, up, down."""
        query, key = (self.hidden, self.heads * self.head_size), (self.hidden, self.kv_heads * self.head_size)
        up = (self.hidden, self.intermediate)
        return [query, key, key, query[::-1], up, up, up[::-1]]

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.layer_matrices)

    @property
    def output_parameters(self) -> int:
        """Weights of the output layer, as many as of the input embedding."""
        return self.hidden * self.vocabulary

    @property
    def end_parameters(self) -> int:
        """Weights of both ends, which may be one matrix."""
        return self.output_parameters * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights but those of norms and biases."""
        return self.layers * self.layer_parameters + self.end_parameters

    def adapter_parameters(self, rank: int) -> int:
        """Weights of LoRA adapters beside all matrices of all layers: a matrix (a, b) gets (a, rank) and (rank, b)."""
        return self.layers * rank * sum(map(sum, self.layer_matrices))


@dataclass(frozen=True)
class Layout:
    """How a run lays a model out on its devices, and what the fullest micro-batch of a device holds."""

    devices: int = 1  # that weights are sharded over
    tokens: float = 16384
    rows: float = inf  # of a device's mini-batch, which a micro-batch has at most
    row: float = inf  # tokens of the longest
    logits: float = 16384  # of the tokens those that meet the vocabulary
    compute_bytes: int = BF16  # of a weight or an activation in arithmetic; gradients and AdamW are fp32
    reference_bytes: int = BF16
    checkpointing: bool = True  # activations recomputed in the backward pass
    keeps_products: bool = False  # but for the results of matrix products and attention
    ranks_per_sequence: int = 1  # that share one, each with `tokens` of it (Ulysses)
    kernel_caps_scores: bool = False  # flash-attn 2 is installed, which does
    eager: bool = False  # attention without a kernel
    whole_gradients: bool = False  # wait unsharded for the last micro-batch
    param_offload: bool = False  # weights on the host except in training
    optimizer_offload: bool = False  # AdamW's moments likewise
    offload_policy: bool = False  # weights, gradients and moments on the host always
    reference_offload: bool = False  # the reference on the host always
    flat: bool = False  # a layer's weights are one piece (FSDP1), where else each matrix is one
    gathers_on_host: bool = False  # checkpoints have the first rank gather the whole model there
    lora_rank: int = 0  # above 0: adapters are trained, and the reference is the model without them
    plays_reference: bool = False  # vLLM takes its weights, for which adapters will not do
    rollout_share: float = 0.5  # of a device's memory that vLLM takes while it generates
    rollout_devices: int = 1  # that one vLLM is spread over
    rollout_graphs: bool = True  # vLLM captures CUDA graphs
    rollout_sequences: int = 512  # that it generates at a time
    rollout_sleeps: bool = True  # vLLM gives its memory back in training
    rollout_waits_on_host: bool = False  # and keeps its weights on the host meanwhile, as only adapters are sent
    bucket: float = 2e9  # of weights on their way to vLLM
    sequence: int = 1536  # tokens of the longest prompt with the longest response
    longest: int | None = 1536  # that vLLM is to take (rollout.max_model_len); None: all the model's positions


def trained_parameters(model: Model, lora_rank: int) -> int:
    """Weights that have gradients and moments."""
    return model.adapter_parameters(lora_rank) if lora_rank else model.parameters


def training(model: Model, layout: Layout) -> dict[str, float]:
    """Bytes of a device at the fullest moment of an update's last backward pass, by what holds them."""
    trained = trained_parameters(model, layout.lora_rank)
    sharded = 0 if layout.offload_policy else 1 / layout.devices
    held = {
        "weights": (model.parameters + (trained if layout.lora_rank else 0)) * FP32 * sharded,
        "gradients": trained * FP32 * (1 if layout.whole_gradients else sharded),
        "AdamW": trained * 2 * FP32 * sharded,
        "reference": reference_bytes(model, layout),
    }
    moments = (log_probs_moment(model, layout), layer_moment(model, layout), embedding_moment(model, layout))
    held |= max(moments, key=lambda moment: sum(moment.values()))
    return held | {"fragments": FRAGMENTS * sum(held.values()), "processes": PROCESSES}


def tensor_bytes(parts: dict[str, float]) -> float:
    """Of the parts of `training` those that are tensors, which torch counts."""
    return sum(parts.values()) - parts["fragments"] - parts["processes"]


def log_probs_moment(model: Model, layout: Layout) -> dict[str, float]:
    """As log-probs come from logits: the output layer is whole, and everything waits for the backward pass."""
    tokens = min(layout.logits, CHUNK)
    return {
        "gathered": gathered_bytes(output_unit(model, layout), layout),
        "summed": 0.0,
        "activations": kept_bytes(model, layout),
        "logits": model.vocabulary * (layout.logits * layout.compute_bytes + tokens * CHUNK_ENTRY),
    }


def layer_moment(model: Model, layout: Layout) -> dict[str, float]:
    """In a layer's backward pass: it is whole, and the one before it or the input embedding.

    Embeddings that are one unit stay whole, and the output layer's gradient waits until the end.
    """
    summed = model.layer_parameters * (layout.compute_bytes + FP32)
    if embeddings_are_one_unit(model, layout):
        whole = 2 * model.layer_parameters + output_unit(model, layout)
        summed += model.output_parameters * layout.compute_bytes
    else:
        whole = model.layer_parameters + max(model.layer_parameters, model.output_parameters)
    return {
        "gathered": gathered_bytes(whole, layout),
        "summed": 0.0 if layout.lora_rank else summed,
        "activations": kept_bytes(model, layout) + layer_bytes(model, layout),
        "logits": 0.0,
    }


def embedding_moment(model: Model, layout: Layout) -> dict[str, float]:
    """As an embedding's gradients are summed, with a layer's on their way."""
    embedding = output_unit(model, layout)
    summed = embedding * (layout.compute_bytes + FP32) + model.layer_parameters * FP32
    return {
        "gathered": gathered_bytes(embedding, layout),
        "summed": 0.0 if layout.lora_rank else summed,
        "activations": kept_bytes(model, layout),
        "logits": 0.0,
    }


def embeddings_are_one_unit(model: Model, layout: Layout) -> bool:
    """Whether FSDP gathers and sums both at once."""
    return model.tied or layout.flat


def output_unit(model: Model, layout: Layout) -> int:
    """Weights that FSDP gathers and sums with the output layer's, these among them."""
    return model.end_parameters if embeddings_are_one_unit(model, layout) else model.output_parameters


def waiting(model: Model, layout: Layout) -> float:
    """Bytes of a device that the trainer keeps while vLLM generates."""
    held = training(model, layout)
    weights = 0.0 if layout.param_offload else held["weights"]
    return weights + (0.0 if layout.optimizer_offload else held["AdamW"]) + held["reference"] + held["processes"]


def peaks(model: Model, layout: Layout, memory: float) -> dict[str, float]:
    """Bytes of a device that has `memory`, at the highest, by phase."""
    rollout = layout.rollout_share * memory
    kept = waiting(model, layout)
    arriving = model.parameters * BF16 / layout.rollout_devices
    sent = layout.bucket + sent_bytes(model, layout)
    return {
        "training": sum(training(model, layout).values()) + (0 if layout.rollout_sleeps else rollout),
        "weights to vLLM": kept + sent + (arriving if layout.rollout_sleeps else rollout),
        "generation": kept + rollout,
    }


def sent_bytes(model: Model, layout: Layout) -> float:
    """Of weights on their way to vLLM, beside the bucket: those of an embedding, as no other matrix is as large.

    A shard is fetched where it is on the host, rounded, and gathered. FSDP1 gathers before it rounds, both embeddings
    in one, and copies the whole shard besides. Adapters: none is as large. For these and with FSDP1 verl brings weights
    that wait on the host back to the device.
    """
    several = layout.devices > 1
    back = training(model, layout)["weights"] if layout.param_offload and (layout.lora_rank or layout.flat) else 0.0
    if layout.lora_rank:
        return back
    if layout.flat:
        shard, ends = model.parameters / layout.devices, model.end_parameters + model.output_parameters
        return back + FP32 * (shard + several * ends) + BF16 * model.output_parameters
    gathered = BF16 * (1 + several / layout.devices)
    fetched = (FP32 + BF16) / layout.devices if layout.param_offload or layout.offload_policy else 0
    return max(gathered, fetched) * model.output_parameters


def longest_sequence(model: Model, layout: Layout) -> int:
    """Tokens of the longest sequence that vLLM is to take."""
    return model.positions if layout.longest is None else layout.longest


def rollout_need(model: Model, layout: Layout) -> float:
    """Bytes that vLLM's share must hold at the least, or it does not start: weights, its workspace, CUDA graphs, and
    the longest sequence's keys and values, those of windows left out."""
    layers = model.layers if model.whole_layers is None else model.whole_layers
    cache = longest_sequence(model, layout) * 2 * layers * model.kv_heads * model.head_size * BF16
    # Every device of a vLLM has the logits of the whole vocabulary
    workspace = max(ROLLOUT_WORKSPACE, layout.rollout_sequences * model.vocabulary * SAMPLER_ENTRY)
    graphs = CUDA_GRAPHS if layout.rollout_graphs else 0
    return (model.parameters * BF16 + cache) / layout.rollout_devices + workspace + graphs


def reference_bytes(model: Model, layout: Layout) -> float:
    if layout.lora_rank or layout.reference_offload:
        return 0.0
    return model.parameters * layout.reference_bytes / layout.devices


def gathered_bytes(weights: int, layout: Layout) -> float:
    """Of weights that are whole at a time; on one device in fp32 they are never anything else."""
    if layout.devices == 1 and layout.compute_bytes == FP32 and not layout.offload_policy:
        return 0.0
    return weights * layout.compute_bytes


def inner_values(model: Model) -> int:
    """Numbers of a token that a layer's backward pass takes, beside the layer's input."""
    return 6 * model.hidden + 2 * model.head_size * (model.heads + model.kv_heads) + 4 * model.intermediate


def kept_bytes(model: Model, layout: Layout) -> float:
    """Of a micro-batch what waits for the backward pass: every layer's input, and the inner values where they are not
    recomputed, or of these the results of matrix products and attention alone (keeps_products)."""
    values, waiting = model.hidden, 0
    if not layout.checkpointing:
        values, waiting = values + inner_values(model), KEPT_SCORE
    elif layout.keeps_products:
        values += 2 * model.hidden + 2 * model.head_size * (model.heads + model.kv_heads) + 2 * model.intermediate
        waiting = layout.compute_bytes
    scores = (model.layers - 1) * waiting * kept_scores(model, layout)
    return layout.tokens * layout.compute_bytes * model.layers * values + scores


def layer_bytes(model: Model, layout: Layout) -> float:
    """Of a micro-batch in one layer's backward pass: inner values that are recomputed, and inner gradients."""
    recomputed = inner_values(model) if layout.checkpointing else 0
    gradients = 4 * model.intermediate * layout.compute_bytes + 2 * model.hidden * FP32
    per_token = recomputed * layout.compute_bytes + gradients
    return layout.tokens * per_token + SCORE * kept_scores(model, layout)


def kept_scores(model: Model, layout: Layout) -> float:
    """Attention scores of a micro-batch in a layer where no kernel does without them (engine/attention.py), else 0.

    For every head tokens by tokens: of all at once, or of each row filled up to the longest, whichever are fewer
    (engine/packing.py); a model's own attention takes all at once.
    """
    kernel_does = model.head_size % HEAD_STEP == 0 and (layout.kernel_caps_scores or not model.caps_scores)
    if kernel_does and not layout.eager:
        return 0.0
    pairs = (layout.tokens * layout.ranks_per_sequence) ** 2  # Ulysses exchanges tokens for heads
    if not layout.eager:
        pairs = min(pairs, layout.rows * layout.row**2)
    return model.heads / layout.ranks_per_sequence * pairs


def host_bytes(model: Model, layout: Layout, ranks: int) -> float:
    """Bytes of a node with so many ranks, at the highest: while the models load, or as a checkpoint is written beside
    what waits on the host.

    With tied embeddings every rank loads the whole model in fp32, without them one rank does, and the others get their
    shards from it. A model that is gathered has the embeddings under both their names.
    """
    loading = model.parameters * FP32 * (ranks if model.tied else 1)
    saving = (model.parameters + (model.end_parameters if model.tied else 0)) * FP32 if layout.gathers_on_host else 0
    waiting = waiting_on_host(model, layout) * ranks
    return max(loading, waiting + saving) + ranks * RANK_PROCESSES + NODE_PROCESSES


def waiting_on_host(model: Model, layout: Layout) -> float:
    """Bytes of host memory that a rank takes for what its device does without at times.

    It is pinned, and what was pinned stays with the process when the device has its contents back.
    """
    base, adapters = weight_pieces(model, layout.flat), adapter_pieces(model, layout.lora_rank)
    trained, held = adapters or base, 0.0
    if layout.param_offload or layout.offload_policy:
        held += pinned_bytes(base + adapters, FP32, layout.devices)
    if layout.offload_policy:  # gradients come to the host pinned, where AdamW makes its moments of ordinary memory
        held += pinned_bytes(trained, FP32, layout.devices) + 2 * FP32 * sum(trained) / layout.devices
    elif layout.optimizer_offload:
        held += 2 * pinned_bytes(trained, FP32, layout.devices)
    if layout.reference_offload and not layout.lora_rank:
        held += pinned_bytes(base, layout.reference_bytes, layout.devices)
    if layout.rollout_waits_on_host:
        held += pinned_bytes(rollout_pieces(model), BF16, layout.rollout_devices)
    return held


def pinned_bytes(pieces: list[int], number: int, devices: int) -> float:
    """Bytes of pinned host memory for a device's share of pieces of so many numbers: torch takes powers of two."""
    return sum(2.0 ** ceil(log2(piece * number / devices)) for piece in pieces)


def weight_pieces(model: Model, flat: bool) -> list[int]:
    """Weights of each tensor that goes to the host in one."""
    layer = [inputs * outputs for inputs, outputs in model.layer_matrices]
    ends = [model.output_parameters] * (1 if model.tied else 2)
    if flat:
        layer, ends = [sum(layer)], [sum(ends)]
    return model.layers * layer + ends


def adapter_pieces(model: Model, rank: int) -> list[int]:
    """The same of LoRA adapters, which FSDP1 keeps apart too; [] without."""
    return model.layers * [rank * side for shape in model.layer_matrices for side in shape] if rank else []


def rollout_pieces(model: Model) -> list[int]:
    """The same of vLLM's weights; it makes one matrix of query, key and value, and one of gate and up."""
    query, key, value, output, gate, up, down = (inputs * outputs for inputs, outputs in model.layer_matrices)
    layer = [query + key + value, output, gate + up, down]
    return model.layers * layer + [model.output_parameters] * (1 if model.tied else 2)


def cpu_bytes(model: Model, ranks: int) -> float:
    """Bytes of a machine that trains without GPUs: in fp32 weights, gradients, AdamW's moments and the reference, which
    the ranks share, and a copy of the weights in each rank's vLLM. Measured for one model alone (README)."""
    return model.parameters * FP32 * (5 + ranks) + CPU_PROCESSES


def checkpoint_bytes(model: Model, contents: list[str], reference_bytes: int, lora_rank: int = 0) -> float:
    """Bytes of a checkpoint on disk; `contents` as in checkpoint.save_contents, reference_bytes 0 without one.

    With LoRA a resume takes the adapters alone, which always lie there once more by themselves.
    """
    trained = trained_parameters(model, lora_rank)
    moments = 2 * FP32 * trained * ("optimizer" in contents)
    weights = model.parameters * ("hf_model" in contents) + trained * ("model" in contents)
    weights += model.adapter_parameters(lora_rank)
    return weights * FP32 + moments + model.parameters * reference_bytes
