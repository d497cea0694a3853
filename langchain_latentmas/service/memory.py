"""Memories: chains of segments, and how several become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from torch import Tensor

from ..engine.model import Embeddable
from .alteration import unaltered
from .budget import Budget

MergeMode = Literal["rotate", "rebuild"]
Merge = Literal["none", "rotated", "rebuilt", "chained"]
Alignment = Literal["realign", "rescale"]
LINES_KEPT = 1 << 23  # bytes of them, at most; all others are worked out again


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
        alignment: Whether its thoughts were made with `W`, or only rescaled.
        parents: Ids of the memories that were read, in order.
        segment: What was added.
    """

    id: str
    model: str
    alignment: Alignment
    parents: tuple[str, ...]
    segment: Segment


class Piece(NamedTuple):
    """A segment's place in a memory, and all that has to be known of it there without its recipe."""

    id: str
    start: int
    positions: int
    own_start: int
    """Where it was computed."""
    steps: int
    """Its thoughts."""
    on_moved: bool
    """Whether something that it saw when it was computed stood elsewhere than where that was computed itself."""

    @property
    def moved(self) -> bool:
        """Whether it stands elsewhere than where it was computed."""
        return self.start != self.own_start

    @property
    def end(self) -> int:
        """Position after its last one."""
        return self.start + self.positions


Layout = tuple[Piece, ...]
"""The segments of a memory in their order, without gaps from position 0."""


def merge(lines: Sequence[Layout]) -> Layout:
    """Lays several memories out as one: common ancestry first, then each branch's own segments.

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
            merged[piece.id] = piece if piece.start == end else piece._replace(start=end)
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
        self._lines: Budget[Layout] = Budget(LINES_KEPT, lambda line: 400 + 250 * len(line))  # none shares its pieces

    def line(self, key: str) -> Layout:
        """The memory of one id: what it saw when it was made, then its own segment, where that was computed."""
        if (line := self._lines.get(key)) is not None:
            return line
        lines: dict[str, Layout] = {}  # those this one is made of, also when they are too many to be kept
        stack = [key]
        while stack:  # a loop, since a memory may be thousands of segments deep
            made = lines[stack[-1]] if stack[-1] in lines else self._made(stack[-1], lines)
            if isinstance(made, list):
                stack += made
                continue
            lines[stack.pop()] = made
        self._lines.put(key, lines[key])  # not those of its ancestors: nobody asks for them as often
        return lines[key]

    def _made(self, key: str, lines: dict[str, Layout]) -> Layout | list[str]:
        """A line, or those of which it is made and which are not in `lines` yet."""
        if (kept := self._lines.get(key)) is not None:
            return kept
        if whole := unaltered(key):
            how = key.removeprefix(whole)
            return tuple(piece._replace(id=piece.id + how) for piece in lines[whole]) if whole in lines else [whole]
        # Those that were made on one memory alone go into one line: each in one of its own takes their number squared.
        run: list[tuple[str, int, int]] = []
        sources: tuple[str, ...] = (key,)
        while len(sources) == 1 and not (sources[0] in lines or sources[0] in self._lines or unaltered(sources[0])):
            recipe = self._recipe(sources[0])
            run.append((recipe.id, recipe.segment.positions, len(recipe.segment.thoughts)))
            sources = recipe.parents
        if unknown := [source for source in sources if source not in lines]:
            return unknown
        seen = merge([lines[source] for source in sources])
        whole_line = len(sources) == 1  # then its last piece has looked at all the others
        on_moved = any(piece.moved or piece.on_moved for piece in (seen[-1:] if whole_line else seen))
        line, start = list(seen), seen[-1].end if seen else 0
        for own, positions, steps in reversed(run):
            line.append(Piece(own, start, positions, start, steps, on_moved))
            start += positions
        return tuple(line)

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
        merge: How several memories became one.
    """

    segments: tuple[Segment, ...]
    positions: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    merge: Merge
