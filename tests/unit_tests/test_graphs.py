"""LatentAgentNode inside of graphs: streams that are left, conversations, batches, retries, and wrong calls."""

import asyncio
import json
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessageChunk, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, LatentState
from langchain_latentmas.errors import InvalidRequest, ModelNotFound, TamperedReference, WrongModel
from langchain_latentmas.service import shared
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import hierarchical, sequential

from ..conftest import Fresh
from ..support import PARITY, kv_copy, kv_difference, wait_for

QUESTION: Any = {"messages": [("human", "What is 12 plus 30 minus 5?")]}
LONG = 1500  # tokens that nobody wants to wait for


def chain(service: LatentService | None, *nodes: LatentAgentNode) -> Any:
    builder = StateGraph(LatentState)
    for node in nodes:
        builder.add_node(str(node.name), node)
    for one, following in zip([START, *(n.name for n in nodes)], [*(n.name for n in nodes), END], strict=True):
        builder.add_edge(str(one), str(following))
    return builder.compile()


@pytest.fixture
def endless(fresh_service: Fresh) -> tuple[LocalService, Any]:
    service = fresh_service()
    service.model.eos = frozenset()
    thinker = LatentAgentNode("planner", "Plan.", service=service, steps=2)
    judger = LatentAgentNode("judger", "Judge.", service=service, speak=True, max_tokens=LONG)
    return service, chain(service, thinker, judger)


async def test_leaving_an_async_stream_of_a_graph_frees_the_slot(endless: tuple[LocalService, Any]) -> None:
    service, graph = endless
    stream = graph.astream(QUESTION, stream_mode="messages")
    await anext(stream)
    assert service.info()["rows"] == 1
    await stream.aclose()
    await asyncio.to_thread(service.think, "Something else.", steps=2)
    wait_for(lambda: service.info()["rows"] == 0)
    assert service.info()["tokens"] < LONG


