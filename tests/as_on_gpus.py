"""What a worker does on GPUs alone, on a CPU: attention by segments, and FSDP round a single rank's fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


def standing_in_for_the_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """torch's varlen_attn in plain operations: each sequence by itself, the causal mask aligned at the end."""
    assert window_size[1] == 0 and enable_gqa
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[2] <= 256 and query.shape[2] % 8 == 0 and query.shape[2] == key.shape[2] == value.shape[2]
    assert query.shape[1] % key.shape[1] == 0 and key.shape[1] == value.shape[1]
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max() and cu_seq_q.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        places = torch.arange(k.shape[1], device=q.device)
        back = places[k.shape[1] - q.shape[1] :, None] - places
        seen = back >= 0
        if window_size[0] >= 0:
            seen &= back <= window_size[0]
        scores = (q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def attention_as_on_gpus() -> Iterator[None]:
    """Within it attention is chosen as on a GPU without flash-attn, with a stand-in for torch's kernel.

    Where a model computes in fp32, so does the stand-in; the kernel takes half precision alone.
    """
    from torch.nn.attention import varlen

    from recipe.spin.engine import attention

    choose, half = attention.choose_attention, attention._half
    patches = {
        "choose_attention": lambda device, *asked: choose("cuda", *asked),
        "has_flash_attention_2": lambda: False,
        "_half": lambda *tensors: half(*tensors) if torch.is_autocast_enabled(tensors[0].device.type) else tensors,
    }
    kernel = mock.patch.object(varlen, "varlen_attn", standing_in_for_the_kernel)
    with mock.patch.multiple(attention, **patches), kernel:
        yield


@contextmanager
def segments_on_a_cpu() -> Iterator[None]:
    """The same, and attention row by row fails."""
    from recipe.spin.engine import attention

    with attention_as_on_gpus(), mock.patch.object(attention, "attend_by_row", None):
        yield


@contextmanager
def fsdp_on_one_rank() -> Iterator[None]:
    """Within it one rank goes through FSDP in fp32 too, as it does on a GPU in bf16."""
    from recipe.spin.engine.row_engine import RowEngine

    with mock.patch.object(RowEngine, "_needs_no_fsdp", lambda self, module: False):
        yield
