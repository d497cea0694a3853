"""Seven ordinary graphs, converted: the change, and text against latent edges.

`python -m benchmarks.conversions [--n 40] [--repeats 3] [--json]`
"""

import asyncio
import difflib
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langgraph.errors import GraphRecursionError
from langgraph.graph.state import CompiledStateGraph
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Table

from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.bundled.tasks import Problem, grade, problem
from langchain_latentmas.service.local import LocalService

EXAMPLES = Path(__file__).parent.parent / "examples"
IMPORT = "from langchain_latentmas import switch_edges\n"
STEPS = 24
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


def sources(name: str) -> tuple[str, str]:
    """The source of an example as it stands, and converted."""
    text = (EXAMPLES / f"{name}.py").read_text()
    first_import = text.index("from langchain_core")
    latent = text[:first_import] + text[first_import:].replace(
        "    return builder.compile()", f"    return switch_edges(builder, {EDGES[name]}, steps={STEPS}).compile()"
    )
    at = latent.index("from langgraph.graph import")
    return text, latent[:at] + IMPORT + latent[at:]


def changes(name: str) -> list[str]:
    """The lines that a conversion removes and adds, as a unified diff without its header."""
    text, latent = (source.splitlines() for source in sources(name))
    return [line for line in list(difflib.unified_diff(text, latent, lineterm="", n=0))[2:] if line[0] in "+-"]


def build(name: str, latent: bool, llm: ChatLatentMAS) -> CompiledStateGraph[Any, Any, Any, Any]:
    """An example's graph, as it stands or converted."""
    source = sources(name)[latent]
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
    n: Annotated[int, typer.Option(help="Held-out questions per graph.")] = 40,
    repeats: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
    model: str = "bundled",
    seed: int = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Runs each example as text and converted, in turns."""
    rng = random.Random(seed)
    problems = [problem(rng, split="test") for _ in range(n)]
    loaded: Any = LatentService.load(model)
    console, rows = Console(width=100), []
    with Progress(console=Console(stderr=True), disable=json) as progress:
        bar = progress.add_task("graphs", total=len(EDGES) * repeats * 2)
        for name in EDGES:
            runs: dict[bool, list[Run]] = {False: [], True: []}
            for _ in range(repeats):
                for latent in (False, True):
                    # A service of its own for each run: what was thought once would be known the next time.
                    fresh = LocalService.from_model(loaded.model.model, loaded.model.tokenizer)
                    runs[latent].append(
                        run(build(name, latent, ChatLatentMAS(service=fresh, max_tokens=128)), problems)
                    )
                    fresh.close()
                    progress.advance(bar)
            rows.append({"graph": name, "changed": changes(name), **_summary(runs)})
    if json:
        console.print_json(data={"n": n, "repeats": repeats, "model": loaded.info()["fingerprint"], "rows": rows})
        return
    for row in rows:
        console.print(f"[bold]{row['graph']}[/]")
        console.print(Syntax("\n".join(row["changed"]), "diff", background_color="default", word_wrap=True))
    table = Table(
        title=f"{n} held-out questions, {repeats} runs each in turns, {STEPS} latent steps, median (min..max) seconds"
    )
    for column in (
        "graph",
        "right text",
        "right latent",
        "tokens text",
        "tokens latent",
        "s text",
        "s latent",
        "ratio",
    ):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for row in rows:
        table.add_row(
            row["graph"],
            *(f"{row['right'][mode]}/{n}" for mode in ("text", "latent")),
            *(f"{row['output_tokens'][mode]:.0f}" for mode in ("text", "latent")),
            *("{:.1f} ({:.1f}..{:.1f})".format(*row["seconds"][mode]) for mode in ("text", "latent")),
            f"{row['ratio']:.1f}",
        )
    console.print(table)


def _summary(runs: dict[bool, list[Run]]) -> dict[str, Any]:
    modes = {"text": runs[False], "latent": runs[True]}
    seconds = {mode: [run.seconds for run in some] for mode, some in modes.items()}
    middle = {mode: statistics.median(some) for mode, some in seconds.items()}
    return {
        "right": {mode: some[0].right for mode, some in modes.items()},
        "output_tokens": {mode: some[0].output_tokens for mode, some in modes.items()},
        "seconds": {mode: (middle[mode], min(some), max(some)) for mode, some in seconds.items()},
        "ratio": middle["text"] / middle["latent"],
    }


if __name__ == "__main__":
    typer.run(main)
