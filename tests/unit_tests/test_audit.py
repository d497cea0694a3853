"""The audit's mechanism, on a small random model: what is read under each condition, what is refused, what is kept."""

import asyncio
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.runnables import RunnableLambda
from langgraph.cache.memory import InMemoryCache as NodeCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import CachePolicy, interrupt
from typer.testing import CliRunner

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, LatentState, audit, switch_edges
from langchain_latentmas.auditing import aaudit, journal_head
from langchain_latentmas.cli import app
from langchain_latentmas.commands.audit import _pairs
from langchain_latentmas.errors import (
    EdgeNotCrossed,
    GraderFailed,
    InvalidEdge,
    InvalidRequest,
    NoPartner,
    ServiceUnreachable,
)
from langchain_latentmas.evaluation.conditions import Questions, Scope, _length_classes

from ..conftest import Fresh
from ..graphs import chain

N = 20
NAMES = ["planner", "critic", "judger"]


def team(service: LatentService, names: Sequence[str] = NAMES, **judging: Any) -> StateGraph:
    """Thinkers one after the other; the last agent speaks, and never sees the question."""
    builder = StateGraph(LatentState)
    for name in names[:-1]:
        builder.add_node(name, LatentAgentNode(name, f"You are {name}.", service=service, steps=2))
    last = names[-1]
    builder.add_node(
        last,
        LatentAgentNode(
            last, lambda state: [SystemMessage("Judge.")], service=service, speak=True, max_tokens=4, **judging
        ),
    )
    for one, following in zip([START, *names], [*names, END], strict=True):
        builder.add_edge(one, following)
    return builder


def asked(n: int = N, answer: Any = None) -> list[tuple[Any, Any]]:
    return [({"messages": [HumanMessage(f"Question {i} of {i * 37 % 101}?")]}, answer or i) for i in range(n)]


class Grader:
    """Right is what the graph answers when nobody interferes; notes what it was given, in the order of conditions."""

    def __init__(self, graph: StateGraph, examples: Sequence[tuple[Any, Any]] = ()) -> None:
        compiled = graph.compile()
        self.right = [self.text(compiled.invoke(example)) for example, _ in examples or asked()]
        self.given: list[tuple[int, str]] = []

    def text(self, state: Any) -> str:
        return state["answer"] if "answer" in state else state["messages"][-1].text

    def __call__(self, state: Any, i: int) -> bool:
        self.given.append((i, self.text(state)))
        return self.text(state) == self.right[i]

    def under(self, condition: int, n: int = N) -> list[str]:
        """The answers of one condition, in the order of the questions."""
        return [text for _, text in sorted(self.given[condition * n : (condition + 1) * n])]


def test_each_condition_reads_what_it_says(service32: LatentService) -> None:
    builder = team(service32)
    grader = Grader(builder)
    result = audit(builder, asked(), grader)
    assert {name: round(o.accuracy) for name, o in result.edges[0].outcomes.items()}["intact"] == 100
    intact, swapped, zeroed, random, cut, text = map(grader.under, range(6))
    assert intact == grader.right
    assert len(set(intact)) > N / 2
    # The judger's prompt is the same for all, so another's memory gives another's answer, and each is given once.
    assert sorted(swapped) == sorted(intact)
    assert all(a != b for a, b in zip(swapped, intact, strict=True) if intact.count(a) == 1)
    alone = team(service32, reads=[]).compile().invoke(asked()[0][0])["messages"][-1].text
    assert set(cut) == {alone}
    assert random != zeroed
    assert result.edges[0].has_content
    spoken = builder.compile().invoke(asked()[3][0], {"configurable": {"edges": "text"}})["messages"][-1].text
    assert text[3] == spoken
    costs = {name: (o.output_tokens, o.latent_steps) for name, o in result.edges[0].outcomes.items()}
    assert costs["intact"] == (4, 4)
    assert costs["text"][1] == 0
    assert costs["text"][0] > 4


