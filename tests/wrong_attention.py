"""Attention with a fault that short sequences or small heads do not show, for the tests of the doctor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

TILE = 64  # keys that a kernel takes at a time


@contextmanager
def _patched(name: str, fault: Callable) -> Iterator[None]:
    from recipe.spin.engine import attention

    right = getattr(attention, name)
    with mock.patch.object(attention, name, lambda *arguments: fault(right, *arguments)):
        yield


def blind_beyond_a_tile():
    """Keys behind the first tile are not seen."""

    def fault(right, query, key, value, mask, scoring):
        return right(query, key, value, mask & (torch.arange(mask.shape[-1]) < TILE), scoring)

    return _patched("_masked_attention", fault)


def wrong_with_a_common_beginning():
    """Right only where prompts have no beginning in common."""

    def fault(right, query, key, value, visibility, scoring):
        return right(query, key, value, visibility, scoring) * (1.5 if visibility.common else 1)

    return _patched("attend_by_row", fault)


def wrong_for_heads_above_64():
    def fault(right, query, *others):
        return right(query, *others) * (1.5 if query.shape[-1] > 64 else 1)

    return _patched("attend_by_row", fault)
