"""What verl's Ulysses sequence parallelism needs of CUDA, for gloo ranks: flash attention and NCCL's all-to-all.

Everything between the two is verl's own: how sequences are cut, exchanged, gathered and differentiated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@contextmanager
def ulysses_on_gloo() -> Iterator[None]:
    """Within it models with `attn_implementation=sdpa` attend as those with flash attention do under Ulysses."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from verl.models.transformers import monkey_patch
    from verl.utils import ulysses

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        with (
            mock.patch.object(monkey_patch, "_flash_attention_forward", packed_attention),
            mock.patch.object(ulysses, "all_to_all_tensor", all_to_all),
        ):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the library's own shows again


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface, (1, heads, tokens, size), on top of what verl puts round flash attention."""
    from verl.models.transformers.monkey_patch import _ulysses_flash_attention_forward

    rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    positions = kwargs["position_ids"]
    return _ulysses_flash_attention_forward(*rows, None, query.shape[2], position_ids=positions, scale=scaling), None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, mask, length: int, position_ids: Tensor, scale: float):
    """Causal attention within each sequence of a packed row, (1, tokens, heads, size), as flash attention computes."""
    assert mask is None and length == query.shape[1]
    sequence = (position_ids == 0).cumsum(-1)  # (1, tokens)
    allowed = (sequence[:, :, None] == sequence[:, None, :]).tril()
    rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return scaled_dot_product_attention(*rows, attn_mask=allowed[:, None], scale=scale, enable_gqa=True).transpose(1, 2)


def all_to_all(local: Tensor, scatter_dim: int, gather_dim: int, group=None, async_op: bool = False) -> Tensor:
    """verl's exchange, by gathering everything: gloo has no all-to-all of lists."""
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    everything = [torch.empty_like(local.contiguous()) for _ in range(size)]
    torch.distributed.all_gather(everything, local.contiguous(), group=group)
    return torch.cat([part.tensor_split(size, scatter_dim)[rank] for part in everything], gather_dim)