def test_an_intact_run_under_the_audit_is_what_it_is_without(fresh_service: Fresh) -> None:
    plain, audited = fresh_service(), fresh_service()
    expected = [team(plain).compile().invoke(example)["latents"] for example, _ in asked()]
    states: dict[int, Any] = {}
    audit(team(audited), asked(), lambda state, i: states.setdefault(i, state) is state, conditions=["intact"])
    for i, refs in enumerate(expected):
        ours = states[i]["latents"]
        assert [{**ref, "mac": ""} for ref in ours] == [{**ref, "mac": ""} for ref in refs]


def test_a_switched_graph_is_audited_through_its_markers(service32: LatentService) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=4)
    builder = switch_edges(chain(llm), [("planner", "critic"), ("critic", "judger")], steps=2)
    examples = [({"question": f"{i * 37 % 101}+{i}?"}, i) for i in range(N)]
    grader = Grader(builder, examples)
    result = audit(builder.compile(), examples, grader, edges="each", conditions=["cut", "text"])
    assert [edge.edge for edge in result.edges] == ["all edges", "planner->critic", "critic->judger"]
    for edge in result.edges:
        assert edge.outcomes["intact"].accuracy == 100
        assert edge.outcomes["cut"].accuracy < 50
        assert not edge.outcomes["text"].errors
        assert edge.crossed == N
        assert edge.notes == ()
    steps = [edge.outcomes["text"].latent_steps for edge in result.edges]
    assert steps == [0, 2, 2]  # one thinker is left where a single edge is text


@pytest.mark.parametrize("condition", ["swapped", "zeroed", "random", "cut"])
def test_nothing_of_an_altered_memory_comes_round_another_way(
    service32: LatentService, condition: str, tmp_path: Path
) -> None:
    """The state still holds the sender's own reference, and later readers must not take it for one nobody read."""
    builder = team(service32, ["planner", "critic", "refiner", "judger"])
    journal = tmp_path / "answers.jsonl"
    edges = [("planner", "critic"), ("critic", "refiner")]
    audit(builder, asked(), Grader(builder), edges=edges, conditions=[condition], journal=journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    chain_of_edges = [["planner", "critic"], ["critic", "refiner"], ["refiner", "judger"]]
    assert {line["condition"] for line in lines} == {"intact", "swapped", condition}
    for line in lines:
        assert [crossed[:2] for crossed in line["crossed"]] == chain_of_edges
        assert line["missing"] == 0


def test_only_the_named_edge_is_altered(service32: LatentService) -> None:
    """Two parallel experts: with one edge cut the judger reads the other expert, as if it were asked to."""

    def experts(reads: list[str] | None = None) -> StateGraph:
        builder = StateGraph(LatentState)
        for name in ("left", "right"):
            builder.add_node(name, LatentAgentNode(name, f"You are {name}.", service=service32, steps=2))
            builder.add_edge(START, name)
        judge = LatentAgentNode(
            "judger", lambda state: [SystemMessage("Judge.")], service=service32, speak=True, max_tokens=4, reads=reads
        )
        builder.add_node("judger", judge)
        builder.add_edge(["left", "right"], "judger")
        builder.add_edge("judger", END)
        return builder

    grader = Grader(experts(["right"]))
    result = audit(experts(), asked(), grader, edges=[("left", "judger")], conditions=["cut"])
    assert result.edges[0].edge == "left->judger"
    assert result.edges[0].outcomes["cut"].accuracy == 100


def test_a_loop_swaps_each_crossing_with_the_same_crossing(service32: LatentService, tmp_path: Path) -> None:
    builder = StateGraph(LatentState)
    builder.add_node("draft", LatentAgentNode("draft", "Draft.", service=service32, steps=1, reads=None))
    builder.add_node("critic", LatentAgentNode("critic", "Criticise.", service=service32, steps=1))
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=3))
    builder.add_edge(START, "draft")
    builder.add_edge("draft", "critic")

    def again(state: LatentState) -> str:
        return "draft" if sum(ref["agent"] == "critic" for ref in state["latents"]) < 2 else "judger"

    builder.add_conditional_edges("critic", again, ["draft", "judger"])
    builder.add_edge("judger", END)
    journal = tmp_path / "answers.jsonl"
    result = audit(
        builder, asked(), Grader(builder), edges=[("draft", "critic")], conditions=["zeroed"], journal=journal
    )
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    arrows = [["draft", "critic"], ["draft", "critic"], ["critic", "draft"], ["critic", "judger"]]
    for line in lines:
        assert sorted(crossed[:2] for crossed in line["crossed"]) == sorted(arrows)
        if line["condition"] != "intact":
            lengths = [crossed[2] for crossed in line["crossed"] if crossed[:2] == ["draft", "critic"]]
            assert lengths[0] < lengths[1]
    assert result.edges[0].notes == ()


