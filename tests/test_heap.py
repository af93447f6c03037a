"""Freed memory is handed back where the C library can, and nothing happens where it cannot."""

from types import SimpleNamespace

from recipe.spin.common import heap


def test_freed_memory_is_handed_back_by_glibc(monkeypatch):
    asked = []
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    heap.hand_back()
    assert asked == [0]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace())
    heap.hand_back()
