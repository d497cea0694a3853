"""switch_edges: turn edges of an existing graph latent, or back to text."""

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any, Literal, NamedTuple, overload

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.types import CachePolicy
from langgraph.utils.runnable import RunnableCallable  # type: ignore[attr-defined]

from .calls import Calls
from .chat_model import THINKER, ChatLatentMAS, Thinker
from .errors import InvalidEdge, InvalidRequest, check_whole
from .modes import Edge, Mode, edge_modes, namespace, node_path
from .node import LatentAgentNode, told_by
from .service.shared import SharedSettings

DEFAULT_ERROR_HANDLER = "__default_error_handler__"  # node that LangGraph's `compile` adds to a builder
SWITCHED = "_latentmas_edges"  # attribute of a builder that holds the steps of its latent edges


class EdgeReport(NamedTuple):
    """What becomes of an edge, and why."""

    source: str
    target: str
    mode: Mode
    why: str


class EdgeReports(list[EdgeReport]):
    """Reports on all edges of a graph; prints as a table, and is shown as one in a notebook."""

    def __str__(self) -> str:
        arrows = [f"{report.source} -> {report.target}" for report in self]
        width = max(map(len, arrows), default=0)
        return "\n".join(
            f"{arrow:{width}}  {report.mode:6}  {report.why}" for arrow, report in zip(arrows, self, strict=True)
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(source)} &rarr; {escape(target)}</td><td>{f'<b>{mode}</b>' if mode == 'latent' else mode}"
            f"</td><td style='text-align: left'>{escape(why)}</td></tr>"
            for source, target, mode, why in self
        )
        return f"<table><tr><th>edge</th><th>mode</th><th style='text-align: left'>why</th></tr>{rows}</table>"


@overload
def switch_edges(
    builder: StateGraph,
    edges: Iterable[Edge] | Literal["*"],
    *,
    to: Mode = ...,
    steps: int = ...,
    router_reads_text: bool = ...,
    explain: Literal[False] = ...,
) -> StateGraph: ...


@overload
def switch_edges(
    builder: StateGraph,
    edges: Iterable[Edge] | Literal["*"],
    *,
    to: Mode = ...,
    steps: int = ...,
    router_reads_text: bool = ...,
    explain: Literal[True],
) -> EdgeReports: ...


