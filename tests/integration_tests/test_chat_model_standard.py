"""LangChain's own tests of chat models, on a small random model: as it is, and with its tokens scripted."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, ToolMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.engine import tick
from langchain_latentmas.service.local import LocalService

from ..support import PARITY

QWEN_LIKE = """\
{%- if tools %}<|im_start|>system
Call functions within <tool_call></tool_call>:
{%- for tool in tools %}
{{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "magic_function": {"input": 3},
    "magic_function_no_args": {},
    "greeting_generator": {"answer_style": "pirate"},
    "my_adder_tool": {"a": 3, "b": 4},
    "get_weather": {"location": "San Francisco"},
    "unicode_customer": {"customer_name": "你好 こんにちは", "description": "客户"},
    "Joke": {"setup": "Why?", "punchline": "Because."},
    "joke": {"setup": "Why?", "punchline": "Because."},
    "JokeDict": {"setup": "Why?", "punchline": "Because."},
}


@cache
def small_service() -> LatentService:
    return LatentService.load(str(PARITY / "qwen3-tied" / "model"), device="cpu", chat_template=QWEN_LIKE)


class TestAsItIs(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLatentMAS

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"service": small_service(), "max_tokens": 24}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Without `timeout` and `max_retries`, which are settings of the service."""
        return {"temperature": 0, "max_tokens": 100, "stop": []}

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "bundled"

    @property
    def has_tool_calling(self) -> bool:
        """A random model of half a million parameters calls no tool on purpose; `TestScripted` does."""
        return False


def answer(messages: list[BaseMessage], prefix: str, tools: list[dict[str, Any]] | None) -> str:
    """What a clever model says after the prefix: it calls the tool that is asked for, then reports."""
    if not tools or (isinstance(messages[-1], ToolMessage) and not prefix):
        return "All done."
    names = [tool["function"]["name"] for tool in tools]
    name = next((name for name in names if f'"{name}"' in prefix), names[0])
    arguments = json.dumps(ARGUMENTS[name], ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'.removeprefix(prefix)


class TestScripted(ChatModelIntegrationTests):
    """Every token is chosen by `answer`, in place of the sampler; all else is the real service."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLatentMAS

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"service": small_service(), "temperature": 1.0}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Without `timeout` and `max_retries`, which are settings of the service."""
        return {"temperature": 0, "max_tokens": 100, "stop": []}

    @pytest.fixture(autouse=True)
    def _script(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encode = LocalService.encode
        asked: list[tuple[Any, ...]] = []

        def noticing(service: LocalService, messages: Any, tag: str, tools: Any = None) -> tuple[int, ...]:
            asked[:] = [(messages, tag, tools)]
            return encode(service, messages, tag, tools)

        class Script:
            def __init__(self, sampling: Any, device: torch.device) -> None:
                tokenizer = small_service().model.tokenizer  # type: ignore[attr-defined]
                ids = tokenizer(answer(*asked[0]), add_special_tokens=False)["input_ids"]
                self.ids: Iterator[int] = iter([*ids, tokenizer.eos_token_id])

            def __call__(self, logits: torch.Tensor) -> int:
                return next(self.ids)

        monkeypatch.setattr(LocalService, "encode", noticing)
        monkeypatch.setattr(tick, "Sampler", Script)
