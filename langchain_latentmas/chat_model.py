"""ChatLatentMAS, the LangChain chat model over a latent service; all speaking goes through it."""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakSet

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ToolMessage,
    UsageMetadata,
    message_chunk_to_message,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langchain_core.utils import from_env
from pydantic import ConfigDict, Field

from .errors import InvalidReference, InvalidRequest
from .modes import inside, names_in, namespace, node_path, runs_as_text
from .progress import reporter
from .service import Chunk, LatentService
from .service.base import READING
from .service.marker import OPENING
from .service.messages import as_openai
from .service.shared import loaded, shared_service
from .state import LatentRef
from .tool_calls import ToolCallText, described, forcing_prefix

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=AIMessage)

# Content blocks that repeat a message's tool calls, or hold what a model of another vendor thought before it spoke.
UNREAD_BLOCKS = ("tool_call", "tool_use", "invalid_tool_call", "reasoning", "thinking", "redacted_thinking")
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed")
# Where things belong that people give to the model.
BELONGS = {
    "steps": "to a call, llm.invoke(..., steps=20), to switch_edges(..., steps=20), or to a LatentAgentNode",
    "latents": "to a call, llm.invoke(..., latents=[ref])",
    "agent": "to a call, llm.invoke(..., agent='planner')",
    "tools": "to llm.bind_tools(...)",
    "timeout": "to the service, LatentService.load('http://...', deadline=60)",
    "max_retries": "to the service, LatentService.load('http://...', patience=120)",
}
_unforced: WeakSet[LatentService] = WeakSet()  # of which the log has said that they cannot be made to call a tool


class Thinker(NamedTuple):
    """The graph node in which model calls think instead of speaking; set by `switch_edges`."""

    name: str
    steps: int
    edges: str
    """Its latent edges, for messages."""
    outputs: frozenset[tuple[str, ...]]
    """Paths of nodes in subgraphs whose model calls are the node's own output; () is the node itself."""
    namespace: str = ""
    """The node's own `checkpoint_ns`."""
    inside: frozenset[str] = frozenset()
    """Nodes of the subgraphs that were seen in it."""

    def speaks_here(self, config: RunnableConfig) -> bool:
        """Whether the call comes from an inner node whose text stays inside of the subgraph."""
        return self._below(config) not in self.outputs

    def warn_of_hidden(self, config: RunnableConfig) -> None:
        """Says so where the call comes from a graph that nobody saw in the node, and so speaks."""
        path = self._below(config)
        if path and path[0] not in self.inside:
            logger.warning(
                "%r calls the model in a graph or task that switch_edges cannot see (at %r): it speaks there, and %s "
                "may be text. Let a global or a closure of the node hold that graph, or make it the node.",
                *(self.name, path[0], self.edges),
            )

    def _below(self, config: RunnableConfig) -> tuple[str, ...]:
        """Path of a call from the node on; a graph that it calls with a thread of its own has its whole path."""
        here, around = namespace(config), names_in(self.namespace)
        # A subgraph with a checkpointer of its own drops the ids of tasks.
        own = here == self.namespace or here.startswith((f"{self.namespace}|", f"{'|'.join(around)}|"))
        return names_in(here)[len(around) if own else 0 :]


THINKER: ContextVar[Thinker | None] = ContextVar("latentmas_thinker", default=None)


