import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core import globals as of_langchain
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps, load, loads
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    message_to_dict,
    messages_from_dict,
    trim_messages,
)
from langchain_core.messages.ai import add_ai_message_chunks
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import Tool
from langchain_tests.unit_tests import ChatModelUnitTests, chat_models
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, switch_edges
from langchain_latentmas.engine import tick
from langchain_latentmas.errors import InvalidReference, InvalidRequest, TamperedReference
from langchain_latentmas.service import shared

from ..conftest import load_parts
from ..served import client, serving
from ..support import PARITY
from ..vllm_double import VLLMDouble

OURS = [ChatLatentMAS]
TEXT: Any = {"configurable": {"edges": "text"}}
QWEN_LIKE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %} <tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.a }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TestStandard(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatLatentMAS]:
        return ChatLatentMAS

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "bundled"}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Without `timeout` and `max_retries`, which are settings of the service."""
        return {"temperature": 0, "max_tokens": 100, "stop": []}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"LATENTMAS_SERVICE": "some-model"}, {}, {"model": "some-model"}

    @pytest.fixture(autouse=True)
    def _allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`allowed_objects="all"` means the packages on LangChain's own list; any other has to be named."""
        monkeypatch.setattr(
            chat_models, "load", lambda *args, **given: load(*args, **given | {"allowed_objects": OURS})
        )


@pytest.fixture
def llm(service32: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=service32, max_tokens=8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 3}, r"no steps; .*switch_edges\(\.\.\., steps=20\)"),
        ({"temprature": 1, "model_kwargs": {}}, "no temprature, model_kwargs; .*temperature"),
        ({"timeout": 5}, "deadline=60"),
        ({"speak_tag": "!"}, r"service=LatentService\.load\(\.\.\., speak_tag=\.\.\.\)"),
        ({"store": "memories", "revision": "main"}, r"load\(\.\.\., store=.*load\(\.\.\., revision="),
    ],
)
def test_what_would_have_no_effect_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        ChatLatentMAS(model="bundled", **given)


def test_tokens_are_counted_as_the_model_reads_them(llm: ChatLatentMAS, service32: LatentService) -> None:
    messages = [SystemMessage("Plan."), HumanMessage("Hello")]
    usage = llm.invoke(messages).usage_metadata
    assert usage is not None
    assert llm.get_num_tokens_from_messages(messages) == usage["input_tokens"]
    marker = service32.marker(service32.think("Plan.", steps=2))
    assert llm.get_num_tokens_from_messages([*messages, HumanMessage(marker)]) == usage["input_tokens"]
    assert llm.get_token_ids("Hello") == service32.token_ids("Hello")
    assert llm.profile == {"max_input_tokens": service32.info()["max_positions"]}
    kept = trim_messages(messages, max_tokens=usage["input_tokens"] - 1, token_counter=llm, strategy="last")
    assert kept == messages[1:]
    assert llm.get_num_tokens_from_messages([]) == 0


def test_a_conversation_is_trimmed_where_the_template_takes_no_part_of_it_backwards(fresh_service: Any) -> None:
    wants_a_question = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no question') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    llm = ChatLatentMAS(service=fresh_service(dtype="float32", chat_template=wants_a_question))
    talk = [HumanMessage("Hello"), AIMessage("Hi there."), HumanMessage("More?"), AIMessage("No.")]
    most = sum(len(llm.get_token_ids(message.text)) for message in talk[2:])
    assert trim_messages(talk, max_tokens=most, token_counter=llm, strategy="last") == talk[2:]
    assert llm.get_num_tokens_from_messages(talk) > llm.get_num_tokens_from_messages(talk[::-1]) > most
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])
    with pytest.raises(InvalidRequest, match="holds more than text"):
        llm.get_num_tokens_from_messages([talk[1], picture])
    with pytest.raises(InvalidRequest, match="presents no tools"):
        llm.get_num_tokens_from_messages(talk, tools=[Add])


