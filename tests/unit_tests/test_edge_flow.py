import json
import operator
from collections import Counter
from typing import Annotated, Any, Literal

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import BaseMessage, HumanMessage, message_to_dict
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from langchain_latentmas import ChatLatentMAS, LatentService, switch_edges
from langchain_latentmas.edges import EdgeReport
from langchain_latentmas.errors import EngineFailed, InvalidEdge, InvalidRequest, LatentMASError, UnknownReference

from ..conftest import Fresh
from ..graphs import (
    ASKED,
    CRITIC,
    PLANNER,
    TEXT,
    Chain,
    chain,
    critic_of,
    is_latent,
    judger_of,
    latent,
    modes,
    planner_of,
)

Shape = tuple[dict[str, Any], set[Any], set[Any], dict[str, Any]]


@pytest.fixture
def llm(service32: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=service32, max_tokens=6)


@pytest.fixture
def other(fresh_service: Fresh) -> ChatLatentMAS:
    """On a service of its own."""
    return ChatLatentMAS(service=fresh_service(dtype="float32"), max_tokens=6)


def test_a_chain_on_strings_hands_over_memories(llm: ChatLatentMAS) -> None:
    out = switch_edges(chain(llm), "*", steps=3).compile().invoke(ASKED)
    assert is_latent(out["plan"], "planner")
    assert is_latent(out["critique"], "critic")
    assert "[latent" not in out["answer"]
    assert out["latent_steps"] == 6  # the planner's memory is the critic's ancestor and counts once


def test_a_text_run_of_a_switched_graph_equals_the_graph_as_it_was(llm: ChatLatentMAS) -> None:
    before = chain(llm).compile().invoke(ASKED)
    graph = switch_edges(chain(llm), "*", steps=3).compile()
    switched = graph.invoke(ASKED)
    assert graph.invoke(ASKED, TEXT) == before
    assert graph.invoke(ASKED) == switched
    assert graph.invoke(ASKED, {"configurable": {"edges": "latent"}}) == switched
    assert before["plan"] != switched["plan"]


def test_single_edges_go_back_to_text_for_a_call(llm: ChatLatentMAS) -> None:
    graph = switch_edges(chain(llm), "*", steps=3).compile()
    out = graph.invoke(ASKED, {"configurable": {"edges": {"planner->critic": "text"}}})
    assert out["plan"] == chain(llm).compile().invoke(ASKED)["plan"]
    assert is_latent(out["critique"], "critic")
    out = graph.invoke(ASKED, {"configurable": {"edges": {"critic->judger": "text", "planner->critic": "latent"}}})
    assert is_latent(out["plan"], "planner")
    assert "[latent" not in out["critique"]


@pytest.mark.parametrize("edges", ["Latent", None, 1, True, {"planner->critic": "off"}, {"planner->critic": None}])
def test_an_unknown_mode_is_refused(llm: ChatLatentMAS, edges: Any) -> None:
    graph = switch_edges(chain(llm), "*").compile()
    with pytest.raises(InvalidRequest, match=r"configurable\.edges must be 'latent', 'text', or a mapping"):
        graph.invoke(ASKED, {"configurable": {"edges": edges}})


@pytest.mark.parametrize("key", ["planner", "planner->", "->critic", "planner -> ", PLANNER, 3])
def test_a_mode_for_what_is_no_edge_is_refused(llm: ChatLatentMAS, key: Any) -> None:
    graph = switch_edges(chain(llm), "*").compile()
    with pytest.raises(InvalidRequest, match=r"names edges as 'source->target', and .* is none"):
        graph.invoke(ASKED, {"configurable": {"edges": {key: "text"}}})