def test_runs_beside_an_audit_are_left_alone(fresh_service: Fresh) -> None:
    service = fresh_service(kv_budget=200_000)  # so that memories are evicted and rebuilt on the way
    builder = team(service)
    graph = builder.compile()
    plain = Grader(team(fresh_service())).right

    async def both() -> tuple[Any, list[str]]:
        async def beside(i: int) -> str:
            await asyncio.sleep(0.02 * i)
            return (await graph.ainvoke(asked()[i][0]))["messages"][-1].text

        audited = asyncio.create_task(aaudit(builder, asked(), grader, conditions=["zeroed", "cut"]))
        texts = await asyncio.gather(*map(beside, range(N)))
        return await audited, texts

    grader = Grader(builder)
    result, texts = asyncio.run(both())
    assert texts == plain == grader.right
    assert result.edges[0].outcomes["intact"].accuracy == 100
    assert result.edges[0].outcomes["cut"].accuracy < 50
    assert service.info()["rebuilds"] > 0


@pytest.fixture
def llm_cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("llm_cache")
def test_no_cache_carries_an_answer_from_one_condition_to_another(service32: LatentService) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=4)
    builder = switch_edges(chain(llm, cache_policy=CachePolicy()), "*", steps=2)
    graph = builder.compile(cache=NodeCache(), checkpointer=InMemorySaver())
    examples = [({"question": f"{i * 37 % 101}+{i}?"}, i) for i in range(N)]
    result = audit(graph, examples, Grader(builder, examples), conditions=["cut"])
    assert result.edges[0].outcomes["intact"].accuracy == 100
    assert result.edges[0].outcomes["cut"].accuracy < 50


async def test_it_can_be_called_inside_of_an_event_loop(service32: LatentService) -> None:
    builder = team(service32)
    assert audit(builder, asked(), Grader(builder), conditions=["cut"]).n == N


@pytest.mark.parametrize("concurrency", [1, N - 1])
def test_an_entrypoint_that_waits_for_its_tasks_does_not_wait_for_ever(
    service32: LatentService, concurrency: int
) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=2)

    @task
    def plan(question: str) -> str:
        return llm.invoke(question, steps=2, agent="planner").text

    @entrypoint()
    def answer(question: str) -> str:
        planned = plan(question).result(timeout=20)  # type: ignore[call-arg]
        return llm.invoke(planned, agent="judger").text

    examples = [(f"Question {i}?", "") for i in range(N)]
    result = audit(answer, examples, lambda said, _: True, conditions=["cut"], concurrency=concurrency)
    assert not result.edges[0].outcomes["intact"].errors


def test_an_audit_in_a_notebook_can_be_interrupted(service32: LatentService) -> None:
    """There it runs in a thread of its own, beside the loop that called it."""
    calls = []

    def grade(state: Any, i: int) -> bool:
        calls.append(i)
        if len(calls) == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        return True

    async def cell() -> None:
        audit(team(service32), asked(), grade, conditions=["intact"], concurrency=1)

    loop = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
    assert len(calls) < N