def test_chunks_add_up_to_the_message(llm: ChatLatentMAS) -> None:
    chunks = [chunk for chunk in llm.stream("Hello") if isinstance(chunk, AIMessageChunk)]
    whole = llm.invoke("Hello")
    added = add_ai_message_chunks(chunks[0], *chunks[1:])
    assert len(chunks) > 4
    assert added.text == whole.text
    assert added.usage_metadata == whole.usage_metadata
    assert added.response_metadata["latent_ref"] == whole.response_metadata["latent_ref"]


def test_a_model_with_configurable_fields_streams_too(llm: ChatLatentMAS) -> None:
    model = llm.configurable_fields(max_tokens=ConfigurableField("max_tokens"))
    chunks = list(model.stream("Hello", {"configurable": {"max_tokens": 12}}))
    assert len(chunks) > 4
    assert "".join(chunk.text for chunk in chunks) == llm.invoke("Hello", max_tokens=12).text


@pytest.mark.parametrize("stream", [False, True])
def test_whether_a_call_streams_may_be_bound(llm: ChatLatentMAS, stream: bool) -> None:
    heard: list[Any] = []

    class Listener(BaseCallbackHandler):
        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            heard.append(token)

    bound = llm.bind(stream=stream)
    said = bound.invoke("Hello", {"callbacks": [Listener()]}).text
    assert said == "".join(chunk.text for chunk in bound.stream("Hello")) == llm.invoke("Hello").text
    assert (len(heard) > 1) == stream


async def test_the_async_ways_say_the_same(llm: ChatLatentMAS) -> None:
    said = llm.invoke("Hello").text
    assert (await llm.ainvoke("Hello")).text == said
    assert "".join([chunk.text async for chunk in llm.astream("Hello")]) == said


def test_usage_counts_what_was_read_and_said(llm: ChatLatentMAS, service32: LatentService) -> None:
    ref = service32.think("Plan.", steps=3)
    usage = llm.invoke("Hello", latents=[ref]).usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 8
    assert usage["total_tokens"] == usage["input_tokens"] + 8
    assert usage["output_token_details"] == {"latent_steps": 3}


def test_stop_and_seed_reach_the_service(llm: ChatLatentMAS) -> None:
    whole = llm.invoke("Hello", max_tokens=24).text
    stop = next(character for character in whole[1:] if character.isprintable())
    cut = llm.invoke("Hello", max_tokens=24, stop=[stop])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.response_metadata["finish_reason"] == "stop"
    samples = {llm.invoke("Hello", temperature=1.0, seed=seed).text for seed in (1, 1, 2, 3)}
    assert 1 < len(samples) <= 3


def test_the_model_is_serialised_without_its_service(llm: ChatLatentMAS) -> None:
    named = llm.model_copy(update={"model": "bundled"})
    again = loads(dumps(named), valid_namespaces=["langchain_latentmas"], allowed_objects=[ChatLatentMAS])
    assert again.service is None
    assert (again.model, again.max_tokens) == ("bundled", 8)
    by_name = json.loads(dumps(llm))["kwargs"]  # of its model, since nothing else can be written down
    assert by_name["model"] == llm.service.name  # type: ignore[union-attr]


def test_a_service_that_is_given_is_named_and_not_that_of_the_environment(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTMAS_SERVICE", "some-model")
    assert json.loads(dumps(ChatLatentMAS(service=service32)))["kwargs"]["model"] == service32.name
    double = VLLMDouble(*load_parts("qwen3-tied", "float64"), str(PARITY / "qwen3-tied" / "model"))
    with LatentService.load("vllm+http://there:8000", transport=double.transport) as vllm:
        assert json.loads(dumps(ChatLatentMAS(service=vllm)))["kwargs"]["model"] == "vllm+http://there:8000"


def test_what_agents_pass_to_every_model_is_left_out_aloud(scripted: Any, caplog: pytest.LogCaptureFixture) -> None:
    llm = scripted('{"a": 3}}\n</tool_call>')
    message = llm.bind_tools([Add], tool_choice="any", parallel_tool_calls=False, strict=True).invoke("Add 3.")
    assert message.tool_calls
    assert [text.split()[0] for text in caplog.messages] == ["strict", "parallel_tool_calls"]
    assert llm.invoke("Hello", latents=None).text


def test_content_blocks_of_text_are_read_and_pictures_refused(llm: ChatLatentMAS) -> None:
    blocks = HumanMessage(content=[{"type": "text", "text": "Hello"}])
    assert llm.invoke([blocks]).text == llm.invoke("Hello").text
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InvalidRequest, match="text only"):
        llm.invoke([HumanMessage(content=[picture])])