def test_an_edge_that_is_text_may_be_called_so_but_not_latent(llm: ChatLatentMAS) -> None:
    graph = switch_edges(chain(llm), "*").compile()
    assert graph.invoke(ASKED, {"configurable": {"edges": {"judger->__end__": "text"}}}) == graph.invoke(ASKED)
    with pytest.raises(InvalidRequest, match="no latent edge of this graph"):
        graph.invoke(ASKED, {"configurable": {"edges": {"judger->__end__": "latent"}}})


@pytest.mark.parametrize("key", ["planner->judge", "critic->planner"])
def test_a_mode_for_an_edge_that_is_not_latent_is_refused(llm: ChatLatentMAS, key: Any) -> None:
    graph = switch_edges(chain(llm), "*").compile()
    with pytest.raises(InvalidRequest, match=r"no latent edge of this graph \(there are: critic->judger, planner->cr"):
        graph.invoke(ASKED, {"configurable": {"edges": {key: "text"}}})


async def test_an_async_run_thinks_and_flips_too(llm: ChatLatentMAS) -> None:
    async def critic(state: Chain) -> Chain:
        return {"critique": (await llm.ainvoke(f"Check {state['plan']} please")).content}

    graph = switch_edges(chain(llm, critic=critic), "*", steps=3).compile()
    sync = switch_edges(chain(llm), "*", steps=3).compile()
    assert await graph.ainvoke(ASKED) == sync.invoke(ASKED)
    assert await graph.ainvoke(ASKED, TEXT) == sync.invoke(ASKED, TEXT)


def test_a_message_wrapped_anew_and_its_list_keep_the_memory(llm: ChatLatentMAS) -> None:
    class State(TypedDict):
        notes: Annotated[list[BaseMessage], operator.add]

    def first(state: State) -> State:
        return {"notes": [HumanMessage(content=llm.invoke("Plan").content, name="first")]}

    def second(state: State) -> State:
        said = llm.invoke([*state["notes"], HumanMessage("Go on")])
        return {"notes": [said]}

    builder = StateGraph(State)
    builder.add_sequence([("first", first), ("second", second)])
    builder.add_edge(START, "first")
    note, said = switch_edges(builder, "*", steps=3).compile().invoke({"notes": []})["notes"]
    assert is_latent(note.content, "first")
    assert said.usage_metadata["output_token_details"]["latent_steps"] == 3


def test_steps_are_per_edge(llm: ChatLatentMAS) -> None:
    builder = switch_edges(switch_edges(chain(llm), [PLANNER], steps=2), [CRITIC], steps=5)
    out = builder.compile().invoke(ASKED)
    assert is_latent(out["plan"], "planner", 2)
    assert is_latent(out["critique"], "critic", 5)
    assert modes(builder, [])[PLANNER] == ("latent", "2 latent steps")
    again = switch_edges(builder, [PLANNER], steps=0).compile().invoke(ASKED)
    assert is_latent(again["plan"], "planner", 0)
    assert is_latent(again["critique"], "critic", 5)


def test_events_are_json_and_stream_in_both_modes(llm: ChatLatentMAS) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, BaseMessage):
            return message_to_dict(value)
        raise TypeError(value)

    graph = switch_edges(chain(llm), "*", steps=3).compile()
    kinds = ["custom", "messages", "updates", "values", "checkpoints", "tasks"]
    said, unmarked = {}, {}
    told = [{"agent": agent, "step": n, "steps": 3} for agent in ("planner", "critic") for n in (1, 2, 3)]
    for mode in ("latent", "text", "latent"):
        events = list(graph.stream({"question": "6*7?"}, {"configurable": {"edges": mode}}, stream_mode=kinds))
        for event in events:
            json.dumps(event, default=plain)
        steps = [event for kind, event in events if kind == "custom"]
        chunks = [event for kind, event in events if kind == "messages"]
        spoken = [(chunk.text, data["langgraph_node"]) for chunk, data in chunks]
        said[mode] = Counter(node for _, node in spoken)
        unmarked[mode] = {node for text, node in spoken if "[latent " not in text}
        assert steps == ([] if mode == "text" else told)  # the second time, of thoughts that are known
    assert said["text"]["planner"] > 1
    assert said["latent"]["planner"] == 1
    assert said["latent"]["judger"] > 1
    assert unmarked == {"latent": {"judger"}, "text": {"planner", "critic", "judger"}}