def test_seeded_runs_repeat_themselves(service32: LatentService) -> None:
    builder = team(service32)
    one, two, other = (Grader(builder) for _ in range(3))
    first = audit(builder, asked(), one, seed=1, conditions=["random"]).to_json()
    again = audit(builder, asked(), two, seed=1, conditions=["random"]).to_json()
    audit(builder, asked(), other, seed=2, conditions=["random"])
    assert [one.under(k) for k in range(3)] == [two.under(k) for k in range(3)]
    assert first["content"] == again["content"]
    assert one.under(1) != other.under(1)
    assert one.under(2) != other.under(2)


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(fresh_service: Fresh, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    options: dict[str, Any] = {"journal": journal, "conditions": ["cut"], "about": {"model": "m"}}
    whole = audit(team(fresh_service()), asked(), Grader(team(fresh_service())), **options).to_json()
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * N
    journal.write_text("".join(lines[: 1 + N + 7]) + lines[1 + N + 7][:20])  # in the middle of "swapped"
    # Another process: the memories of the intact run are gone, and are made again for the swaps that are left.
    service = fresh_service()
    grader = Grader(team(service))
    told: list[tuple[str, int, int]] = []
    resumed = audit(team(service), asked(), grader, on_answer=lambda *at: told.append(at), **options).to_json()
    for key in ("conditions", "content", "presence", "verdict"):
        assert resumed[key] == whole[key]
    assert told[0] == ("intact", N, N)
    assert told[1] == ("swapped, all edges", 7, N)
    assert len(journal.read_text().splitlines()) == 1 + 3 * N + 1  # and the line that was cut off
    asked_again = len(grader.given)
    assert 2 * N - 7 <= asked_again < 3 * N
    # Nothing is left to do.
    done = audit(team(service), asked(), grader, **options).to_json()
    assert done["content"] == whole["content"]
    assert len(grader.given) == asked_again
    with pytest.raises(InvalidRequest, match="another run"):
        audit(team(service), asked(), grader, **{**options, "about": {"model": "other"}})
    with pytest.raises(InvalidRequest, match="another run"):
        audit(team(service), asked(N + 1), grader, **options)


def test_another_graph_does_not_go_on_from_the_answers(service32: LatentService, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    builder = team(service32)
    options: dict[str, Any] = {"journal": journal, "conditions": ["intact"]}
    audit(builder, asked(), lambda state, i: True, **options)
    audit(builder, asked(), lambda state, i: True, **options)  # the same one, though its agents have run
    with pytest.raises(InvalidRequest, match=r"another run \(graph was"):
        audit(team(service32, temperature=0.5), asked(), lambda state, i: True, **options)
    llm = ChatLatentMAS(service=service32, max_tokens=2)
    heads = [
        journal_head(switch_edges(chain(model), "*", steps=steps), [], 0)["graph"]
        for model in (llm, llm.model_copy(update={"max_tokens": 3}))
        for steps in (1, 2)
    ]
    assert len(set(heads)) == 4


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda node: node.with_config(tags=["judge"]),
        lambda node: node.with_retry(),
        lambda node: RunnableLambda(lambda state: state) | node,
        lambda node: lambda state: node.invoke(state),
    ],
    ids=["with tags", "with retries", "in a chain", "called by a function"],
)
def test_an_agent_that_a_node_wraps_is_audited_as_one_that_is_the_node(service32: LatentService, wrapped: Any) -> None:
    def built(**judging: Any) -> StateGraph:
        builder = team(service32, ["planner"])
        builder.add_node("critic", LatentAgentNode("critic", "Check.", service=service32, steps=1))
        judger = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=2, **judging)
        builder.add_node("judge", wrapped(judger))
        return builder.add_edge("planner", "critic").add_edge("critic", "judge")

    heads = [journal_head(built(temperature=temperature), [], 0) for temperature in (0.0, 0.5, 0.5)]
    assert heads[0]["graph"] != heads[1]["graph"] == heads[2]["graph"]
    with pytest.raises(InvalidEdge, match="'judger' reads planner only"):
        audit(built(reads=["planner"]), asked(), lambda state, i: True, edges=[("critic", "judger")])


