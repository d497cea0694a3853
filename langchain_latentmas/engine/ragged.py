"""Rows with different numbers of new positions, laid one behind the other, so that only attention computes padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .device import sent

PADDED = 2  # times the positions of a run that its places may be


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
        length: Cells in sight of the row that sees most.
        runs: All rows, in order.
        cuts: Between them; None where there is one, so that whoever compiles what follows sees no number of rows.
        cells: [total]: where in its slot each new position is written.
        owners: [total]: whose each new position is; None where all have as many.
        spread: Which of all new positions each place of the runs takes, one run behind the other; None where they lie
            there as they are. What a row is filled up with is its last position again.
        back: [total]: at which place of the runs each new position is; None likewise.
        firsts: [rows]: which of all new positions is the first of each row; not for rows that decode.
        lasts: [rows]: which one is the last; likewise.
    """

    cuts: Cuts | None = None
    owners: Tensor | None = None
    spread: Tensor | None = None
    back: Tensor | None = None
    firsts: Tensor
    lasts: Tensor

    def __init__(self, counts: Sequence[int], starts: Sequence[int], device: torch.device) -> None:
        """Plans a pass.

        Args:
            counts: New positions of each row.
            starts: Cell of each row's first one; those behind it follow, and all see the cells before them.
            device: Where the indices are needed.
        """
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        self.counts, self.new, self.even = tuple(counts), max(counts), len(set(counts)) == 1
        # On a GPU a call more costs more than cells that a short row need not have read. Rows with one new position
        # are computed as those that decode, by what may be compiled for one run.
        self.length, self.runs = max(lengths), _runs(counts, lengths, device.type == "cpu" and self.new > 1)
        if len(self.runs) > 1:
            sizes = [run.rows.stop - run.rows.start for run in self.runs]
            self.cuts = Cuts(sizes, [size * run.new for size, run in zip(sizes, self.runs, strict=True)])
        new = torch.tensor(counts)
        ends = new.cumsum(0)
        firsts, owners = ends - new, torch.arange(len(counts)).repeat_interleave(new)
        within = torch.arange(len(owners)) - firsts[owners]
        indices = [firsts, ends - 1, torch.tensor(starts)[owners] + within, owners]
        if any(count < run.new for run in self.runs for count in counts[run.rows]):
            places = [(run.rows, torch.arange(run.new)[None]) for run in self.runs]
            spread = [firsts[rows, None] + at.minimum(new[rows, None] - 1) for rows, at in places]
            indices.append(torch.cat([part.flatten() for part in spread]))
            indices.append(torch.cat([(at < new[rows, None]).flatten() for rows, at in places]).nonzero()[:, 0])
        # In one, since each copy is a call.
        found = sent(torch.cat(indices), device).split([len(index) for index in indices])
        self.firsts, self.lasts, self.cells, owners, *others = found
        if not self.even:
            self.owners = owners
        if others:
            self.spread, self.back = others

    @classmethod
    def decoding(cls, cells: Tensor, length: int) -> "Ragged":
        """Rows with one new position each, all in one run; nothing is copied to a device.

        Args:
            cells: [rows]: where in its slot each is written.
            length: Cells in sight.
        """
        one, rows = cls.__new__(cls), len(cells)
        one.counts, one.new, one.even, one.length = (1,) * rows, 1, True, length
        one.runs, one.cells = [Run(slice(0, rows), 1, length)], cells
        return one


def _runs(counts: Sequence[int], lengths: Sequence[int], by_length: bool) -> list[Run]:
    """Rows behind each other, as long as that computes at most `PADDED` times their positions."""
    runs: list[Run] = []
    real = 0  # positions of the last run
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        mine = Run(slice(row, row + 1), count, length)
        if runs:
            last = runs[-1]
            both = Run(slice(last.rows.start, row + 1), max(last.new, count), max(last.length, length))
            fits = (row + 1 - both.rows.start) * both.new <= PADDED * (real + count)
            if fits and not (by_length and bucket(last.length) != bucket(length)):
                runs[-1], real = both, real + count
                continue
        runs.append(mine)
        real = count
    return runs


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
