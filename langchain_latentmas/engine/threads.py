"""How many threads a forward pass takes on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SHARED = 1 << 19  # multiplications of a product from which sharing it out saves more than it costs, some 10 µs a thread
READ = 8  # rows that are multiplied with a weight in the time that it takes to read it


class Threads:
    """torch's threads for passes with products that are worth sharing out, and one thread for all others.

    torch takes them all for any product, so that most of a small model's tick is threads that wait for each other. Who
    uses torch in the same process keeps what it has; but its number is also what threads begin with that use torch for
    the first time, and so one that does while a small pass is under way keeps to one.
    """

    def __init__(self, decoder: nn.Module, embeddings: nn.Parameter) -> None:
        """Takes all threads that torch has now.

        Args:
            decoder: Whose products they are.
            embeddings: Parameter of it that is in none.
        """
        sizes = [p.numel() for p in decoder.parameters() if p.dim() > 1 and p is not embeddings]
        self.all, self._product = torch.get_num_threads(), sum(sizes) // max(1, len(sizes))

    def of(self, positions: int) -> int:
        """How many a pass of so many positions takes."""
        return self.all if self._product * max(positions, READ) >= SHARED else 1

    @contextmanager
    def taken(self, positions: int) -> Iterator[None]:
        """Sets torch to as many as a pass of so many positions takes, in this thread and for as long."""
        wanted, before = self.of(positions), torch.get_num_threads()
        if wanted == before:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)
