"""The KV of memories on the device, under a byte budget; what was evicted is rebuilt from its recipe."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from ..engine.kv import KV, Placed
from ..engine.scheduler import Scheduler
from ..engine.tick import Result, Row
from ..errors import EngineFailed
from .alteration import alter, unaltered
from .budget import Budget
from .memory import Layout, Lineage, MergeMode, Piece, Recipe

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class KVPool:
    """Hands out the KV of whole memories, segment by segment, shared between all memories that contain them.

    A segment is kept once, with the keys of where it was computed; whoever reads it elsewhere turns them on the way
    into a slot. Nothing here blocks: what has to be rebuilt first arrives through the futures.

    Attributes:
        kept: KV by memory id.
        rebuilds: Prefills that brought back what was evicted.
    """

    def __init__(
        self, scheduler: Scheduler, lineage: Lineage, recipe: Callable[[str], Recipe], limit: int, mode: MergeMode
    ) -> None:
        """Starts empty.

        Args:
            scheduler: Computes what is missing.
            lineage: Where the segments of a memory stand.
            recipe: Returns the recipe of an id, or raises.
            limit: Bytes of KV to keep; what is in use may exceed it.
            mode: What happens to segments that a merge moves.
        """
        self.kept: Budget[KV] = Budget(limit, lambda kv: kv.nbytes)
        self.mode, self.rebuilds = mode, 0
        self._scheduler, self._lineage, self._recipe = scheduler, lineage, recipe
        self._rebuilding: dict[str, Future[KV]] = {}
        self._lock = threading.RLock()

    def place(self, layout: Layout) -> "Future[list[Placed]]":
        """The KV of a memory, ready to be written to a slot.

        Args:
            layout: From `Lineage.layout`.

        Returns:
            A future of one `Placed` per piece; fails if a recipe is missing or the engine does.
        """
        lines = {piece.id: self._lineage.line(piece.id) for piece in layout}
        shifts = {piece.id: piece.start - lines[piece.id][-1].start for piece in layout}
        starts = {piece.id: piece.start for piece in layout}
        anew: set[str] = set()
        if self.mode == "rebuild":  # whatever stands elsewhere than when it was made, or sees something that does
            anew = {key for key, line in lines.items() if any(seen.start != starts[seen.id] for seen in line)}
        # The last one first: its rebuild brings back the whole run before it.
        kvs = {piece.id: self._kv(piece.id) for piece in reversed(layout) if piece.id not in anew}
        placed: dict[str, Future[Placed]] = {}
        for piece in layout:
            if piece.id in anew and unaltered(piece.id):
                placed[piece.id] = _then(self._unaltered_at(lines[piece.id], starts), _Alter(piece.id))
            elif piece.id in anew:
                placed[piece.id] = self._computed_at(piece, [placed[seen.id] for seen in lines[piece.id][:-1]])
            else:
                placed[piece.id] = _then(kvs[piece.id], _Place(piece.start, shifts[piece.id]))
        return _gather(list(placed.values()))

    def _kv(self, key: str) -> "Future[KV]":
        """A segment's KV where it was computed."""
        if whole := unaltered(key):
            return _then(self._kv(whole), partial(alter, key=key))
        with self._lock:
            if key in self._rebuilding:
                return self._rebuilding[key]
            if (kv := self.kept.get(key)) is not None:
                done: Future[KV] = Future()
                done.set_result(kv)
                return done
            # One prefill brings back a whole run of segments, each made on the one before it.
            run = [self._recipe(key)]
            while len(run[0].parents) == 1 and not {*run[0].parents} & self._rebuilding.keys():
                if run[0].parents[0] in self.kept or unaltered(run[0].parents[0]):
                    break
                run.insert(0, self._recipe(run[0].parents[0]))
            seen = self._lineage.layout(run[0].parents)
            futures = {recipe.id: Future[KV]() for recipe in run}
            self._rebuilding |= futures
            self.rebuilds += 1
        logger.info("rebuilding %d segments that end in %s", len(run), key)

        def deliver(result: Result) -> None:
            try:
                parts = result.kv.split([recipe.segment.positions for recipe in run]) if len(run) > 1 else [result.kv]
            except RuntimeError as error:  # no memory for the copies; the row is gone, so nobody else would tell
                fail(EngineFailed(f"A memory could not be rebuilt ({error}); the same call may succeed later."))
                return
            with self._lock:
                for recipe, kv in zip(run, parts, strict=True):
                    self.kept.put(recipe.id, kv)
                    del self._rebuilding[recipe.id]
            for future, kv in zip(futures.values(), parts, strict=True):
                future.set_result(kv)

        def fail(error: BaseException) -> None:
            with self._lock:
                for recipe in run:
                    del self._rebuilding[recipe.id]
            for future in futures.values():
                future.set_exception(error)

        inputs = [part for recipe in run for part in recipe.segment.inputs]
        row = Row(past=(), start=seen[-1].end if seen else 0, inputs=inputs, on_done=deliver, on_error=fail)
        try:
            self.submit(row, self.place(seen))
        except Exception as error:  # a recipe that is gone: whoever else waits for this segment must hear of it
            fail(error)
        return futures[key]

    def _unaltered_at(self, line: Layout, starts: Mapping[str, int]) -> "Future[Placed]":
        """The last segment of an altered memory as it was before, computed anew where a merge puts it."""
        whole = tuple(Piece(unaltered(piece.id), starts[piece.id], piece.positions) for piece in line)
        return _then(self.place(whole), lambda placed: placed[-1])

    def submit(self, row: Row, past: "Future[list[Placed]]") -> None:
        """Queues a row as soon as the memory it reads is there; errors go to the row."""

        def ready(past: "Future[list[Placed]]") -> None:
            if (error := past.exception()) is not None:
                row.on_error(error)
            elif not row.cancelled:
                row.past = past.result()
                try:
                    self._scheduler.submit(row)
                except Exception as closed:
                    row.on_error(closed)

        past.add_done_callback(ready)

    def _computed_at(self, piece: Piece, seen: "Sequence[Future[Placed]]") -> "Future[Placed]":
        """A segment's KV computed anew where a merge puts it, blind to what it did not see when it was made."""
        future: Future[Placed] = Future()

        def see(past: "Future[list[Placed]]") -> None:
            if (error := past.exception()) is not None:
                future.set_exception(error)
                return
            try:
                inputs = self._recipe(piece.id).segment.inputs
            except Exception as error:  # a future swallows what its callbacks raise
                future.set_exception(error)
                return
            there = sorted(past.result(), key=lambda at: at.start)  # a merge may have changed their order
            ends = [0, *(at.start + at.kv.positions for at in there)]
            starts = [*(at.start for at in there), piece.start]
            row = Row(
                past=(),
                start=piece.start,
                inputs=inputs,
                holes=[(end, start) for end, start in zip(ends, starts, strict=True) if end < start],
                on_done=lambda result: future.set_result(Placed(result.kv, piece.start)),
                on_error=future.set_exception,
            )
            self.submit(row, past)

        _gather(seen).add_done_callback(see)
        return future


