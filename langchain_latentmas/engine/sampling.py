"""Choosing the next token: transformers' logits processors, and a draw for each row that no other row can change."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..errors import InvalidRequest

COLDEST = 1e-6  # as good as greedy; logits divided by less would overflow float32


@dataclass(frozen=True)
class Sampling:
    """How a speaking row chooses its tokens.

    Attributes:
        max_tokens: Most tokens to speak, at least 1.
        temperature: 0 means greedy.
        top_p: Smallest set of tokens whose probability exceeds this.
        top_k: Only so many most likely tokens; None means all.
        seed: For the same tokens again; None draws one.
        stop: Strings that end the text, and are not part of it.

    Raises:
        InvalidRequest: If a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, *, stop: str | Sequence[str] | None = None, **values: Any) -> Self:
        """From a caller's keywords, `stop` maybe a single string.

        Raises:
            InvalidRequest: If one is unknown, or out of range.
        """
        try:
            return cls(**values, stop=(stop,) if isinstance(stop, str) else tuple(stop or ()))
        except TypeError as error:
            raise InvalidRequest(
                f"speak takes max_tokens, temperature, top_p, top_k, stop and seed: {error}"
            ) from error

    def __post_init__(self) -> None:
        """Checks every value."""
        whole = {"max_tokens": self.max_tokens, "top_k": self.top_k, "seed": self.seed}
        for name, value in whole.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidRequest(f"{name} must be a whole number, not {value!r}.")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {self.max_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidRequest(f"temperature must be 0 (greedy) or more, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must lie in (0, 1], not at {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest(f"top_k must be at least 1 or None, not {self.top_k}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidRequest(f"seed must lie in [0, 2**63), not at {self.seed}.")
        if any(not isinstance(stop, str) or not stop for stop in self.stop):
            raise InvalidRequest(f"Stop strings must be strings, and not empty: {list(self.stop)!r}.")


def shares(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """How likely each token is to be drawn, of rows that sample alike.

    That takes some fifteen calls, a sort of the vocabulary among them, however many rows there are.

    Args:
        logits: [rows, vocab].
        temperature: Above 0.
        top_k: See `Sampling`.
        top_p: See `Sampling`.

    Returns:
        [rows, vocab], in float32.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(max(float(temperature), COLDEST))])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors(None, logits.float()).softmax(-1)


class Sampler:
    """Draws for one row, with a random generator of its own, so that its neighbours cannot change its tokens."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        """Prepares the generator.

        Args:
            sampling: Has the seed.
            device: Where the logits will be.
        """
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, share: Tensor) -> Tensor:
        """Draws a token id [], where each token has its share [vocab]."""
        # What torch.multinomial does for one sample, without its checks, for which the host would wait each time.
        return (share / torch.empty_like(share).exponential_(generator=self.generator)).argmax()
