"""What of a layer's values waits for the backward pass, and what is computed a second time there."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# What takes long to compute. Attention on a CPU alone: a GPU's kernels would have to be listed one by one
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def keep_products(model: nn.Module) -> None:
    """Makes a transformers model keep the results of matrix products and attention, and recompute the rest.

    What is element-wise takes half the memory and little of the time. The numbers are the same to the bit.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
