"""The slot cache: rows of different lengths side by side, under unmodified transformers decoders."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .kv import KV, AnyKV


class Window:
    """Which cells of the slots the next forward pass writes and sees; all layers share one."""

    rows: slice = slice(0, 0)
    cells: Tensor
    """[rows, new]: where each new position is written."""
    length: int = 0
    """Cells that can be seen."""

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and cell indices [rows, 1] and [rows, new] on `device`."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None]
        return rows, self.cells.to(device)


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
        """Grows to the cache's slots and capacity; what is there stays."""
        old_keys, old_values = self.keys, self.values
        slots, _, capacity, _ = old_keys.shape
        self.lazy_initialization(old_keys, old_values)
        self.keys[:slots, :, :capacity] = old_keys
        self.values[:slots, :, :capacity] = old_values

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
        rows, cells = window.index(key_states.device)
        self.keys[rows, :, cells] = key_states.transpose(1, 2)
        self.values[rows, :, cells] = value_states.transpose(1, 2)
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
    """One slot per live row; grows in powers of two, so that a short batch on a large model stays small."""

    def __init__(self, layers: int) -> None:
        """Makes an empty cache.

        Args:
            layers: Number of the model's layers that hold keys and values.
        """
        self.slots, self.capacity, self.window = 1, 128, Window()
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes over all layers; 0 before the first forward pass."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.nbytes // (t.shape[0] * t.shape[2]) for t in tensors)

    def size_for(self, slots: int, capacity: int) -> tuple[int, int]:
        """What `reserve` would grow to."""
        return max(self.slots, _power_of_two(slots)), max(self.capacity, _power_of_two(capacity))

    def reserve(self, slots: int, capacity: int) -> None:
        """Makes room for `slots` rows of `capacity` cells; what is live stays."""
        size = self.size_for(slots, capacity)
        if size != (self.slots, self.capacity):
            self.slots, self.capacity = size
            for layer in self.layers:
                if layer.is_initialized:
                    layer.resize()

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


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
