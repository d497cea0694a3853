"""audit: what is the content of an edge worth? The same graph on the same questions, with the edge tampered with."""

import asyncio
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import SystemMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from .calls import Calls
from .edges import GraphEdges
from .errors import InvalidEdge, InvalidRequest, check_whole
from .evaluation.conditions import LEAST, Grade, Progress, Questions, told
from .evaluation.journal import Journal, digest, pinned
from .evaluation.machine import version_of
from .evaluation.worth import CONDITIONS, Audit, EdgeWorth
from .modes import Edge
from .node import LatentAgentNode, field_of
from .service import LatentService
from .service.shared import shared_service

LEFT_OUT: dict[str, Any] = {
    "checkpointer": None,
    "cache": None,
    "interrupt_before_nodes": (),
    "interrupt_after_nodes": (),
}
"""What a compiled graph is audited without."""


def audit(
    graph: StateGraph | Pregel,
    examples: Sequence[tuple[Any, Any]],
    grade: Grade,
    *,
    edges: Iterable[Edge] | Literal["all", "each"] = "all",
    conditions: Sequence[str] = CONDITIONS,
    seed: int = 0,
    level: float = 0.95,
    concurrency: int = 32,
    config: RunnableConfig | None = None,
    context: Any = None,
    journal: str | Path | None = None,
    task: str = "audit",
    about: Mapping[str, Any] | None = None,
    on_answer: Progress | None = None,
) -> Audit:
    """Finds out what the content of latent edges is worth, in points of accuracy.

    Runs the graph on the same questions under up to six conditions. An edge (a, b) carries the whole memory that agent
    b reads through a reference of agent a: what a thought or said, and what a had read before.

    - "intact": as it is.
    - "swapped": the memory of another question crosses instead, one of about the same length from the same edge of the
      intact run. Examples without such a one are left out of "swapped" and of what is told from it.
    - "zeroed": the same memory with all values zero; keys and positions stay.
    - "random": the same memory with noise for values, its norms those of the values.
    - "cut": the reader reads nothing over the edge.
    - "text": the edge carries text (the sender speaks, over all of its edges).

    A condition under which every question fails, and would again, is left out, and the result's notes say so.

    Intact less swapped is the edge's *content*: a swapped memory is one that this graph really produces, in the same
    role and of about the same length, so the question behind it is all that differs. Swapped less cut is its mere
    *presence*. "zeroed" and "random" are no part of the content: no reader was ever given such values, so they show
    what a damaged memory does, not what a memory without content does. Both effects have paired bootstrap intervals
    and McNemar's exact test; p-values are adjusted (Holm) where several edges are audited. The verdict follows the
    tests: content is what has p below 1 - `level`. Examples that ask the same count as one question in all of that,
    with the share of them that was right, and McNemar's test is the sign test then.

    Greedy agents repeat themselves; give those that sample a `seed`. Checkpointer, node cache and breakpoints
    (`interrupt_before`) of a compiled graph are left out; what nodes keep elsewhere, say in the graph's store, is not.
    A question on which a node calls `interrupt()` has failed: nobody is there to answer.

    Example:
        ```python
        examples = [({"messages": [("human", question)]}, answer) for question, answer in held_out]
        report = audit(graph, examples, lambda state, answer: answer in state["messages"][-1].text)
        print(report.verdict)  # this edge's content is worth 88 ± 4 points
        ```

    Args:
        graph: A graph of `LatentAgentNode`s, or one converted by `switch_edges`; compiled or not.
        examples: Pairs of the graph's input and whatever the grader compares with, of at least 20 questions.
        grade: Gets the graph's last state and the second half of the pair; says whether the answer is right.
        edges: "all": all latent edges at once. "each": all at once, then each that was crossed by itself. Pairs of
            names: those at once, then each by itself.
        conditions: Which of the six; "intact" and "swapped" are always run.
        seed: Of the swaps, the noise and the bootstrap; 0 or more.
        level: Confidence of intervals and tests.
        concurrency: Questions at a time.
        config: Passed to the graph.
        context: The graph's runtime context.
        journal: A file that gets every answer as a line of JSON. If it has some already, these are not asked for
            again; but the intact run is repeated where its memories are needed and gone.
        task: What to call it.
        about: What else the answers depend on, in plain JSON, say the grader; a journal with another `about`, of
            another graph or model, with other examples or another seed is refused.
        on_answer: Called with the name of the run, the answers so far, and how many there will be.

    Returns:
        What came of it.

    Raises:
        InvalidRequest: Fewer than 20 questions, an unknown condition, a seed below 0; before anything runs, like
            `InvalidEdge`. Or the graph fails on all examples, intact or swapped.
        InvalidEdge: If an edge does not exist or is not latent.
        EdgeNotCrossed: If no example's memory crosses an edge; after the intact run, like the two below.
        NoPartner: If no two questions' memories are of one length class (within a factor of 2), to be swapped.
        GraderFailed: If the grader raises on each of the first 20 answers. Where it raises on some, or the graph does,
            these count as wrong, and the result says what was raised and how often.
    """
    given: dict[str, Any] = {**locals()}
    ends: list[Callable[[], object]] = []

    async def work() -> Audit:
        task = asyncio.current_task()
        assert task is not None
        ends.append(partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel))
        # Nodes without a coroutine run in the loop's threads, and one that waits for another, as an entrypoint does for
        # its tasks, keeps its own meanwhile. So there is always one more; how many questions run is bounded elsewhere.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(sys.maxsize))
        return await aaudit(**given)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as thread:  # inside of an event loop, as in a notebook
        running = thread.submit(copy_context().run, asyncio.run, work())
        try:
            return running.result()
        except BaseException:
            for end in [] if running.done() else ends:  # interrupted: else the hours that are left would be waited for
                end()
            raise