def switch_edges(
    builder: StateGraph,
    edges: Iterable[Edge] | Literal["*"],
    *,
    to: Mode = "latent",
    steps: int = 20,
    router_reads_text: bool = True,
    explain: bool = False,
) -> StateGraph | EdgeReports:
    """Turns edges of a graph latent, or back to text.

    The nodes are ordinary ones that call a `ChatLatentMAS`. One whose outgoing edges are all latent thinks when it
    calls the model, and the text it gets is a marker, which the next model call reads as the memory it stands for. At
    run time `{"configurable": {"edges": "text"}}` runs every edge as text, and a mapping like
    `{"planner->critic": "text"}` single ones.

    A node that calls its model in threads of its own, or in a graph that cannot be seen from the node, speaks there
    (the latter the log says): hand threads the context (`contextvars.copy_context().run`), or take LangChain's `batch`.
    Nor does a graph that it calls with a thread of its own hear of `configurable.edges`: LangGraph drops it on the way,
    so hand it on.

    Switch last: edges that are added to the builder afterwards do not make a thinking node speak. LangGraph keeps what
    a node with a `CachePolicy` returned under the node's input alone, so one that ran latent is read as a marker in a
    text run too, and the other way round, until `graph.clear_cache()`. A node that is interrupted and resumed thinks
    once: the same call gives the same marker.

    Example:
        ```python
        builder = switch_edges(builder, [("planner", "critic"), ("critic", "judger")], to="latent", steps=20)
        ```

    Args:
        builder: Any `StateGraph`; it is left as it is.
        edges: Pairs of node names, or "*" for every edge that can be latent.
        to: "latent" or "text".
        steps: Latent steps of a node that thinks.
        router_reads_text: Whether the routers of conditional edges (and nodes that return `Command`) read the text of
            their node, as they do unless you know better; such edges stay text.
        explain: Return what would become of each edge instead.

    Returns:
        A new builder; with `explain`, a report on every edge, which prints as a table.

    Raises:
        InvalidEdge: If a node or edge does not exist, or a named edge cannot be latent; says why, and the way out.
        InvalidRequest: If the graph is already compiled, or `to` or `steps` is out of range.
    """
    if isinstance(builder, CompiledStateGraph):
        raise InvalidRequest(
            "This graph is compiled already; pass its builder (graph.builder) and compile what returns."
        )
    if isinstance(builder, Pregel):
        raise InvalidRequest(
            "A workflow of the functional API has no edges to switch; call the model with steps=... in the tasks that "
            "shall think."
        )
    if not isinstance(builder, StateGraph):
        raise InvalidRequest(f"switch_edges takes a StateGraph, not a {type(builder).__name__}.")
    if to not in ("latent", "text"):
        raise InvalidRequest(f"to must be 'latent' or 'text', not {to!r}.")
    check_whole("steps", steps)
    graph = GraphEdges(builder)
    wanted = list(graph.edges) if edges == "*" else _named(edges, graph)
    switched = dict(graph.switched)
    refused: dict[Edge, str] = {}
    if to == "text":
        for source, target in wanted:
            by_itself = None if source == START or edges == "*" else graph._by_itself(source)
            if by_itself and (source, target) not in switched:
                raise InvalidEdge(
                    f"The edge {source!r} -> {target!r} cannot be switched: {by_itself} Run the graph with "
                    f'{{"configurable": {{"edges": {{"{source}->{target}": "text"}}}}}} instead.'
                )
            switched.pop((source, target), None)
    else:
        refused = graph.refusals(wanted, switched, router_reads_text, trusted=edges != "*")
        if refused and edges != "*":
            (source, target), why = next(iter(refused.items()))
            raise InvalidEdge(f"The edge {source!r} -> {target!r} cannot be latent: {why}")
        switched |= {edge: steps for edge in wanted if edge not in refused}
    if explain:
        return EdgeReports(graph.report(edge, switched, refused.get(edge, "not switched")) for edge in graph.edges)
    return graph.with_edges(switched)