class ChatLatentMAS(BaseChatModel):
    r"""A chat model that can read memories before it speaks.

    Example:
        ```python
        service = LatentService.load("Qwen/Qwen3-4B", device="cuda", speak_tag="<think>\n\n</think>\n\n")
        llm = ChatLatentMAS(service=service, max_tokens=256)  # or model="bundled"
        llm.invoke("What is the answer?", latents=[ref])
        llm.invoke("Plan the answer.", agent="planner", steps=20)
        ```

    A call with `steps` thinks, and returns a marker as its text; in a graph that runs with
    `{"configurable": {"edges": "text"}}` it speaks. In a node that `switch_edges` made think, every call thinks, but
    for those with `speak=True`, whose text the node itself can read: `llm.invoke("Name two queries.", speak=True)`.
    Markers in its messages are taken out, verified, and read as the memories they stand for.

    The message it returns has `usage_metadata` with `output_token_details["latent_steps"]`: the thoughts that spoken
    text was read from, or the steps that a marker stands for. A marker's own usage counts no input tokens, although its
    prompt was prefilled: compare costs by output tokens and seconds. `response_metadata` has the model's name, the
    finish reason, and as `latent_ref` the reference of what was said or thought; that of a marker says `thought`
    besides. Whoever shows `stream_mode="messages"` leaves out what holds "[latent ": a node may wrap a marker anew.

    Attributes:
        service: The model service; None takes the shared one of `model`.
        model: What `LatentService.load` takes, where `service` is None; by default `LATENTMAS_SERVICE`, else "bundled".
            A call may name another one: `llm.invoke("Hello", model="Qwen/Qwen3-8B")`.
        device: "cuda", "cpu", ..., where `service` is None; by default `LATENTMAS_DEVICE`, else the service chooses.
        dtype: Name of a torch dtype, where `service` is None; by default `LATENTMAS_DTYPE`, else the checkpoint's.
            For all other settings, load a service.
        max_tokens: Most tokens to decode.
        temperature: 0 means greedy.
        top_p: Nucleus sampling.
        top_k: Only so many most likely tokens.
        seed: For the same sample again.
        stop: Strings that end the text, where a call names none.
        marker_text: What is left in a marker's place in a message.
        streaming: Whether `invoke` streams, whoever listens; None streams where somebody does.

    Raises:
        InvalidRequest: At any other argument; LangChain's `timeout` and `max_retries` are settings of the service.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    service: LatentService | None = Field(default=None, exclude=True, repr=False)
    model: str | None = Field(default_factory=from_env("LATENTMAS_SERVICE", default=None), alias="model_name")
    device: str | None = None
    dtype: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    marker_text: str = ""
    streaming: bool | None = None

    def __init__(self, **given: Any) -> None:
        """Checks names and values.

        Args:
            **given: The attributes.

        Raises:
            InvalidRequest: If one is none.
        """
        known = {*type(self).model_fields, *(field.alias for field in type(self).model_fields.values())}
        if unknown := [name for name in given if name not in known]:
            hints = "".join(f" {name} belongs {place}." for name in unknown if (place := _place(name)))
            raise InvalidRequest(
                f"ChatLatentMAS takes no {', '.join(unknown)}; it takes service, model, device, dtype, "
                f"{', '.join(SAMPLING)}, stop, marker_text, streaming and what every chat model of LangChain "
                f"takes.{hints}"
            )
        super().__init__(**given)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: everything but the service itself is plain data."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class again."""
        return ["langchain_latentmas", "chat_model"]

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Presents tools to the model through its own chat template, and reads its calls in that template's format.

        Args:
            tools: Anything LangChain converts to an OpenAI function description.
            tool_choice: "any" (or True) or a tool's name begins the text with the call, where the template's format is
                known (`<tool_call>`; with any other the choice is the model's, and the log says so, once per
                service); None and "auto" leave the choice to the model; "none" presents no tools.
            **kwargs: Bound as well. `strict` and `parallel_tool_calls`, which some agents pass to every model, ask for
                what a local model cannot promise; they are left out, and the log says so.

        Raises:
            InvalidRequest: If a tool is no function, or `tool_choice` names none.
        """
        for name in ("strict", "parallel_tool_calls"):
            if kwargs.pop(name, None) is not None:
                logger.warning("%s is left out: the model calls tools as its chat template taught it to", name)
        offered = described(tools)
        if isinstance(tool_choice, dict):
            tool_choice = str(tool_choice.get("function", {}).get("name"))
        choice = "any" if tool_choice is True else tool_choice or None
        named = [tool["function"]["name"] for tool in offered]
        if choice not in (None, "auto", "none", "any", "required", *named):
            raise InvalidRequest(
                f"tool_choice={choice!r} is none of the tools: {', '.join(named) or 'there are none'}."
            )
        return self.bind(tools=offered, tool_choice=choice, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands, by the model's own tokenizer.

        Raises:
            InvalidRequest: If the model runs behind a server.
        """
        return self.custom_get_token_ids(text) if self.custom_get_token_ids else self._service.token_ids(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens that a call with these messages prefills, by the model's own chat template.

        A marker counts as what it leaves, `marker_text`; the positions of its memory are `latent_ref["positions"]`. Of
        messages that the template refuses the texts are counted: `trim_messages` asks for parts of a conversation, and
        for these backwards.

        Raises:
            InvalidRequest: If the model runs behind a server, the messages hold more than text, or the template
                presents no tools or refuses messages with them.
            InvalidReference: If a marker cannot be read.
        """
        if not messages:
            return 0
        service = self._service
        read, _ = without_markers(messages, service, self.marker_text)
        offered = described(tools) if tools else None
        try:
            return len(service.token_ids(read, offered))
        except InvalidRequest:
            if offered:
                raise
            return sum(len(service.token_ids(message["content"] or "")) for message in as_openai(read))

    def _resolve_model_profile(self) -> ModelProfile | None:
        most = None if self.service is None else self.service.max_positions
        return None if most is None else ModelProfile(max_input_tokens=most)

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What is written down of a service: its address, or the name of its model."""
        if self.service is None or "model" in self.model_fields_set:
            return {}
        return {"model": self.service.address}

    @property
    def _service(self) -> LatentService:
        return shared_service(self.model, self.device, self.dtype) if self.service is None else self.service

    @property
    def _llm_type(self) -> str:
        return "latentmas"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "device", "dtype", *SAMPLING)}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Key of LangChain's model cache."""
        service = self._at_hand(kwargs.get("model"))
        served = None if service is None else service.identity
        reading = READING.get()
        return f"{super()._get_llm_string(stop, **kwargs)}---{served}---{reading and reading.name}"

    def _caching(self, call: Mapping[str, Any]) -> "ChatLatentMAS":
        """This model, without LangChain's cache where a call has nothing to do with it.

        Thoughts are known to the service. What is not loaded has no identity yet, and to load it takes long, on what
        may be an event loop.
        """
        if self.cache is False or (self.cache is None and get_llm_cache() is None):
            return self
        thinks = _thinker(call.get("agent"), call.get("steps"), bool(call.get("speak")), ensure_config())
        if thinks is None and self._at_hand(call.get("model")) is not None:
            return self
        return self.model_copy(update={"cache": False})

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        llm = self._caching(kwargs)
        return super(ChatLatentMAS, llm)._generate_with_cache(messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        llm = self._caching(kwargs)
        return await super(ChatLatentMAS, llm)._agenerate_with_cache(messages, stop, run_manager, **kwargs)

    def _at_hand(self, model: str | None) -> LatentService | None:
        """The service of a call that names this model, or none; None where it has to be loaded first."""
        if not model and self.service is not None:
            return self.service
        return loaded(model or self.model, self.device, self.dtype)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="latentmas",
            ls_model_name=kwargs.get("model") or (self.service.name if self.service else self.model or "bundled"),
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if named := stop or self.stop:
            params["ls_stop"] = named
        return params

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """See `BaseChatModel.invoke`. What `config` says of edges and nodes counts wherever the call stands."""
        with inside(config):
            return super().invoke(input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Like `invoke`."""
        with inside(config):
            return await super().ainvoke(input, config, **kwargs)

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """Like `invoke`, chunk by chunk."""
        chunks = super().stream(input, config, **kwargs)
        with inside(config):  # a call asks for it before its first chunk, and others must not find it between two
            first = list(islice(chunks, 1))
        yield from first
        yield from chunks

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """Like `stream`."""
        spoken = cast(AsyncGenerator[AIMessageChunk], super().astream(input, config, **kwargs))
        async with aclosing(spoken) as chunks:
            with inside(config):
                first = await anext(chunks, None)
            if first is not None:
                yield first
            async for chunk in chunks:
                yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(_Call(self, messages, stop, kwargs).whole())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(await (await _Call.aside(self, messages, stop, kwargs)).awhole())

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for generation in _Call(self, messages, stop, kwargs).parts():
            if run_manager:
                run_manager.on_llm_new_token(generation.text, chunk=generation)
            yield generation

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for generation in (await _Call.aside(self, messages, stop, kwargs)).aparts():
            if run_manager:
                await run_manager.on_llm_new_token(generation.text, chunk=generation)
            yield generation


for _generate in (ChatLatentMAS._generate, ChatLatentMAS._agenerate):  # LangChain asks for it in every call
    _generate.__signature__ = inspect.signature(_generate)  # type: ignore[union-attr]
del _generate


class _Call:
    """One call of the model: what it reads, whether it thinks, and how what comes becomes messages."""

    def __init__(
        self,
        llm: ChatLatentMAS,
        messages: list[BaseMessage],
        stop: list[str] | None,
        given: dict[str, Any],
        service: LatentService | None = None,
    ) -> None:
        model: str | None = given.pop("model", None)
        if service is None:
            service = shared_service(model, llm.device, llm.dtype) if model else llm._service
        self.service = service
        self.named: str | None = given.pop("agent", None)
        tools, choice = given.pop("tools", None), given.pop("tool_choice", None)
        tools = None if choice == "none" else tools
        for name in ("ls_structured_output_format", "stream"):  # for tracing, and for LangChain to choose a way
            given.pop(name, None)
        latents: Sequence[LatentRef] = given.pop("latents", None) or ()
        steps: int | None = given.pop("steps", None)
        speak: bool = given.pop("speak", False)
        config = ensure_config()
        self.agent = _agent(self.named, config)
        self.thinker = _thinker(self.named, steps, speak, config)
        if self.thinker is None and not speak and (around := THINKER.get()):
            around.warn_of_hidden(config)
        if self.thinker and tools:
            raise InvalidRequest(
                f"Node {self.agent!r} has tools or structured output bound, which need text, but its edges are latent "
                f"({self.thinker.edges}); switch these to text, or bind the tools in another node."
            )
        try:
            self.messages, marked = without_markers(messages, self.service, llm.marker_text)
        except InvalidReference as error:
            raise type(error)(f"{self.agent!r} cannot read what it was handed. {error}") from error
        self.latents = [*latents, *marked]
        prefix = forcing_prefix(self.service.chat_template, choice, tools) if tools else ""
        if tools and choice not in (None, "auto") and not prefix and self.service not in _unforced:
            _unforced.add(self.service)
            logger.warning(
                "tool_choice=%r cannot be forced: the chat template of %s has no <tool_call>, so the model may answer "
                "without a call; pass chat_template=... that teaches it, or check message.tool_calls",
                *(choice, self.service.name),
            )
        self.calls = ToolCallText(prefix) if tools else None
        own = {name: getattr(llm, name) for name in SAMPLING}
        self.sampling = {**own, **given, "stop": stop or llm.stop, "tools": tools, "prefix": prefix}

    @classmethod
    async def aside(cls, *call: Any) -> "_Call":
        """Made in a thread of its own, where the service has to be loaded first, or a store or server to be asked."""
        llm, messages, stop, given = call
        service = llm._at_hand(given.get("model"))
        if service is not None and not any(may_hold_marker(message) for message in messages):
            return cls(llm, messages, stop, given, service)
        return await asyncio.to_thread(cls, llm, messages, stop, given, service)

    def whole(self) -> AIMessage:
        """Thinks or speaks, and returns all of it."""
        if self.thinker is not None:
            return self._thought(self.service.think(self.messages, self.latents, **self._thinking), AIMessage)
        return self._said(self.service.say(self.messages, self.latents, agent=self.agent, **self.sampling))

    async def awhole(self) -> AIMessage:
        """Like `whole`."""
        if self.thinker is not None:
            ref = await self.service.athink(self.messages, self.latents, **self._thinking)
            return self._thought(ref, AIMessage)
        return self._said(await self.service.asay(self.messages, self.latents, agent=self.agent, **self.sampling))

    def parts(self) -> Iterator[ChatGenerationChunk]:
        """Thinks, or speaks token by token."""
        if self.thinker is not None:
            ref = self.service.think(self.messages, self.latents, **self._thinking)
            return iter([_last(self._thought(ref, AIMessageChunk))])
        spoken = self.service.speak(self.messages, self.latents, agent=self.agent, **self.sampling)
        return map(self._generation, spoken)

    async def aparts(self) -> AsyncIterator[ChatGenerationChunk]:
        """Like `parts`."""
        if self.thinker is not None:
            ref = await self.service.athink(self.messages, self.latents, **self._thinking)
            yield _last(self._thought(ref, AIMessageChunk))
            return
        speak = partial(self.service.aspeak, agent=self.agent, **self.sampling)
        # In a thread, since it reads recipes and makes tokens of the messages.
        async for chunk in await asyncio.to_thread(speak, self.messages, self.latents):
            yield self._generation(chunk)

    @property
    def _thinking(self) -> dict[str, Any]:
        assert self.thinker is not None
        steps = self.thinker.steps
        return {"steps": steps, "agent": self.agent, "on_step": reporter(self.agent, steps)}

    def _thought(self, ref: LatentRef, kind: type[M]) -> M:
        """The message of a think: a marker."""
        message = kind(content=self.service.marker(ref), name=self.named)
        message.usage_metadata = _usage(0, 0, ref["steps"])
        message.response_metadata = {**self._metadata("stop", ref), "thought": True}
        return message

    def _said(self, chunk: Chunk) -> AIMessage:
        """The message of all that was spoken."""
        if self.calls:  # only chunks make tool calls of text
            return cast(AIMessage, message_chunk_to_message(self._generation(chunk).message))
        message = AIMessage(content=chunk.text, name=self.named)
        self._close(message, chunk)
        return message

    def _generation(self, chunk: Chunk) -> ChatGenerationChunk:
        """The message chunk of a piece of spoken text."""
        text = self.calls.push(chunk.text) if self.calls else chunk.text
        message = AIMessageChunk(content=text, name=self.named)
        if chunk.usage is not None and chunk.ref is not None:
            if not self.calls:
                self._close(message, chunk)
                return _last(message)
            # LangChain ends the stream with an empty chunk: what it makes of the last one holds no malformed calls.
            rest, calls = self.calls.end()
            message = AIMessageChunk(content=text + rest, name=self.named, tool_call_chunks=calls)
            self._close(message, chunk)
        return ChatGenerationChunk(message=message)

    def _close(self, message: AIMessage, last: Chunk) -> None:
        """Says in a message what the last chunk says."""
        assert last.usage is not None
        assert last.ref is not None
        usage = last.usage
        message.usage_metadata = _usage(usage["input_tokens"], usage["output_tokens"], usage["latent_steps"])
        message.response_metadata = {**self._metadata(last.finish_reason or "", last.ref), "merge": usage["merge"]}

    def _metadata(self, finish: str, ref: LatentRef) -> dict[str, Any]:
        return {
            "model_provider": "latentmas",
            "model_name": self.service.name,
            "finish_reason": finish,
            "agent": self.named,
            "latent_ref": ref,
        }


def _place(name: str) -> str:
    """Where something belongs that was given to the model; "" if nowhere."""
    from .service.local import LOADING, LocalSettings  # which imports transformers: seconds

    own = {*LOADING, *LocalSettings.model_fields}
    of_the_service = f"to the service, ChatLatentMAS(service=LatentService.load(..., {name}=...))"
    return BELONGS.get(name) or (of_the_service if name in own else "")


def _agent(named: str | None, config: RunnableConfig) -> str:
    """Who calls: as the call says, else the node that thinks, else the innermost node."""
    around = THINKER.get()
    return named or (around and around.name) or (node_path(config) or ("agent",))[-1]


def _thinker(named: str | None, steps: int | None, speak: bool, config: RunnableConfig) -> Thinker | None:
    """How a call thinks; None if it speaks."""
    if speak:
        if steps is not None:
            raise InvalidRequest(f"A call with speak=True takes no latent steps; leave steps={steps!r} out.")
        return None
    agent = _agent(named, config)
    if steps is not None and not runs_as_text(config, agent, *node_path(config)):
        return Thinker(agent, steps, f"steps={steps}", frozenset())
    around = THINKER.get()
    return None if around is None or around.speaks_here(config) else around


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])


def _last(message: AIMessageChunk) -> ChatGenerationChunk:
    message.chunk_position = "last"
    return ChatGenerationChunk(message=message)


def _usage(read: int, spoken: int, latent_steps: int) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=read,
        output_tokens=spoken,
        total_tokens=read + spoken,
        output_token_details={"latent_steps": latent_steps},  # type: ignore[typeddict-unknown-key]
    )


def may_hold_marker(message: BaseMessage) -> bool:
    """Whether `without_markers` has to look into a message."""
    return OPENING in str(message.content) or OPENING in str(getattr(message, "tool_calls", ""))


def without_markers(
    messages: Sequence[BaseMessage], service: LatentService, left: str
) -> tuple[list[BaseMessage], list[LatentRef]]:
    """Takes the markers out of messages; a message that was nothing else goes with them, unless it is the only one."""
    kept: list[BaseMessage] = []
    emptied: list[BaseMessage] = []
    refs: list[LatentRef] = []

    def take(text: str) -> str:
        text, found = service.take_markers(text, left)
        refs.extend(found)
        return text

    for message in messages:
        before = len(refs)
        content: Any = message.content
        if isinstance(content, str):
            content = take(content)
        else:
            content = [block for block in content if isinstance(block, str) or block.get("type") not in UNREAD_BLOCKS]
            content = [
                take(block)
                if isinstance(block, str)
                else {**block, "text": take(block["text"])}
                if isinstance(block.get("text"), str)
                else block
                for block in content
            ]
        if content != message.content:
            message = message.model_copy(
                update={"content": content.strip() if isinstance(content, str) else content or ""}
            )
        calls = getattr(message, "tool_calls", None)
        if calls and (changed := [{**call, "args": _each_string(call["args"], take)} for call in calls]) != calls:
            message = message.model_copy(update={"tool_calls": changed})
        answers = isinstance(message, ToolMessage) or calls  # and belong together
        empty = len(refs) > before and not message.text.strip() and not answers
        (emptied if empty else kept).append(message)
    return kept or emptied[-1:], refs


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its strings changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_string(part, change) for key, part in value.items()}
    return [_each_string(part, change) for part in value] if isinstance(value, list) else value
