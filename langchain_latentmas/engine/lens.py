"""The lens: what a thought would have been, had it been a token."""

import torch
from torch import Tensor

from .model import LanguageModel

TOGETHER = 64  # states whose logits, as large as the vocabulary, are there at a time


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
        tops = [model.logits(piece).float().softmax(-1).topk(top_k) for piece in states.split(TOGETHER)]
    return [
        [(model.tokenizer.decode([token]), probability) for token, probability in zip(tokens, shares, strict=True)]
        for top in tops
        for tokens, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
