"""Which kernels of attention are installed and what they take, told without loading any."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

LARGEST_HEAD, HEAD_STEP = 256, 8  # of flash attention: up to so many numbers a head, in steps of so many


@cache
def has_flash_attention_2() -> bool:
    """Whether flash-attn 2 is installed; version 4 has the same module's name and other functions."""
    try:
        return bool(find_spec("flash_attn")) and version("flash-attn").split(".")[0] == "2"
    except PackageNotFoundError:  # flash-attn-4
        return False
