"""Weights in 8 bits, through torchao."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TorchAoConfig
from transformers.utils import is_torchao_available

from ..errors import MissingExtra, ModelNotSupported

KINDS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
"""Names in `torchao.quantization`; both have one scale per output row."""


def quantization_config(kind: str, dtype: str | torch.dtype = "auto") -> TorchAoConfig:
    """What `from_pretrained` needs to load linear layers in 8 bits.

    Both embedding matrices stay as they are: the alignment is made of them, and thoughts are compared with them.

    Args:
        kind: "int8" or "fp8".
        dtype: What everything else is to have.

    Raises:
        ModelNotSupported: If it is neither, or torchao does not take this dtype, or overflows in it.
        MissingExtra: If torchao is not installed.
    """
    if kind not in KINDS:
        raise ModelNotSupported(f"Weights cannot be quantized to {kind!r}; take {' or '.join(map(repr, KINDS))}.")
    if dtype in ("float64", "double", torch.float64):
        raise ModelNotSupported("Weights cannot be quantized where all else is float64; take a narrower dtype.")
    if kind == "int8" and dtype in ("float16", "half", torch.float16):
        raise ModelNotSupported(
            "In float16 int8 weights overflow: torchao adds their codes up before it scales them. Take "
            "dtype='bfloat16', or quantization='fp8'."
        )
    if not is_torchao_available():
        raise MissingExtra.of("quant", "quantization=... needs torchao 0.15 or newer")
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, KINDS[kind])())


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the ones that a quantized one is made of, with their names."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor
