"""Rows of different lengths, laid one behind the other, so that nothing is computed of padding."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows that attend together: those behind each other that see about as far."""

    rows: slice
    new: int
    """New positions of the row that has most."""
    length: int
    """Cells in sight."""


class Ragged:
    """How the new positions of some rows are laid out, and which rows attend together.

    Attention is computed per run, with padding; all else takes the real positions alone.

    Attributes:
        runs: All rows, in order.
        real: [total]: which of [rows * new] are real; None where all are.
        spread: Which of the real positions each place of the runs takes, one run behind the other; None where they lie
            there as they are.
        back: [total]: at which place of the runs each real position is; None likewise.
        starts: [rows]: the first real position of each row.
    """

    real: Tensor | None = None
    spread: Tensor | None = None
    back: Tensor | None = None

    def __init__(self, counts: Sequence[int], lengths: Sequence[int], new: int, device: torch.device) -> None:
        """Plans a pass.

        Args:
            counts: Real new positions of each row.
            lengths: Cells in sight of each row's last one.
            new: Positions that each row takes with its padding.
            device: Where the indices are needed.
        """
        # On a GPU another call costs more than the cells that a short row need not have read.
        classes = [bucket(n) if device.type == "cpu" else 0 for n in lengths]
        self.runs, first = [], 0
        for _, alike in groupby(classes):
            rows = slice(first, first := first + len(list(alike)))
            self.runs.append(Run(rows, max(counts[rows]), max(lengths[rows])))
        ends = list(accumulate(counts))
        starts = torch.tensor([0, *ends[:-1]])
        self.starts = starts.to(device)
        n = torch.tensor(counts)[:, None]
        if any(count < new for count in counts):
            self.real = (torch.arange(new) < n).flatten().nonzero()[:, 0].to(device)
        if any(count < run.new for run in self.runs for count in counts[run.rows]):
            places = [torch.arange(run.new)[None] for run in self.runs]
            within = list(zip(self.runs, places, strict=True))
            spread = [starts[run.rows, None] + at.minimum(n[run.rows] - 1) for run, at in within]
            self.spread = torch.cat([part.flatten() for part in spread]).to(device)
            self.back = torch.cat([(at < n[run.rows]).flatten() for run, at in within]).nonzero()[:, 0].to(device)


def bucket(length: int) -> int:
    """The next of 128, 192, 256, 384, 512, 768, ...: few lengths, and at most half as much again to read."""
    whole = max(128, 1 << (length - 1).bit_length())
    return whole * 3 // 4 if whole > 128 and length <= whole * 3 // 4 else whole


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    """`x[index]`, or all of it."""
    return x if index is None else x[index]
