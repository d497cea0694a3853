"""Linear layers: on a CPU, large products go to oneDNN."""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LARGE = 1 << 20  # multiplications; below, a call of oneDNN costs more than it saves
FEW = 2  # rows for which MKL takes 0.6 to 0.9 of oneDNN's time on Intel's processors, and from twice as many on more


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


INTEL = _is_intel()
MKL_LAGS = not INTEL and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether the processor has wider vectors than MKL uses on it: that uses the widest ones of Intel's alone."""


class Linear:
    """A linear layer over the weights of a module; no gradients."""

    def __init__(self, module: nn.Linear, packed: bool = False) -> None:
        """Takes the weights of a module.

        Args:
            module: Whose weight [out, in] and bias [out].
            packed: Whether to keep the weight a second time, in the layout that oneDNN reads fastest.
        """
        self.weight, self.bias = module.weight, module.bias
        self._packed: Tensor | None = None
        if packed and self.weight.numel() >= LARGE and packable(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] of [..., in]."""
        if self._packed is None or torch.compiler.is_compiling() or _is_few(x, self.weight):
            return linear(x, self.weight, self.bias)
        return _onednn(x, self._packed, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, as `torch.nn.functional.linear`; no gradients.

    For float32 torch calls MKL, which uses the wide vectors of Intel's processors only. oneDNN, which comes with torch,
    asks the processor what it has: on an AMD EPYC with AVX-512 it reads a matrix for one row 2.4 times as fast, and
    multiplies many rows in 0.45 of the time. On an Intel Xeon, and on an AMD EPYC without AVX-512, the two are alike
    for small matrices, but MKL takes less time to begin (on a first-generation EPYC 2 µs a call and not 50), so these
    are left to it there; large ones oneDNN shares out better among threads, but for one or two rows on a Xeon. For
    bfloat16 torch calls oneDNN itself.

    Args:
        x: [..., in].
        weight: [out, in], of the same dtype; may be quantized.
        bias: [out], or None.

    Returns:
        [..., out].
    """
    small = x.numel() * weight.shape[0] < LARGE or (weight.numel() < LARGE and not MKL_LAGS) or _is_few(x, weight)
    if small or weight.dtype is not torch.float32 or not packable(weight) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def packable(weight: Tensor) -> bool:
    """Whether oneDNN takes a weight on this processor."""
    if weight.device.type != "cpu" or is_traceable_wrapper_subclass(weight) or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32


def _is_few(x: Tensor, weight: Tensor) -> bool:
    return INTEL and weight.dtype is torch.float32 and x.numel() <= FEW * weight.shape[1]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