def test_examples_stay_the_same_when_a_graph_has_given_their_messages_ids(service32: LatentService) -> None:
    builder = team(service32)
    examples: list[Any] = [({"messages": [HumanMessage("What is 12 plus 30?")]}, i) for i in range(2)]
    before = journal_head(builder, examples, 0)
    builder.compile().invoke(examples[0][0])
    assert examples[0][0]["messages"][0].id
    assert journal_head(builder, examples, 0) == before
    examples[0][0]["messages"][0].content = "What is 12 plus 31?"
    assert journal_head(builder, examples, 0) != before


def test_what_fails_is_counted_and_named(service32: LatentService) -> None:
    builder = team(service32)
    right = Grader(builder)

    def grade(state: Any, i: int) -> bool:
        if i == 3:
            raise ZeroDivisionError("no such thing")
        return right(state, i)

    def fail(state: LatentState) -> dict[str, Any]:
        if "Question 5 " in state["messages"][0].text:
            raise KeyError("five")
        return {}

    builder.add_node("gate", fail)
    builder.add_edge("gate", END)
    builder.edges.discard(("judger", END))
    builder.add_edge("judger", "gate")
    outcomes = audit(builder, asked(), grade, conditions=["cut"]).edges[0].outcomes
    errors = {"the grader raised ZeroDivisionError: no such thing": 1, "KeyError: 'five'": 1}
    assert outcomes["intact"].errors == outcomes["cut"].errors == errors
    assert outcomes["intact"].right == N - 2


