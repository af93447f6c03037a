"""Matrix products in fp32 by oneDNN, where torch takes MKL's: a tenth to two fifths less time on AMD's AVX-512.

torch leaves products of fp32 to oneDNN only where their precision may be lowered; here it is not. Few rows gain most,
as vLLM has them in decoding (32 rows through SmolLM2-135M on 2 cores of an AMD EPYC: 74 ms in place of 127). Weights
are not packed for it, so new ones take effect at once. MKL keeps the gradients of weights, whose left factor is
transposed: there it is ahead. Layers with a bias are left to MKL too.
"""

import warnings
from pathlib import Path

import torch

_overriding: torch.library.Library | None = None  # torch takes back what a library registered as it goes


def is_ahead() -> bool:
    """Whether this is a machine of the kind on which oneDNN was measured to be ahead: AMD's with AVX-512."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()  # Intel's MKL is at home on Intel's


def install() -> None:
    """Takes oneDNN for this process's products where it was measured to be ahead; a second call does nothing."""
    global _overriding
    if _overriding is None and is_ahead():
        _overriding = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel of torch's is replaced: it is meant to be
            _overriding.impl("mm", product, "CPU", allow_override=True)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two matrices, (rows, inner) and (inner, columns), as `torch.mm`'s."""
    if _is_for_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[:1] + b.shape[1:]))


def _is_for_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    fit = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.numel() > 0 and b.numel() > 0
    plain = fit and a.is_contiguous() and (b.is_contiguous() or b.t().is_contiguous())
    return plain and a.dtype == b.dtype == torch.float32
