"""Altered memories: the same keys with other values, so that a reader finds positions but no content (for the audit).

An altered memory is never stored. Its id is that of the memory it was made of, a dot, and what was done to it, so
nobody takes one for the other, whatever read it has an id of its own too, and once evicted it is altered again.
"""

import hashlib

import torch
from torch import Tensor

from ..engine.kv import KV, AnyKV, of_each, stacked


def alter(kv: AnyKV, key: str) -> KV:
    """The KV of an altered memory.

    Args:
        kv: That of the memory it was made of.
        key: Id of the altered one; ends in ".zeroed", or in ".random" and a seed.

    Returns:
        The same keys, not copied, with values of zero, or with noise of the same norm per layer, head and position.
        The noise depends on the id alone.
    """
    if key.endswith(".zeroed"):
        return KV(kv.keys, of_each(kv.values, torch.zeros_like))
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
    return KV(kv.keys, stacked([_noise_like(values, generator) for values in kv.values]))


def unaltered(key: str) -> str:
    """The id of the memory that an altered one was made of; "" for one that is as it was thought."""
    return key.rpartition(".")[0]


def original(key: str) -> str:
    """The id of the memory at the bottom of any alterations."""
    return key.partition(".")[0]


def _noise_like(values: Tensor, generator: torch.Generator) -> Tensor:
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    noise = torch.randn(values.shape, generator=generator, dtype=wide.dtype).to(values.device)
    return (noise * (wide.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))).to(values.dtype)
