"""Attention over slots that several query heads read without a copy of keys and values for each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "latentmas"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models ask for, and this attention would leave out
MANY = 8  # rows times their heads of keys; for fewer, on a CPU, torch's kernel is faster


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
    """Scaled dot-product attention as transformers calls it; the heads of a group become positions of one head.

    Args:
        module: The attention layer, not looked at.
        query: [rows, heads, new, head_dim].
        key: [rows, kv_heads, length, head_dim].
        value: The same shape, its own head_dim.
        attention_mask: What is added to the scores, [rows, 1, new, length], or None.
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
    packed = query.reshape(rows, key.shape[1], groups * new, dim)
    if attention_mask is not None and new > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    small = new == 1 < groups and rows * key.shape[1] >= MANY and query.dtype is torch.float32
    if small and attention_mask is not None and query.device.type == "cpu" and not torch.compiler.is_compiling():
        # For a few queries each, products of all heads at once take 0.35 to 1 of the time of torch's kernel there.
        scores = torch.matmul(packed * (scaling or dim**-0.5), key.transpose(2, 3)).add_(attention_mask)
        out = torch.matmul(scores.softmax(-1), value)
    else:
        out = F.scaled_dot_product_attention(packed, key, value, attention_mask, dropout, scale=scaling)
    return out.reshape(rows, heads, new, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)  # whoever runs the model without a mask gets one that is added
