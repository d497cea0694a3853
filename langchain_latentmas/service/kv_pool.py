"""The KV of memories: on the device, else in CPU memory, else on the disk, else rebuilt from the recipe."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import takewhile
from typing import TypeVar, cast

import torch

from ..engine.kv import KV, AnyKV, Placed
from ..engine.scheduler import Scheduler
from ..engine.tick import Result, Row
from ..errors import EngineFailed, LatentMASError, ServiceClosed, StoreCorrupted, UnknownReference, first_line
from .alteration import alter, unaltered
from .budget import Budget
from .memory import Layout, Lineage, MergeMode, Piece, Recipe
from .prefixes import Prefixes
from .spill import Spill

logger = logging.getLogger(__name__)

QUICK = 0.002  # seconds that a tick waits for the pool
REUSED_FROM = 8  # tokens that two prompts begin with alike; fewer are sooner computed than copied

A = TypeVar("A")
B = TypeVar("B")
_turns = threading.local()


class KVPool:
    """Hands out the KV of whole memories, segment by segment, shared between all memories that contain them.

    A segment is kept once, with the keys of where it was computed; whoever reads it elsewhere turns them on the way
    into a slot. What leaves the device for want of room goes to CPU memory, from there to the disk, and comes back to
    the device when somebody reads it. Nothing here waits for the disk or for the model: what has to be read or rebuilt
    first arrives through the futures. But what goes to CPU memory, or comes from there, is copied at once, and on a GPU
    that waits for the ticks that are queued. Recipes that are in memory no more are read where they are needed.

    Attributes:
        packed: Whether it keeps KV in 8 bits.
        kept: KV on the device, by memory id.
        spilled: KV in CPU memory, by memory id.
        hits: Segments found "device", "cpu" or "disk".
        rebuilds: Prefills that brought back what was nowhere.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lineage: Lineage,
        recipe: Callable[[str], Recipe],
        limit: int,
        mode: MergeMode,
        *,
        cpu_limit: int = 0,
        disk: Spill | None = None,
        devices: Sequence[torch.device] = (),
        packed: bool = False,
    ) -> None:
        """Starts empty, but for what `disk` holds.

        Args:
            scheduler: Computes what is missing.
            lineage: Where the segments of a memory stand.
            recipe: Returns the recipe of an id, or raises.
            limit: Bytes of KV to keep on the device. Beyond it is what rows near their turn are about to read.
            mode: What happens to segments that a merge moves.
            cpu_limit: Bytes of KV to keep in CPU memory besides.
            disk: Where KV goes that has no room there either.
            devices: Device of each layer.
            packed: Whether to keep KV in 8 bits. Then all readers get what the 8 bits say, wherever they were kept.
        """
        self.kept: Budget[AnyKV] = Budget(limit, lambda kv: kv.nbytes)
        self.spilled: Budget[AnyKV] = Budget(cpu_limit, lambda kv: kv.nbytes)
        self.packed, self.mode, self.rebuilds = packed, mode, 0
        self.hits: Counter[str] = Counter()
        self.disk, self._devices = disk, list(devices)
        self._scheduler, self._lineage, self._recipe = scheduler, lineage, recipe
        self._coming: dict[str, Future[AnyKV]] = {}  # read from the disk, or rebuilt
        self._prefixes = Prefixes()  # prompts whose KV is in `kept`
        self._lock = threading.RLock()
        scheduler.when_full(self.give_up)

    def keep(self, key: str, kv: AnyKV) -> AnyKV:
        """Takes in the KV of a new memory, or of one that came back; others may have to leave the device for it.

        That of a memory which was dropped meanwhile, or whose recipe is damaged, is not taken in.

        Returns:
            The KV as its readers get it.
        """
        kept = kv = kv.packed() if self.packed else kv
        with self._lock:
            self.spilled.pop(key)
            try:
                recipe = self._recipe(key)
            except (UnknownReference, StoreCorrupted):  # `forget` has been here, and does not come again
                return kept
            leaving = self.kept.put(key, kv)
            if not self.packed:  # what is computed anew on rounded keys would depend on who came before
                self._prefixes.add(key, (recipe.model, *recipe.parents), recipe.segment.prompt_ids)
            if leaving:
                self._spill(leaving)
        return kept

    def keeps_at_once(self, kv: KV) -> bool:
        """Whether `keep` neither rounds nor copies anything: it may be called where nobody is to be held up."""
        spills = self.spilled.limit or self.disk is not None
        return not self.packed and not (spills and self.kept.used + kv.nbytes > self.kept.limit)

    def give_up(self) -> None:
        """Lets half of what is kept leave the device, since memory ran out there."""
        with self._lock:
            self._spill(self.kept.halve())

    def _spill(self, leaving: Sequence[tuple[str, AnyKV]]) -> None:
        """Finds another place for what has left the device, if there is one. Whoever calls holds the lock."""
        cpu = [torch.device("cpu")] * len(self._devices)
        for old, _ in leaving:
            self._prefixes.remove(old)
        if self.spilled.limit:
            leaving = [left for key, kv in leaving for left in self.spilled.put(key, kv.to(cpu))]
        if self.disk is not None:
            for old, gone in leaving:
                if old not in self.disk:
                    self.disk.put(old, gone.to(cpu))  # a copy, so that what waits holds no room on the device

    def forget(self, key: str) -> None:
        """Removes the KV of a memory, wherever it is."""
        with self._lock:
            self.kept.pop(key)
            self._prefixes.remove(key)
            self.spilled.pop(key)
            if self.disk is not None:
                self.disk.drop(key)

    def forget_prefixes(self) -> None:
        """Lets no prompt to come take over what a kept one begins with; the KV of memories stays."""
        with self._lock:
            self._prefixes = Prefixes()

    def place(self, layout: Layout) -> "Future[list[Placed]]":
        """The KV of a memory, ready to be written to a slot.

        Args:
            layout: From `Lineage.layout`.

        Returns:
            A future of one `Placed` per piece; fails if a recipe is missing or the engine does.
        """
        lines: dict[str, Layout] = {}
        starts = {piece.id: piece.start for piece in layout}
        anew: set[str] = set()
        if self.mode == "rebuild" and any(piece.moved or piece.on_moved for piece in layout):
            # Whatever stands elsewhere than when it was made, or sees something that does.
            lines = {piece.id: self._lineage.line(piece.id) for piece in layout}
            anew = {key for key, line in lines.items() if any(seen.start != starts[seen.id] for seen in line)}
        if not anew and (here := self._all_here(layout)) is not None:
            return _done(here)
        # The last one first: its rebuild brings back the whole run before it.
        kvs = {piece.id: self._kv(piece) for piece in reversed(layout) if piece.id not in anew}
        placed: dict[str, Future[Placed]] = {}
        for piece in layout:
            if piece.id in anew and unaltered(piece.id):
                placed[piece.id] = _then(self._unaltered_at(lines[piece.id], starts), partial(_altered, key=piece.id))
            elif piece.id in anew:
                placed[piece.id] = self._computed_at(piece, [placed[seen.id] for seen in lines[piece.id][:-1]])
            else:
                placed[piece.id] = _then(kvs[piece.id], partial(_placed, piece=piece))
        return _gather(list(placed.values()))

    def _all_here(self, layout: Layout) -> list[Placed] | None:
        """What `place` finds, if all of it is on the device; what nearly everybody reads, and needs no futures."""
        here = []
        for piece in reversed(layout):  # what others were made on is used last, and so leaves last
            if (kv := self.kept.get(piece.id)) is None:
                return None
            here.append(_placed(kv, piece))
        with self._lock:
            self.hits["device"] += len(here)
        return here[::-1]

    def _kv(self, piece: Piece) -> "Future[AnyKV]":
        """A segment's KV where it was computed."""
        key = piece.id
        if whole := unaltered(key):
            return _then(self._kv(piece._replace(id=whole)), partial(alter, key=key))
        with self._lock:
            if (found := self._found(key)) is not None:
                return found
            if self.disk is not None and key in self.disk:
                return self._read(piece, self.disk)
        return self._rebuilt(key)

    def _found(self, key: str) -> "Future[AnyKV] | None":
        """A segment's KV if it is in memory, or on its way there. Whoever calls holds the lock."""
        if key in self._coming:
            return self._coming[key]
        if (kv := self.kept.get(key)) is not None:
            self.hits["device"] += 1
            return _done(kv)
        if (kv := self.spilled.get(key)) is not None:
            kv = kv.to(self._devices)
            self.hits["cpu"] += 1
            self.keep(key, kv)
            return _done(kv)
        return None

    def _read(self, piece: Piece, disk: Spill) -> "Future[AnyKV]":
        """A segment's KV from the disk, or rebuilt if that fails."""
        key, reading = piece.id, disk.get(piece.id, piece.positions)
        future = self._coming[key] = Future[AnyKV]()

        def follow(reading: "Future[AnyKV]") -> None:
            if reading.cancelled():
                future.set_exception(ServiceClosed("The service was closed while it worked on this request."))
                return
            try:
                kv = reading.result().to(self._devices)
            except Exception as error:
                logger.warning("%s", error)
                with self._lock:
                    del self._coming[key]
                try:
                    rebuilt = self._rebuilt(key)
                except Exception as lost:  # a future swallows what its callbacks raise
                    future.set_exception(lost)
                    return
                rebuilt.add_done_callback(partial(_hand_on, future))
                return
            with self._lock:
                self.hits["disk"] += 1
                del self._coming[key]
                try:
                    self.keep(key, kv)
                except Exception as error:  # such as a disk that takes no more; it is here all the same
                    logger.warning("the KV of %s is not kept: %s", key, error)
            future.set_result(kv)

        reading.add_done_callback(follow)
        return future

    def _rebuilt(self, key: str) -> "Future[AnyKV]":
        """A segment's KV from its recipe, and with it a whole run of lost segments, each made on the one before.

        Whoever calls does not hold the lock: to read the recipes may take long, and ticks wait for it.
        """
        run = [self._recipe(key)]
        while len(run[-1].parents) == 1 and not self._is_somewhere(run[-1].parents[0]):
            run.append(self._recipe(run[-1].parents[0]))
        with self._lock:
            if (found := self._found(key)) is not None:  # somebody else was faster
                return found
            lost = takewhile(lambda recipe: not self._is_somewhere(recipe.id), run[1:])  # likewise, for a part of it
            run = [run[0], *lost][::-1]
            # One prefill brings all back. But what is kept in 8 bits was computed on 8 bits: there, each takes its own.
            legs = [[recipe] for recipe in run] if self.packed else [run]
            futures = {recipe.id: Future[AnyKV]() for recipe in run}
            self._coming |= futures
            self.rebuilds += len(legs)
        logger.info("rebuilding %d segments that end in %s", len(run), key)

        def prefill(past: "Future[list[Placed]]", start: int) -> None:
            leg = legs.pop(0)

            def deliver(result: Result) -> None:
                try:
                    parts = result.kv.split([recipe.segment.positions for recipe in leg]) if leg[1:] else [result.kv]
                    kept = [self.keep(recipe.id, kv) for recipe, kv in zip(leg, parts, strict=True)]
                except LatentMASError as error:
                    fail(error)
                    return
                except Exception as error:  # such as no memory for the copies; the row is gone, so nobody else tells
                    fail(EngineFailed(f"A memory could not be rebuilt ({error}); the same call may succeed later."))
                    return
                with self._lock:
                    for recipe in leg:
                        del self._coming[recipe.id]
                for recipe, kv in zip(leg, kept, strict=True):
                    futures.pop(recipe.id).set_result(kv)
                if legs:
                    placed = [*past.result(), Placed(kept[0], start)]
                    prefill(_done(placed), start + kept[0].positions)

            inputs = [part for recipe in leg for part in recipe.segment.inputs]
            row = Row(past=(), start=start, inputs=inputs, on_done=deliver, on_error=fail)
            self._submit_with(row, past)

        def fail(error: BaseException) -> None:
            with self._lock:
                for lost in futures:
                    del self._coming[lost]
            for future in futures.values():
                future.set_exception(error)

        def begin() -> None:
            try:
                seen = self._lineage.layout(run[0].parents)
                prefill(self.place(seen), seen[-1].end if seen else 0)
            except Exception as error:  # a recipe that is gone: whoever else waits for this segment must hear of it
                fail(error)

        wanted = futures[key]
        _in_turn(begin)
        return wanted

    def _is_somewhere(self, key: str) -> bool:
        """Whether a segment need not be rebuilt: it is altered from another one, kept, spilled, or on its way."""
        somewhere = key in self.kept or key in self.spilled or key in self._coming
        return bool(unaltered(key)) or somewhere or (self.disk is not None and key in self.disk)

    def _unaltered_at(self, line: Layout, starts: Mapping[str, int]) -> "Future[Placed]":
        """The last segment of an altered memory as it was before, computed anew where a merge puts it."""
        whole = tuple(piece._replace(id=unaltered(piece.id), start=starts[piece.id]) for piece in line)
        return _then(self.place(whole), lambda placed: placed[-1])

    def submit(self, row: Row, layout: Layout, after: Sequence[str] | None = None) -> None:
        """Queues a row; the memory it reads is placed when its turn is near. Errors go to the row.

        Args:
            row: The row.
            layout: The memory, from `Lineage.layout`.
            after: The model and the memories that its prompt is read after: then what a kept prompt after the same
                ones begins with alike is copied and not computed again. None computes all of it.
        """
        try:
            self._scheduler.submit(row, partial(self._bring, row, layout, after))
        except Exception as closed:
            row.on_error(closed)

    def _bring(self, row: Row, layout: Layout, after: Sequence[str] | None, done: Callable[[], None]) -> None:
        """Places a row's memory and submits it: at once, or if that takes longer, in a thread. No tick waits for it."""
        moved = self.mode == "rebuild" and any(piece.moved or piece.on_moved for piece in layout)
        if not moved and self._lock.acquire(timeout=QUICK):  # whoever has it may be copying a whole memory
            try:
                if (here := self._all_here(layout)) is not None:
                    self._submit_on(row, here, after)
                    done()
                    return
            finally:
                self._lock.release()

        def aside() -> None:
            try:
                self._submit_on(row, self._place_somehow(layout), after)
            except Exception as error:
                row.on_error(error)
            finally:
                done()

        try:
            threading.Thread(target=aside, name="latentmas-place", daemon=True).start()
        except RuntimeError as error:
            row.on_error(EngineFailed(f"A memory could not be brought ({error}); the same call may succeed later."))
            done()

    def _place_somehow(self, layout: Layout) -> list[Placed]:
        """What comes of `place`; where the device is full, what is kept makes room for it.

        Raises:
            EngineFailed: If that is not enough.
        """
        try:
            try:
                return self.place(layout).result()
            except torch.OutOfMemoryError:
                self.give_up()
                return self.place(layout).result()
        except torch.OutOfMemoryError as error:
            raise EngineFailed(
                f"The device has no room for the memory that is read ({first_line(error)}); the same call may succeed "
                "later, or read fewer memories, or lower live_budget."
            ) from error

    def _submit_with(self, row: Row, past: "Future[list[Placed]]") -> None:
        """Queues a row that computes a memory, once what it reads is there: before all that wait for theirs."""

        def ready(past: "Future[list[Placed]]") -> None:
            if (error := past.exception()) is not None:
                row.on_error(error)
            else:
                self._submit_on(row, past.result())

        past.add_done_callback(ready)

    def _submit_on(self, row: Row, past: Sequence[Placed], after: Sequence[str] | None = None) -> None:
        if row.cancelled:
            return
        row.past = past
        if after is not None:
            self._reuse(row, after)
        try:
            self._scheduler.submit(row)
        except Exception as closed:
            row.on_error(closed)

    def _reuse(self, row: Row, after: Sequence[str]) -> None:
        """Lets a row have the KV of what its prompt and a kept one begin with."""
        prompt_ids = tuple(cast(Sequence[int], row.inputs[0]))
        with self._lock:
            key, alike = self._prefixes.longest(after, prompt_ids)
            alike = min(alike, len(prompt_ids) - 1)  # the last one's hidden state is needed
            kv = self.kept.get(key) if alike >= REUSED_FROM else None
        if isinstance(kv, KV):
            row.past, row.known = [*row.past, Placed(kv.first(alike), row.start)], alike

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
            self._submit_with(row, past)

        _gather(seen).add_done_callback(see)
        return future


