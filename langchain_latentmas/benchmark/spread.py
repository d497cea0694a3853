"""Medians and their spread."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Repeated measurements of one thing."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 2, unit: str = "") -> str:
        """As rich markup: the median, and the others in brackets."""
        if self.min == self.max:
            return f"{self.median:,.{digits}f}{unit}"
        return f"{self.median:,.{digits}f}{unit} [dim]({self.min:,.{digits}f}..{self.max:,.{digits}f})[/]"


def ratios(ones: Sequence[float], others: Sequence[float]) -> Spread:
    """How many times more the ones are, measurement by measurement: what was measured side by side is compared."""
    return Spread.of(one / other for one, other in zip(ones, others, strict=True))