class _Alter:
    """Alters a KV that has its place already."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, placed: Placed) -> Placed:
        return placed._replace(kv=alter(placed.kv, self.key))


class _Place:
    """Puts a KV where a layout wants it."""

    def __init__(self, start: int, shift: int) -> None:
        self.start, self.shift = start, shift

    def __call__(self, kv: KV) -> Placed:
        return Placed(kv, self.start, self.shift)


def _then(future: "Future[A]", function: Callable[[A], B]) -> "Future[B]":
    following: Future[B] = Future()

    def follow(done: "Future[A]") -> None:
        try:
            result = function(done.result())
        except Exception as error:  # a future swallows what its callbacks raise
            following.set_exception(error)
        else:
            following.set_result(result)

    future.add_done_callback(follow)
    return following


def _gather(futures: "Sequence[Future[A]]") -> "Future[list[A]]":
    """All results, or the first error in their order, once all are done."""
    gathered: Future[list[A]] = Future()
    left = len(futures)
    lock = threading.Lock()

    def count(_: "Future[A] | None") -> None:
        nonlocal left
        with lock:
            left -= 1
            if left > 0:
                return
        error = next((f.exception() for f in futures if f.exception() is not None), None)
        if error is not None:
            gathered.set_exception(error)
        else:
            gathered.set_result([f.result() for f in futures])

    if not futures:
        gathered.set_result([])
    for future in futures:
        future.add_done_callback(count)
    return gathered