async def test_cancelling_a_graph_frees_the_slot(endless: tuple[LocalService, Any]) -> None:
    service, graph = endless
    task = asyncio.create_task(graph.ainvoke(QUESTION))
    await asyncio.to_thread(wait_for, lambda: service.info()["tokens"] > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(service.think, "Something else.", steps=2)
    wait_for(lambda: service.info()["rows"] == 0)
    assert service.info()["tokens"] < LONG


def test_leaving_a_stream_of_a_chat_model_frees_the_slot(endless: tuple[LocalService, Any]) -> None:
    from langchain_latentmas import ChatLatentMAS

    service, _ = endless
    stream = ChatLatentMAS(service=service, max_tokens=LONG).stream("Speak.")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    service.think("Something else.", steps=2)
    wait_for(lambda: service.info()["rows"] == 0)
    assert service.info()["tokens"] < LONG


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_tokens_come_while_the_judger_still_speaks(endless: tuple[LocalService, Any], mode: str) -> None:
    """The first token is there long before the last one was decoded."""
    service, graph = endless
    if mode == "async":
        stream = graph.astream(QUESTION, stream_mode=["messages", "custom"])
        events = [await anext(stream) for _ in range(4)]
        seen = service.info()["tokens"]
        await stream.aclose()
    else:
        short = chain(service, LatentAgentNode("judger", "Judge.", service=service, speak=True, max_tokens=200))
        stream = short.stream(QUESTION, stream_mode=["messages", "custom"])
        events = [next(stream)]
        seen = service.info()["tokens"]
        stream.close()
    assert any(name == "messages" and isinstance(event[0], AIMessageChunk) for name, event in events)
    assert seen < 200


def test_progress_names_agent_step_and_steps(fresh_service: Fresh) -> None:
    graph = chain(None, LatentAgentNode("planner", "Plan.", service=fresh_service(), steps=3))
    for _ in ("new", "known"):
        events = list(graph.stream(QUESTION, stream_mode="custom"))
        assert events == [{"agent": "planner", "step": step, "steps": 3} for step in (1, 2, 3)]
        json.dumps(events)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("heard", [True, False])
async def test_a_service_reports_steps_only_where_they_are_heard(
    fresh_service: Fresh, monkeypatch: Any, mode: str, heard: bool
) -> None:
    service, asked = fresh_service(), []
    for name in ("think", "athink"):
        think = getattr(service, name)
        spy = lambda *args, think=think, **kwargs: (asked.append(kwargs["on_step"]), think(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(service, name, spy)
    graph = chain(None, LatentAgentNode("planner", "Plan.", service=service, steps=2))
    streamed = {"stream_mode": ["values", "custom"] if heard else ["values", "updates"]}
    if mode == "sync":
        list(graph.stream(QUESTION, **streamed))
    else:
        async for _ in graph.astream(QUESTION, **streamed):
            pass
    assert [report is not None for report in asked] == [heard]


def test_streamed_chunks_add_up_to_the_message_in_the_state(fresh_service: Fresh) -> None:
    service = fresh_service()
    graph = sequential(service, steps=2, max_tokens=12).compile()
    chunks, final = [], None
    for mode, event in graph.stream(QUESTION, stream_mode=["messages", "values"]):
        if mode == "messages":
            chunks.append(event[0])
        else:
            final = event["messages"][-1]
    spoken = [chunk for chunk in chunks if isinstance(chunk, AIMessageChunk)]
    assert final is not None
    assert "".join(chunk.text for chunk in spoken) == final.text
    assert {chunk.id for chunk in spoken} == {final.id}
    assert final.usage_metadata["output_token_details"] == {"latent_steps": 6}
    assert final.response_metadata["finish_reason"] in ("stop", "length")
    assert final.response_metadata["merge"] == "none"


def test_a_conversation_reads_its_first_turn_through_memory_alone(fresh_service: Fresh) -> None:
    service, config = fresh_service(), {"configurable": {"thread_id": "1"}}
    graph = sequential(service, steps=2, max_tokens=6).compile(checkpointer=InMemorySaver())
    first = graph.invoke(QUESTION, config)  # type: ignore[arg-type]
    second = graph.invoke({"messages": [("human", "And 2 more?")]}, config)  # type: ignore[arg-type]
    planner = second["latents"][4]
    prompt = service.model.tokenizer.decode(list(service.memory(planner).segments[-1].prompt_ids))
    assert planner["parents"] == [first["latents"][-1]["id"]]
    assert "And 2 more?" in prompt
    assert f"assistant\n{first['messages'][-1].text}<|im_end|>" not in prompt
    assert len(second["latents"]) == 8
    assert [s.agent for s in service.memory(second["latents"][-1]).segments] == [
        *("planner", "critic", "refiner", "judger"),
        *("planner", "critic", "refiner", "judger"),
    ]


def test_batches_share_ticks_and_equal_single_runs(fresh_service: Fresh) -> None:
    questions = [{"messages": [("human", f"What is {i} plus {'1 plus ' * i}1?")]} for i in range(4)]
    single = fresh_service(key=bytes(32))
    alone = [hierarchical(single, steps=60, max_tokens=6).compile().invoke(q)["latents"] for q in questions]  # type: ignore[arg-type]
    service = fresh_service(key=bytes(32))
    together = hierarchical(service, steps=60, max_tokens=6).compile().batch(questions)  # type: ignore[arg-type]
    assert [state["latents"] for state in together] == alone
    assert service.info()["ticks"] < single.info()["ticks"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_that_cuda_graphs_replay_are_those_that_are_computed() -> None:
    questions: list[Any] = [{"messages": [("human", f"What is {i} plus {'1 plus ' * i}1?")]} for i in range(5)]
    found = []
    for replayed in (True, False):
        model = str(PARITY / "qwen3-tied" / "model")
        with LatentService.load(model, device="cuda", dtype="float64", cuda_graphs=replayed) as service:
            states = hierarchical(service, steps=30, max_tokens=12).compile().batch(questions)
            refs = [ref for state in states for ref in state["latents"]]
            assert service.info()["cuda_graphs"] == ("on" if replayed else "off")
            found.append({ref["id"]: kv_copy(service.memory(ref)) for ref in refs})
    replays, computed = found
    assert len(replays) == 4 * len(questions)
    assert replays.keys() == computed.keys()  # an id is a digest of the tokens too
    assert max(kv_difference(replays[key], computed[key]) for key in replays) < 1e-8


async def test_a_node_alone_runs_batches_too(fresh_service: Fresh) -> None:
    node = LatentAgentNode("judger", "Judge.", service=fresh_service(), speak=True, max_tokens=4)
    states = [{"messages": [HumanMessage(f"Number {i}.")], "latents": []} for i in range(3)]
    alone = [node.invoke(state)["messages"][0].text for state in states]
    assert [update["messages"][0].text for update in node.batch(states)] == alone
    assert [update["messages"][0].text for update in await node.abatch(states)] == alone


def test_text_mode_reads_agents_in_the_order_of_reads(fresh_service: Fresh) -> None:
    service = fresh_service()
    text: Any = {"configurable": {"edges": "text"}}
    builder = StateGraph(LatentState)
    for name in ("a", "b"):
        builder.add_node(name, LatentAgentNode(name, f"You are {name}.", service=service, max_tokens=4))
        builder.add_edge(START, name)
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service, speak=True, reads=["b", "a"]))
    builder.add_edge(["a", "b"], "judger")
    said = {m.name: m for m in builder.compile().invoke(QUESTION, text)["messages"][1:]}
    ref = said["judger"].response_metadata["latent_ref"]
    (segment,) = service.memory(ref).segments
    prompt = service.model.tokenizer.decode(list(segment.prompt_ids))
    assert prompt.index("b: ") < prompt.index("a: ") < prompt.index("What is 12")
    assert said["judger"].usage_metadata["output_token_details"] == {"latent_steps": 0}  # type: ignore[index]


@pytest.mark.parametrize("team", [sequential, hierarchical])
def test_whether_those_before_the_judger_speak_is_an_option_like_others(fresh_service: Fresh, team: Any) -> None:
    service = fresh_service()
    state = team(service, speak=True, steps=3, max_tokens=2).compile().invoke(QUESTION)
    assert len(state["messages"]) == 5
    assert state["messages"][-1].name == "judger"
    assert service.info()["thoughts"] == 0
    assert len(team(service, speak=False, steps=3, max_tokens=2).compile().invoke(QUESTION)["messages"]) == 2
    assert service.info()["thoughts"] == 9


def test_a_retried_node_thinks_the_same_again_once(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    service, hidden = fresh_service(), None
    hidden = service.model.hidden

    def fail_once(*arguments: Any) -> Any:
        monkeypatch.setattr(service.model, "hidden", hidden)
        raise RuntimeError("the device hiccups")

    monkeypatch.setattr(service.model, "hidden", fail_once)
    builder = StateGraph(LatentState)
    node = LatentAgentNode("planner", "Plan.", service=service, steps=2)
    builder.add_node("planner", node, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False))
    builder.add_edge(START, "planner")
    assert len(builder.compile().invoke(QUESTION)["latents"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"positions": 1}, {"agent": "boss"}, {"mac": "0" * 64}, {"parents": None}, {"id": 5}]
)
def test_a_reference_that_was_changed_in_the_state_is_refused(fresh_service: Fresh, change: dict[str, Any]) -> None:
    service = fresh_service()
    ref = {**service.think("Plan.", steps=1, agent="planner"), **change}
    ticks = service.info()["ticks"]
    for reads in (None, ["planner", "boss"]):
        node = LatentAgentNode("judger", "Judge.", service=service, speak=True, reads=reads)
        with pytest.raises((TamperedReference, InvalidRequest)):
            node.invoke({**QUESTION, "latents": [ref]})
    assert service.info()["ticks"] == ticks


def test_a_state_of_another_model_is_refused(fresh_service: Fresh) -> None:
    ref = fresh_service().think("Plan.", steps=1, agent="planner")
    with pytest.raises(WrongModel, match="'planner'"):
        LatentAgentNode("judger", "Judge.", service=fresh_service("llama-untied"), steps=1).invoke(
            {**QUESTION, "latents": [ref]}
        )


def test_a_negative_temperature_is_refused_before_any_work(fresh_service: Fresh) -> None:
    service = fresh_service()
    with pytest.raises(InvalidRequest, match="temperature"):
        chain(None, LatentAgentNode("judger", "Judge.", service=service, speak=True, temperature=-1.0)).invoke(QUESTION)
    assert service.info()["ticks"] == 0


def test_what_is_no_service_is_refused_wherever_it_comes_from(fresh_service: Fresh) -> None:
    builder = StateGraph(LatentState, context_schema=dict)  # type: ignore[type-var]
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", steps=1))
    builder.add_edge(START, "planner")
    with pytest.raises(InvalidRequest, match="must be a LatentService"):
        builder.compile().invoke(QUESTION, context={"service": "bundled"})


def test_a_node_without_service_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_SERVICE", "no/such-model")
    monkeypatch.setattr(shared, "_services", {})
    with pytest.raises(ModelNotFound, match=r"'no/such-model'.*Give a hub id, a folder"):
        LatentAgentNode("planner", "Plan.").invoke(QUESTION)


def test_one_shared_service_serves_all_nodes(monkeypatch: pytest.MonkeyPatch, service32: LatentService) -> None:
    loaded: list[str] = []

    def load(name: str, **settings: Any) -> LatentService:
        loaded.append(name)
        return service32

    monkeypatch.setenv("LATENTMAS_SERVICE", "some/model")
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", load)
    nodes = [LatentAgentNode(name, f"You are {name}.", steps=1) for name in ("a", "b", "c")]
    assert len(chain(None, *nodes).invoke(QUESTION)["latents"]) == 3
    assert loaded == ["some/model"]


@pytest.mark.parametrize("name", ["vllm:some/model", "vllm+http://127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_model_that_runs_elsewhere_is_given_no_device(
    monkeypatch: pytest.MonkeyPatch, service32: LatentService, name: str
) -> None:
    loaded: list[dict[str, Any]] = []
    monkeypatch.setenv("LATENTMAS_DEVICE", "cuda")  # of the models that run here
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", lambda _, **settings: (loaded.append(settings), service32)[1])
    ChatLatentMAS(model=name, max_tokens=1).invoke("Hello")
    assert loaded == [{} if name.startswith("http") else {"store": None}]
    with pytest.raises(InvalidRequest, match="takes no device"):
        ChatLatentMAS(model=name, max_tokens=1, device="cpu").invoke("Hello")


def test_a_chat_model_says_how_its_model_is_loaded(monkeypatch: pytest.MonkeyPatch, service32: LatentService) -> None:
    loaded: list[tuple[str, Any, Any]] = []

    def load(name: str, **settings: Any) -> LatentService:
        loaded.append((name, settings["device"], settings["dtype"]))
        return service32

    monkeypatch.setenv("LATENTMAS_DEVICE", "cpu")
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", load)
    for llm in (
        ChatLatentMAS(model="some/model", max_tokens=1),
        ChatLatentMAS(model="some/model", max_tokens=1, device="cpu"),
        ChatLatentMAS(model="some/model", max_tokens=1, device="cuda", dtype="bfloat16"),
    ):
        llm.invoke("Hello")
    llm.invoke("Hello", model="other/model")
    assert loaded == [
        ("some/model", "cpu", "auto"),
        ("some/model", "cuda", "bfloat16"),
        ("other/model", "cuda", "bfloat16"),
    ]
