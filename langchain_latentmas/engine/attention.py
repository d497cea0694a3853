"""Attention over slots that several query heads read without a copy of keys and values for each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "latentmas"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models ask for, and this attention would leave out


def attend(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as transformers calls it.

    Where torch would copy keys and values for each head of a group, these heads become positions of one head instead.
    On a CPU it copies nothing, and with many queries of a row is faster by itself; with one it reads keys once a head.

    Args:
        module: The attention layer, not looked at.
        query: [rows, heads, new, head_dim].
        key: [rows, kv_heads, length, head_dim].
        value: The same shape, its own head_dim.
        attention_mask: What is added to the scores, [rows, 1, new, length], maybe `repeated` already, or None.
        dropout: Of the weights, 0 here.
        scaling: Of the scores; None takes 1 / sqrt(head_dim).
        **kwargs: What some models add.

    Returns:
        [rows, new, heads, head_dim], and no weights.

    Raises:
        NotImplementedError: If the model asks for more than this.
    """
    if asked := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(asked)}")
    rows, heads, new, dim = query.shape
    groups = heads // key.shape[1]
    if not copies(query.device) and new > 1:
        out = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=groups > 1
        )
        return out.transpose(1, 2).contiguous(), None
    packed = query.reshape(rows, key.shape[1], groups * new, dim)
    if attention_mask is not None and attention_mask.shape[2] == new:
        attention_mask = repeated(attention_mask, groups)
    out = F.scaled_dot_product_attention(packed, key, value, attention_mask, dropout, scale=scaling)
    return out.reshape(rows, heads, new, value.shape[-1]).transpose(1, 2).contiguous(), None


def copies(device: torch.device) -> bool:
    """Whether torch would copy keys and values for each head of a group."""
    return device.type != "cpu"


def repeated(mask: Tensor, groups: int) -> Tensor:
    """A mask for heads of a group that became positions of one head.

    Args:
        mask: [rows, 1, new, length]; of a single position it holds for all of them as it is.
        groups: Heads of a group.
    """
    return mask.repeat(1, 1, groups, 1) if groups > 1 and mask.shape[2] > 1 else mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)  # whoever runs the model without a mask gets one that is added