def _placed(kv: AnyKV, piece: Piece) -> Placed:
    """A KV where a layout wants it."""
    return Placed(kv, piece.start, piece.start - piece.own_start)


def _altered(placed: Placed, key: str) -> Placed:
    """The same place with an altered KV."""
    return placed._replace(kv=alter(placed.kv, key))


def _in_turn(call: Callable[[], None]) -> None:
    """Makes a call, or if this thread is making another one, makes it once that has returned.

    What follows on what is as deep as merges are stacked, hundreds of them in a long thread, and Python's stack is not.
    """
    if (queue := getattr(_turns, "queue", None)) is not None:
        queue.append(call)
        return
    _turns.queue = queue = deque([call])
    try:
        while queue:
            queue.popleft()()
    finally:
        del _turns.queue


def _done(value: A) -> "Future[A]":
    future: Future[A] = Future()
    future.set_result(value)
    return future


def _hand_on(to: "Future[A]", done: "Future[A]") -> None:
    if (error := done.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())


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
    waited, left = list(futures), len(futures)
    lock = threading.Lock()

    def count(_: "Future[A] | None") -> None:
        nonlocal left
        with lock:
            left -= 1
            if left > 0:
                return
        _in_turn(settle)

    def settle() -> None:
        ended = waited.copy()
        waited.clear()  # they hold what they call, and else that would hold them, and KV, until garbage is collected
        error = next((f.exception() for f in ended if f.exception() is not None), None)
        if error is not None:
            gathered.set_exception(error)
        else:
            gathered.set_result([f.result() for f in ended])

    if not futures:
        gathered.set_result([])
    for future in futures:
        future.add_done_callback(count)
    return gathered