class GraphEdges:
    """A builder, seen as its edges.

    Attributes:
        builder: The builder.
        switched: Its latent edges, with their steps.
        edges: All of them, in the order in which the nodes were added, and how each is made: "edge", "command",
            "conditional" or "conditional, to anywhere".
    """

    def __init__(self, builder: StateGraph) -> None:
        self.builder = builder
        self.switched: dict[Edge, int] = getattr(builder, SWITCHED, {})
        made: dict[Edge, str] = dict.fromkeys(builder.edges, "edge")
        made |= {(source, target): "edge" for sources, target in builder.waiting_edges for source in sources}
        for source, branches in builder.branches.items():
            for branch in branches.values():
                for target in (branch.ends or {name: name for name in (*builder.nodes, END)}).values():
                    made[source, target] = "conditional" if branch.ends else "conditional, to anywhere"
        for source, spec in builder.nodes.items():
            for target in spec.ends or ():
                made.setdefault((source, target), "command")
        order = {name: at for at, name in enumerate((START, *builder.nodes, END))}
        self.edges = {edge: made[edge] for edge in sorted(made, key=lambda edge: [order.get(name, 0) for name in edge])}
        self._calls: dict[str, Calls] = {}

    def leaving(self, source: str) -> list[Edge]:
        """The edges of a node."""
        return [edge for edge in self.edges if edge[0] == source]

    def report(self, edge: Edge, switched: Mapping[Edge, int], why_text: str) -> EdgeReport:
        """What an edge is, once these are switched; a latent one beside a text one of the same node is text."""
        if edge not in switched:
            source, target = edge
            by_itself = None if START in edge or END in edge else self._by_itself(source)
            reads = by_itself and self.calls(target).agents
            return EdgeReport(source, target, "latent" if reads else "text", by_itself or why_text)
        siblings = self.leaving(edge[0])
        for other in siblings:
            if other not in switched:
                return EdgeReport(*edge, "text", f"{edge[0]!r} speaks, because its edge to {other[1]!r} is text.")
        why = f"{max(switched[each] for each in siblings)} latent steps"
        if silent := self._silent_after(edge):
            why += f"; {silent!r} calls no model that can be seen, and has a marker only where it reads this text"
        return EdgeReport(*edge, "latent", why)

    def refusals(
        self, wanted: list[Edge], switched: Mapping[Edge, int], router_reads_text: bool, trusted: bool
    ) -> dict[Edge, str]:
        """Why edges cannot be latent, for those that cannot.

        Args:
            wanted: The edges to switch.
            switched: Those that are latent already.
            router_reads_text: See `switch_edges`.
            trusted: Whether somebody named the edges, and so knows of models that cannot be seen from here.
        """
        refused: dict[Edge, str] = {}
        for edge in wanted:
            if edge not in switched and (why := self._refusal(edge, router_reads_text, trusted)):
                refused[edge] = why
        latent = ({*wanted, *switched}) - refused.keys()
        for edge in wanted:
            other = next((e for e in self.leaving(edge[0]) if e not in latent and e != edge), None)
            if edge not in refused and other is not None:
                why = refused.get(other) or self._refusal(other, router_reads_text, trusted=False)
                why = why or "it is not switched; name it too."
                refused[edge] = f"{edge[0]!r} speaks, because its edge to {other[1]!r} stays text: {why}"
        return refused

    def _refusal(self, edge: Edge, router_reads_text: bool, trusted: bool) -> str | None:
        source, target = edge
        advice = " Leave it out, and name the edges between your nodes." if trusted else ""
        if source == START:
            return "what enters the graph is text." + advice
        made = self.edges[edge]
        if target == END:
            hint = " If its router never goes there, tell add_conditional_edges with path_map=[...]."
            return "what leaves the graph is text." + (hint if made.endswith("anywhere") else advice)
        if made != "edge" and router_reads_text:
            who = "the node that returns Command reads" if made == "command" else "its router reads"
            return f"{who} the text of {source!r}; pass router_reads_text=False if it does not."
        sender, receiver = self.calls(source), self.calls(target)
        ends = self._ends(source)
        output = self._output(source, sender, ends)
        if why := self._by_itself(source):
            return why
        for name, facts in ((source, output), (target, receiver)):
            if facts.foreign and not (trusted and facts.ours):
                return f"{name!r} runs another model ({facts.foreign}); give it a ChatLatentMAS."
            if not facts.ours and not trusted:
                return f"no ChatLatentMAS can be seen in {name!r}; name the edge if it calls one all the same."
        if output.tools:
            return f"{source!r} binds tools or structured output, which need text; bind them in another node."
        if output.parsers:
            return f"{source!r} parses its own text ({output.parsers[0]}); take the parser out, or keep the edge text."
        sent, read = ({_service_of(model) for model in facts.ours} for facts in (output, receiver))
        if len(sent | read) > 1 and not (trusted and sent & read):
            return f"{target!r} runs another model than {source!r}; give both the same service."
        if not trusted and (other := self._stranger_after(target, sent | read)):
            return f"what {source!r} thought may reach {other!r}, which runs another model; name the edge if not."
        judges = not trusted and {(target, source), (target, END)} <= self.edges.keys()
        if judges and (parsers := self._output(target, receiver, self._ends(target)).parsers):
            return (
                f"{target!r} parses what it says ({parsers[0]}) and may end the graph, whose answer may be what "
                f"{source!r} says then; name the edge if not."
            )
        if not all(ends):
            return f"{source!r} is a subgraph whose last node cannot be told; switch the edges inside of it instead."
        return None

    def _by_itself(self, name: str) -> str | None:
        """Why nothing is to be switched at a node that hands over references without that."""
        facts = self.calls(name)
        if facts.models or not facts.agents:
            return None
        alone = isinstance(unswitched(self.builder.nodes[name].runnable), LatentAgentNode)
        what = "is a LatentAgentNode, which hands" if alone else "runs LatentAgentNodes, which hand"
        return f"{name!r} {what} over references in the state by {'itself' if alone else 'themselves'}."

    def calls(self, name: str) -> Calls:
        """What can be seen of the calls of a node."""
        if name not in self._calls:
            self._calls[name] = Calls.of(unswitched(self.builder.nodes[name].runnable))
        return self._calls[name]

    def _stranger_after(self, name: str, services: set[Hashable]) -> str | None:
        """A node further down that runs a model which cannot read the markers of these services."""
        for at in self._onward(name):
            if self.calls(at).foreign or not services >= set(map(_service_of, self.calls(at).ours)):
                return at
        return None

    def _silent_after(self, edge: Edge) -> str | None:
        """A node further down that calls no model that can be seen."""
        for at in self._onward(edge[1]):
            if not (at == edge[0] or self.calls(at).agents or self.calls(at).models):
                return at
        return None

    def _onward(self, name: str) -> Iterator[str]:
        """A node and all those that may run after it, the nearest first."""
        queue = [name]
        for at in queue:
            yield at
            queue += [target for _, target in self.leaving(at) if target not in (*queue, END)]

    def _ends(self, name: str) -> list[dict[tuple[str, ...], Any]]:
        """The `_outputs` of each subgraph that a node calls, if something in it calls a model."""
        return [_outputs(subgraph) for subgraph in _direct(self.builder.nodes[name].runnable)]

    def _output(self, name: str, facts: Calls, ends: Sequence[Mapping[tuple[str, ...], Any]]) -> Calls:
        """What can be seen of the calls that give a node its output: its own, and in subgraphs those of last nodes."""
        if not ends or not all(ends):
            return facts
        looked = [Calls.of(unswitched(self.builder.nodes[name].runnable), into_subgraphs=False)]
        looked += [Calls.of(last, into_subgraphs=False) for outputs in ends for last in outputs.values()]
        models = [model for each in looked for model in each.models]
        parsers = [parser for each in looked for parser in each.parsers]
        return Calls(models, any(each.tools for each in looked), parsers, [], [], [])

    def with_edges(self, switched: dict[Edge, int]) -> StateGraph:
        """A copy of the builder in which these edges are latent and all others are not."""
        new = copy.copy(self.builder)
        vars(new).update({name: copy.copy(value) for name, value in vars(new).items()})
        new.branches = type(new.branches)(dict, {k: dict(v) for k, v in new.branches.items()})
        new.compiled = False
        inside = [GraphEdges(each.builder) for each in self._subgraphs() if isinstance(each, CompiledStateGraph)]
        latent = {edge for graph in inside for edge in graph.switched} | switched.keys()
        known = frozenset(latent | {edge for graph in (self, *inside) for edge in graph._latent_by_themselves()})
        there = frozenset(edge for graph in (self, *inside) for edge in graph.edges)
        for name, spec in self.builder.nodes.items():
            if name == DEFAULT_ERROR_HANDLER:  # made by `compile`, and made anew by the next one
                del new.nodes[name]
                continue
            if spec.error_handler_node == DEFAULT_ERROR_HANDLER:
                spec = dataclasses.replace(spec, error_handler_node=None)
            runnable, cache = unswitched(spec.runnable), _uncached(spec.cache_policy)
            edges = {edge: switched[edge] for edge in self.leaving(name) if edge in switched}
            if edges and len(edges) == len(self.leaving(name)):
                paths = {path for outputs in self._ends(name) for path in outputs}
                paths |= {(task,) for task in Calls.of(runnable, into_subgraphs=False).tasks}
                seen = frozenset(node for subgraph in _direct(runnable) for node in subgraph.nodes)
                runnable = _Switched(name, runnable, edges, frozenset({(), *paths}), seen, known, there)
                cache = _cached(cache or self.builder._node_defaults.cache_policy, edges, runnable.inner)
            new.nodes[name] = dataclasses.replace(spec, runnable=runnable, cache_policy=cache)
        setattr(new, SWITCHED, switched)
        return new

    def _latent_by_themselves(self) -> Iterator[Edge]:
        """Edges of nodes that hand over references without being switched, by node and by agent."""
        for source, target in self.edges:
            agents = [] if source == START else self._agents(source)
            for name in (source, *agents) if agents else ():
                yield name, target

    def _agents(self, name: str) -> list[str]:
        """The agents that a node runs by itself, and not in a subgraph."""
        looked = Calls.of(unswitched(self.builder.nodes[name].runnable), into_subgraphs=False)
        return [str(agent.name) for agent in looked.agents]

    def _subgraphs(self) -> Iterator[Pregel]:
        """All that can be seen, those inside of others included."""
        for name in self.builder.nodes:
            yield from self.calls(name).subgraphs


