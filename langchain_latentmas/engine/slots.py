"""The slot cache: rows of different lengths side by side, under unmodified transformers decoders."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .kv import KV, AnyKV

LEAST = 128  # cells of a slot


class Window:
    """Which cells of the slots the next forward pass writes and sees; all layers share one."""

    def __init__(self, rows: slice, cells: Tensor, length: int, capacity: int) -> None:
        """Works out once where all layers write.

        Args:
            rows: The slots that take part.
            cells: [rows, new]: where in its slot each new position is written.
            length: Cells that can be seen.
            capacity: Cells of a slot.
        """
        self.rows, self.length = rows, length
        self._cells, self._capacity = cells, capacity
        self._targets: dict[tuple[int, torch.device], Tensor] = {}

    def targets(self, heads: int, device: torch.device) -> Tensor:
        """Where each new position goes in the cells of all slots and heads laid end to end.

        Args:
            heads: Heads of keys and values.
            device: Where it is needed.

        Returns:
            [rows * heads * new], the same tensor for every layer that is alike.
        """
        if (heads, device) not in self._targets:
            slots = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None]
            runs = (slots * heads + torch.arange(heads, device=device)) * self._capacity
            self._targets[heads, device] = (runs[..., None] + self._cells.to(device)[:, None]).flatten()
        return self._targets[heads, device]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, kv_heads, capacity, head_dim]; a row writes at its own positions."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the slots, once the model has shown shape, dtype and device."""
        slots, capacity = self.cache.slots, self.cache.capacity
        # Zeros, not empty: a masked cell has weight 0, and 0 times a stray NaN would be NaN.
        self.keys = key_states.new_zeros(slots, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def resize(self) -> None:
        """Takes on the cache's slots and capacity; of what is there, as much stays as has room."""
        old_keys, old_values = self.keys, self.values
        slots, capacity = min(len(old_keys), self.cache.slots), min(old_keys.shape[2], self.cache.capacity)
        self.lazy_initialization(old_keys, old_values)
        self.keys[:slots, :, :capacity] = old_keys[:slots, :, :capacity]
        self.values[:slots, :, :capacity] = old_values[:slots, :, :capacity]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values and returns views of all cells in sight.

        Args:
            key_states: [rows, kv_heads, new, head_dim].
            value_states: The same shape, its own head_dim.
            *args: Ignored; transformers passes them to some layers.
            **kwargs: Ignored, likewise.

        Returns:
            Keys and values [rows, kv_heads, length, head_dim], views of the slots.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.cache.window
        targets = window.targets(key_states.shape[1], key_states.device)
        self.keys.view(-1, self.keys.shape[3]).index_copy_(0, targets, key_states.flatten(0, 2))
        self.values.view(-1, self.values.shape[3]).index_copy_(0, targets, value_states.flatten(0, 2))
        return self.keys[window.rows, :, : window.length], self.values[window.rows, :, : window.length]

    def get_seq_length(self) -> int:
        """0: positions and masks are always given, so transformers derives neither from the cache."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Cells in sight, and their offset."""
        return self.cache.window.length, 0

    def get_max_length(self) -> int:
        """Cells of a slot."""
        return self.cache.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class SlotCache(Cache):
    """One slot per live row; sizes are powers of two, so that a short batch on a large model stays small.

    Attributes:
        slots: How many there are.
        capacity: Cells of each.
        window: What the next forward pass writes and sees; set before it.
    """

    window: Window

    def __init__(self, layers: int) -> None:
        """Makes an empty cache.

        Args:
            layers: Number of the model's layers that hold keys and values.
        """
        self.slots, self.capacity = 1, LEAST
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes over all layers; 0 before the first forward pass."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.nbytes // (t.shape[0] * t.shape[2]) for t in tensors)

    def reserve(self, slots: int, capacity: int) -> None:
        """Makes room for `slots` rows of `capacity` cells; what is live stays."""
        self.resize(max(self.slots, power_of_two(slots)), max(self.capacity, power_of_two(capacity)))

    def resize(self, slots: int, capacity: int) -> None:
        """Takes on a number of slots and cells, powers of two; what is beyond them is lost."""
        if (slots, capacity) != (self.slots, self.capacity):
            self.slots, self.capacity = slots, capacity
            for layer in self.layers:
                if layer.is_initialized:
                    layer.resize()

    def blank(self, slot: int) -> None:
        """Zeroes a slot."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot] = 0
                layer.values[slot] = 0

    def write(self, slot: int, start: int, kv: AnyKV) -> None:
        """Copies a KV into the cells from `start` on."""
        for layer, keys, values in zip(self.layers, kv.keys, kv.values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[slot, :, start : start + keys.shape[1]] = keys
            layer.values[slot, :, start : start + values.shape[1]] = values

    def read(self, slot: int, start: int, end: int) -> KV:
        """Copies the cells [start, end) of a slot out."""
        return KV(
            [layer.keys[slot, :, start:end].clone() for layer in self.layers],
            [layer.values[slot, :, start:end].clone() for layer in self.layers],
        )

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` cells of slot `source` over those of `target`."""
        for layer in self.layers:
            if not layer.is_initialized:
                return  # no row has written anything yet
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]


def power_of_two(n: int) -> int:
    """The smallest one that is not less."""
    return 1 << (n - 1).bit_length()
