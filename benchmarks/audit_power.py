"""Does the audit find content where there is some, and only there? `python -m benchmarks.audit_power`."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.graph import END, START, StateGraph
from rich.progress import track
from rich.table import Table

from benchmarks.report import Spread, machine, prepare, show
from langchain_latentmas import LatentAgentNode, LatentService, LatentState, audit
from langchain_latentmas.bundled import ROLES, STEPS, tasks
from langchain_latentmas.evaluation.statistics import wilson
from langchain_latentmas.evaluation.task import Question, Relay
from langchain_latentmas.evaluation.worth import EdgeWorth
from langchain_latentmas.modes import Edge
from langchain_latentmas.service.local import LocalService

BYSTANDER: Edge = ("bystander", "judger")
Examples = Sequence[tuple[Any, Question]]


class PlaceboState(LatentState):
    topic: str


def placebo(service: LatentService | None = None, steps: int = STEPS) -> StateGraph:
    """A judger that never sees the question reads a planner, who does, and a bystander.

    The bystander thinks about a problem of its own, drawn at random and independent of the question. So the content of
    its edge cannot matter: any other bystander's memory is as good, though the judger does read it and may be misled.
    """
    builder = StateGraph(PlaceboState)
    builder.add_node("planner", LatentAgentNode("planner", ROLES["planner"], service=service, steps=steps))
    builder.add_node("bystander", LatentAgentNode("bystander", _topic_only, service=service, steps=steps))
    builder.add_node("judger", LatentAgentNode("judger", _no_question, service=service, speak=True, max_tokens=64))
    for source, target in ((START, "planner"), (START, "bystander"), ("judger", END)):
        builder.add_edge(source, target)
    builder.add_edge(["planner", "bystander"], "judger")
    return builder


def placebo_examples(n: int, seed: int) -> Examples:
    """Questions, each with a topic that has nothing to do with it."""
    topics = random.Random(f"topics of {seed}")
    return [
        ({"messages": [HumanMessage(asked.text)], "topic": tasks.problem(topics, "test").question}, asked)
        for asked in Relay().questions(n, seed)
    ]


def relay_examples(n: int, seed: int) -> Examples:
    task = Relay()
    return [(task.input(asked), asked) for asked in task.questions(n, seed)]


def right(state: Any, asked: Question) -> bool:
    return Relay().grade(state["messages"][-1].text, asked)


def _topic_only(state: PlaceboState) -> list[Any]:
    return [SystemMessage(ROLES["reading"]), HumanMessage(state["topic"])]


def _no_question(state: PlaceboState) -> list[Any]:
    return [SystemMessage(ROLES["judger"])]


class Case(NamedTuple):
    """A graph, and whether the content of its edge is worth anything."""

    name: str
    graph: Callable[[LatentService], StateGraph]
    examples: Callable[[int, int], Examples]
    edges: Any
    expected: str


CASES = (
    Case("placebo", placebo, placebo_examples, [BYSTANDER], "at most 5 %"),
    Case(
        "relay",
        lambda service: Relay().graph(service, "sequential"),
        relay_examples,
        "all",
        "at least 99 %",
    ),
)


def main(
    runs: Annotated[int, typer.Option(help="Seeded audits of each graph.")] = 100,
    n: Annotated[int, typer.Option("--n", help="Questions of each.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the first audit; the others count on from it.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Audits a placebo and the relay with as many seeds; every audit has questions of its own."""
    prepare(None)
    rows = []
    for case in CASES:
        begun, found, worths = time.perf_counter(), 0, []
        with LocalService.load("bundled", kv_budget=1 << 28) as service:
            about, model = machine(service.model.device), service.model.fingerprint
            graph = case.graph(service)
            for i in track(range(runs), case.name, transient=True, disable=as_json):
                # The verdict rests on intact against swapped, so the other conditions are left out.
                result = audit(
                    graph,
                    case.examples(n, seed + i),
                    right,
                    edges=case.edges,
                    conditions=["intact", "swapped"],
                    seed=seed + i,
                )
                found += result.edges[0].has_content
                worths.append(result.edges[0])
        rows.append(_row(case, found, worths, time.perf_counter() - begun))
    show(
        {
            "machine": about,
            "model": f"bundled ({model})",
            "audits": f"{runs} of each graph, {n} held-out questions each, seeds {seed} to {seed + runs - 1}",
        },
        table(rows),
        "[dim]Each audit asks questions of its own; none are drawn again from a pool. Content found: McNemar's exact p "
        "of intact against swapped is below 5 % (95 % Wilson interval). Rest: median (min..max) of the audits.[/]",
        as_json=as_json,
        results={"rows": rows},
    )


def _row(case: Case, found: int, worths: Sequence[EdgeWorth], seconds: float) -> dict[str, Any]:
    return {
        "graph": case.name,
        "expected": case.expected,
        "audits": len(worths),
        "found": found,
        "found_interval": [100 * end for end in wilson(found, len(worths))],
        **{name: Spread.of(worth.outcomes[name].accuracy for worth in worths) for name in ("intact", "swapped")},
        "points": Spread.of(worth.effects["content"].points for worth in worths),
        "seconds": seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=None, padding=(0, 2), header_style="dim")
    for i, name in enumerate(("graph", "content found", "expected", "intact", "swapped", "points", "minutes")):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        low, high = row["found_interval"]
        shown.add_row(
            row["graph"],
            f"{row['found']} of {row['audits']} [dim]({low:.0f}..{high:.0f} %)[/]",
            row["expected"],
            row["intact"].show(0, " %"),
            row["swapped"].show(0, " %"),
            row["points"].show(0),
            f"{row['seconds'] / 60:.1f}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