class _Switched(RunnableCallable):
    """A node whose model calls think, as long as the configuration leaves all its edges latent.

    A `RunnableCallable` over closures, because that is where LangGraph looks for subgraphs.
    """

    def __init__(
        self,
        name: str,
        inner: Runnable,
        edges: dict[Edge, int],
        outputs: frozenset[tuple[str, ...]],
        inside: frozenset[str],
        known: frozenset[Edge],
        there: frozenset[Edge],
    ) -> None:
        def thinker(config: RunnableConfig) -> Thinker | None:
            outermost = len(node_path(config)) == 1  # a subgraph may be handed edges of the graphs around it
            if "text" in edge_modes(config, edges, known if outermost else None, there).values():
                return None
            arrows = ", ".join("->".join(edge) for edge in edges)
            steps = max(edges.values())
            return Thinker(name, steps, arrows, outputs, namespace(config), inside)

        def call(input: Any, config: RunnableConfig) -> Any:
            token = THINKER.set(thinker(config))
            try:
                return inner.invoke(input, config)
            finally:
                THINKER.reset(token)

        async def acall(input: Any, config: RunnableConfig) -> Any:
            token = THINKER.set(thinker(config))
            try:
                return await inner.ainvoke(input, config)
            finally:
                THINKER.reset(token)

        # LangGraph knows by this what it can only run in a thread, and refuses a `timeout` for it.
        awaited = getattr(inner, "afunc", None)
        if isinstance(awaited, partial) and awaited.func is run_in_executor:
            awaited = partial(run_in_executor, None, call)  # type: ignore[call-arg]
        else:
            awaited = acall
        super().__init__(call, awaited, name=inner.get_name(), trace=False, recurse=False)
        self.inner = inner


