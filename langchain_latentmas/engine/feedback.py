"""The feedback: what each slot takes as its next input, a thought or a token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .alignment import Alignment
from .graphs import Graphs, Step
from .model import LanguageModel
from .ragged import Ragged, bucket, power_of_two
from .slots import SlotCache, Window


class Feedback:
    """The state of decoding rows on the device, by slot; a step needs nothing from the host.

    Attributes:
        hidden: Last hidden states [slots, hidden].
        tokens: Last tokens [slots].
        speaking: Whether the next input is the token's embedding, or else the aligned hidden state, [slots].
        positions: Where the next input goes, [slots].
        mask: What is added to attention scores, [slots, capacity]: 0 where a cell is seen.
    """

    def __init__(self, model: LanguageModel, cache: SlotCache, graphs: Graphs | None = None) -> None:
        """State for the slots that the cache has; `fit` follows it when its size changes.

        Args:
            model: The model that takes the steps.
            cache: The slots.
            graphs: Records and replays the steps; None computes every one.
        """
        self.model, self.cache, self.graphs = model, cache, graphs
        self._made_of: tuple[object, object] = (model.alignment, model.decode)
        self._allocate()

    def fit(self) -> None:
        """Takes on the slots and capacity of the cache; of what is there, as much stays as has room."""
        if self.mask.shape == (self.cache.slots, self.cache.capacity):
            return
        old = self._tensors
        self._allocate()
        for new, before in zip(self._tensors, old, strict=True):
            both = tuple(slice(min(sizes)) for sizes in zip(new.shape, before.shape, strict=True))
            new[both] = before[both]

    def enter(self, slot: int, position: int, hidden: Tensor, speaking: bool, holes: Sequence[tuple[int, int]]) -> None:
        """Lets a row begin to decode.

        Args:
            slot: Its slot.
            position: Where its next input goes; it sees all cells before.
            hidden: Its last hidden state [hidden].
            speaking: Whether it speaks; its last token is then put into `tokens` before each step.
            holes: Ranges of cells that it must not see.
        """
        self.hidden[slot] = hidden
        self.speaking[slot] = speaking
        self.positions[slot] = position
        self.mask[slot] = self.model.unseen
        self.mask[slot, :position] = 0
        for start, end in holes:
            self.mask[slot, start:end] = self.model.unseen

    def move(self, source: int, target: int) -> None:
        """Puts the state of slot `source` in place of that of `target`."""
        for state in self._tensors:
            state[target] = state[source]

    def step(self, rows: int, length: int, *, thinking: bool, speaking: bool) -> Step:
        """Feeds the first `rows` slots their next inputs, and takes over what comes of it.

        Args:
            rows: How many slots take part.
            length: Cells in sight, more than any of these rows' positions.
            thinking: Whether some of them think.
            speaking: Whether some of them speak.
        """
        alignment = self.model.alignment  # one for the whole step, whoever changes weights meanwhile
        whole = min(bucket(length), self.cache.capacity)  # what lies beyond the positions of all rows is masked
        if self.graphs is None or self.graphs.fault:
            # A CPU reads no cell that it need not; on a GPU, attention may be planned anew for each length.
            length = length if self.model.device.type == "cpu" else whole
            step = self._compute(alignment, rows, length, thinking, speaking)
        else:
            # Slots in excess write into their last cell; a row that will have it writes it anew before it sees it.
            size = power_of_two(rows), whole
            self.positions[rows : size[0]] = self.cache.capacity - 1
            self.mask[rows : size[0], 0] = 0  # some kernels make NaN of attention to nothing
            self.hidden[rows : size[0]] = 0  # and a row that overflowed may have left some
            made_of = alignment, self.model.decode  # kept, since what was recorded reads their tensors
            # Weights, modules or hooks were changed. Not by ==: methods of one object are equal, however often taken.
            if any(old is not new for old, new in zip(self._made_of, made_of, strict=True)):
                self.graphs.clear()
                self._made_of = made_of
            step = self.graphs.step(size, lambda: self._compute(alignment, *size, thinking=True, speaking=True))
            step = Step(step.inputs[:rows], step.hidden[:rows])
        self.hidden[:rows] = step.hidden
        self.positions[:rows] += 1
        return step

    def _compute(self, alignment: Alignment, rows: int, length: int, thinking: bool, speaking: bool) -> Step:
        """A step before anything is taken over: doing it again gives the same."""
        slots, positions = slice(0, rows), self.positions[:rows]
        if thinking:
            inputs = alignment(self.hidden[slots])
        if speaking:
            embeds = self.model.embed(self.tokens[slots])
            inputs = torch.where(self.speaking[slots, None], embeds, inputs) if thinking else embeds
        self.cache.window = Window(slots, self.cache.capacity, Ragged.decoding(positions, length))
        self.mask[slots].scatter_(1, positions[:, None], 0)
        mask = self.mask[slots, None, None, :length]
        # A slot in excess may be longer than the model can see.
        known = positions.clamp_max(self.model.max_positions - 1)
        return Step(inputs, self.model.hidden(inputs, known, [mask], self.cache))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.hidden, self.tokens, self.speaking, self.positions, self.mask

    def _allocate(self) -> None:
        slots, capacity = self.cache.slots, self.cache.capacity
        place, whole = {"device": self.model.device}, {"device": self.model.device, "dtype": torch.long}
        self.hidden = torch.zeros(slots, self.model.config.hidden_size, dtype=self.model.dtype, **place)
        self.tokens = torch.zeros(slots, **whole)
        self.speaking = torch.zeros(slots, dtype=torch.bool, **place)
        self.positions = torch.zeros(slots, **whole)
        self.mask = torch.full((slots, capacity), self.model.unseen, dtype=self.model.dtype, **place)
        if self.graphs is not None:
            self.graphs.clear()
