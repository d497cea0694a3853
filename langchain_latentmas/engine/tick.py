"""The tick: one forward pass that lets every live row take its next step, thinking or speaking."""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, count
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..errors import EngineFailed, NotFinite
from .device import Pace, sent
from .feedback import Feedback
from .graphs import Graphs
from .kv import KV, Placed
from .model import Embeddable, LanguageModel
from .ragged import Ragged, power_of_two
from .sampling import Sampler, Sampling, shares
from .slots import LEAST, Window
from .text import TextStream

logger = logging.getLogger(__name__)

PASS_COST = 128  # of a forward pass that pads, in positions that it could have prefilled
CPU_PASS = 1024  # positions a prefill pass takes on a CPU; beyond them its intermediate results fall out of the caches
GPU_PASS = 8192  # on a GPU; the memory that a pass takes, for its masks above all, grows with them
NO_STATE = torch.zeros(0)  # of a row that has not prefilled anything; one for all, since to make one takes 70 µs


class Spoken(NamedTuple):
    """A token, and the text that became certain with it."""

    token: int
    text: str


class NotJoined(EngineFailed):
    """A row could not join, and no other one has noticed."""


class Result(NamedTuple):
    """What a finished row leaves behind."""

    kv: KV
    """Keys and values of all its new positions."""
    thoughts: Tensor
    """[steps, hidden], on the CPU."""
    tokens: list[int]
    text: str
    """Text that was still held back when the row ended; all of it, if nobody was told of the tokens."""
    finish: str
    """"stop", "length", or "" for a row that did not speak."""
    hidden: Tensor | None
    """Last hidden states [prefilled, hidden] of the prefill, where they were asked for."""


@dataclass(eq=False)
class Row:
    """One request and how far it is.

    Attributes:
        past: The memory it reads, piece by piece.
        start: Position of its first own token.
        inputs: What is prefilled, at least one position.
        known: How many positions of `inputs`, all of them of its first part, `past` holds already; never all.
        steps: Latent steps to take.
        sampling: How to speak after the prefill; None for rows that do not.
        holes: Position ranges below `start` that it must not see.
        keep_hidden: Whether to return the hidden states of the prefill.
        on_step: Called after each latent step with the number taken.
        on_token: Called with each token.
        on_done: Called once with the result.
        on_error: Called once, instead, with what went wrong.
        cancelled: Set by anyone, from any thread: the row leaves at the next tick, and its callbacks may be called
            until then.
    """

    past: Sequence[Placed]
    start: int
    inputs: Sequence[Embeddable]
    on_done: Callable[[Result], None]
    on_error: Callable[[BaseException], None]
    known: int = 0
    steps: int = 0
    sampling: Sampling | None = None
    holes: Sequence[tuple[int, int]] = ()
    keep_hidden: bool = False
    on_step: Callable[[int], None] | None = None
    on_token: Callable[[Spoken], None] | None = None
    cancelled: bool = False

    turn: int = field(init=False)  # how many rows joined before
    position: int = field(init=False)  # the next one to be written
    ids: list[int] = field(init=False)  # what is left to prefill, 0 for thoughts
    embeds: Tensor | None = field(init=False, default=None)  # the same, [n, hidden]; None where there are no thoughts
    hidden: Tensor = field(init=False, default=NO_STATE)  # last hidden state, [hidden]
    thoughts: list[Tensor] = field(init=False, default_factory=list)
    tokens: list[int] = field(init=False, default_factory=list)
    prefilled: list[Tensor] = field(init=False, default_factory=list)
    sampler: Sampler | None = field(init=False, default=None)
    text: TextStream = field(init=False)
    finish: str = field(init=False, default="")

    def __post_init__(self) -> None:
        """Places the row at its start."""
        self.position = self.start

    def enter(self, model: LanguageModel) -> None:
        """Places the row behind what is known, and gets ready what is left to prefill."""
        self.position = self.start + self.known
        first, *others = self.inputs
        left = [first[self.known :], *others]
        self.ids = [token for part in left for token in ([0] * len(part) if isinstance(part, Tensor) else part)]
        if any(isinstance(part, Tensor) for part in left):
            self.embeds = torch.cat([model.embedded(part) for part in left])
        self.past = ()

    @property
    def prefill_end(self) -> int:
        """Position after the last prefilled one."""
        return self.start + sum(len(part) for part in self.inputs)

    @cached_property
    def end(self) -> int:
        """Position after the last one it can ever write."""
        return self.prefill_end + self.steps + (self.sampling.max_tokens if self.sampling else 0)

    @property
    def thinking(self) -> bool:
        """Whether its next input is a thought."""
        return self.sampling is None


