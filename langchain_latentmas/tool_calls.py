"""Tool calls in the text of a model, in the formats that chat templates teach."""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.messages import ToolCallChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.utils.function_calling import convert_to_openai_tool

from .errors import InvalidRequest

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)  # Qwen, Hermes
_OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_BARE = re.compile(r"\s*(?:\[\s*)?\{")
_UNDECIDED = re.compile(r"\s*(?:\[\s*)?")


class ToolCallText:
    """Passes on what is said, and keeps what is a tool call for the end.

    Reads `<tool_call>{...}</tool_call>` (Qwen, Hermes), `[TOOL_CALLS][{...}]` (Mistral), `<|python_tag|>{...}; {...}`
    (Llama), and the latter two without their tags, which tokenizers leave out of a text as special tokens. A call is a
    JSON object with `name` and `arguments` or `parameters`.
    """

    def __init__(self, prefix: str = "") -> None:
        """Starts with what the generation prompt already holds of the call."""
        self._said, self._held = prefix, prefix
        self._calling = bool(prefix)

    def push(self, text: str) -> str:
        """Takes more text; returns what certainly is no tool call."""
        self._said += text
        self._held += text
        opened = any(opening in self._held for opening in _OPENINGS)
        if _UNDECIDED.fullmatch(self._said):
            return ""
        if self._calling or opened or _BARE.match(self._said):
            self._calling = True
            at = min((i for i in map(self._held.find, _OPENINGS) if i >= 0), default=0)
            visible, self._held = self._held[:at], self._held[at:]
            return visible
        hold = max(n for opening in _OPENINGS for n in range(len(opening)) if self._held.endswith(opening[:n]))
        visible, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        return visible

    def end(self) -> tuple[str, list[ToolCallChunk]]:
        """What was held back: text that was no call after all, and calls.

        A call that cannot be read keeps its opening tag, so that LangChain finds no JSON in it and files it under
        `invalid_tool_calls`; adding chunks up would lose it there.
        """
        calls: list[ToolCallChunk] = []
        if not self._calling:
            return self._held, calls
        marked = any(opening in self._held for opening in _OPENINGS)
        bare = re.sub("|".join(map(re.escape, _OPENINGS)), "", self._held)
        pieces = _HERMES.findall(self._held)
        rest = _HERMES.sub("", self._held).strip() if pieces else ""
        for piece in pieces or [bare]:
            try:
                calls += [_call(read, index) for index, read in enumerate(_objects(piece), len(calls))]
            except (ValueError, TypeError, KeyError):
                if not marked:  # an answer that merely begins with a brace
                    return self._held, []
                calls.append(tool_call_chunk(args=f"{_OPENINGS[0]}{piece}", id=_call_id(), index=len(calls)))
        return rest, calls


def _objects(text: str) -> Iterator[Any]:
    """The JSON objects in a text, one after the other or in lists; at least one."""
    while True:
        read, end = json.JSONDecoder().raw_decode(text := text.strip("; \r\n\t"))
        yield from read if isinstance(read, list) else [read]
        if not text[end:].strip():
            return
        text = text[end:]


def _call(read: Any, index: int) -> ToolCallChunk:
    arguments = read["arguments"] if "arguments" in read else read["parameters"]
    if not isinstance(read["name"], str) or not isinstance(arguments, dict):
        raise TypeError("a tool call needs a name and an object of arguments")
    return tool_call_chunk(name=read["name"], args=json.dumps(arguments), id=_call_id(), index=index)


def described(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI function descriptions of tools.

    Raises:
        InvalidRequest: If one is no function, such as a vendor's `{"type": "web_search"}`.
    """
    made = [convert_to_openai_tool(tool) for tool in tools]
    if other := next((tool for tool in made if "function" not in tool), None):
        raise InvalidRequest(
            f"This model calls functions only, and a tool of type {other.get('type')!r} without a `function` is none; "
            "give it a function, a class or a BaseTool instead."
        )
    return made


def forcing_prefix(template: str, tool_choice: str | None, tools: list[dict[str, Any]]) -> str:
    """How a text begins that must call a tool, in the format of a chat template; "" where it may choose.

    Args:
        template: The chat template.
        tool_choice: None or "auto", "any" or "required", or the name of a tool.
        tools: OpenAI function descriptions.
    """
    if tool_choice in (None, "auto") or "<tool_call>" not in template:
        return ""
    names = [tool["function"]["name"] for tool in tools]
    name = tool_choice if tool_choice in names else names[0] if len(names) == 1 else None
    return '<tool_call>\n{"name": "' + (f'{name}", "arguments": ' if name else "")


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
