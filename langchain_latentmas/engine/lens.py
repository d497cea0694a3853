"""The lens: what a thought would have been, had it been a token."""

import torch
from torch import Tensor

from .model import LanguageModel


def read_out(model: LanguageModel, states: Tensor, top_k: int) -> list[list[tuple[str, float]]]:
    """The most likely tokens of hidden states.

    Args:
        model: Whose vocabulary.
        states: Last hidden states before alignment, [steps, hidden].
        top_k: Tokens per state.

    Returns:
        Per state, `top_k` pairs of token text and probability, the likeliest first.
    """
    with torch.inference_mode():
        top = model.logits(states).float().softmax(-1).topk(top_k)
    return [
        [(model.tokenizer.decode([token]), probability) for token, probability in zip(tokens, shares, strict=True)]
        for tokens, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
