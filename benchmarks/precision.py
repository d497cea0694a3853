"""What fewer bits change, on held-out questions: `python -m benchmarks.precision`."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import track
from rich.table import Table
from rich.text import Text

from benchmarks.report import machine, prepare, show
from langchain_latentmas import LatentRef
from langchain_latentmas.commands.options import Options, named
from langchain_latentmas.commands.session import reported
from langchain_latentmas.errors import LatentMASError
from langchain_latentmas.evaluation.statistics import wilson
from langchain_latentmas.evaluation.task import Question, Relay, Task, Words
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.memory import Memory

PRECISIONS: Mapping[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, int8 KV": {"dtype": "float32", "kv_dtype": "int8"},
    "float32, int8 weights": {"dtype": "float32", "quantization": "int8"},
    "float32, fp8 weights": {"dtype": "float32", "quantization": "fp8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8 KV": {"dtype": "bfloat16", "kv_dtype": "int8"},
    "bfloat16, int8 weights, int8 KV": {"dtype": "bfloat16", "quantization": "int8", "kv_dtype": "int8"},
    "float16": {"dtype": "float16"},
}
"""The first one that runs is what the others are compared with."""

GRAPHS: Mapping[str, tuple[Task, str]] = {
    "relay": (Relay(), "sequential"),
    "words": (Words(), "sequential"),
    "alone": (Words(), "single"),
}
COMPARED = 8
"""Questions whose keys and values are compared; thoughts and tokens are compared on all of them."""


class Run(NamedTuple):
    """What one precision made of the questions of one graph."""

    right: int
    tokens: list[tuple[int, ...]]
    """Of who answered."""
    thoughts: list[torch.Tensor]
    """Of all thinkers of a question, [steps, hidden]."""
    memories: list[Memory]
    """What the last thinker left."""


def main(
    n: Annotated[int, typer.Option("--n", help="Held-out questions of each graph.")] = 100,
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    seed: int = 0,
    device: str | None = None,
    threads: Annotated[int | None, typer.Option(help="Of torch, at most; by default as many as it chooses.")] = None,
    option: Options = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """The same questions in every precision: right answers, the same tokens, how far thoughts and KV are off, bytes."""
    prepare(threads)
    with reported(as_json):
        given = {"device": device, **named(option)}
    rows: list[dict[str, Any]] = []
    first: dict[str, Run] = {}
    about: dict[str, Any] = {}
    for name, settings in track(PRECISIONS.items(), "measuring", transient=True, disable=as_json):
        try:
            with LocalService.load(model, **{**given, **settings}) as service:
                about = about or machine(service.model.device)
                runs = {graph: ask(service, *GRAPHS[graph], n, seed) for graph in GRAPHS}
                info = service.info()
                kept = service._pool.kept._values
                position = info["kv_bytes"] / sum(kv.positions for kv in kept.values())
        except LatentMASError as error:  # what took an hour before it is not lost
            rows.append({"precision": name, "refused": f"{type(error).__name__}: {error}"})
            continue
        first = first or runs
        teams = [(runs[graph], first[graph]) for graph in ("relay", "words")]
        rows.append(
            {
                "precision": name,
                **{graph: {"right": run.right, "same_tokens": same(run, first[graph])} for graph, run in runs.items()},
                "thoughts_off": off((t, e) for a, b in teams for t, e in zip(a.thoughts, b.thoughts, strict=True)),
                "keys_off": off(pairs(teams, "keys")),
                "values_off": off(pairs(teams, "values")),
                "weight_bytes": info["weight_bytes"],
                "kv_bytes_per_position": position,
            }
        )
    ran = [row for row in rows if "refused" not in row]
    show(
        {
            "machine": about,
            "model": model,
            "questions": f"{n} held-out word problems for each graph, seed {seed}, all at once; greedy",
            "graphs": "relay and words: three thinkers and a judger, who sees the question in words only; alone: one "
            "agent, in text",
        },
        *((answers(ran, n), errors(ran)) if ran else ()),
        *([refused(rows)] if len(ran) < len(rows) else []),
        "[dim]Right: 95 % Wilson interval. Same: whoever answered said the same as in the first row, token by "
        "token. Off: root mean square of the difference to the first row, relative to it, over all thoughts, and over "
        f"what the judger reads in the first {COMPARED} questions. KV: bytes that a position of a stored memory takes."
        "[/]",
        as_json=as_json,
        results={"n": n, "rows": rows},
    )
    if not ran:
        raise typer.Exit(2)


def ask(service: LocalService, task: Task, arrangement: str, n: int, seed: int) -> Run:
    """Puts all questions to a graph at once."""
    questions: Sequence[Question] = task.questions(n, seed)
    graph = task.graph(service, arrangement).compile()
    states = graph.batch([task.input(q) for q in questions], {"max_concurrency": n})  # type: ignore[arg-type]
    right = sum(task.grade(state["messages"][-1].text, q) for state, q in zip(states, questions, strict=True))
    tokens, thoughts, memories = [], [], []
    for i, state in enumerate(states):
        answered = service.memory(_answer(state)).segments
        tokens.append(answered[-1].spoken_ids)
        if len(answered) > 1:
            thoughts.append(torch.cat([segment.thoughts for segment in answered]))
        if len(answered) > 1 and i < COMPARED:
            thinkers = {ref["id"]: ref for ref in state["latents"]}
            memories.append(service.memory(thinkers[_answer(state)["parents"][-1]]))
    return Run(right, tokens, thoughts, memories)


def same(run: Run, first: Run) -> float:
    """Share of answers with the same tokens."""
    return sum(a == b for a, b in zip(run.tokens, first.tokens, strict=True)) / len(run.tokens)


def pairs(teams: Sequence[tuple[Run, Run]], side: str) -> Any:
    """Keys or values of both, layer by layer."""
    for run, first in teams:
        for ours, theirs in zip(run.memories, first.memories, strict=True):
            yield from zip(getattr(ours, side), getattr(theirs, side), strict=True)


def off(tensors: Any) -> float:
    """Root mean square of the differences, relative to the second ones."""
    difference = whole = 0.0
    for ours, theirs in tensors:
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        difference += float((ours - theirs).square().sum())
        whole += float(theirs.square().sum())
    return (difference / whole) ** 0.5


def answers(rows: Sequence[dict[str, Any]], n: int) -> Table:
    shown = _table(*(f"{graph}: {what}" for graph in GRAPHS for what in ("right %", "same %")))
    for row in rows:
        cells = []
        for graph in GRAPHS:
            low, high = wilson(row[graph]["right"], n)
            right = f"{100 * row[graph]['right'] / n:.0f} [dim]({100 * low:.0f}..{100 * high:.0f})[/]"
            cells += [right, f"{100 * row[graph]['same_tokens']:.0f}"]
        shown.add_row(row["precision"], *cells)
    return shown


def errors(rows: Sequence[dict[str, Any]]) -> Table:
    shown = _table("thoughts off", "keys off", "values off", "bytes of weights", "bytes of KV")
    for row in rows:
        cells = [f"{100 * row[name]:.2g} %" for name in ("thoughts_off", "keys_off", "values_off")]
        shown.add_row(row["precision"], *cells, f"{row['weight_bytes']:,}", f"{row['kv_bytes_per_position']:,.0f}")
    return shown


def refused(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table.grid(padding=(0, 2))
    for row in rows:
        if "refused" in row:
            shown.add_row(row["precision"], Text(f"refused: {row['refused']}"))
    return shown


def _table(*names: str) -> Table:
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    shown.add_column("", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right")
    return shown


def _answer(state: Mapping[str, Any]) -> LatentRef:
    """The reference of who answered."""
    ref: LatentRef = state["messages"][-1].response_metadata["latent_ref"]
    return ref


if __name__ == "__main__":
    typer.run(main)
