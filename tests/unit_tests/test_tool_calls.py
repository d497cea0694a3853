import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_latentmas.tool_calls import ToolCallText, forcing_prefix

CALL = {"name": "add", "arguments": {"a": 1, "b": "x"}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "sub")]


def read(text: str, cuts: list[int], prefix: str = "") -> tuple[str, list[Any]]:
    """Pushes a text in pieces."""
    stream = ToolCallText(prefix)
    ends = sorted({*(cut % (len(text) + 1) for cut in cuts), len(text)})
    said = "".join(stream.push(text[a:b]) for a, b in zip([0, *ends], ends, strict=False))
    rest, calls = stream.end()
    return said + rest, [(c["name"], json.loads(c["args"] or "") if c["name"] else c["args"]) for c in calls]


cuts = st.lists(st.integers(0, 200), max_size=8)


@given(st.text(), cuts)
def test_text_without_calls_passes_whatever_the_chunks(text: str, cuts: list[int]) -> None:
    assume(not any(opening in text for opening in ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")))
    assert read(text, cuts) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        f"[TOOL_CALLS][{json.dumps(CALL)}]",
        f"<|python_tag|>{json.dumps({'name': 'add', 'parameters': CALL['arguments']})}",
        json.dumps({"name": "add", "parameters": CALL["arguments"]}),
        f" [{json.dumps(CALL)}]",
    ],
    ids=["qwen", "mistral", "llama", "llama without its tag", "mistral without its tag"],
)
@given(cuts=cuts)
def test_every_format_is_read_whatever_the_chunks(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == ("", [("add", CALL["arguments"])])


def test_parallel_calls_follow_what_was_said() -> None:
    text = "".join(f"<tool_call>\n{json.dumps({**CALL, 'name': name})}\n</tool_call>\n" for name in ("add", "sub"))
    said, calls = read(f"Let me see. {text}", [])
    assert said == "Let me see. "
    assert [name for name, _ in calls] == ["add", "sub"]


@pytest.mark.parametrize("between", ["; ", "\n"])
def test_llamas_calls_follow_one_another(between: str) -> None:
    text = between.join(json.dumps({**CALL, "name": name}) for name in ("add", "sub"))
    assert read(text, []) == ("", [("add", CALL["arguments"]), ("sub", CALL["arguments"])])


@given(cuts=cuts)
def test_what_is_said_after_a_call_is_not_lost(cuts: list[int]) -> None:
    text = f"First: <tool_call>{json.dumps(CALL)}</tool_call>\nThat is all."
    assert read(text, cuts) == ("First: That is all.", [("add", CALL["arguments"])])


def test_a_list_that_begins_an_answer_streams_as_text() -> None:
    stream = ToolCallText()
    assert stream.push(" [") == ""
    assert stream.push("1] See") == " [1] See"
    assert read('[{"a": 1}, {"a": 2}]', [3]) == ('[{"a": 1}, {"a": 2}]', [])


@pytest.mark.parametrize("broken", ['{"name": "add", "arguments": {', '{"name": 1, "arguments": {}}', '["add"]', "{}"])
def test_a_call_that_cannot_be_read_is_invalid_and_not_lost(broken: str) -> None:
    assert read(f"<tool_call>{broken}</tool_call>", []) == ("", [(None, f"<tool_call>{broken}")])


def test_an_answer_that_begins_with_a_brace_is_text() -> None:
    assert read('{"colour": "red"}', [3]) == ('{"colour": "red"}', [])
    assert read("{not json", [3]) == ("{not json", [])


@pytest.mark.parametrize(
    ("choice", "begins"),
    [
        (None, ""),
        ("auto", ""),
        ("sub", '<tool_call>\n{"name": "sub", "arguments": '),
        ("any", '<tool_call>\n{"name": "'),
    ],
)
def test_a_choice_begins_the_text_with_the_call(choice: str | None, begins: str) -> None:
    assert forcing_prefix("{{ tools }} <tool_call>", choice, TOOLS) == begins
    assert forcing_prefix("{{ tools }} another format", choice, TOOLS) == ""


def test_a_begun_call_is_read_with_its_beginning() -> None:
    prefix = forcing_prefix("<tool_call>", "add", TOOLS)
    assert read('{"a": 1, "b": "x"}}\n</tool_call>', [2, 9], prefix) == ("", [("add", CALL["arguments"])])
