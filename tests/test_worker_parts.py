"""Small parts of the worker: how micro-batches divide, and how the actor is mixed into the reference."""

import os

import pytest
import torch
from worker_harness import Ranks

from recipe.spin.dp_actor import largest_divisor
from recipe.spin.fsdp_workers import mix_parameters


@pytest.mark.parametrize(
    ("number", "limit", "expected"), [(12, 5, 4), (12, 12, 12), (12, 100, 12), (7, 6, 1), (1, 1, 1)]
)
def test_largest_divisor(number, limit, expected):
    assert largest_divisor(number, limit) == expected


def linear(value: float, features: int = 2, buffer: float | None = None) -> torch.nn.Module:
    module = torch.nn.Linear(features, 1)
    torch.nn.init.constant_(module.weight, value)
    torch.nn.init.constant_(module.bias, 10 * value)
    if buffer is not None:
        module.register_buffer("table", torch.tensor([buffer]))
    return module


def test_parameters_are_mixed_and_buffers_copied():
    target = linear(1.0, buffer=1.0)
    mix_parameters(source=linear(2.0, buffer=2.0), target=target, alpha=0.3)
    torch.testing.assert_close(target.weight.detach(), torch.full((1, 2), 1.3))
    torch.testing.assert_close(target.bias.detach(), torch.tensor([13.0]))
    assert target.table.item() == 2.0


def test_full_refresh_copies_and_stays_a_copy():
    source, target = linear(2.0), linear(1.0)
    mix_parameters(source, target)
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)
    with torch.no_grad():
        source.weight.add_(1)
    assert target.weight.detach().tolist() == [[2.0, 2.0]]


def test_modules_that_differ_are_refused():
    with pytest.raises(ValueError, match="different tensors.*bias"):
        mix_parameters(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"weight has \(1, 3\) in the actor's.*fsdp_size"):
        mix_parameters(linear(1.0, features=3), linear(1.0, features=2))


@pytest.mark.slow
def test_a_rank_that_died_is_told_and_not_waited_for():
    with pytest.raises(RuntimeError, match=r"exit codes: \{0: 0\}"):
        Ranks(1).run(os._exit)  # with its rank