# Ways through a graph


class Debate(TypedDict, total=False):
    topics: list[str]
    notes: Annotated[list[str], operator.add]
    rounds: int
    answer: str
    latent_steps: int


def noter(llm: ChatLatentMAS, prompt: str) -> Any:
    return lambda state: {"notes": [llm.invoke(prompt + " ".join(state.get("notes", ()))).content]}


def closer(llm: ChatLatentMAS) -> Any:
    def judger(state: Debate) -> Debate:
        said = llm.invoke("Judge " + " ".join(state["notes"]))
        assert said.usage_metadata
        return {"answer": said.content, "latent_steps": said.usage_metadata["output_token_details"]["latent_steps"]}

    return judger


def test_parallel_branches_of_unequal_length_meet_at_a_deferred_node(llm: ChatLatentMAS) -> None:
    builder = StateGraph(Debate)
    for name in ("pro", "con", "rebuttal"):
        builder.add_node(name, noter(llm, f"You are {name}. "))
    builder.add_node("judger", closer(llm), defer=True)
    for edge in [(START, "pro"), (START, "con"), ("con", "rebuttal"), ("pro", "judger"), ("rebuttal", "judger")]:
        builder.add_edge(*edge)
    builder.add_edge("judger", END)
    assert latent(builder) == {("con", "rebuttal"), ("pro", "judger"), ("rebuttal", "judger")}
    graph = switch_edges(builder, "*", steps=3).compile()
    out = graph.invoke({"notes": []})
    assert [note.split()[1] for note in out["notes"]] == ["con", "pro", "rebuttal"]
    assert out["latent_steps"] == 9
    assert graph.invoke({"notes": []}, TEXT) == builder.compile().invoke({"notes": []})


def test_all_sources_of_a_waiting_edge_switch(llm: ChatLatentMAS) -> None:
    builder = StateGraph(Debate)
    builder.add_node("pro", noter(llm, "You are pro. "))
    builder.add_node("con", noter(llm, "You are con. "))
    builder.add_node("judger", closer(llm))
    builder.add_edge(START, "pro").add_edge(START, "con").add_edge(["pro", "con"], "judger")
    out = switch_edges(builder, [("pro", "judger"), ("con", "judger")], steps=3).compile().invoke({"notes": []})
    assert out["latent_steps"] == 6


