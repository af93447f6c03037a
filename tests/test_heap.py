"""Freed memory is handed back where the C library can, and nothing happens where it cannot."""

import platform
from types import SimpleNamespace

import pytest

from recipe.spin.common import heap


def test_freed_memory_is_handed_back_by_glibc(monkeypatch):
    asked = []
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    heap.hand_back()
    assert asked == [0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no malloc_trim")
def test_glibc_has_what_is_called():
    assert heap.ctypes.CDLL(None).malloc_trim(0) in (0, 1)
    heap.hand_back()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace())
    heap.hand_back()