async def aaudit(
    graph: StateGraph | Pregel,
    examples: Sequence[tuple[Any, Any]],
    grade: Grade,
    *,
    edges: Iterable[Edge] | Literal["all", "each"] = "all",
    conditions: Sequence[str] = CONDITIONS,
    seed: int = 0,
    level: float = 0.95,
    concurrency: int = 32,
    config: RunnableConfig | None = None,
    context: Any = None,
    journal: str | Path | None = None,
    task: str = "audit",
    about: Mapping[str, Any] | None = None,
    on_answer: Progress | None = None,
) -> Audit:
    """Like `audit`, in the event loop that is running.

    Nodes without a coroutine run in this loop's threads. Where such a node waits for another, as a sync `@entrypoint`
    does for its sync tasks, give the loop twice `concurrency` of them (`loop.set_default_executor`), or use `audit`.
    """
    if odd := next((one for one in examples if not (isinstance(one, (tuple, list)) and len(one) == 2)), None):
        raise InvalidRequest(
            f"An example is a pair of the graph's input and what the grader compares with, not {odd!r}."
        )
    if (different := len({told(question) for question, _ in examples})) < LEAST:
        raise InvalidRequest(
            f"An audit needs at least {LEAST} examples of different questions to tell anything, not {different}; 100 "
            "are better."
        )
    if unknown := set(conditions) - set(CONDITIONS):
        raise InvalidRequest(f"There is no condition {min(unknown)!r}; take some of {', '.join(CONDITIONS)}.")
    if not 0 < level < 1:
        raise InvalidRequest(f"level must lie between 0 and 1, not at {level!r}.")
    check_whole("seed", seed)
    check_whole("concurrency", concurrency, 1)
    if isinstance(edges, str) and edges not in ("all", "each"):
        raise InvalidEdge(f"edges must be 'all', 'each', or pairs of names, not {edges!r}.")
    named = edges if isinstance(edges, str) else [_edge(edge) for edge in edges]
    if not named:
        raise InvalidEdge("edges names no edge; give pairs of names, 'all' or 'each'.")
    seen = _Survey(graph)
    _check_edges(graph, seen, [] if isinstance(named, str) else named)
    compiled = graph.compile() if isinstance(graph, StateGraph) else graph.copy(LEFT_OUT)
    wanted = [name for name in CONDITIONS if name in {"intact", "swapped", *conditions}]
    head = journal_head(graph, examples, seed, about, context, config) if journal else {}
    with Journal(journal, head) if journal else nullcontext() as opened:
        asked = Questions(
            compiled, seen.edges, examples, grade, seed, concurrency, config or {}, context, on_answer, opened
        )
        intact = await asked.intact()
        scopes = asked.scopes(named)
        for scope in scopes:
            asked.partners(scope)  # that nobody has one is to be known before the hours of work
        worths = []
        for scope in scopes:
            answers = {name: await asked.altered(scope, name) if name != "intact" else intact for name in wanted}
            questions, notes = asked.questions, asked.notes(scope)
            crossed = len({questions[i] for i in asked.crossing(scope)})
            worths.append(EdgeWorth.of(scope.name, answers, questions, crossed, seed=seed, level=level, notes=notes))
    return Audit.of(task, worths, seed=seed, level=level, about=about)


