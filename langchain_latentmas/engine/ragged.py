"""Rows with different numbers of new positions, laid one behind the other, so that only attention computes padding."""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows that attend together: those behind each other that are about as long and see about as far."""

    rows: slice
    new: int
    """New positions of the row that has most."""
    length: int
    """Cells in sight of the row that sees most."""


class Cuts(NamedTuple):
    """Where one run ends and the next one begins."""

    rows: list[int]
    """Of each run."""
    places: list[int]
    """Of each run, rows times new positions."""


class Ragged:
    """How the new positions of some rows lie one behind the other, and which rows attend together.

    Attention is computed run by run, each row filled up to the longest of its run.

    Attributes:
        counts: New positions of each row.
        new: Those of the row that has most.
        even: Whether all have as many.
        runs: All rows, in order.
        cuts: Between them; None where there is one, so that whoever compiles what follows sees no number of rows.
        starts: [rows]: at which of all new positions each row begins.
        owners: [total]: whose each new position is; None where all have as many.
        spread: Which of all new positions each place of the runs takes, one run behind the other; None where they lie
            there as they are. What a row is filled up with is its last position again.
        back: [total]: at which place of the runs each new position is; None likewise.
    """

    cuts: Cuts | None = None
    starts: Tensor
    owners: Tensor | None = None
    spread: Tensor | None = None
    back: Tensor | None = None

    def __init__(self, counts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """Plans a pass.

        Args:
            counts: New positions of each row.
            lengths: Cells in sight of each row's last one.
            device: Where the indices are needed.
        """
        self.counts, self.new, self.even = tuple(counts), max(counts), len(set(counts)) == 1
        # On a GPU a call more costs more than cells that a short row need not have read. Rows with one new position
        # are computed as those that decode, by what may be compiled for one run.
        far = [bucket(length) if device.type == "cpu" and self.new > 1 else 0 for length in lengths]
        alike, self.runs = groupby(zip(far, map(bucket, counts), strict=True)), list[Run]()
        for first, end in pairwise(accumulate((len(list(rows)) for _, rows in alike), initial=0)):
            rows = slice(first, end)
            self.runs.append(Run(rows, max(counts[rows]), max(lengths[rows])))
        if len(self.runs) > 1:
            sizes = [run.rows.stop - run.rows.start for run in self.runs]
            self.cuts = Cuts(sizes, [size * run.new for size, run in zip(sizes, self.runs, strict=True)])
        new = torch.tensor(counts)[:, None]
        starts = new.cumsum(0) - new
        indices = [starts.flatten(), torch.arange(len(counts)).repeat_interleave(new.flatten())]
        if any(count < run.new for run in self.runs for count in counts[run.rows]):
            places = [(run.rows, torch.arange(run.new)[None]) for run in self.runs]
            indices.append(torch.cat([(starts[rows] + at.minimum(new[rows] - 1)).flatten() for rows, at in places]))
            indices.append(torch.cat([(at < new[rows]).flatten() for rows, at in places]).nonzero()[:, 0])
        # In one, since each copy waits for the device.
        self.starts, owners, *others = torch.cat(indices).to(device).split([len(index) for index in indices])
        if not self.even:
            self.owners = owners
        if others:
            self.spread, self.back = others

    @classmethod
    def decoding(cls, rows: int, length: int) -> "Ragged":
        """Rows with one new position each, all in one run; nothing is copied to a device."""
        one = cls.__new__(cls)
        one.counts, one.new, one.even, one.runs = (1,) * rows, 1, True, [Run(slice(0, rows), 1, length)]
        return one

    @property
    def length(self) -> int:
        """Cells in sight of the row that sees most."""
        return max(run.length for run in self.runs)


def bucket(length: int) -> int:
    """The next of 128, 192, 256, 384, 512, 768, ...: few lengths, and at most half as much again to read."""
    whole = max(128, power_of_two(length))
    return whole * 3 // 4 if whole > 128 and length <= whole * 3 // 4 else whole


def power_of_two(n: int) -> int:
    """The smallest one that is not less."""
    return 1 << (n - 1).bit_length()


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    """`x[index]`, or all of it."""
    return x if index is None else x[index]
