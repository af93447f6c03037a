"""Memory that a process holds and does not need for a while, given back to the system."""

import ctypes
import mmap
import os

import torch

_libc = ctypes.CDLL(None, use_errno=True)


def empty(tensor: torch.Tensor) -> None:
    """Gives back the pages of a tensor's storage; it reads as zeros where nothing is written anew.

    Raises:
        OSError: when the system refuses, as for memory that is locked.
    """
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE  # whole pages alone
    if end > start and _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED):
        error = ctypes.get_errno()
        raise OSError(error, f"madvise: {os.strerror(error)}")


def empty_heap() -> None:
    """Gives back what the C library keeps of freed memory, where that is glibc."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
