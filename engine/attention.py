"""Attention over packed rows: a response sees its prompt and itself, as if it stood alone.

Registered with transformers' attention interface under `NAME`; the model's forward hands the keyword `visibility`
through to it. A GPU computes segment by segment with kernels of variable length; a CPU, and a GPU whose kernels do not
have what a model asks for, row by row under a mask.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_world_size,
)

from recipe.spin.engine.kernels import HEAD_STEP, LARGEST_HEAD, has_flash_attention_2
from recipe.spin.engine.packing import Visibility

NAME = "spin_shared_prompt"
SHARE_PROMPT = "actor_rollout_ref.share_prompt"
GO_ON = f"set {SHARE_PROMPT}=False: each response then gets a copy of the prompt, and the model's own attention"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    visibility: Visibility | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence of T tokens, in the form of transformers' attention interface.

    Shapes: query (1, H, T, D), key and value (1, K, T, D), H a multiple of K; returns (1, T, H, D). Under Ulysses T is
    split over the ranks that share a sequence, and heads are while attention runs (arXiv 2309.14509).
    Errors: ValueError for what a model asks of attention and this function does not have."""
    if visibility is None:
        raise ValueError(f"{type(module).__name__} does not hand its keyword arguments to attention: {GO_ON}.")
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} uses dropout, sinks or position biases in attention: {GO_ON}.")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} masks attention in a way of its own: {GO_ON}.")
    if sliding_window is None and _has_window(module):
        raise ValueError(f"{type(module).__name__} has a sliding window that it does not hand to attention: {GO_ON}.")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    size = get_ulysses_sequence_parallel_world_size()
    if size > 1:
        repeats = max(size // key.shape[1], 1)
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        query, key, value = (gather_seq_scatter_heads(tensor, 0, 1) for tensor in (query, key, value))
    attend = choose_attention(query.device.type, query.shape[-1], value.shape[-1], softcap)
    output = attend(query, key, value, visibility, Scoring(scaling, sliding_window, softcap))
    if size > 1:
        output = gather_heads_scatter_seq(output, head_dim=1, seq_dim=0)
    return output[None], None


AttentionInterface.register(NAME, shared_prompt_attention)


def _has_window(layer: torch.nn.Module) -> bool:
    """Whether a layer of attention has one by its config; some models put it into a mask alone."""
    config = getattr(layer, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
    if kinds and number is not None:
        return kinds[number] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def choose_attention(device: str, head: int, value_head: int, softcap: float | None) -> Callable[..., Tensor]:
    """By segment where a flash kernel takes heads of this size and knows caps if they are asked for, else by row.

    `head` is the size of a query's head and a key's, `value_head` that of a value's. Only flash-attn 2 caps scores
    (Gemma 2); no kernel takes the global heads of Gemma 4 (512) or DeepSeek-V3's (192, and 128 in values)."""
    takes_heads = head <= LARGEST_HEAD and head % HEAD_STEP == 0 and value_head == head
    takes_caps = not softcap or has_flash_attention_2()
    return attend_by_segment if device != "cpu" and takes_heads and takes_caps else attend_by_row


class Scoring(NamedTuple):
    """What a layer asks of its attention scores."""

    scaling: float | None  # None: 1 / sqrt(D)
    window: int | None  # how many positions back are seen, the token's own counted; None: all
    softcap: float | None  # scores x become softcap * tanh(x / softcap)


def attend_by_row(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """All rows at once, filled up to the longest, under a mask; the common beginning by itself. (T, H, D)."""
    queries, keys, inside = visibility.by_row
    common = visibility.common
    query_rows, key_rows, value_rows = (
        tensor.index_select(0, places.flatten()).view(*places.shape, *tensor.shape[1:])
        for tensor, places in ((query, queries), (key, keys), (value, keys))
    )
    rows = _masked_attention(query_rows, key_rows, value_rows, visibility.mask(scoring.window), scoring)
    output = rows[inside]
    if not common:
        return output
    before = torch.ones(common, common, dtype=torch.bool, device=query.device).tril()
    if scoring.window is not None:
        before = before.triu(1 - scoring.window)
    beginning = (tensor[None, :common] for tensor in (query, key, value))
    return torch.cat([_masked_attention(*beginning, before, scoring)[0], output])


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """(B, L, heads, D) each; returns (B, L, H, D)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scaling, _, softcap = scoring
    if softcap or query.device.type != "cpu":  # under a mask a GPU's only kernel that groups queries keeps all scores
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if not softcap:
        grouped = key.shape[1] < query.shape[1]
        output = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
        return output.transpose(1, 2)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def attend_by_segment(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """Each segment against all it sees, by a kernel of variable lengths with its causal mask aligned at the end."""
    index = visibility.by_segment
    kernel = _softcapping_kernel(scoring.softcap) if scoring.softcap else torch_kernel
    query, key, value = _half(query, key, value)
    back = -1 if scoring.window is None else scoring.window - 1
    keys, values = (_Gathered.apply(tensor, index.keys) for tensor in (key, value))
    return kernel(query, keys, values, *index[1:], scoring.scaling, back)


class _Gathered(torch.autograd.Function):
    """Tokens (T, ...) at places (K,). Many segments see what prompts have in common: its gradients are summed in fp32,
    where index_select on a GPU adds them up one by one in bf16 and rounds each time."""

    @staticmethod
    def forward(ctx, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = tokens.shape
        return tokens.index_select(0, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        return total.index_add_(0, places, gradient.float()).to(gradient.dtype), None


def torch_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float | None,
    back: int,
) -> Tensor:
    """torch's variable-length flash attention, part of torch since 2.10; `back` positions are seen, -1 all."""
    options = {"scale": scaling, "window_size": (back, 0)}
    if _asks_for_groups(varlen.varlen_attn):  # since torch 2.12; before, queries are grouped unasked
        options["enable_gqa"] = True
    return varlen.varlen_attn(query, key, value, query_bounds, key_bounds, longest_query, longest_key, **options)


@cache
def _asks_for_groups(kernel: Callable[..., Tensor]) -> bool:
    return "enable_gqa" in inspect.signature(kernel).parameters


def _softcapping_kernel(softcap: float) -> Callable[..., Tensor]:
    """flash-attn 2's kernel, which caps scores where torch's does not."""
    from flash_attn import flash_attn_varlen_func

    def kernel(query, key, value, query_bounds, key_bounds, longest_query, longest_key, scaling, back):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            query_bounds,
            key_bounds,
            longest_query,
            longest_key,
            softmax_scale=scaling,
            causal=True,
            window_size=(back, 0),
            softcap=softcap,
        )

    return kernel


def _half(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the half precision that flash kernels compute in, that of autocast where a model left it."""
    if all(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors):
        return tensors
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        raise ValueError(
            f"attention kernels on a {kind} device compute in bf16 or fp16, and got {tensors[0].dtype}: set "
            f"actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16, or {GO_ON}."
        )
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def check_model_shares_prompts(model: torch.nn.Module) -> None:
    """Errors: ValueError for a model in which a token depends on others by more than attention."""
    config = model.config.get_text_config()  # of a model of texts and images
    others = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if others or getattr(model, "_is_stateful", False) or not getattr(model, "_supports_attention_backend", False):
        what = f"layers of the kinds {', '.join(sorted(others))}" if others else "layers that are not attention alone"
        raise ValueError(f"{type(model).__name__} has {what}, which cannot share a prompt between responses: {GO_ON}.")
