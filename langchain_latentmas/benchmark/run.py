"""A whole run of `latentmas bench`, as one plain-JSON document."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, product
from typing import Any, NamedTuple, get_args

from .. import bundled
from ..engine.model import LanguageModel
from ..evaluation.machine import Steal, machine
from .graphs import concurrency, text_against_latent
from .memory import Copy
from .spread import Spread
from .targets import targets
from .ticks import What, Work, measure, obstacle, weight_bytes

Progress = Callable[[str, int, int], None]
"""What comes next, how much is done, and of how much."""


class Graphs(NamedTuple):
    """What is measured of whole graphs."""

    questions: Sequence[int]
    """Asked at once of the teams that run as text and with latent edges."""
    steps: int
    """Latent steps of each of the three thinkers."""
    tokens: int
    """Of the judger, and of each agent that speaks."""
    concurrent: int
    """Questions at once of the demo's graph."""
    alone: int
    """Questions that it is asked one at a time."""
    repeats: int = 3
    """Turns."""


class Bench:
    """What is to be measured of a model."""

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[int],
        positions: Sequence[int],
        repeats: int,
        graphs: Graphs | None = None,
    ) -> None:
        """Plans; measures nothing yet.

        Args:
            model: The model.
            rows: Numbers of rows.
            positions: Lengths of their memories.
            repeats: Turns of each loop.
            graphs: What to measure of whole graphs; None for nothing.
        """
        self.model, self.repeats, self.graphs = model, repeats, graphs
        self.works = [Work(what, n, length) for what, length, n in product(get_args(What), positions, rows)]

    @property
    def obstacle(self) -> str:
        """Why nothing of it can be measured, by the first size; "" if something can."""
        why = [obstacle(self.model, work, self.repeats) for work in self.works]
        return why[0] if all(why) else ""

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measures everything that fits.

        Returns:
            Plain JSON; `rows` has one entry per kind of work, number of rows and length.
        """
        about, steal = machine(self.model.device), Steal()
        copy = Copy(self.model.device)
        copied = [copy.run() for _ in range(self.repeats)]
        measured, skipped = [], []
        with _endless(self.model):
            for done, work in enumerate(self.works):
                progress(f"{work.what}, {work.rows} rows, {work.positions} positions", done, len(self.works))
                if why := obstacle(self.model, work, self.repeats):
                    skipped.append({**work._asdict(), "why": why})
                else:
                    measured.append(measure(self.model, work, self.repeats, copy, copied))
        del copy
        bandwidth = Spread.of(copied)
        graphs = self._graphs(self.graphs, progress) if self.graphs else {}
        result = {
            "machine": about,
            "steal": steal.share,
            "model": self._about(),  # last: what a hook makes of the decoder is to be seen here
            "repeats": self.repeats,
            "bandwidth_gb_s": bandwidth.median / 1e9,
            "bandwidth_gb_s_spread": [bandwidth.min / 1e9, bandwidth.max / 1e9],
            "rows": [one.row(bandwidth.median) for one in measured],
            "skipped": skipped,
            **graphs,
        }
        return {**result, "targets": [target.row() for target in targets(result)]}

    def _graphs(self, graphs: Graphs, progress: Progress) -> dict[str, Any]:
        turns = count(1)
        total = graphs.repeats * 2 + (graphs.repeats + 1) * 4 * len(graphs.questions)

        def done(what: str) -> Callable[[], None]:
            progress(what, 0, total)
            return lambda: progress(what, next(turns), total)

        at_once = concurrency(
            self.model,
            concurrent=graphs.concurrent,
            alone=graphs.alone,
            repeats=graphs.repeats,
            done=done(f"{graphs.concurrent} questions at once, {graphs.alone} one at a time"),
            steps=bundled.STEPS,
            max_tokens=graphs.tokens,
        )
        with _endless(self.model):
            compared = [
                row
                for questions in graphs.questions
                for row in text_against_latent(
                    self.model,
                    questions=questions,
                    steps=graphs.steps,
                    tokens=graphs.tokens,
                    repeats=graphs.repeats,
                    done=done(f"text against latent, {questions} at once"),
                )
            ]
        return {"concurrency": at_once, "graphs": compared}

    def _about(self) -> dict[str, Any]:
        model = self.model
        return {
            "name": model.name,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "compiled": model.compiled,
            "packed": model.packed,
            "decoder": model.decoder_fault or "own",
            "fingerprint": model.fingerprint,
            "kv_bytes_per_position": model.bytes_per_position,
            "weights_gb": {what: weight_bytes(model, what) / 1e9 for what in get_args(What)},
        }


@contextmanager
def _endless(model: LanguageModel) -> Iterator[None]:
    """No token ends a text, so that all texts are as long as wanted."""
    model.eos, eos = frozenset(), model.eos
    try:
        yield
    finally:
        model.eos = eos
