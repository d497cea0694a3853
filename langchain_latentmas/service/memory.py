"""Memories: chains of segments, and how several become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from torch import Tensor

from ..engine.model import Embeddable
from .alteration import unaltered

MergeMode = Literal["rotate", "rebuild"]
LINES_KEPT = 65536


@dataclass(frozen=True, eq=False)
class Segment:
    """What one agent added to a memory: prompt, then thoughts, then spoken tokens.

    Attributes:
        agent: Who.
        prompt_ids: Token ids of its prompt.
        thoughts: [steps, hidden], in the model's dtype.
        spoken_ids: Token ids that it decoded.
    """

    agent: str
    prompt_ids: tuple[int, ...]
    thoughts: Tensor
    spoken_ids: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Positions it takes in a memory."""
        return len(self.prompt_ids) + len(self.thoughts) + len(self.spoken_ids)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in CPU memory, about."""
        return self.thoughts.nbytes + 40 * (len(self.prompt_ids) + len(self.spoken_ids)) + 2000

    @property
    def inputs(self) -> list[Embeddable]:
        """What one prefill is fed to rebuild its KV."""
        return [part for part in (self.prompt_ids, self.thoughts, self.spoken_ids) if len(part)]


@dataclass(frozen=True, eq=False)
class Recipe:
    """A memory without its KV: one segment, and the ids of the memories it was made on.

    Attributes:
        id: Digest of what it was made from.
        model: Fingerprint of the model.
        alignment: "realign" or "rescale".
        parents: Ids of the memories that were read, in order.
        segment: What was added.
    """

    id: str
    model: str
    alignment: str
    parents: tuple[str, ...]
    segment: Segment


class Piece(NamedTuple):
    """A segment's place in a memory."""

    id: str
    start: int
    positions: int

    @property
    def end(self) -> int:
        """Position after its last one."""
        return self.start + self.positions


Layout = tuple[Piece, ...]
"""The segments of a memory in their order, without gaps from position 0."""


def merge(lines: Sequence[Layout]) -> Layout:
    """Lays several memories out as one: common ancestry first, then each branch's own segments (design, rule 7).

    Args:
        lines: The memories, in the order in which they are read.

    Returns:
        A layout in which every segment stands once, after everything it has seen.
    """
    if len(lines) == 1:
        return lines[0]
    common = set.intersection(*({piece.id for piece in line} for line in lines)) if lines else set()
    first = (piece for line in lines[:1] for piece in line if piece.id in common)
    merged: dict[str, Piece] = {}
    end = 0
    for piece in chain(first, *lines):
        if piece.id not in merged:
            merged[piece.id] = Piece(piece.id, end, piece.positions)
            end += piece.positions
    return tuple(merged.values())


class Lineage:
    """Knows of every memory where each of its segments stands."""

    def __init__(self, recipe: Callable[[str], Recipe]) -> None:
        """Starts empty.

        Args:
            recipe: Returns the recipe of an id, or raises.
        """
        self._recipe = recipe
        self._lines: dict[str, Layout] = {}

    def line(self, key: str) -> Layout:
        """The memory of one id: what it saw when it was made, then its own segment, where that was computed."""
        if len(self._lines) > LINES_KEPT:
            self._lines = {}  # a new one: others may be reading the old
        lines, stack = self._lines, [key]
        while stack:  # a loop, since a memory may be thousands of segments deep
            if (whole := unaltered(stack[-1])) and whole not in lines:
                stack.append(whole)
                continue
            if whole:
                how = stack[-1].removeprefix(whole)
                lines[stack[-1]] = tuple(piece._replace(id=piece.id + how) for piece in lines[whole])
                stack.pop()
                continue
            recipe = self._recipe(stack[-1])
            unknown = [parent for parent in recipe.parents if parent not in lines]
            if unknown:
                stack += unknown
                continue
            seen = merge([lines[parent] for parent in recipe.parents])
            lines[recipe.id] = (*seen, Piece(recipe.id, seen[-1].end if seen else 0, recipe.segment.positions))
            stack.pop()
        return lines[key]

    def tips(self, keys: Sequence[str]) -> list[str]:
        """Those ids that none of the others descends from, each once, in their order."""
        older = {piece.id for key in keys for piece in self.line(key)[:-1]}
        return [key for key in dict.fromkeys(keys) if key not in older]

    def layout(self, keys: Sequence[str]) -> Layout:
        """The memory that someone who reads these ids gets."""
        return merge([self.line(key) for key in keys])


@dataclass(frozen=True, eq=False)
class Memory:
    """A memory as `LatentService.memory` shows it.

    Attributes:
        segments: In order.
        positions: Of all segments together.
        keys: Per layer [kv_heads, positions, head_dim].
        values: Per layer [kv_heads, positions, head_dim].
        merge: How several memories became one: "none", "rotated" or "rebuilt".
    """

    segments: tuple[Segment, ...]
    positions: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    merge: str
