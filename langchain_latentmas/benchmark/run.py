"""A whole run of `latentmas bench`, as one plain-JSON document."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, get_args

from ..engine.model import LanguageModel
from ..evaluation.machine import machine
from .memory import Copy
from .ticks import Spread, What, Work, measure, obstacle, weight_bytes

Progress = Callable[[str, int, int], None]
"""What comes next, how much is done, and of how much."""


class Bench:
    """What is to be measured of a model."""

    def __init__(self, model: LanguageModel, rows: Sequence[int], positions: Sequence[int], repeats: int) -> None:
        """Takes the model over: from then on, no token ends a text of it, so that all texts are as long as wanted.

        Args:
            model: The model.
            rows: Numbers of rows.
            positions: Lengths of their memories.
            repeats: Turns of each loop.
        """
        model.eos = frozenset()
        self.model, self.repeats = model, repeats
        self.works = [Work(what, n, length) for what, length, n in product(get_args(What), positions, rows)]

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measures everything that fits."""
        about, copy = machine(self.model.device), Copy(self.model.device)
        copied = [copy.run() for _ in range(self.repeats)]
        measured, skipped = [], []
        for done, work in enumerate(self.works):
            progress(f"{work.what}, {work.rows} rows, {work.positions} positions", done, len(self.works))
            if why := obstacle(self.model, work, self.repeats):
                skipped.append({**work._asdict(), "why": why})
            else:
                measured.append(measure(self.model, work, self.repeats, copy, copied))
        bandwidth = Spread.of(copied)
        return {
            "machine": about,
            "model": self._about(),
            "repeats": self.repeats,
            "bandwidth_gb_s": bandwidth.median / 1e9,
            "bandwidth_gb_s_spread": [bandwidth.min / 1e9, bandwidth.max / 1e9],
            "rows": [one.row(bandwidth.median) for one in measured],
            "skipped": skipped,
        }

    def _about(self) -> dict[str, Any]:
        model = self.model
        return {
            "name": model.name,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
            "kv_bytes_per_position": model.bytes_per_position,
            "weights_gb": {what: weight_bytes(model, what) / 1e9 for what in get_args(What)},
        }
