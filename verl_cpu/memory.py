"""Memory that a process does not need for a while, offered to the system.

The system takes an offered page (MADV_FREE) when it is short of memory and no sooner. What it has not taken is used
again as if nothing had been, where handing memory back costs a tenth of an update: every page is cleared and mapped
anew. Until then it counts as resident; `/proc/PID/smaps_rollup` tells it apart as LazyFree, and so does MemAvailable.
"""

import ctypes
import mmap
import os
from collections.abc import Callable

import torch

_libc = ctypes.CDLL(None, use_errno=True)
BLOCKS = (16 << 20, 4 << 20, 1 << 20, 256 << 10)  # below what glibc maps apart (MALLOC_MMAP_THRESHOLD_ in env.sh)


def offer(tensor: torch.Tensor) -> None:
    """Offers the pages of a tensor's storage; what it reads as, as before or zeros, is unknown until written anew.

    Raises:
        OSError: when the system refuses, as for memory that is locked.
    """
    start, length = _whole_pages(tensor)
    if length > 0:
        _call(_libc.madvise, start, length, mmap.MADV_FREE)


def offer_heap() -> None:
    """Offers what the C library keeps of freed memory: takes it in blocks, offers these and frees them again.

    Of the heap that the calling thread allocates from. A block of pages that are not there yet is new to the process,
    or was taken by the system already: no more of that length is free.
    """
    blocks = []
    for length in BLOCKS:
        while _is_resident(block := torch.empty(length, dtype=torch.uint8)):
            blocks.append(block)
    for block in blocks:
        offer(block)


def _is_resident(block: torch.Tensor) -> bool:
    """Whether the page in a block's middle lies in memory; the first may do so for what the C library writes there."""
    start, length = _whole_pages(block)
    middle = ctypes.create_string_buffer(1)
    _call(_libc.mincore, start + length // mmap.PAGESIZE // 2 * mmap.PAGESIZE, mmap.PAGESIZE, middle)
    return bool(middle.raw[0] & 1)


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the pages that hold nothing but the tensor's storage."""
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    return start, end - start


def _call(function: Callable[..., int], start: int, length: int, *arguments) -> None:
    if function(ctypes.c_void_p(start), ctypes.c_size_t(length), *arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{function.__name__}: {os.strerror(error)}")
