"""Recomputation that keeps products: the same gradients to the bit, and no matrix product or attention twice."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import save_tiny_model
from recipe.spin.engine.recompute import PRODUCTS, keep_products


class Count(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls[operation] += 1
        return operation(*args, **kwargs or {})


@pytest.fixture(params=["llama", "qwen2"])  # projections without biases and with
def model(tmp_path, request):
    folder = save_tiny_model(tmp_path / "model", request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def update(model) -> tuple[list[torch.Tensor], Counter]:
    """The gradients of a pass, and what was computed in it."""
    model.zero_grad()
    with Count() as count:
        model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits.logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()], count.calls


def products(calls: Counter) -> dict:
    return {operation: number for operation, number in calls.items() if operation in PRODUCTS}


def test_gradients_are_the_same_to_the_bit_and_only_the_rest_is_recomputed(model):
    expected, once = update(model)
    keep_products(model)
    gradients, calls = update(model)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert products(calls) == products(once) and products(once)
    silu = torch.ops.aten.silu.default
    assert calls[silu] == 2 * once[silu] > 0


def test_recomputation_of_whole_layers_computes_products_twice(model):
    """What the test above would find without `keep_products`."""
    _, once = update(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, calls = update(model)
    assert sum(products(calls).values()) > sum(products(once).values())
