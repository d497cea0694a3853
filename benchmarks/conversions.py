"""Seven ordinary graphs, converted: the change, and text against latent edges.

`python -m benchmarks.conversions [--n 40] [--repeats 3] [--json]`
"""

import asyncio
import difflib
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langgraph.errors import GraphRecursionError
from langgraph.graph.state import CompiledStateGraph
from rich.progress import track
from rich.syntax import Syntax
from rich.table import Table

from benchmarks.report import Spread, machine, prepare, ratios, show
from langchain_latentmas import ChatLatentMAS
from langchain_latentmas.bundled import STEPS
from langchain_latentmas.bundled.tasks import Problem, grade
from langchain_latentmas.demo import held_out
from langchain_latentmas.service.local import LocalService

EXAMPLES = Path(__file__).parent.parent / "examples"
IMPORT = "from langchain_latentmas import switch_edges\n"
MODES = ("text", "latent")
EDGES = {
    "chain_of_strings": '[("planner", "critic"), ("critic", "judger")]',
    "chain_of_messages": '[("planner", "critic"), ("critic", "judger")]',
    "reflection": '[("critic", "solver")]',
    "plan_and_execute": '[("planner", "executor"), ("executor", "judger")]',
    "debate": '"*"',
    "map_reduce": '[("worker", "judger")]',
    "supervisor": '[("solver", "supervisor")]',
}


class Run(NamedTuple):
    """All questions through one graph."""

    right: int
    output_tokens: float
    """Per question."""
    seconds: float


def sources(name: str, steps: int = STEPS) -> tuple[str, str]:
    """The source of an example as it stands, and converted."""
    text = (EXAMPLES / f"{name}.py").read_text()
    first_import = text.index("from langchain_core")
    latent = text[:first_import] + text[first_import:].replace(
        "    return builder.compile()", f"    return switch_edges(builder, {EDGES[name]}, steps={steps}).compile()"
    )
    at = latent.index("from langgraph.graph import")
    return text, latent[:at] + IMPORT + latent[at:]


def changes(name: str, steps: int = STEPS) -> list[str]:
    """The lines that a conversion removes and adds, as a unified diff without its header."""
    text, latent = (source.splitlines() for source in sources(name, steps))
    return [line for line in list(difflib.unified_diff(text, latent, lineterm="", n=0))[2:] if line[0] in "+-"]


def build(name: str, latent: bool, llm: ChatLatentMAS, steps: int = STEPS) -> CompiledStateGraph[Any, Any, Any, Any]:
    """An example's graph, as it stands or converted."""
    source = sources(name, steps)[latent]
    namespace: dict[str, Any] = {"__name__": f"examples.{name}"}
    exec(compile(source, str(EXAMPLES / f"{name}.py"), "exec"), namespace)
    return namespace["make"](llm)


def run(graph: CompiledStateGraph[Any, Any, Any, Any], problems: list[Problem], edges: str = "latent") -> Run:
    """Puts all problems to a graph at once."""
    usage = UsageMetadataCallbackHandler()
    config: Any = {"configurable": {"edges": edges}, "callbacks": [usage], "max_concurrency": 32}
    messages = "messages" in graph.get_input_jsonschema()["properties"]
    inputs: list[Any] = [
        {"messages": [("human", p.question)]} if messages else {"question": p.question} for p in problems
    ]
    begun = time.perf_counter()
    states = asyncio.run(graph.abatch(inputs, config, return_exceptions=True))
    seconds = time.perf_counter() - begun
    if other := [s for s in states if isinstance(s, Exception) and not isinstance(s, GraphRecursionError)]:
        raise other[0]
    # A supervisor that routes in circles has not answered.
    ended = [{} if isinstance(state, Exception) else state for state in states]
    answers = [state["messages"][-1].text if messages else state.get("answer", "") for state in ended]
    right = sum(grade(answer, p.answer) for answer, p in zip(answers, problems, strict=True))
    tokens = sum(spent["output_tokens"] for spent in usage.usage_metadata.values())
    return Run(right, tokens / len(problems), seconds)


def main(
    n: Annotated[int, typer.Option("--n", help="Held-out questions per graph.")] = 40,
    repeats: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    steps: Annotated[int, typer.Option(help="Latent steps of each thinking node.")] = STEPS,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="Of torch, at most; by default as many as it chooses.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Runs each example as text and converted, in turns."""
    prepare(threads)
    problems = held_out(n, seed)
    with LocalService.load(model) as service:
        loaded, settings = service.model, service.settings
    about = machine(loaded.device)

    def measure(name: str, latent: bool) -> Run:
        # A service of its own for each run: one that has thought a thought before returns it without work.
        with LocalService(loaded, settings) as fresh:
            return run(build(name, latent, ChatLatentMAS(service=fresh, max_tokens=256), steps), problems)

    for converted in (False, True):
        measure(next(iter(EDGES)), converted)  # what is done once in a process is in nobody's seconds
    rows = []
    for name in track(EDGES, "measuring", transient=True, disable=as_json):
        pairs = [(measure(name, False), measure(name, True)) for _ in range(repeats)]
        text, latent = (list(runs) for runs in zip(*pairs, strict=True))
        rows.append(
            {
                "graph": name,
                "changed": changes(name, steps),
                "right": {"text": text[0].right, "latent": latent[0].right},
                "output_tokens": {"text": text[0].output_tokens, "latent": latent[0].output_tokens},
                "seconds": {"text": Spread.of(r.seconds for r in text), "latent": Spread.of(r.seconds for r in latent)},
                "text_over_latent": {
                    "output_tokens": text[0].output_tokens / latent[0].output_tokens,
                    "seconds": ratios([run.seconds for run in text], [run.seconds for run in latent]),
                },
            }
        )
    show(
        {
            "machine": about,
            "model": f"{model} ({loaded.fingerprint}), {loaded.dtype}",
            "questions": f"{n} held-out word problems, seed {seed}, all at once; greedy",
            "agents": f"{steps} latent steps a thinking node, at most 256 tokens a speaking one",
            "repeats": repeats,
        },
        *(
            part
            for row in rows
            for part in (
                f"[bold]{row['graph']}[/]",
                Syntax("\n".join(row["changed"]), "diff", background_color="default"),
            )
        ),
        table(rows),
        "[dim]Tokens: decoded by all nodes, per question. Seconds: wall clock for all questions together, median "
        "(min..max) of the repeats.[/]",
        as_json=as_json,
        results={"rows": rows},
    )


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    shown.add_column(no_wrap=True)
    headings = (
        "right\ntext",
        "\nlatent",
        "tokens\ntext",
        "\nlatent",
        "\nratio",
        "seconds\ntext",
        "\nlatent",
        "\nratio",
    )
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        more = row["text_over_latent"]
        shown.add_row(
            f"[bold]{row['graph']}[/]",
            *(str(row["right"][mode]) for mode in MODES),
            *(f"{row['output_tokens'][mode]:.0f}" for mode in MODES),
            f"[green]{more['output_tokens']:.1f}×[/]",
            *(row["seconds"][mode].show(1) for mode in MODES),
            f"[green]{more['seconds'].median:.1f}×[/]",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
