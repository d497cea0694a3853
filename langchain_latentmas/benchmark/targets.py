"""What should be reached, and whether it was."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self


class Target(NamedTuple):
    """A figure with its bound."""

    name: str
    value: float
    bound: float
    least: bool
    """Whether the bound is the least that the figure should be, and not the most."""
    possible: float | None = None
    """About how much there is to reach, where the work itself sets a limit."""

    @property
    def met(self) -> bool:
        """Whether the figure keeps to its bound."""
        return self.value >= self.bound if self.least else self.value <= self.bound

    def row(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**self._asdict(), "met": self.met}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """What `row` made JSON of."""
        return cls(**{name: row[name] for name in cls._fields if name in row})

    def cells(self) -> tuple[str, str, str]:
        """What was reached, what was wanted, and whether that is met, for a table of rich."""
        met = "[green]met[/]" if self.met else "[red]missed[/]"
        limit = "" if self.possible is None else f" [dim](ticks allow {self.possible:.2f})[/]"
        return f"{self.value:.2f}", f"{'≥' if self.least else '≤'} {self.bound:g}{limit}", met


def targets(result: Mapping[str, Any]) -> Iterator[Target]:
    """The targets that a result of `Bench.run` says something about.

    Those of single ticks hold for the shortest memories that were measured; those of many rows for 32 against 1,
    those of many questions for 64 or more.
    """
    cuda, name = result["model"]["device"].startswith("cuda"), result["model"]["name"]
    longest_first = sorted(result["rows"], key=lambda row: row["positions"], reverse=True)
    cells = {(row["what"], row["rows"]): row for row in longest_first}
    think, speak = cells.get(("think", 1)), cells.get(("speak", 1))
    if think and cuda:
        yield Target("a thought, times its floor", think["floor_ratio"], 1.25, least=False)
    if speak and cuda:
        yield Target("a token, times its floor", speak["floor_ratio"], 1.35, least=False)
    if think and not cuda and name == "random Qwen3-0.6B":
        yield Target("a thought, share of the plain loop", think["full_lm_ratio"], 0.68, least=False)
        yield Target("a thought, times its floor", think["floor_ratio"], 2.2, least=False)
    if think and not cuda and name == "bundled":
        yield Target("a thought, share of the plain loop", think["full_lm_ratio"], 0.75, least=False)
    many = cells.get(("think", 32))
    if think and many and think["positions"] == many["positions"]:
        times = many["per_second"] / think["per_second"]
        yield Target("thoughts per second, 32 rows over 1", times, 20 if cuda else 9, least=True)
    at_once = result.get("concurrency")
    if at_once and at_once["concurrent"] >= 64:
        yield Target(
            f"questions per second, {at_once['concurrent']} at once over 1 at a time", at_once["times"], 6, least=True
        )
    if cuda:
        for graph in result.get("graphs", ()):
            if graph["questions"] == 1:
                ticks = graph["text_ticks"] / graph["latent_ticks"]
                name = f"{graph['arrangement']} graph, text over latent"
                yield Target(name, graph["text_over_latent"], 4, least=True, possible=ticks)