class Drawn(NamedTuple):
    """Tokens that rows have drawn, on their way to the host."""

    rows: list[Row]
    tokens: Tensor
    """[rows], where the logits are."""
    told: Tensor
    """The same on the CPU, or -1 of a row whose hidden state is not finite."""
    ready: torch.cuda.Event | None
    """When `told` can be read; None for at once."""

    @classmethod
    def of(cls, rows: list[Row], tokens: Tensor, sound: Tensor) -> Self:
        """Sends them on their way.

        Args:
            rows: Who has drawn.
            tokens: What, [rows].
            sound: Whether a row's hidden state is finite, [rows].
        """
        told, ready = torch.where(sound, tokens, -1).to("cpu", non_blocking=True), None
        if tokens.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(tokens.device))
        return cls(rows, tokens, told, ready)

    def read(self) -> Iterator[tuple[Row, int]]:
        """Waits for them."""
        if self.ready is not None:
            self.ready.synchronize()
        yield from zip(self.rows, self.told.tolist(), strict=True)


class Ticker:
    """The live rows of a model, each in its slot.

    Decoding rows hold the first slots and prefilling rows the ones behind, without gaps, so that each kind is a plain
    slice of the slots and no live KV is ever gathered. Belongs to one thread.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_rows: int,
        live_bytes: int,
        chunk: int = 512,
        graphs: Graphs | None = None,
    ) -> None:
        """Starts without rows.

        Args:
            model: The model that all rows share.
            max_rows: Most rows at a time.
            live_bytes: Most bytes of slots; a single row is always let in.
            chunk: Most positions of one row that one tick prefills. Where rows decode, those of all rows together are
                about as many as one pass takes, so that neither a long prompt nor many of them stall those rows.
            graphs: Replays decode steps; None computes every one.
        """
        self.model, self.max_rows, self.live_bytes, self.chunk = model, max_rows, live_bytes, chunk
        self.graphs = graphs
        self.pass_positions = CPU_PASS if model.device.type == "cpu" else GPU_PASS
        self.pace = Pace(model.device) if model.device.type == "cuda" else None
        self.ahead = model.device.type == "cuda"  # the next step is begun before the host reads what was drawn
        self.ticks = self.thoughts = self.spoken = self.prefilled = self.reused = 0
        self.rows: list[Row] = []
        self.decoding = 0
        self._turns = count()
        self._drawn: list[Drawn] = []  # what the next step feeds
        self._left: dict[int, Row] = {}  # by slot, who has moved on from there and may not be finite
        self._ended: list[tuple[Row, Result | NotFinite]] = []
        self.make_room: Callable[[], object] = lambda: None  # called where there is no memory for what a row leaves
        self.cache = model.new_cache()
        self.renew()

    @property
    def cuda_graphs(self) -> str:
        """Whether decode steps are replayed: "on", "off", or why they no longer are."""
        return "off" if self.graphs is None else self.graphs.fault or "on"

    def clear(self) -> list[Row]:
        """Drops all rows, and returns them; `renew` has to follow, since their slots may hold anything."""
        dropped, self.rows, self.decoding = self.rows, [], 0
        return dropped

    def renew(self) -> None:
        """Gives all slots up, and what they hold; there must be no rows."""
        self._drawn.clear()
        self._left.clear()
        self.cache.clear()
        self.feedback = Feedback(self.model, self.cache, self.graphs)

    def fits(self, row: Row) -> bool:
        """Whether a row can join now."""
        return not self.rows or (len(self.rows) < self.max_rows and self._bytes(self._needed(row)) <= self.live_bytes)

    def join(self, row: Row) -> None:
        """Gives a row the next slot, and copies the memory it reads there.

        Raises:
            NotJoined: If the memory cannot be copied; all other rows can go on.
        """
        needed = self._needed(row)
        size = max(self.cache.slots, needed[0]), max(self.cache.capacity, needed[1])
        # Slots that are there are kept, but one long row, now gone, must not make them dear for all others.
        self.cache.resize(*(size if self._bytes(size) <= self.live_bytes else needed))
        self.feedback.fit()
        self._tidy(len(self.rows))
        try:
            for kv, start, shift in row.past:
                turned = self.model.rotary.turn(kv, shift) if shift and self.model.rotary else kv
                self.cache.write(len(self.rows), start, turned)
            row.enter(self.model)
        except Exception as error:
            self.cache.blank(len(self.rows))
            raise NotJoined(f"A row could not join ({type(error).__name__}: {error}).") from error
        row.turn = next(self._turns)
        self.reused += row.known
        self.rows.append(row)

    def step(self) -> None:
        """One tick: cancelled rows leave, a chunk is prefilled, and every decoding row takes a step."""
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].cancelled:
                self._leave(slot, blank=True)
        self.ticks += 1
        try:
            with self.model.threads.taken(1):  # but for passes that are worth more
                self._prefill()
                self._decode()
        finally:
            # Last: whoever waits for a result wakes up at it, and takes the interpreter away from this thread.
            ended, self._ended = self._ended, []
            for row, end in ended:
                try:
                    if isinstance(end, Result):
                        row.on_done(end)
                    else:
                        row.on_error(end)
                except Exception as error:
                    logger.exception("who waited for a row could not take its result")
                    with suppress(Exception):  # those of the other rows are still to be told
                        row.on_error(error)
        if self.pace is not None:
            self.pace.keep()

    def _needed(self, row: Row) -> tuple[int, int]:
        """Slots and cells that the live rows and this one take."""
        end = max(other.end for other in (*self.rows, row))
        return power_of_two(len(self.rows) + 1), max(LEAST, power_of_two(end))

    def _bytes(self, size: tuple[int, int]) -> int:
        return size[0] * size[1] * self.model.bytes_per_position

    def _prefill(self) -> None:
        rows = self.rows[self.decoding :]
        if not rows:
            return
        due = self._due()
        while due:
            self._prefill_pass(due)
        ready = [row for row in rows if not row.ids]
        # A thinker is looked at when it is done: what is not finite stays so, and to look takes as long as some calls.
        thinkers = [row for row in ready if row.thinking and row.steps]
        ready = thinkers + self._sound([row for row in ready if not (row.thinking and row.steps)])
        for row in ready:
            if row.sampling is not None:
                row.text = TextStream(self.model.tokenizer, row.sampling.stop, quiet=row.on_token is None)
                if row.sampling.temperature > 0:
                    row.sampler = Sampler(row.sampling, row.hidden.device)
        self._sample([row for row in ready if row.sampling is not None])
        for row in ready:
            if row.steps or row.sampling is not None:
                self._swap(self.rows.index(row), self.decoding)
                self.feedback.enter(self.decoding, row.position, row.hidden, not row.thinking, row.holes)
                self.decoding += 1
            else:
                self._finish(row)

    def _due(self) -> dict[int, int]:
        """How many positions this tick prefills, by slot.

        Who decodes waits for it meanwhile, so it is about one pass then. Who came first goes first, wherever it lies: a
        slot is taken over from whoever leaves.
        """
        due = {slot: min(len(self.rows[slot].ids), self.chunk) for slot in range(self.decoding, len(self.rows))}
        if self.decoding:
            in_turn = sorted(due, key=lambda slot: self.rows[slot].turn)
            in_turn = in_turn[: _fitting((due[slot] for slot in in_turn), self.pass_positions)]
            due = {slot: due[slot] for slot in sorted(in_turn)}
        return due

    def _prefill_pass(self, due: dict[int, int]) -> None:
        """Prefills the first of these slots, as many as lie behind each other and fit into one pass.

        Args:
            due: Positions by slot, in order; what was prefilled is taken off.
        """
        first = min(due)
        slots = [slot for at, slot in enumerate(due, first) if slot == at]
        slots = slots[: _fitting((due[slot] for slot in slots), self.pass_positions)]
        rows, counts = [self.rows[slot] for slot in slots], [due[slot] for slot in slots]
        if self.model.decoder_fault:
            # It pads. The width that wastes least: a wide pass pads the short rows, a narrow one leaves passes to come.
            width = max(
                set(counts), key=lambda width: sum(min(n, width) for n in counts) / (PASS_COST + len(counts) * width)
            )
            counts = [min(n, width) for n in counts]
        ids = [token for row, n in zip(rows, counts, strict=True) for token in row.ids[:n]]
        embeds, ends = self.model.embed(sent(torch.tensor(ids), self.model.device)), list(accumulate(counts))
        for row, n, end in zip(rows, counts, ends, strict=True):
            row.ids = row.ids[n:]
            if row.embeds is not None:
                embeds[end - n : end] = row.embeds[:n]
                row.embeds = row.embeds[n:]
        ragged = Ragged(counts, [row.position for row in rows], self.model.device)
        self.cache.window = Window(slice(first, first + len(rows)), self.cache.capacity, ragged)
        masks = self.model.masks(ragged, [row.holes for row in rows])
        last_only = not any(row.keep_hidden for row in rows)
        with self.model.threads.taken(len(embeds)):
            hidden = self.model.hidden(embeds, ragged.cells, masks, self.cache, last_only)
        self.prefilled += ends[-1]
        for i, (row, n, end) in enumerate(zip(rows, counts, ends, strict=True)):
            row.position += n
            row.hidden = hidden[i if last_only else end - 1]
            if row.keep_hidden:
                row.prefilled.append(hidden[end - n : end].clone())  # a view would keep those of all rows
            due[first + i] -= n
            if not due[first + i]:
                del due[first + i]

    def _decode(self) -> None:
        rows, drawn, self._drawn = self.rows[: self.decoding], self._drawn, []
        if not rows:
            return
        thinking = [row for row in rows if row.thinking]
        speaking = [row for row in rows if not row.thinking]
        if speaking:
            self._feed(drawn)
        length = 1 + max(row.position for row in rows)
        with self.model.threads.taken(len(rows)):
            step = self.feedback.step(len(rows), length, thinking=bool(thinking), speaking=bool(speaking))
        for row, fed, state in zip(rows, step.inputs, step.hidden, strict=True):
            row.position += 1
            row.hidden = state
            if row.thinking:
                row.thoughts.append(fed)
        self.thoughts += len(thinking)
        for row in thinking:
            if row.on_step:
                row.on_step(len(row.thoughts))
        lost = self._read(drawn) if self.ahead else set[Row]()
        # The last token of a text is fed as well, so that whoever reads the memory finds it whole.
        over = [row for row in rows if row.finish or (row.thinking and len(row.thoughts) == row.steps)]
        self._sample([row for row in speaking if not row.finish and row not in lost])
        for row in reversed(self._sound(over)):  # whoever comes last leaves without another one being moved
            self._finish(row)

    def _sample(self, rows: list[Row]) -> None:
        if not rows:
            return
        states = torch.stack([row.hidden for row in rows])
        logits = self.model.logits(states)
        choices = logits.argmax(-1)
        alike: dict[tuple[float, int | None, float], list[tuple[int, Sampler]]] = {}
        for i, row in enumerate(rows):
            if row.sampler is not None and row.sampling is not None:
                how = row.sampling.temperature, row.sampling.top_k, row.sampling.top_p
                alike.setdefault(how, []).append((i, row.sampler))
        for how, samplers in alike.items():
            found = shares(torch.stack([logits[i] for i, _ in samplers]), *how)
            for (i, sampler), own in zip(samplers, found, strict=True):
                choices[i] = sampler(own)
        # Of states: a head may give -inf of its own accord.
        drawn = Drawn.of(rows, choices, _sums(states).isfinite().to(choices.device))
        self._drawn.append(drawn)
        if not self.ahead:
            self._read([drawn])

    def _feed(self, drawn: list[Drawn]) -> None:
        """Makes what was drawn the next inputs; nothing of it goes by the host."""
        slots = {row: slot for slot, row in enumerate(self.rows)}
        for each in drawn:
            there = [(slots[row], i) for i, row in enumerate(each.rows) if row in slots]  # others have left since
            tokens = each.tokens.to(self.feedback.tokens.device)
            if there == [(i, i) for i in range(len(tokens))]:
                self.feedback.tokens[: len(tokens)] = tokens
            elif there:
                at, picked = sent(torch.tensor(there), tokens.device).unbind(1)
                self.feedback.tokens[at] = tokens[picked]

    def _read(self, drawn: list[Drawn]) -> set[Row]:
        """Tells rows what they have drawn; returns those that end here, since it was not from finite numbers."""
        here, lost = set(self.rows), set[Row]()
        for row, token in (told for each in drawn for told in each.read() if told[0] in here):
            if token < 0:
                self._overflowed(row)
                lost.add(row)
                continue
            assert row.sampling is not None
            self.spoken += 1
            row.tokens.append(token)
            text = row.text.push(token)
            if token in self.model.eos or row.text.stopped:
                row.finish = "stop"
            elif len(row.tokens) == row.sampling.max_tokens:
                row.finish = "length"
            if row.on_token:
                row.on_token(Spoken(token, text))
        return lost

    def _sound(self, rows: list[Row]) -> list[Row]:
        """Those whose last hidden state is finite; the others end here."""
        if not rows:
            return []
        finite = list(map(math.isfinite, _sums(torch.stack([row.hidden for row in rows])).tolist()))
        for row, sound in zip(rows, finite, strict=True):
            if not sound:
                self._overflowed(row)
        return [row for row, sound in zip(rows, finite, strict=True) if sound]

    def _overflowed(self, row: Row) -> None:
        """Ends a row whose last hidden state is not finite.

        In a narrow dtype a prompt can make a model overflow. Whatever comes after an infinite key or value is none of
        the model's, and left in a slot it would reach the next row there: a weight of 0 times NaN is NaN.
        """
        self._leave(self.rows.index(row), blank=True)
        error = NotFinite(
            f"The model made infinite numbers or NaN of this in {self.model.dtype}; take dtype='bfloat16' or "
            "'float32', or another prompt."
        )
        self._ended.append((row, error))

    def _finish(self, row: Row) -> None:
        slot = self.rows.index(row)
        self._left = {at: other for at, other in self._left.items() if other is not row}  # it is finite
        thoughts = torch.stack(row.thoughts) if row.thoughts else row.hidden.new_zeros(0, row.hidden.shape[-1])
        # Here, where the device has just been waited for, and not where the result is taken, maybe on an event loop.
        thoughts = thoughts.cpu()
        kv = None
        with suppress(torch.OutOfMemoryError):
            kv = self.cache.read(slot, row.start, row.position)
        if kv is None:  # what is kept gives way to it now, and not only when this is kept
            self.make_room()
            kv = self.cache.read(slot, row.start, row.position)
        text = row.text.end() if row.sampling is not None else ""
        hidden = torch.cat(row.prefilled) if row.keep_hidden else None
        self._leave(slot)  # last, so that whatever raises before finds the row still there to be told
        self._ended.append((row, Result(kv, thoughts, row.tokens, text, row.finish, hidden)))

    def _leave(self, slot: int, blank: bool = False) -> None:
        """Takes a row out; with `blank`, so that nothing of what it wrote stays in its slot."""
        if blank:
            self.cache.blank(slot)
        if slot < self.decoding:
            self._swap(slot, self.decoding - 1, keep=False)
            self.decoding -= 1
            slot = self.decoding
        self._swap(slot, len(self.rows) - 1, keep=False)
        self.rows.pop()

    def _tidy(self, slot: int) -> None:
        """Blanks a slot where a row that has moved on left numbers that are not finite.

        To whoever comes next they are masked, but a weight of 0 times NaN is NaN.
        """
        row = self._left.pop(slot, None)
        # What it had written when it moved, its state has seen since. To look is cheap on a CPU only.
        if row is not None and (self.model.device.type != "cpu" or not math.isfinite(row.hidden.sum())):
            self.cache.blank(slot)

    def _swap(self, a: int, b: int, keep: bool = True) -> None:
        """Exchanges two rows; without `keep`, what row `a` has written is lost."""
        if a == b:
            return
        row_a, row_b = self.rows[a], self.rows[b]
        # As far as either of them goes, so that neither slot keeps anything of the other row.
        length = max(row_a.position, row_b.position)
        kept = self.cache.read(a, 0, length) if keep else None
        self._tidy(a)
        self.cache.move(b, a, length)
        if kept is not None:
            self.cache.write(b, 0, kept)
        else:
            self._left[b] = row_b
        self.feedback.move(b, a)
        self.rows[a], self.rows[b] = row_b, row_a


def _fitting(counts: Iterable[int], room: int) -> int:
    """How many of them, from the first on, add up to at most `room`; the first one in any case."""
    return max(1, bisect_right(list(accumulate(counts)), room))


def _sums(states: Tensor) -> Tensor:
    """Of hidden states [rows, hidden], one number each that is finite if they are."""
    return states.sum(-1, dtype=torch.float32)