def journal_head(
    graph: StateGraph | Pregel,
    examples: Sequence[Any],
    seed: int,
    about: Mapping[str, Any] | None = None,
    context: Any = None,
    config: RunnableConfig | None = None,
) -> dict[str, Any]:
    """What the answers of an audit depend on, as far as it can be seen without running the graph.

    What functions do is not among it, nodes and prompts that are functions included: who has their source names it in
    `about`.

    Returns:
        Plain JSON: what a journal begins with.
    """
    seen = _Survey(graph)
    compiled = graph.compile() if isinstance(graph, StateGraph) else graph
    calls = Calls.of(compiled)
    llms, agents = calls.ours, calls.agents
    services = [llm._service for llm in llms]
    services += [agent.service or field_of(context, "service") or shared_service() for agent in agents]
    models = {digest(pinned(one)) for one in services if isinstance(one, LatentService)}
    shape = [
        sorted(map(str, seen.edges)),
        sorted((*edge, steps) for edge, steps in seen.latent.items()),
        sorted(digest(llm._identifying_params) for llm in llms),
        sorted(digest(_settings(agent)) for agent in agents),
    ]
    return {
        "journal": "audit",
        "version": version_of("langchain-latentmas"),
        "models": sorted(models),
        "graph": digest(shape),
        "examples": hashlib.sha256("\n".join(map(told, examples)).encode()).hexdigest(),
        "seed": seed,
        "about": dict(about or {}),
        "config": digest((config or {}).get("configurable")),
    }


def _settings(agent: LatentAgentNode) -> dict[str, Any]:
    names = ("name", "steps", "speak", "reads", "max_tokens", "sampling")
    prompt = agent.prompt.content if isinstance(agent.prompt, SystemMessage) else agent.prompt
    prompt = prompt if isinstance(prompt, (str, list)) else type(prompt).__name__
    return {**{name: getattr(agent, name) for name in names}, "prompt": prompt}


def _builder(graph: StateGraph | Pregel) -> Any:
    """The builder of a graph; None of one of the functional API, which shows no edges."""
    return graph if isinstance(graph, StateGraph) else getattr(graph, "builder", None)


def _edge(named: Any) -> Edge:
    if isinstance(named, str) or not isinstance(named, Sequence) or len(named) != 2:
        raise InvalidEdge(f"An edge is a pair of names, such as ('planner', 'critic'), not {named!r}.")
    return str(named[0]), str(named[1])


def _check_edges(graph: StateGraph | Pregel, seen: "_Survey", edges: Sequence[Edge]) -> None:
    """Refuses, before anything runs, edges that do not exist or are not latent, as far as that can be seen."""
    if not isinstance(builder := _builder(graph), StateGraph):
        return
    if not seen.agents and not seen.latent and "latents" not in builder.channels:
        raise InvalidEdge("No edge of this graph is latent; switch some with switch_edges(builder, '*', to='latent').")
    agents = [str(agent.name) for agent in seen.agents]
    names = [*dict.fromkeys([*seen.nodes, *agents])]
    for source, target in edges:
        arrow = f"{source}->{target}"
        for name in (source, target):
            if name in (START, END):
                raise InvalidEdge(f"The edge {arrow} is not latent: what enters or leaves the graph is text.")
            if name not in names:
                raise InvalidEdge(f"The edge {arrow}: there is no agent {name!r} (there are: {', '.join(names)}).")
        readers = [agent for agent in seen.agents if agent.name == target]
        if source in agents and readers and not any(each.reads is None or source in each.reads for each in readers):
            read = ", ".join(dict.fromkeys(name for each in readers for name in each.reads or ())) or "nobody"
            raise InvalidEdge(f"The edge {arrow} is not latent: {target!r} reads {read} only.")
        if source not in agents and (source, target) not in seen.latent and "latents" not in builder.channels:
            there = ", ".join(map("->".join, sorted(seen.latent))) or "none"
            raise InvalidEdge(
                f"The edge {arrow} is not latent (latent are: {there}); switch it with switch_edges first."
            )


class _Survey:
    """Nodes, agents, edges and switched edges of a graph and its subgraphs; none of one of the functional API."""

    def __init__(self, graph: StateGraph | Pregel) -> None:
        self.nodes: list[str] = []
        self.agents: list[LatentAgentNode] = []
        self.edges: list[Edge] = []
        self.latent: dict[Edge, int] = {}
        if isinstance(builder := _builder(graph), StateGraph):
            self.look(builder)

    def look(self, builder: StateGraph) -> None:
        """Adds a graph."""
        graph = GraphEdges(builder)
        self.edges += graph.edges
        self.latent |= graph.switched
        for name in builder.nodes:
            self.nodes.append(name)
            self.agents += graph.calls(name).agents
            for subgraph in graph.calls(name).subgraphs:
                if isinstance(subgraph, CompiledStateGraph):
                    self.look(subgraph.builder)
