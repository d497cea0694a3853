"""What the tests of all integrations share: a small model, as it is and with its tokens scripted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may touch the network

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.engine import tick
from langchain_latentmas.service.local import LocalService

MODEL = Path(__file__).parents[1] / "tests" / "data" / "parity" / "qwen3-tied" / "model"
TEMPLATE = """\
{%- for tool in tools or [] %}<tool_call>{{ tool.function.name }}
{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

Answer = Callable[[list[str]], str]


@pytest.fixture(scope="session")
def service() -> Iterator[LatentService]:
    """A small random model whose template presents tools."""
    with LatentService.load(str(MODEL), device="cpu", chat_template=TEMPLATE) as service:
        yield service


@pytest.fixture
def llm(service: LatentService) -> ChatLatentMAS:
    """The model as it is."""
    return ChatLatentMAS(service=service, max_tokens=6)


@pytest.fixture
def scripted(service: LatentService, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], ChatLatentMAS]:
    """A model that says, token by token through the real engine, what a function makes of the names of its tools."""
    encode = LocalService.encode
    offered: list[str] = []

    def noticing(service: LocalService, messages: Any, tag: str, tools: Any = None) -> tuple[int, ...]:
        offered[:] = [tool["function"]["name"] for tool in tools or ()]
        return encode(service, messages, tag, tools)

    def make(answer: Answer) -> ChatLatentMAS:
        class Script:
            def __init__(self, sampling: Any, device: Any) -> None:
                assert isinstance(service, LocalService)
                tokenizer = service.model.tokenizer
                ids = tokenizer(answer(list(offered)), add_special_tokens=False)["input_ids"]
                self.ids = iter([*ids, tokenizer.eos_token_id])

            def __call__(self, logits: Any) -> int:
                return next(self.ids)

        monkeypatch.setattr(LocalService, "encode", noticing)
        monkeypatch.setattr(tick, "Sampler", Script)
        return ChatLatentMAS(service=service, temperature=1.0)

    return make