def test_what_failed_for_want_of_a_grader_or_a_device_is_asked_again(service32: LatentService, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    options: dict[str, Any] = {"journal": journal, "conditions": ["cut"]}
    builder = team(service32)
    right = Grader(builder)
    fails = {"intact": {3}, "swapped": {5}, "cut": {7}}  # by condition, what the grader cannot take
    calls: list[int] = []

    def grade(state: Any, i: int) -> bool:
        calls.append(i)
        if i in [*fails.values()][(len(calls) - 1) // N]:
            raise ZeroDivisionError
        return right(state, i)

    assert audit(builder, asked(), grade, **options).edges[0].outcomes["intact"].right == N - 1
    lines = journal.read_text().splitlines()
    failed = json.loads(lines[-1]) | {"answer": {"right": False, "error": "EngineFailed: out of memory"}}
    journal.write_text("\n".join([*lines[:-1], json.dumps(failed)]) + "\n")
    mended = audit(builder, asked(), right, **options).edges[0]
    again = [json.loads(line) for line in journal.read_text().splitlines()[1 + 3 * N :]]
    third = {("intact", 3), ("swapped", 3), ("cut", 3)}  # nothing of it could be trusted
    assert {(line["condition"], line["example"]) for line in again} == {
        *third,
        ("swapped", 5),
        ("cut", 7),
        ("cut", failed["example"]),
    }
    assert mended.outcomes["intact"].accuracy == 100
    assert not any(outcome.errors for outcome in mended.outcomes.values())
    right.given.clear()
    assert audit(builder, asked(), right, **options).edges[0] == mended
    assert right.given == []


def test_a_server_that_is_gone_ends_it(service32: LatentService) -> None:
    builder = team(service32)

    def gone(state: LatentState) -> dict[str, Any]:
        raise ServiceUnreachable("nobody there")

    builder.add_node("gate", gone)
    builder.edges.discard(("judger", END))
    builder.add_edge("judger", "gate")
    with pytest.raises(ServiceUnreachable):
        audit(builder, asked(), Grader(team(service32)))


def test_a_grader_that_always_raises_ends_it(service32: LatentService) -> None:
    def grade(state: Any, i: int) -> bool:
        raise ValueError("bad grader")

    calls: list[int] = []
    with pytest.raises(GraderFailed, match="ValueError: bad grader"):
        audit(team(service32), asked(40), grade, on_answer=lambda _, done, __: calls.append(done), concurrency=1)
    assert max(calls) == N  # the others are not waited for


def test_a_graph_that_always_fails_ends_it(service32: LatentService) -> None:
    with pytest.raises(InvalidRequest, match="every example: InvalidRequest"):
        audit(team(service32), asked(), Grader(team(service32)), config={"configurable": {"edges": "perhaps"}})


def test_breakpoints_are_left_out_and_a_graph_that_waits_for_a_human_fails(service32: LatentService) -> None:
    builder = team(service32)
    grader = Grader(builder)
    stops = builder.compile(InMemorySaver(), interrupt_before=["judger"], interrupt_after=["planner"])
    assert audit(stops, asked(), grader, conditions=[]).to_json()["conditions"]["intact"] == 100
    asks = StateGraph(LatentState)
    asks.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32, steps=2))
    asks.add_node("judger", lambda state: {"messages": [HumanMessage(interrupt("How?"))]})
    asks.add_edge(START, "planner").add_edge("planner", "judger")
    with pytest.raises(InvalidRequest, match="waits for a human"):
        audit(asks, asked(), grader)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n": 19}, InvalidRequest, "at least 20 examples"),
        ({"conditions": ["intact", "swaped"]}, InvalidRequest, "'swaped'"),
        ({"level": 95}, InvalidRequest, "level"),
        ({"seed": -1}, InvalidRequest, "seed"),
        ({"seed": 0.5}, InvalidRequest, "seed"),
        ({"concurrency": 0}, InvalidRequest, "concurrency"),
        ({"edges": []}, InvalidEdge, "no edge"),
        ({"edges": "planner->critic"}, InvalidEdge, "pairs"),
        ({"edges": ("planner", "critic")}, InvalidEdge, "a pair of names"),
        ({"edges": ["ab"]}, InvalidEdge, "a pair of names"),
        ({"edges": [("planner", "critic", "judger")]}, InvalidEdge, "a pair of names"),
        ({"edges": [("planner", "nobody")]}, InvalidEdge, "there are: planner, critic, judger"),
        ({"edges": [(START, "planner")]}, InvalidEdge, "not latent"),
        ({"edges": [("judger", END)]}, InvalidEdge, "not latent"),
        ({"examples": [1] * N}, InvalidRequest, "pair"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    service32: LatentService, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    before = service32.info()["ticks"]
    examples = change.pop("examples", None) or asked(change.pop("n", N))
    with pytest.raises(error, match=words):
        audit(team(service32), examples, lambda state, i: True, **change)
    assert service32.info()["ticks"] == before


def test_edges_that_carry_text_are_refused(service32: LatentService) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=4)
    examples = [({"question": f"{i}?"}, i) for i in range(N)]
    with pytest.raises(InvalidEdge, match="No edge of this graph is latent"):
        audit(chain(llm), examples, lambda state, i: True)
    builder = switch_edges(chain(llm), [("planner", "critic")], steps=1)
    with pytest.raises(InvalidEdge, match=r"critic->judger is not latent \(latent are: planner->critic\)"):
        audit(builder, examples, lambda state, i: True, edges=[("critic", "judger")])
    with pytest.raises(InvalidEdge, match="reads nobody only"):
        audit(team(service32, reads=[]), asked(), lambda state, i: True, edges=[("critic", "judger")])


def test_an_edge_that_nothing_crosses_is_an_error(service32: LatentService) -> None:
    with pytest.raises(EdgeNotCrossed, match="crossed were: planner->critic, critic->judger"):
        audit(team(service32), asked(), lambda state, i: True, edges=[("planner", "judger")])
    with pytest.raises(EdgeNotCrossed, match="any edge"):
        audit(team(service32, ["planner", "judger"], reads=[]), asked(), lambda state, i: True)