def test_a_loop_thinks_on_top_of_its_earlier_rounds(llm: ChatLatentMAS) -> None:
    builder = StateGraph(Debate)
    builder.add_node("writer", lambda state: {**noter(llm, "Write. ")(state), "rounds": state.get("rounds", 0) + 1})
    builder.add_node("critic", noter(llm, "Criticise. "))
    builder.add_node("judger", closer(llm))
    builder.add_edge(START, "writer")
    builder.add_conditional_edges("writer", lambda state: "critic" if state["rounds"] < 3 else "judger")
    builder.add_edge("critic", "writer")
    anywhere = modes(builder, router_reads_text=False)["writer", END][1]
    assert "path_map=[...]" in anywhere
    assert latent(builder, router_reads_text=False) == {("critic", "writer")}

    builder = StateGraph(Debate)
    builder.add_node("writer", lambda state: {**noter(llm, "Write. ")(state), "rounds": state.get("rounds", 0) + 1})
    builder.add_node("critic", noter(llm, "Criticise. "))
    builder.add_node("judger", closer(llm))
    builder.add_edge(START, "writer")
    path = ["critic", "judger"]
    builder.add_conditional_edges("writer", lambda state: path[state["rounds"] // 3], path)
    builder.add_edge("critic", "writer")
    assert latent(builder) == {("critic", "writer")}
    out = switch_edges(builder, "*", router_reads_text=False, steps=3).compile().invoke({"notes": []})
    assert [note.split()[1] for note in out["notes"]] == ["writer", "critic", "writer", "critic", "writer"]
    assert out["latent_steps"] == 15


def test_a_router_that_reads_text_keeps_all_edges_of_its_node_text(llm: ChatLatentMAS) -> None:
    builder = chain(llm)
    builder.add_conditional_edges("planner", lambda state: "critic", ["critic"])
    assert latent(builder) == {CRITIC}
    with pytest.raises(InvalidEdge, match="its router reads the text of 'planner'; pass router_reads_text=False"):
        switch_edges(builder, [PLANNER])
    assert "[latent" not in switch_edges(builder, "*", steps=3).compile().invoke(ASKED)["plan"]
    out = switch_edges(builder, "*", router_reads_text=False, steps=3).compile().invoke(ASKED)
    assert is_latent(out["plan"], "planner")


def test_sends_carry_markers_to_workers_and_theirs_to_the_judger(llm: ChatLatentMAS) -> None:
    class Work(TypedDict):
        plan: str

    class State(Debate, total=False):
        plan: str

    builder = StateGraph(State)
    builder.add_node("planner", lambda state: {"plan": llm.invoke("Plan").content})
    builder.add_node("worker", lambda work: {"notes": [llm.invoke(f"Do {work['plan']}").content]}, input_schema=Work)
    builder.add_node("judger", closer(llm))
    builder.add_edge(START, "planner")
    builder.add_conditional_edges(
        "planner", lambda state: [Send("worker", {"plan": f"{n}: {state['plan']}"}) for n in range(3)], ["worker"]
    )
    builder.add_edge("worker", "judger")
    out = switch_edges(builder, "*", router_reads_text=False, steps=3).compile().invoke({"notes": []})
    assert is_latent(out["plan"], "planner")
    assert all(is_latent(note, "worker") for note in out["notes"])
    assert out["latent_steps"] == 12  # the planner's once, and each worker's


def test_a_command_carries_a_marker(llm: ChatLatentMAS) -> None:
    def planner(state: Chain) -> Command[Literal["critic"]]:
        return Command(goto="critic", update=planner_of(llm)(state))

    builder = StateGraph(Chain)
    builder.add_node("planner", planner)
    builder.add_node("critic", critic_of(llm))
    builder.add_node("judger", judger_of(llm))
    builder.add_edge(START, "planner").add_edge("critic", "judger")
    assert latent(builder) == {CRITIC}
    with pytest.raises(InvalidEdge, match="the node that returns Command reads the text of 'planner'"):
        switch_edges(builder, [PLANNER])
    out = switch_edges(builder, "*", router_reads_text=False, steps=3).compile().invoke(ASKED)
    assert is_latent(out["plan"], "planner")
    assert out["latent_steps"] == 6


# Policies


def test_a_retried_node_thinks_again_and_gives_the_same_marker(llm: ChatLatentMAS) -> None:
    tries: list[str] = []

    def critic(state: Chain) -> Chain:
        made = critic_of(llm)(state)
        tries.append(made["critique"])
        if len(tries) == 1:
            raise EngineFailed("once")
        return made

    retry = RetryPolicy(initial_interval=0, jitter=False)
    builder = chain(llm, critic=critic, retry_policy=retry)
    out = switch_edges(builder, "*", steps=3).compile().invoke(ASKED)
    assert tries == [out["critique"]] * 2


def test_an_error_that_a_retry_would_meet_again_is_not_retried(llm: ChatLatentMAS) -> None:
    tries: list[str] = []

    def critic(state: Chain) -> Chain:
        tries.append(state["plan"])
        return {"critique": llm.invoke(state["plan"].replace(" 3 steps", " 4 steps")).content}

    builder = chain(llm, critic=critic, retry_policy=RetryPolicy(initial_interval=0, jitter=False))
    with pytest.raises(LatentMASError, match="'planner' does not match"):
        switch_edges(builder, "*", steps=3).compile().invoke(ASKED)
    assert len(tries) == 1


@pytest.mark.parametrize("default", [False, True])
def test_a_cached_node_is_kept_apart_by_graph_and_steps(llm: ChatLatentMAS, default: bool) -> None:
    runs: list[str] = []

    def critic(state: Chain) -> Chain:
        runs.append("critic")
        return critic_of(llm)(state)

    policy = CachePolicy(key_func=lambda state: state["question"])
    builder = chain(llm, critic=critic, **({} if default else {"cache_policy": policy}))
    if default:
        builder.set_node_defaults(cache_policy=policy)
    cache = InMemoryCache()
    plain = builder.compile(cache=cache).invoke(ASKED)
    short = switch_edges(builder, "*", steps=2).compile(cache=cache)
    long = switch_edges(switch_edges(builder, "*", steps=2), "*", steps=5).compile(cache=cache)
    assert is_latent(short.invoke(ASKED)["critique"], "critic", 2)
    assert is_latent(long.invoke(ASKED)["critique"], "critic", 5)
    assert len(runs) == 3
    assert is_latent(short.invoke(ASKED)["critique"], "critic", 2)
    back = switch_edges(switch_edges(builder, "*"), "*", to="text").compile(cache=cache)
    assert back.invoke(ASKED) == plain
    assert len(runs) == 3


def test_nodes_of_one_name_in_two_graphs_share_no_cache(llm: ChatLatentMAS) -> None:
    def doubter(state: Chain) -> Chain:
        return {"critique": llm.invoke(f"Doubt {state['plan']} please").content}

    policy, cache = CachePolicy(key_func=lambda state: state["question"]), InMemoryCache()
    builders = [chain(llm, critic=critic, cache_policy=policy) for critic in (None, doubter)]
    one, other = (switch_edges(each, "*", steps=3).compile(cache=cache).invoke(ASKED) for each in builders)
    assert one["critique"] != other["critique"]


def test_a_cached_marker_is_still_read_in_a_text_run_until_the_cache_is_cleared(llm: ChatLatentMAS) -> None:
    builder = chain(llm, cache_policy=CachePolicy(key_func=lambda state: state["question"]))
    graph = switch_edges(builder, "*", steps=3).compile(cache=InMemoryCache())
    assert is_latent(graph.invoke(ASKED)["critique"], "critic")
    mixed = graph.invoke(ASKED, TEXT)
    assert is_latent(mixed["critique"], "critic")
    assert mixed["latent_steps"] == 6
    graph.clear_cache()
    assert graph.invoke(ASKED, TEXT) == builder.compile().invoke(ASKED)


@pytest.mark.parametrize("resumed_as", ["latent", "text"])
def test_a_resumed_node_thinks_the_same_or_speaks(llm: ChatLatentMAS, resumed_as: str) -> None:
    thought: list[str] = []

    def critic(state: Chain) -> Chain:
        thought.append(critic_of(llm)(state)["critique"])
        interrupt("Go on?")
        return {"critique": thought[-1]}

    graph = switch_edges(chain(llm, critic=critic), "*", steps=3).compile(checkpointer=InMemorySaver())
    thread: dict[str, Any] = {"thread_id": "1"}
    assert "__interrupt__" in graph.invoke(ASKED, {"configurable": thread})
    out = graph.invoke(Command(resume=True), {"configurable": {**thread, "edges": resumed_as}})
    assert out["plan"].startswith("[latent planner")
    if resumed_as == "latent":
        assert thought == [out["critique"]] * 2
    else:
        assert "[latent" not in out["critique"]
        assert out["latent_steps"] == 3  # the planner's, from before the interrupt


def test_a_thread_goes_on_as_text_after_latent_turns(llm: ChatLatentMAS) -> None:
    class State(TypedDict):
        messages: Annotated[list[BaseMessage], operator.add]

    def agent(state: State) -> State:
        return {"messages": [llm.invoke(state["messages"])]}

    builder = StateGraph(State).add_sequence([("one", agent), ("two", agent)]).add_edge(START, "one")
    graph = switch_edges(builder, "*", steps=3).compile(checkpointer=InMemorySaver())
    thread: dict[str, Any] = {"thread_id": "1"}
    graph.invoke({"messages": [HumanMessage("Hello")]}, {"configurable": thread})
    out = graph.invoke({"messages": [HumanMessage("More")]}, {"configurable": {**thread, "edges": "text"}})
    assert [message.text.startswith("[latent") for message in out["messages"]] == [False, True, *[False] * 4]
    assert out["messages"][-1].usage_metadata["output_token_details"]["latent_steps"] == 3


# The builder


def shape(builder: StateGraph) -> Shape:
    branches = {source: dict(branch) for source, branch in builder.branches.items()}
    return dict(builder.nodes), set(builder.edges), set(builder.waiting_edges), branches


def contents(builder: StateGraph) -> dict[str, Any]:
    kept = {name: list(value) for name, value in vars(builder).items() if isinstance(value, (dict, set))}
    runnables = {name: (id(spec.runnable), spec.cache_policy, spec.ends) for name, spec in builder.nodes.items()}
    return {**kept, "nodes": runnables, "defaults": repr(builder._node_defaults), "compiled": builder.compiled}


def test_the_users_builder_stays_as_it_was_whatever_happens_to_the_new_one(llm: ChatLatentMAS) -> None:
    class Longer(Chain, total=False):
        more: str

    builder = chain(llm, cache_policy=CachePolicy())
    builder.add_conditional_edges("critic", lambda state: "judger", ["judger"])
    before, parts = shape(builder), contents(builder)
    out = builder.compile().invoke(ASKED)
    parts["compiled"] = True
    new = switch_edges(builder, "*", router_reads_text=False, steps=3)
    new.add_node("extra", lambda state: {"more": "x"}, input_schema=Longer)
    new.add_edge("judger", "extra")
    new.add_conditional_edges("judger", lambda state: "extra", ["extra"])
    new.set_node_defaults(retry_policy=RetryPolicy())
    assert list(new.compile().stream(ASKED))[-1] == {"extra": {"more": "x"}}
    assert shape(builder) == before
    assert contents(builder) == parts
    assert builder.compile().invoke(ASKED) == out


def test_a_builder_that_was_compiled_before_can_be_switched(llm: ChatLatentMAS) -> None:
    graph = chain(llm).compile()
    assert is_latent(switch_edges(graph.builder, "*", steps=3).compile().invoke(ASKED)["plan"], "planner")


def test_edges_flip_back_one_by_one(llm: ChatLatentMAS) -> None:
    builder = chain(llm)
    both = switch_edges(builder, "*", steps=3)
    one = switch_edges(both, [PLANNER], to="text")
    assert latent(one, []) == {CRITIC}
    out = one.compile().invoke(ASKED)
    assert "[latent" not in out["plan"]
    assert is_latent(out["critique"], "critic")
    none = switch_edges(one, "*", to="text")
    assert latent(none, []) == set()
    assert shape(none) == shape(builder)


def test_flipping_back_one_of_two_edges_makes_the_node_speak_and_says_so(llm: ChatLatentMAS) -> None:
    builder = chain(llm)
    builder.add_edge("planner", "judger")
    edge = ("planner", "judger")
    with pytest.raises(InvalidEdge, match=r"'planner' speaks, because its edge to 'judger' .* name it too"):
        switch_edges(builder, [PLANNER])
    both = switch_edges(builder, [PLANNER, edge], steps=3)
    one = switch_edges(both, [edge], to="text")
    assert latent(one, []) == set()
    assert modes(one, [])[PLANNER][1] == "'planner' speaks, because its edge to 'judger' is text."
    again = switch_edges(one, [edge], steps=3)
    assert latent(again, []) == {PLANNER, edge}
    assert modes(switch_edges(both, [edge], steps=9), [])[PLANNER] == ("latent", "9 latent steps")


def test_explaining_changes_nothing_and_names_every_edge(llm: ChatLatentMAS) -> None:
    builder = chain(llm)
    before = shape(builder)
    reports = switch_edges(builder, [PLANNER], steps=3, explain=True)
    assert set(reports) == {
        EdgeReport(START, "planner", "text", "not switched"),
        EdgeReport(*PLANNER, "latent", "3 latent steps"),
        EdgeReport(*CRITIC, "text", "not switched"),
        EdgeReport("judger", END, "text", "not switched"),
    }
    assert all(why for _, why in modes(builder).values())
    assert shape(builder) == before
    assert str(reports).splitlines() == [
        "__start__ -> planner  text    not switched",
        "planner -> critic     latent  3 latent steps",
        "critic -> judger      text    not switched",
        "judger -> __end__     text    not switched",
    ]
    assert reports._repr_html_().count("<tr>") == 5


# Refusals


@pytest.mark.parametrize("options", [{"to": "latents"}, {"steps": -1}, {"steps": 2.5}, {"steps": True}])
def test_settings_out_of_range_are_refused(llm: ChatLatentMAS, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="must be"):
        switch_edges(chain(llm), "*", **options)


@pytest.mark.parametrize("builder", [None, "graph", object()])
def test_what_is_no_graph_is_refused(builder: Any) -> None:
    with pytest.raises(InvalidRequest, match="takes a StateGraph"):
        switch_edges(builder, "*")


def test_a_model_of_another_vendor_further_down_keeps_edges_text_unless_named(llm: ChatLatentMAS) -> None:
    vendor = FakeListChatModel(responses=["x"])
    builder = chain(llm, judger=lambda state: {"answer": vendor.invoke("Judge").content})
    reports = modes(builder)
    assert reports[CRITIC] == ("text", "'judger' runs another model (FakeListChatModel); give it a ChatLatentMAS.")
    assert "may reach 'judger'" in reports[PLANNER][1]
    out = switch_edges(builder, [PLANNER], steps=3).compile().invoke(ASKED)
    assert is_latent(out["plan"], "planner")
    assert out["answer"] == "x"


def test_a_marker_that_reaches_another_service_is_refused_when_it_is_read(
    llm: ChatLatentMAS, other: ChatLatentMAS
) -> None:
    hidden = {"other": other}.__getitem__
    graph = switch_edges(chain(llm, critic=lambda state: critic_of(hidden("other"))(state)), [PLANNER], steps=3)
    with pytest.raises(LatentMASError, match="'planner' does not match: it was edited, or another service made it"):
        graph.compile().invoke(ASKED)


def test_a_marker_of_a_lost_memory_is_refused(fresh_service: Fresh) -> None:
    key = b"k" * 32
    one, two = (ChatLatentMAS(service=fresh_service(dtype="float32", key=key), max_tokens=4) for _ in range(2))
    plan = switch_edges(chain(one), "*", steps=3).compile().invoke(ASKED)["plan"]
    with pytest.raises(UnknownReference):
        two.invoke(plan)


def test_models_that_share_a_service_by_name_are_one_model(monkeypatch: pytest.MonkeyPatch, llm: ChatLatentMAS) -> None:
    monkeypatch.setenv("LATENTMAS_SERVICE", "some-model")
    by_default, by_name, another = ChatLatentMAS(), ChatLatentMAS(model="some-model"), ChatLatentMAS(model="another")
    assert latent(chain(by_default, critic=critic_of(by_name))) == {PLANNER, CRITIC}
    assert latent(chain(by_default, critic=critic_of(another))) == set()
