"""What a node costs besides the model's work: `python -m benchmarks.overhead`."""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from langchain_core.messages import HumanMessage
from rich.progress import track
from rich.table import Table

from benchmarks.report import Spread, machine, prepare, show
from langchain_latentmas import LatentAgentNode
from langchain_latentmas.benchmark.shapes import build
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.tick import Result, Row, Ticker
from langchain_latentmas.service.local import LocalService, LocalSettings
from langchain_latentmas.state import LatentRef, merge_latents


class Overhead(NamedTuple):
    """Seconds of one call outside of the engine."""

    before: float
    """Until the engine gets the row."""
    after: float
    """From the row's end on."""


def overhead(call: Callable[[], Any]) -> Overhead:
    """Looks when the engine takes the row of a call, and when it is done with it."""
    seen: list[float] = []
    join = Ticker.join

    def joined(ticker: Ticker, row: Row) -> None:
        seen.append(time.perf_counter())
        done = row.on_done

        def ended(result: Result) -> None:
            seen.append(time.perf_counter())
            done(result)

        row.on_done = ended
        join(ticker, row)

    Ticker.join = joined  # type: ignore[method-assign]
    try:
        begun = time.perf_counter()
        call()
        ended = time.perf_counter()
    finally:
        Ticker.join = join  # type: ignore[method-assign]
    first, last = seen
    return Overhead(first - begun, ended - last)


class Case(NamedTuple):
    """One kind of call: what it is, and how to make the n-th of it, which nobody made before."""

    name: str
    call: Callable[[int], Any]


def cases(service: LocalService, references: int) -> list[Case]:
    """A node that thinks and one that speaks, reading one memory of a state with one reference or with many."""
    others = [service.think(f"What is {i} plus 1?", steps=0, agent=f"other{i}") for i in range(references)]
    ref = service.think("What is 12 plus 30?", steps=4, agent="planner")
    made = []
    for latents in ([ref], [*others, ref]):
        for name, speak in (("thinks one step", False), ("speaks one token", True)):
            how: dict[str, Any] = {"speak": speak, "steps": 1, "max_tokens": 1, "reads": ["planner"]}
            node = LatentAgentNode("critic", "You check.", service=service, **how)
            made.append(Case(f"{name}, {len(latents):,} references in the state", partial(ask, node, latents)))
    return made


def ask(node: LatentAgentNode, latents: list[LatentRef], i: int) -> Any:
    asked = HumanMessage(f"Is that right? ({i}, {len(latents)})")
    return node.invoke({"messages": [asked], "latents": latents})


def main(
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    shape: Annotated[str | None, typer.Option(help="A shape with random weights instead, such as Qwen3-0.6B.")] = None,
    references: Annotated[int, typer.Option(help="Others in the state.")] = 999,
    repeats: int = 100,
    device: str | None = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """From a node's `invoke` to the engine, and from the engine back to the caller."""
    prepare(None)
    if shape is None:
        with LocalService.load(model, device=device) as loading:
            loaded: LanguageModel = loading.model
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = build(shape, device, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    measured: dict[str, list[Overhead]] = {}
    with LocalService(loaded, LocalSettings()) as service:
        asked = cases(service, references)
        for i in track(range(repeats + 5), "measuring", transient=True, disable=as_json):
            for case in asked:
                seen = overhead(lambda case=case, i=i: case.call(i))  # type: ignore[misc]
                if i >= 5:
                    measured.setdefault(case.name, []).append(seen)
        latents = [service.think(f"What is {i} plus 1?", steps=0, agent=f"other{i}") for i in range(references + 1)]
        begun = time.perf_counter()
        for _ in range(repeats):
            merge_latents(latents[:-1], latents[-1:])
        merging = (time.perf_counter() - begun) / repeats
    table = Table("node", "µs before", "µs after", "µs together", box=None, padding=(0, 2), header_style="dim")
    rows = []
    for name, seen in measured.items():
        parts = [Spread.of(1e6 * o.before for o in seen), Spread.of(1e6 * o.after for o in seen)]
        together = Spread.of(1e6 * sum(o) for o in seen)
        table.add_row(name, *(part.show(0) for part in parts), together.show(0))
        rows.append({"node": name, "before_us": parts[0], "after_us": parts[1], "together_us": together})
    table.add_row(f"reducer, {references + 1:,} references", "", "", f"{1e6 * merging:.0f}")
    run = {"machine": machine(loaded.device), "model": shape or model, "repeats": repeats}
    show(run, table, as_json=as_json, results={"rows": rows, "reducer_us": 1e6 * merging})


if __name__ == "__main__":
    typer.run(main)