def _named(edges: Iterable[Edge], graph: GraphEdges) -> list[Edge]:
    if isinstance(edges, str):
        raise InvalidEdge(f"edges must be pairs of node names, or '*', not {edges!r}.")
    named = []
    for edge in edges:
        if not (isinstance(edge, (tuple, list)) and len(edge) == 2):
            raise InvalidEdge(f"An edge is a pair of node names, not {edge!r}.")
        source, target = edge
        for name in edge:
            if name not in graph.builder.nodes and name not in (START, END):
                known = ", ".join(graph.builder.nodes)
                raise InvalidEdge(f"The edge {source!r} -> {target!r}: there is no node {name!r} (there are: {known}).")
        if (source, target) not in graph.edges:
            there = ", ".join(repr(t) for s, t in graph.leaving(source)) or (
                "nowhere (a node that returns Command says where: -> Command[Literal['name']], or "
                "add_node(..., destinations=('name',)))"
            )
            raise InvalidEdge(f"There is no edge {source!r} -> {target!r}; the edges of {source!r} go to: {there}.")
        named.append((source, target))
    return named


def unswitched(runnable: Any) -> Any:
    """What a node was before its edges were switched."""
    return runnable.inner if isinstance(runnable, _Switched) else runnable


def _cached(policy: CachePolicy | None, edges: Mapping[Edge, int], inner: Runnable) -> CachePolicy | None:
    """The policy of a node that thinks: what the same node returned as text, or after other steps, is not for it.

    Nor is what a node of its name returned in another graph: LangGraph tells these apart by their function, which here
    is the same for all.
    """
    if policy is None:
        return None
    function = getattr(inner, "func", None) or getattr(inner, "afunc", None) or type(inner)
    label = f"{max(edges.values())} {told_by(function)}"
    return dataclasses.replace(policy, key_func=_CacheKey(policy.key_func, label))


