"""AdamW as the engine builds it: fused, whatever shards the weights, with torch's own steps."""

from collections import Counter

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from verl.workers.config.optimizer import FSDPOptimizerConfig

from recipe.spin.engine.row_engine import RowEngine


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SHARDED = {
    "plain": lambda module: module,
    "fsdp": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    "fsdp2": lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (1,))),
}


class Updates(TorchDispatchMode):
    """Counts the optimizer's kernels: one for all weights when it is fused."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls[operation.overloadpacket] += 1
        return operation(*args, **kwargs or {})


def build(module: torch.nn.Module, **options) -> torch.optim.Optimizer:
    engine = RowEngine.__new__(RowEngine)
    engine.optimizer_config = FSDPOptimizerConfig(lr=0.1, weight_decay=0.01, override_optimizer_config=options or None)
    return engine._build_optimizer(module)


def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(5, 3)


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Counter:
    """Three steps, the last after the optimizer was loaded from a checkpoint; returns its kernels in the last."""
    for step in range(3):
        module(torch.full((2, 5), 1.0 + step)).square().sum().backward()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
        with Updates() as updates:
            optimizer.step()
        optimizer.zero_grad()
    return updates.calls


@pytest.mark.parametrize("kind", SHARDED)
def test_adamw_makes_no_temporaries_of_the_weights(one_rank, kind):
    """On a GPU torch's default makes a list of them as large as the shard, and memory.py counts none."""
    module, plain = SHARDED[kind](layer()), layer()
    calls = train(module, build(module, eps=1e-4))
    assert calls[torch.ops.aten._fused_adamw_] and not calls[torch.ops.aten.sqrt], calls
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.01, eps=1e-4, fused=False)
    assert train(plain, optimizer)[torch.ops.aten.sqrt]
    found = torch.cat([parameter.data.flatten() for parameter in module.parameters()])
    expected = torch.cat([parameter.data.flatten() for parameter in plain.parameters()])
    torch.testing.assert_close(getattr(found, "full_tensor", lambda: found)(), expected)


def test_another_form_of_adamw_can_be_asked_for():
    module = layer()
    assert build(module).defaults["fused"] is True
    assert build(module, fused=False).defaults["fused"] is False
    assert build(module, foreach=True).defaults["fused"] is False  # torch refuses both