def test_what_is_no_setting_is_refused(llm: ChatLatentMAS) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        llm.invoke("Hello", tempreature=1)


class Add(BaseModel):
    """Adds."""

    a: int = Field(description="A summand.")


@pytest.fixture
def scripted(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A service whose model says what the test wants, token by token, through the real engine."""

    def make(text: str) -> ChatLatentMAS:
        service = fresh_service(dtype="float32", chat_template=QWEN_LIKE)
        ids = [*service.model.tokenizer(text, add_special_tokens=False)["input_ids"], 2]

        def sample(self: tick.Ticker, rows: list[tick.Row]) -> None:
            for row in rows:
                token = ids[len(row.tokens)]
                row.tokens.append(token)
                row.finish = "stop" if token == 2 else ""
                text = row.text.push(token)
                if row.on_token:
                    row.on_token(tick.Spoken(token, text))

        monkeypatch.setattr(tick.Ticker, "_sample", sample)
        return ChatLatentMAS(service=service)

    return make


CALL = '<tool_call>\n{"name": "Add", "arguments": {"a": 3}}\n</tool_call>'


def test_tool_calls_come_out_and_go_back_in(scripted: Any) -> None:
    llm = scripted("Well. " + CALL)
    message = llm.bind_tools([Add]).invoke("Add 3.")
    assert message.text == "Well. "
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("Add", {"a": 3})]
    answer = ToolMessage("3", tool_call_id=message.tool_calls[0]["id"])
    again = llm.bind_tools([Add]).invoke([HumanMessage("Add 3."), message, answer])
    assert again.tool_calls


def test_tool_calls_stream(scripted: Any) -> None:
    chunks = [c for c in scripted(CALL).bind_tools([Add]).stream("Add 3.") if isinstance(c, AIMessageChunk)]
    added = add_ai_message_chunks(chunks[0], *chunks[1:])
    assert [(call["name"], call["args"]) for call in added.tool_calls] == [("Add", {"a": 3})]
    assert added.text == ""


@pytest.mark.parametrize("choice", ["Add", "any", True])
def test_a_forced_call_needs_only_its_rest(scripted: Any, choice: Any) -> None:
    llm = scripted('{"a": 3}}\n</tool_call>')
    message = llm.bind_tools([Add], tool_choice=choice).invoke("Add 3.")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("Add", {"a": 3})]


def test_a_choice_that_the_template_cannot_force_is_said_once(
    fresh_service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service = fresh_service(dtype="float32", chat_template=QWEN_LIKE.replace("<tool_call>", "<call>"))
    llm = ChatLatentMAS(service=service, max_tokens=1)
    for choice in (None, "auto", "none"):
        llm.bind_tools([Add], tool_choice=choice).invoke("Add 3.")
    assert not caplog.messages
    for choice in ("any", "Add"):
        llm.bind_tools([Add], tool_choice=choice).invoke("Add 3.")
    [said] = caplog.messages
    assert said.startswith("tool_choice='any' cannot be forced")


def test_structured_output_is_an_object(scripted: Any) -> None:
    structured = scripted('{"a": 3}}\n</tool_call>').with_structured_output(Add, include_raw=True)
    result = structured.invoke("Add 3.")
    assert result["parsed"] == Add(a=3)
    assert result["parsing_error"] is None
    assert isinstance(result["raw"], AIMessage)


def test_a_broken_call_is_an_invalid_one(scripted: Any) -> None:
    message = (
        scripted("<tool_call>{broken</tool_call>").bind_tools([Add]).invoke([SystemMessage("S"), HumanMessage("A")])
    )
    assert message.tool_calls == []
    assert message.invalid_tool_calls[0]["args"] == "<tool_call>{broken"


def test_a_template_that_presents_no_tools_is_told_so(llm: ChatLatentMAS) -> None:
    with pytest.raises(InvalidRequest, match="presents no tools"):
        llm.bind_tools([Add]).invoke("Add 3.")


def test_a_choice_of_none_presents_no_tools(scripted: Any) -> None:
    llm = scripted(CALL)
    message = llm.bind_tools([Add], tool_choice="none").invoke("Add 3.")
    assert not message.tool_calls
    assert message.usage_metadata == llm.invoke("Add 3.").usage_metadata


@pytest.mark.parametrize(
    ("tool", "kind"),
    [
        ({"type": "web_search"}, "web_search"),
        ({"type": "function", "name": "Add"}, "function"),
        (Tool("grep", lambda line: line, "Greps.", metadata={"type": "custom_tool"}), "custom"),
    ],
    ids=["a vendor's", "flat", "custom"],
)
def test_a_tool_that_is_no_function_is_refused(llm: ChatLatentMAS, tool: Any, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"a tool of type '{kind}'"):
        llm.bind_tools([Add, tool])
    with pytest.raises(InvalidRequest, match=f"a tool of type '{kind}'"):
        llm.get_num_tokens_from_messages([HumanMessage("Add 3.")], tools=[tool])


@pytest.mark.parametrize("choice", ["Sub", {"type": "function", "function": {"name": "Sub"}}, {}])
def test_a_choice_that_names_no_tool_is_refused(llm: ChatLatentMAS, choice: Any) -> None:
    with pytest.raises(InvalidRequest, match="is none of the tools: Add"):
        llm.bind_tools([Add], tool_choice=choice)


def test_a_choice_may_be_a_description_of_the_function(scripted: Any) -> None:
    choice = {"type": "function", "function": {"name": "Add"}}
    message = scripted('{"a": 3}}\n</tool_call>').bind_tools([Add], tool_choice=choice).invoke("Add 3.")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("Add", {"a": 3})]


def test_a_tool_message_that_is_a_marker_stays_beside_its_call(scripted: Any) -> None:
    llm = scripted("Done.")
    ref = llm.service.think("Look it up.", steps=2)
    call = AIMessage("", tool_calls=[{"name": "Add", "args": {"a": 3}, "id": "1"}])
    asked = [HumanMessage("Add 3."), call]
    with_marker = llm.invoke([*asked, ToolMessage(llm.service.marker(ref), tool_call_id="1")])
    assert with_marker.usage_metadata["output_token_details"]["latent_steps"] == 2
    without = llm.invoke([*asked, ToolMessage("", tool_call_id="1")])
    assert with_marker.usage_metadata["input_tokens"] == without.usage_metadata["input_tokens"]


@pytest.mark.parametrize(("left", "expected"), [("", "Check  please."), ("(a memory)", "Check (a memory) please.")])
def test_what_is_left_in_a_markers_place_is_a_setting(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch, left: str, expected: str
) -> None:
    marker = service32.marker(service32.think("Plan.", steps=1))
    read: list[Any] = []
    say = service32.say

    def listening(messages: Any, *rest: Any, **given: Any) -> Any:
        read.extend(messages)
        return say(messages, *rest, **given)

    monkeypatch.setattr(service32, "say", listening)
    blocks = [{"type": "text", "text": f"Check {marker} please."}]
    llm = ChatLatentMAS(service=service32, max_tokens=2, marker_text=left)
    llm.invoke([SystemMessage(f"Check {marker} please."), HumanMessage(blocks)])  # type: ignore[arg-type]
    assert [message.text for message in read] == [expected, expected]


def test_markers_in_the_arguments_of_a_tool_call_are_read_too(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = scripted("Done.")
    ref = llm.service.think("Look it up.", steps=2)
    nested = {"a": 3, "note": {"plans": ["First.", f"Plan: {llm.service.marker(ref)}"]}}
    call = AIMessage("", tool_calls=[{"name": "Add", "args": nested, "id": "1"}])
    read: list[Any] = []
    say = llm.service.say
    monkeypatch.setattr(
        llm.service, "say", lambda messages, *rest, **given: read.append(messages) or say(messages, *rest, **given)
    )
    said = llm.invoke([HumanMessage("Add 3."), call, ToolMessage("3", tool_call_id="1")])
    assert said.usage_metadata["output_token_details"]["latent_steps"] == 2
    assert read[0][1].tool_calls[0]["args"] == {"a": 3, "note": {"plans": ["First.", "Plan: "]}}
    assert call.tool_calls[0]["args"] == nested
    nested["note"]["plans"][1] = nested["note"]["plans"][1][:-9]
    with pytest.raises(TamperedReference, match="cut or edited"):
        llm.invoke([HumanMessage("Add 3."), call, ToolMessage("3", tool_call_id="1")])


def test_a_marker_that_cannot_be_read_names_both_ends_of_its_edge(llm: ChatLatentMAS, service32: LatentService) -> None:
    marker = service32.marker(service32.think("Plan.", steps=3, agent="planner"))
    builder = StateGraph(MessagesState)
    builder.add_node("critic", lambda state: {"messages": [llm.invoke(marker.replace(" 3 steps", " 4 steps"))]})
    builder.add_edge(START, "critic")
    with pytest.raises(InvalidReference, match=r"^'critic' cannot read what it was handed\. .* agent 'planner'"):
        builder.compile().invoke({"messages": []})


def test_traces_name_the_model_that_runs(llm: ChatLatentMAS, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm._get_ls_params()["ls_model_name"] == llm.service.name  # type: ignore[union-attr]
    monkeypatch.setenv("LATENTMAS_SERVICE", "some-model")
    assert ChatLatentMAS()._get_ls_params()["ls_model_name"] == "some-model"


def test_what_was_thought_is_not_taken_from_a_cache_of_what_was_said(service32: LatentService) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=4, cache=InMemoryCache())
    said = llm.invoke("Hello").text
    builder = StateGraph(MessagesState)
    builder.add_node("one", lambda state: {"messages": [llm.invoke("Hello")]})
    builder.add_node("two", lambda state: {"messages": [llm.invoke("Hello")]})
    builder.add_edge(START, "one").add_edge("one", "two")
    for steps in (2, 3):
        graph = switch_edges(builder, "*", steps=steps).compile()
        one, two = graph.invoke({"messages": []})["messages"]
        assert one.text.startswith(f"[latent one {steps} steps")
        assert two.text == said


def test_a_cache_hands_out_no_answers_of_another_service(fresh_service: Any) -> None:
    cache = InMemoryCache()
    for _ in range(2):  # which differ in nothing but their keys
        llm = ChatLatentMAS(service=fresh_service(dtype="float32"), max_tokens=2, cache=cache)
        said = [llm.invoke("Hello") for _ in range(2)]
        assert said[0].id == said[1].id
        assert llm.service.memory(said[1].response_metadata["latent_ref"])  # type: ignore[union-attr]
        assert llm.invoke([llm.invoke("Plan.", steps=2), HumanMessage("Go on.")]).text


def test_services_that_read_each_others_memories_are_one_to_a_cache(fresh_service: Any, tmp_path: Path) -> None:
    store, key = {"store": tmp_path}, {"key": b"k" * 32}
    settings: list[dict[str, Any]] = [store, store, {**store, "speak_tag": "Well."}, {}, {}, key, key]
    strings = [ChatLatentMAS(service=fresh_service(**each))._get_llm_string() for each in settings]
    assert strings[0] == strings[1]
    assert len(set(strings)) == len(settings) - 1


def test_clients_of_one_server_are_one_to_a_cache(fresh_service: Any) -> None:
    with serving(fresh_service()) as one, serving(fresh_service()) as other:
        clients = [client(server) for server in (one, one, other)]
        strings = [ChatLatentMAS(service=each)._get_llm_string() for each in clients]
        for each in clients:
            each.close()
    assert strings[0] == strings[1] != strings[2]
    assert json.dumps(one.address) in strings[0]  # which is what `load` takes


@pytest.mark.parametrize("everywhere", [False, True], ids=["of the model", "of all models"])
async def test_a_cache_is_asked_for_what_a_loaded_model_says_and_nothing_else(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    """Nobody could ever hit what a thought writes, nor what is written under no identity."""
    asked: list[str] = []

    class Watched(InMemoryCache):
        def lookup(self, prompt: str, llm_string: str) -> Any:
            asked.append("lookup")
            return super().lookup(prompt, llm_string)

        def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
            asked.append("update")
            super().update(prompt, llm_string, return_val)

    cache = Watched()
    monkeypatch.setattr(of_langchain, "_llm_cache", cache if everywhere else None)
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", lambda *_, **__: service32)
    llm = ChatLatentMAS(max_tokens=2, cache=None if everywhere else cache)
    said = await llm.ainvoke("Hello")  # which loads it
    assert llm.invoke("Hello", steps=1).text == (await llm.ainvoke("Hello", steps=1)).text
    assert asked == []
    assert [llm.invoke("Hello").text, (await llm.ainvoke("Hello")).text] == [said.text] * 2
    assert asked == ["lookup", "update", "lookup"]


def test_a_cache_tells_calls_with_steps_that_think_from_those_that_speak(service32: LatentService) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=4, cache=InMemoryCache())
    plan = RunnableLambda(lambda _: llm.invoke("Plan.", agent="planner", steps=2).text)
    for _ in range(2):
        assert plan.invoke(None).startswith("[latent planner 2 steps")
        assert not plan.invoke(None, {"configurable": {"edges": "text"}}).startswith("[latent")


async def test_what_takes_long_is_not_done_on_the_loop(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifying a marker may ask a store or a server, and the first call may load a model."""
    on_loop: list[str] = []

    def watched(name: str, call: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                on_loop.append(name)
            return call(*args, **kwargs)

        return inner

    thought = await ChatLatentMAS(service=service32).ainvoke("Plan.", steps=2)
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", watched("load", lambda *_, **__: service32))
    monkeypatch.setattr(service32, "take_markers", watched("markers", service32.take_markers))
    monkeypatch.setattr(service32, "aspeak", watched("speak", service32.aspeak))
    assert await ChatLatentMAS(max_tokens=3, cache=InMemoryCache()).ainvoke("Hello")
    llm = ChatLatentMAS(max_tokens=3)
    await llm.ainvoke([thought, HumanMessage("Go on.")])
    assert [chunk async for chunk in llm.astream([thought, HumanMessage("Go on.")])]
    node = LatentAgentNode("critic", "Check.", steps=2)
    await node.ainvoke({"messages": [HumanMessage("Hello"), thought], "latents": []})
    assert on_loop == []


async def test_a_model_that_is_being_loaded_holds_up_no_call_of_another(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def load(name: str, **_: Any) -> LatentService:
        if name == "slow":
            begun.set()
            assert go.wait(10)
        return service32

    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", load)
    quick, slow = (ChatLatentMAS(model=name, max_tokens=1) for name in ("quick", "slow"))
    await quick.ainvoke("Hello")
    loading = asyncio.create_task(slow.ainvoke("Hello"))
    assert await asyncio.to_thread(begun.wait, 10)
    assert await quick.ainvoke("Hello")
    assert quick.invoke("Hello")
    assert not loading.done()
    go.set()
    assert await loading


def test_memories_are_counted_and_json_wherever_messages_go(llm: ChatLatentMAS, service32: LatentService) -> None:
    said = llm.invoke("Hello", latents=[service32.think("Plan.", steps=3)])
    for again in (
        AIMessage.model_validate_json(said.model_dump_json()),
        messages_from_dict(json.loads(json.dumps([message_to_dict(said)])))[0],
        JsonPlusSerializer().loads_typed(JsonPlusSerializer().dumps_typed(said)),
    ):
        assert again == said
        assert again.usage_metadata["output_token_details"] == {"latent_steps": 3}
        service32.memory(again.response_metadata["latent_ref"])


async def test_a_call_with_steps_thinks_unless_it_runs_as_text(llm: ChatLatentMAS) -> None:
    thought = llm.invoke("Plan.", agent="planner", steps=3)
    assert thought.text.startswith("[latent planner 3 steps")
    assert thought.response_metadata["latent_ref"]["steps"] == 3
    assert (await llm.ainvoke("Plan.", agent="planner", steps=3)).text == thought.text
    assert llm.invoke([thought, HumanMessage("Go on.")]).usage_metadata["output_token_details"] == {"latent_steps": 3}
    node = RunnableLambda(lambda _: llm.invoke("Plan.", agent="planner", steps=3))
    said = node.invoke(None, {"configurable": {"edges": "text"}})
    assert said.text == llm.invoke("Plan.").text
    single = node.invoke(None, {"configurable": {"edges": {"planner->judger": "text"}}})
    assert single.text == said.text
    other = node.invoke(None, {"configurable": {"edges": {"critic->judger": "text"}}})
    assert other.text == thought.text
    with pytest.raises(InvalidRequest, match=r"tools or structured output bound.*steps=3"):
        llm.bind_tools([Add]).invoke("Plan.", steps=3)
    with pytest.raises(InvalidRequest, match="whole number from 0"):
        llm.invoke("Plan.", steps=-1)


async def test_what_the_configuration_of_a_call_says_counts_outside_of_a_graph(llm: ChatLatentMAS) -> None:
    said = llm.invoke("Plan.").text
    assert llm.invoke("Plan.", TEXT, steps=2).text == said
    assert (await llm.ainvoke("Plan.", TEXT, steps=2)).text == said
    chunks = llm.stream("Plan.", TEXT, steps=2)
    first = next(chunks).text
    assert llm.invoke("Plan.", steps=2).text.startswith("[latent")  # what another call is told is not told to this one
    assert first + "".join(chunk.text for chunk in chunks) == said
    assert "".join([chunk.text async for chunk in llm.astream("Plan.", TEXT, steps=2)]) == said
    adds = RunnableLambda(lambda _: llm.invoke("Plan.", {"configurable": {"session": "1"}}, steps=2).text)
    assert adds.invoke(None, TEXT) == said


async def test_a_model_in_a_chain_that_is_a_node_knows_its_run(llm: ChatLatentMAS) -> None:
    """LangGraph sets the configuration for the first step of such a chain only."""

    class State(TypedDict, total=False):
        question: str
        plan: str
        reader: str

    prompt = ChatPromptTemplate([("human", "{question}")])
    builder = StateGraph(State)
    builder.add_node("planner", prompt | llm.bind(steps=2, agent="planner") | (lambda said: {"plan": said.text}))
    builder.add_node("judger", prompt | llm | (lambda said: {"reader": said.response_metadata["latent_ref"]["agent"]}))
    builder.add_edge(START, "planner").add_edge("planner", "judger")
    graph, asked = builder.compile(), State(question="What is 1 plus 2?")
    thought, said = graph.invoke(asked), graph.invoke(asked, TEXT)
    assert thought["plan"].startswith("[latent planner 2 steps")
    assert said["plan"] == llm.invoke(prompt.invoke(asked)).text
    assert thought["reader"] == "judger"
    assert [await graph.ainvoke(asked), await graph.ainvoke(asked, TEXT)] == [thought, said]
    steps = list(graph.stream(asked, stream_mode="custom"))
    assert [step["step"] for step in steps] == [1, 2]  # type: ignore[index]