def test_a_memory_without_its_like_is_left_out_of_swapped(service32: LatentService, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    examples = [*asked(), ({"messages": [HumanMessage("Long? " * 60)]}, N)]
    builder = team(service32)
    edge = audit(builder, examples, Grader(builder, examples), conditions=["cut"], journal=journal).edges[0]
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert Counter(line["condition"] for line in lines) == {"intact": N + 1, "swapped": N, "cut": N + 1}
    assert N not in [line["example"] for line in lines if line["condition"] == "swapped"]
    assert (edge.n, edge.crossed, edge.alone) == (N + 1, N + 1, 1)
    assert edge.effects["content"].points == 100 - edge.outcomes["swapped"].accuracy
    assert edge.outcomes["swapped"].accuracy == 100 * edge.outcomes["swapped"].right / N
    assert edge.notes[0].startswith("swapped: 1 left out, for want of another question")


def test_where_nobody_can_be_swapped_there_is_nothing_to_audit(service32: LatentService) -> None:
    builder = team(service32, ["planner", "judger"])
    builder.edges.discard((START, "planner"))
    first = lambda state: "planner" if "Question 0 " in state["messages"][0].text else "judger"  # noqa: E731
    builder.add_conditional_edges(START, first, ["planner", "judger"])
    with pytest.raises(NoPartner, match="no two questions"):
        audit(builder, asked(), lambda state, i: True)


def test_the_same_questions_again_are_no_more_questions(service32: LatentService) -> None:
    few = [(asked()[i % (N - 1)][0], i) for i in range(2 * N)]
    with pytest.raises(InvalidRequest, match="at least 20 examples of different questions to tell anything, not 19"):
        audit(team(service32), few, lambda state, i: True)


def test_a_question_is_never_swapped_with_itself(service32: LatentService) -> None:
    builder = team(service32)
    examples = [(asked()[i % N][0], i) for i in range(3 * N)]
    grader = Grader(builder, examples)
    edge = audit(builder, examples, grader, conditions=["swapped"]).edges[0]
    intact, swapped = grader.under(0, 3 * N), grader.under(1, 3 * N)
    assert all(a != b for a, b in zip(swapped, intact, strict=True) if intact.count(a) == 3)
    assert sorted(swapped) == sorted(intact)  # each memory is given once
    assert (edge.n, edge.crossed, edge.alone) == (N, N, 0)
    once = audit(builder, examples[:N], Grader(builder), conditions=["swapped"]).edges[0]
    assert (edge.verdict, edge.effects) == (once.verdict, once.effects)


def test_partners_are_other_questions_of_about_the_length_over_the_same_edges() -> None:
    edge, other = ("a", "b"), ("b", "c")
    for seed in range(50):
        rng = random.Random(seed)
        examples = [(rng.choice("abcdefgh"), None) for _ in range(40)]
        asked = Questions(None, [], examples, None, seed, 1, {}, None, None)  # type: ignore[arg-type]
        lengths = [rng.randint(50, 150) * rng.choice([1, 1, 4]) for _ in examples]
        over = [frozenset(rng.choice([[edge], [edge], [edge, other], [other]])) for _ in examples]
        asked.crossed = {i: [(each, lengths[i]) for each in sorted(over[i])] for i in range(40)}
        scope = Scope("a->b", frozenset([edge]))
        partners = asked.partners(scope)
        for i, j in partners.items():
            assert examples[i] != examples[j]
            assert lengths[i] <= 2 * lengths[j] <= 4 * lengths[i]
            assert edge in over[i] & over[j]
        assert asked.alone(scope) == {i for i in range(40) if edge in over[i]} - partners.keys()
        assert len(asked.alone(scope)) < 20


def test_an_agent_whose_reader_is_not_the_next_node_speaks_as_text(service32: LatentService) -> None:
    """The critic never reads the plan and the judger does: what crosses there is no edge of the graph."""
    llm = ChatLatentMAS(service=service32, max_tokens=4)
    critic = lambda state: {"critique": llm.invoke(f"Check {state['question']} please").content}  # noqa: E731
    builder = switch_edges(chain(llm, critic=critic), [("planner", "critic"), ("critic", "judger")], steps=2)
    examples = [({"question": f"{i * 37 % 101}+{i}?"}, i) for i in range(N)]
    edges = audit(builder, examples, Grader(builder, examples), edges="each", conditions=["text"]).edges
    assert [edge.edge for edge in edges] == ["all edges", "planner->judger", "critic->judger"]
    for edge in edges[1:]:
        assert not edge.outcomes["text"].errors
        assert edge.outcomes["text"].latent_steps == 2


def test_a_condition_under_which_all_fail_is_left_out(service32: LatentService) -> None:
    builder = team(service32)
    grader = Grader(builder)

    def spoke(state: LatentState) -> dict[str, Any]:
        if not any(ref["steps"] for ref in state["latents"]):
            raise KeyError("no thoughts")
        return {}

    builder.add_node("gate", spoke)
    builder.edges.discard(("judger", END))
    builder.add_edge("judger", "gate")
    builder.add_edge("gate", END)
    edge = audit(builder, asked(), grader, conditions=["cut", "text"]).edges[0]
    assert list(edge.outcomes) == ["intact", "swapped", "cut"]
    assert "against_text" not in edge.effects
    assert edge.notes == ("text: left out, since every question failed there (KeyError: 'no thoughts')",)
    assert "as text" not in edge.verdict


def test_length_classes_hold_all_with_neighbours_of_like_length() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        lengths = [rng.randint(50, 99) * rng.choice([1, 1, 2]) for _ in range(rng.randint(20, 60))]
        classes = _length_classes([(length, i) for i, length in enumerate(lengths)], rng)
        assert sorted(i for group in classes for i in group) == list(range(len(lengths)))
        for group in classes:
            assert 2 <= len(group) <= 8
            assert max(lengths[i] for i in group) <= 2 * min(lengths[i] for i in group)


@pytest.mark.parametrize(
    ("lengths", "classes"),
    [
        ([100, 100, 200, 390], [[0, 1], [2, 3]]),
        ([100, 150, 250, 290, 310], [[0, 1], [2, 3, 4]]),
        ([100, 199, 201, 390, 401, 700], [[0, 1], [2, 3], [4, 5]]),
        ([100, 200, 390], [[0, 1]]),
        ([10, 100, 110], [[1, 2]]),
        ([100, 110, 500, 2000, 2100], [[0, 1], [3, 4]]),
        ([100, 300], []),
        ([], []),
    ],
)
def test_no_two_of_a_length_class_differ_by_more_than_a_factor_of_two(
    lengths: list[int], classes: list[list[int]]
) -> None:
    cut = _length_classes([(length, i) for i, length in enumerate(lengths)], random.Random(0))
    assert [sorted(group) for group in cut] == classes


def test_a_line_of_examples_ends_at_a_newline_only(tmp_path: Path) -> None:
    path, asked = tmp_path / "examples.jsonl", "1\u2028\u2029\x85"
    path.write_text(json.dumps({"input": asked, "answer": "1"}, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert _pairs(path, 1, 0) == [({"messages": [("human", asked)]}, "1")]


def test_the_command_audits_every_edge_by_itself(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_latentmas.commands.audit.load", lambda *_: fresh_service(dtype="float32"))
    asked = ["audit", "--task", "words", "--n", str(N), "--steps", "1", "--max-tokens", "2", "--conditions", "cut"]
    told = CliRunner().invoke(app, [*asked, "--each", "--out", str(tmp_path), "--json"])
    assert told.exit_code == 0, told.output
    names = [edge["edge"] for edge in json.loads(told.stdout)["edges"]]
    assert names == ["all edges", "planner->critic", "critic->refiner", "refiner->judger"]
    shown = CliRunner().invoke(app, [*asked, "--each", "--out", str(tmp_path)])
    lines = [line.strip() for line in shown.stdout.splitlines()]
    assert [line for line in lines if line in names] == names
    assert "What is said of one edge holds while the others stay as they are." in " ".join(lines)