def _uncached(policy: CachePolicy | None) -> CachePolicy | None:
    """The policy that the user gave."""
    if policy is not None and isinstance(policy.key_func, _CacheKey):
        return dataclasses.replace(policy, key_func=policy.key_func.inner)
    return policy


class _CacheKey(NamedTuple):
    """A key function whose keys are those of another one, labelled."""

    inner: Callable[..., str | bytes]
    label: str

    def __call__(self, *args: Any, **kwargs: Any) -> bytes:
        key = self.inner(*args, **kwargs)
        return f"latent {self.label} ".encode() + (key.encode() if isinstance(key, str) else key)


def _service_of(model: ChatLatentMAS) -> Hashable:
    if model.service is not None:
        return model.service.identity
    return SharedSettings().key(model.model, model.device, model.dtype)


def _outputs(subgraph: Pregel, around: tuple[Pregel, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The nodes in a compiled graph after which it ends, whatever happens.

    Args:
        subgraph: The graph.
        around: Those it lies in.

    Returns:
        Their runnables by path, those of last nodes in its own subgraphs included; empty if that cannot be told.
    """
    if not isinstance(subgraph, CompiledStateGraph) or any(subgraph is other for other in around):
        return {}
    graph = GraphEdges(subgraph.builder)
    silent = {name for name in graph.builder.nodes if not graph.leaving(name)}  # they end without an edge that says so
    ending: set[str] = {name for name in silent if graph.calls(name).models}
    after = [END, *silent - ending]  # nothing here calls a model
    for end in after:
        for source in {source for source, target in graph.edges if target == end} - {START, *after}:
            (ending.add if graph.calls(source).models else after.append)(source)
    if any(graph.calls(name).agents for name in after if name != END):
        return {}  # what leaves it is not what a model that can be switched says
    passed = list(ending)
    for source in passed:
        for _, target in graph.leaving(source):
            if target not in after:
                return {}
            passed += [target] if target not in passed else []
    if any(name.endswith((".after_model", ".after_agent")) for name in ending):
        return {}  # middleware that looks at what the agent said
    last: dict[tuple[str, ...], Any] = {}
    for name in ending:
        last[(name,)] = runnable = unswitched(graph.builder.nodes[name].runnable)
        for deeper in _direct(runnable):
            if not (inner := _outputs(deeper, (*around, subgraph))):
                return {}
            last |= {(name, *path): at for path, at in inner.items()}
    return last


def _direct(runnable: Any) -> list[Pregel]:
    """The subgraphs that a node calls by itself, and not those inside of them; only such as call a model somewhere."""
    return [each for each in Calls.of(unswitched(runnable), into_subgraphs=False).subgraphs if Calls.of(each).models]
