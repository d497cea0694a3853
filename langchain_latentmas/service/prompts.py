"""Messages as the tokens that a model reads: its chat template, and what templates refuse."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from langchain_core.language_models import LanguageModelInput
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InvalidRequest, ModelNotSupported
from .messages import as_openai

if TYPE_CHECKING:
    from .recipes import RecipeSettings, ServedModel


class Prompts:
    """Makes prompts for one model.

    Attributes:
        model: What is known of it.
        settings: As given.
        template: The chat template in use.
        plain: Whether the tokens of a text are those that the tokenizers library gives it.
    """

    def __init__(self, model: "ServedModel", settings: "RecipeSettings") -> None:
        """Looks for a chat template.

        Args:
            model: What is known of the model.
            settings: Chat template, and what is passed to it.

        Raises:
            ModelNotSupported: If the tokenizer has no chat template.
        """
        self.model, self.settings = model, settings
        self.template: str = settings.chat_template or model.tokenizer.chat_template or ""
        if not self.template:
            raise ModelNotSupported(f"{model.name}: its tokenizer has no chat template; pass chat_template=...")
        self.plain = _is_plain(model.tokenizer)

    def encode(
        self, messages: LanguageModelInput, tag: str, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Token ids of messages in the chat template, with a generation prompt that ends in `tag`.

        Raises:
            InvalidRequest: If there are no messages, or the template or this model cannot take them.
        """
        listed = _as_messages(messages)
        if self._system_needs_user and all(message["role"] == "system" for message in listed):
            listed = [*listed, {"role": "user", "content": ""}]
        if self._roles_must_alternate:
            listed = list(_alternating(listed))
        if tools and "tools" not in self.template:
            raise InvalidRequest(
                f"The chat template of {self.model.name} presents no tools, so the model would never see them; "
                "pass chat_template=... that does, or bind none."
            )
        try:
            ids = self.token_ids(self._rendered(listed, tools) + tag)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}") from error
        if not ids:
            raise InvalidRequest(
                "The model's chat template makes no tokens of these messages; it must make at least one."
            )
        return tuple(ids)

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        return self.model.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=True,
            **self.settings.template_args,
        )

    @cached_property
    def _system_needs_user(self) -> bool:
        """Whether the chat template drops, or refuses, a system message that no user message follows.

        Such is what an agent is told when all else that it reads is a memory. Gemma's template puts what the system
        says into the turn of the user; others look for a user's query.
        """
        said = "You are told this."
        try:
            return said not in self._rendered([{"role": "system", "content": said}])
        except (jinja2.TemplateError, TypeError, ValueError):
            return True

    @cached_property
    def _roles_must_alternate(self) -> bool:
        """Whether the chat template refuses two user messages in a row.

        Such are left when the text between them was a marker. Mistral's and Gemma's templates do.
        """
        try:
            self._rendered([{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}])
        except (jinja2.TemplateError, TypeError, ValueError):
            return True
        return False

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands."""
        tokenizer = self.model.tokenizer
        if self.plain:  # the Python around it takes longer than the tokens of a short prompt
            backend = tokenizer.backend_tokenizer
            if (backend.truncation, backend.padding, backend.encode_special_tokens) == (None, None, False):
                return list(backend.encode(text, add_special_tokens=False).ids)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is one of the tokenizers library and adds nothing of its own when it encodes a text."""
    kind = type(tokenizer)
    calls = kind.__call__ is PreTrainedTokenizerBase.__call__
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and calls
        and (kind._encode_plus is PreTrainedTokenizerFast._encode_plus and not tokenizer.split_special_tokens)
    )


def _as_messages(messages: LanguageModelInput) -> list[dict[str, Any]]:
    listed = as_openai(messages)
    # By order: a random id that a template prints would make another memory of the same words, and Mistral's take nine
    # letters or digits.
    numbers: dict[str, str] = {}

    def numbered(id: Any) -> str:
        return numbers.setdefault(str(id), f"{len(numbers):09d}")

    for message in listed:
        for call in message.get("tool_calls") or ():  # templates want the arguments as an object
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            call["id"] = numbered(call.get("id"))
        if "tool_call_id" in message:
            message["tool_call_id"] = numbered(message["tool_call_id"])
    return listed


def _alternating(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Messages with those of the same user or assistant in a row made one, where they are text."""
    before: dict[str, Any] = {}
    for message in messages:
        texts = all(isinstance(each.get("content"), str) and not each.get("tool_calls") for each in (before, message))
        if texts and message["role"] == before["role"] != "tool":
            before = {**before, "content": f"{before['content']}\n\n{message['content']}"}
            continue
        if before:
            yield before
        before = message
    yield before
