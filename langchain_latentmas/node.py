"""LatentAgentNode: a LangGraph node that thinks or speaks on top of what other agents thought."""

import asyncio
import dataclasses
import hashlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.runtime import Runtime, get_runtime

from .chat_model import ChatLatentMAS, may_hold_marker, without_markers
from .errors import InvalidRequest, WrongModel, check_whole
from .modes import inside, node_path, runs_as_text
from .progress import reporter
from .service import LatentService
from .service.identity import checked_on_failure
from .service.shared import shared_service
from .state import LatentRef, ancestry, tips
from .unread import held, key_of, last_human, mark, memory_of, not_yet_read, thoughts, warn_of_thoughts

logger = logging.getLogger(__name__)

Prompt = str | SystemMessage | Runnable[Any, Any] | Callable[[Any], Any] | Callable[[Any], Awaitable[Any]]


class _Plan(NamedTuple):
    """What one run of a node will do."""

    service: LatentService
    messages: list[BaseMessage]
    latents: list[LatentRef]
    leaves_text: bool
    """And no reference."""
    thinks: bool
    conversation: Sequence[BaseMessage]
    """All that was said before, if its prompt or the memories it reads hold it; else nothing."""


class LatentAgentNode(Runnable[Any, dict[str, Any]]):
    """An agent of a latent graph.

    A thinking agent returns `{"latents": [ref]}`, a speaking one `{"messages": [AIMessage], "latents": [ref]}`. It
    reads the memories of others through the references in the state's `latents`, and what stands in such a memory is
    not read a second time from `messages`: what an agent said and, under a prompt of words, the conversation before
    it, but for the last question. Thinking reports its progress on `stream_mode="custom"` as
    `{"agent", "step", "steps"}`; the tokens of speaking arrive on `stream_mode="messages"`.

    Run with `{"configurable": {"edges": "text"}}`, the same node speaks where it would think, and finds what others
    said since the last human message at the head of that message, as `name: text` (and what they said before it, if the
    prompt leaves it out and the node has not run since: a human may come in between two agents). A mapping such as
    `{"planner->critic": "text"}` does that to single nodes: the planner speaks and leaves no reference, and whoever
    reads it reads its text, beside the memories of others.

    What a node gets as its input is all that it knows: where a `Send` or an `input_schema` leaves `latents` out, it
    reads nobody. A `Send` to agents that shall read passes `"latents": state["latents"]`. A prompt of words takes
    `messages` and `latents` from the input and nothing else, so one with neither is refused: what a `Send` gives beside
    them, or a text alone, is for a prompt that is a template or a function.

    A `CachePolicy` of LangGraph knows the node's input and nothing of `edges`: what a latent run cached, a text run
    gets as it is, and so no text. Clear the cache between such runs (`graph.clear_cache()`), or cache no agents. A
    cache that outlives the process gives back references that a service without `store` does not know after a restart,
    and refuses: give it one, or clear the cache. Two prompts that are functions of one name, such as lambdas, are the
    same to a cache.

    Example:
        ```python
        builder.add_node("planner", LatentAgentNode("planner", prompt="You are a planner ...", steps=20))
        builder.add_node("judger", LatentAgentNode("judger", prompt="...", speak=True, reads=["planner", "critic"]))
        ```
    """

    def __init__(
        self,
        name: str,
        prompt: Prompt,
        *,
        service: LatentService | None = None,
        steps: int = 20,
        speak: bool = False,
        reads: Sequence[str] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> None:
        """Describes the agent; nothing is loaded before it runs.

        Args:
            name: Its name, in references, messages and `reads`.
            prompt: A string or a `SystemMessage` stands in front of the state's messages; a prompt template is filled
                from the state; a callable gets the state and returns messages (one that is `async` runs in `ainvoke`
                only).
            service: The model service; None takes `service` of the graph's runtime context, else `LATENTMAS_SERVICE`,
                else the bundled model.
            steps: Latent steps, where it thinks.
            speak: Whether it decodes text.
            reads: Agents whose memories it reads, in the order in which they are merged: those it has not read yet, or
                if there are none, those it read last. Of an agent that is a node beside it and has not run (another
                branch was taken, or a loop begins) it reads nothing; where the state looks as if it had run, the log
                says so. None reads every tip of the state (a reference that no other one there descends from), by agent
                name, and so all of a conversation.
            max_tokens: Most tokens to decode, where it speaks.
            temperature: 0 means greedy.
            top_p: Nucleus sampling.
            top_k: Only so many most likely tokens.
            stop: Strings that end its text.
            seed: For the same sample again.

        Raises:
            InvalidRequest: If the name is empty, `steps` is negative, `max_tokens` below 1, or one of these, `prompt`,
                `reads`, `stop` or `service` is of another type.
        """
        if not (name and isinstance(name, str)):
            raise InvalidRequest(f"An agent needs a name, not {name!r}.")
        check_whole(f"Agent {name!r}: steps", steps)
        check_whole(f"Agent {name!r}: max_tokens", max_tokens, 1)
        if not (isinstance(prompt, (str, SystemMessage, Runnable)) or callable(prompt)):
            raise InvalidRequest(
                f"Agent {name!r}: prompt must be a string, a SystemMessage, a prompt template or a function of the "
                f"state, not {type(prompt).__name__}."
            )
        if not (reads is None or (isinstance(reads, Sequence) and not isinstance(reads, str))):
            raise InvalidRequest(f"Agent {name!r}: reads must be a list of names, such as ['planner'], not {reads!r}.")
        if not (stop is None or isinstance(stop, Sequence)):
            raise InvalidRequest(f"Agent {name!r}: stop must be a string or a list of strings, not {stop!r}.")
        if service is not None and not isinstance(service, LatentService):
            raise InvalidRequest(f"Agent {name!r}: service must be a LatentService, not {type(service).__name__}.")
        self.name = name
        self.prompt, self.service, self.steps, self.speak = prompt, service, steps, speak
        self.reads = None if reads is None else list(reads)
        self.max_tokens = max_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        self.sampling["stop_sequences"] = [stop] if isinstance(stop, str) else list(stop) if stop else None
        self._llm: ChatLatentMAS | None = None
        self._missed: set[str] = set()  # agents of whom the log has said that nothing of them is there
        # LangGraph tells what it caches apart by this, as it does for functions.
        made_of = (name, steps, speak, self.reads, max_tokens, self.sampling, service and service.identity)
        described = f"{made_of} {prompt if isinstance(prompt, str) else told_by(prompt)}"
        self.__qualname__ = f"{type(self).__name__}.{hashlib.sha256(described.encode()).hexdigest()[:32]}"

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Runs the agent on a graph state; see the class for what it returns.

        Raises:
            InvalidRequest: If `reads` names somebody who neither left anything nor is a node beside this one, the
                input is none that the prompt can take, the prompt gives no messages, `configurable.edges` is malformed,
                there are `kwargs`, or the state of the graph has no `latents`, or no `messages` for what the agent
                says.
            LatentMASError: Whatever `LatentService.think` and `LatentService.speak` raise.
        """
        self._take_no(kwargs)
        with inside(config) as config:
            made = self._prompted("invoke", input, config)
            if inspect.isawaitable(made):
                if inspect.iscoroutine(made):
                    made.close()
                raise InvalidRequest(
                    f"The prompt of agent {self.name!r} is async; run the graph with ainvoke or astream."
                )
            plan = self._plan(input, config, self._messages(made))
            with self._way_out(plan):
                if plan.thinks:
                    on_step = reporter(str(self.name), self.steps)
                    ref = plan.service.think(
                        plan.messages, plan.latents, steps=self.steps, agent=str(self.name), on_step=on_step
                    )
                    return {"latents": [ref]}
                llm = self._chat_model(plan)
                # A node that calls this one may think; this one was made to speak.
                said = llm.invoke(plan.messages, config, latents=plan.latents, agent=self.name, speak=True)
            return _said(said, plan)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Like `invoke`, without blocking the event loop."""
        self._take_no(kwargs)
        with inside(config) as config:
            made = self._prompted("ainvoke", input, config)
            if inspect.isawaitable(made):
                made = await made
            shown = self._messages(made)
            if self.service is None or any(map(may_hold_marker, shown)):
                plan = await asyncio.to_thread(self._plan, input, config, shown)  # may load a model, or ask a server
            else:
                plan = self._plan(input, config, shown)
            with self._way_out(plan):
                if plan.thinks:
                    on_step = reporter(str(self.name), self.steps)
                    ref = await plan.service.athink(
                        plan.messages, plan.latents, steps=self.steps, agent=str(self.name), on_step=on_step
                    )
                    return {"latents": [ref]}
                llm = self._chat_model(plan)
                said = await llm.ainvoke(plan.messages, config, latents=plan.latents, agent=self.name, speak=True)
            return _said(said, plan)

    def _take_no(self, kwargs: Mapping[str, Any]) -> None:
        if kwargs:
            raise InvalidRequest(
                f"A run of agent {self.name!r} takes no {', '.join(kwargs)}: what it does is settled where it is made, "
                "LatentAgentNode(..., steps=..., max_tokens=...)."
            )

    @contextmanager
    def _way_out(self, plan: _Plan) -> Iterator[None]:
        """Adds to an error about the memory of an agent how that one hands over its text instead."""
        try:
            yield
        except WrongModel as error:
            for sender in {ref["agent"] for ref in plan.latents}:
                if repr(sender) in str(error):
                    error.args = (
                        f"{error} For its text, run the graph with "
                        f'{{"configurable": {{"edges": {{"{sender}->{self.name}": "text"}}}}}}; or give {self.name!r} '
                        f"reads=[...] without {sender!r}.",
                    )
            raise

    def _leaves_text(self, config: RunnableConfig) -> bool:
        """Whether an edge that leaves it, or a node that it lies in, is text."""
        return runs_as_text(config, str(self.name), *node_path(config))

    def _prompted(self, run: Literal["invoke", "ainvoke"], state: Any, config: RunnableConfig) -> Any:
        """What the prompt makes of a state; an awaitable of it, where the prompt is async or run so."""
        channels = {"latents": ("its memory", "list[LatentRef], merge_latents")}
        if self.speak or self._leaves_text(config):
            channels["messages"] = ("what it says", "list[AnyMessage], add_messages")
        for channel, (what, kind) in channels.items():
            if _loses(channel, state, config):
                raise InvalidRequest(
                    f"The state of the graph in which agent {self.name!r} runs has no `{channel}`: {what} would be "
                    f"lost. Derive the state from LatentState, or add `{channel}: Annotated[{kind}]` to it. (A "
                    f"function that calls the agent and hands {what} on by itself passes `{channel}`, [] for none.)"
                )
        if isinstance(self.prompt, (str, SystemMessage)):
            if not (_has(state, "messages") or _has(state, "latents")):
                raise InvalidRequest(
                    f"Agent {self.name!r} has a prompt of words and would read nothing of its input, a "
                    f"{type(state).__name__} with neither `messages` nor `latents`: hand over {{'messages': [...]}}, "
                    "or make the prompt a template or a function of the input."
                )
            system = SystemMessage(self.prompt) if isinstance(self.prompt, str) else self.prompt
            return [system, *(field_of(state, "messages") or [])]
        if isinstance(self.prompt, Runnable):
            return getattr(self.prompt, run)(self._fields(state), config)
        return self.prompt(state)

    def _fields(self, state: Any) -> dict[str, Any]:
        if dataclasses.is_dataclass(state):  # with slots it has no `vars`
            return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        try:
            return dict(state if isinstance(state, Mapping) else vars(state))
        except TypeError as error:
            raise InvalidRequest(
                f"The prompt of agent {self.name!r} is filled from the fields of its input, and a "
                f"{type(state).__name__} has none: hand over a mapping, or make the prompt a function of the input."
            ) from error

    def _plan(self, state: Any, config: RunnableConfig, messages: list[BaseMessage]) -> _Plan:
        service = self.service or _service_of_the_run() or shared_service()
        if not isinstance(service, LatentService):
            raise InvalidRequest(f"Agent {self.name!r}: service must be a LatentService, not {type(service).__name__}.")
        leaves_text, reads_text = self._leaves_text(config), runs_as_text(config)
        handed = field_of(state, "latents")
        known = list(handed or [])
        # A prompt of words shows all that was said. What others show is their own choice.
        whole = isinstance(self.prompt, (str, SystemMessage))
        said = [] if whole else field_of(state, "messages") or []
        conversation = messages[1:] if whole else self._converted(said, "The `messages` in the state")
        with checked_on_failure(known):
            if reads_text and known:
                warn_of_thoughts(str(self.name), self.reads, known, conversation)
                known = []
            latents, notes = self._read(known, conversation, messages, handed is None, config)
            read = ancestry(latents, known) if any(map(memory_of, messages)) else set()
        if whole:
            known_already = held(conversation, read) | thoughts(conversation, known)
            messages = [message for message in messages if key_of(message) not in known_already]
        else:
            messages = [message for message in messages if memory_of(message) not in read]
        messages = _with_notes(messages, notes)
        thinks = not self.speak and not leaves_text
        if thinks:  # whoever speaks does it through a chat model, which takes markers by itself
            messages, marked = without_markers(messages, service, "")
            latents = [*latents, *marked]
        heard = conversation if whole and not leaves_text else ()
        return _Plan(service, messages, latents, leaves_text, thinks, heard)

    def _messages(self, made: Any) -> list[BaseMessage]:
        """What the prompt made, as messages."""
        if isinstance(made, PromptValue):
            made = made.to_messages()
        if isinstance(made, BaseMessage):
            made = [made]
        messages = self._converted(made, "The prompt")
        if not messages:
            raise InvalidRequest(f"The prompt of agent {self.name!r} gives no messages; it must give at least one.")
        return messages

    def _converted(self, given: Any, what: str) -> list[BaseMessage]:
        """What LangChain takes for messages, as messages."""
        try:
            if not isinstance(given, (str, list, tuple)):
                raise TypeError(f"{type(given).__name__} is none of these")
            return convert_to_messages([("human", given)] if isinstance(given, str) else given)
        except (TypeError, ValueError, KeyError, NotImplementedError) as error:
            raise InvalidRequest(
                f"{what} of agent {self.name!r} must give messages, or a text for a human one: {error}."
            ) from error

    def _read(
        self,
        known: Sequence[LatentRef],
        messages: Sequence[BaseMessage],
        shown: Sequence[BaseMessage],
        bare: bool,
        config: RunnableConfig,
    ) -> tuple[list[LatentRef], list[AIMessage]]:
        """What it reads of others.

        Args:
            known: References in the state.
            messages: Those of the state.
            shown: Those that its prompt gives.
            bare: Whether its input had no references, not even an empty list.
            config: Of the run.

        Returns:
            References in the order in which they are merged, and texts that stand in no memory: what was said since the
            last human message, and what was said before that and since it ran last, if its prompt does not show it.
        """
        ids = {ref["id"] for ref in known}
        said = [
            (i, message)
            for i, message in enumerate(messages)
            if isinstance(message, AIMessage) and _speaker(message)
            if memory_of(message) not in ids
        ]
        own = [ref for ref in known if ref["agent"] == self.name]
        asked = last_human(messages)
        # Of a thinker nothing tells how much was said before it thought: it thought about what it was asked.
        mine = (i for i, message in enumerate(messages) if _speaker(message) == self.name)
        read = max(mine, default=asked if own else -1)
        there = {key_of(message) for message in shown}
        new = [message for i, message in said if i > asked or (i > read and key_of(message) not in there)]
        new = [message for message in new if not message.tool_calls]  # these stay with their answers
        if self.reads is None:
            return sorted(tips(known), key=lambda ref: ref["agent"]), new
        # One pass over the references of the state, of which there may be thousands.
        left: dict[str, list[LatentRef]] = {agent: [] for agent in self.reads}
        for ref in known:
            if ref["agent"] in left:
                left[ref["agent"]].append(ref)
        notes: list[AIMessage] = []
        for agent in self.reads:
            theirs = [message for message in new if _speaker(message) == agent]
            if not theirs and not left[agent]:
                last = next((message for _, message in reversed(said) if _speaker(message) == agent), None)
                if last is None:
                    agents = {ref["agent"] for ref in known} | {_speaker(m) for _, m in said}
                    if bare or not _is_node(agent, config):
                        raise self._nobody(agent, sorted(agents), bare)
                    if agent not in self._missed:
                        self._tell_of(agent, known, agents, config)
                    continue
                theirs = [] if key_of(last) in there or last.tool_calls else [last]
            notes += theirs
        # Those of a loop that descend from each other count once: the service reads tips only.
        if own:
            left = not_yet_read(left, own, known)
        return [ref for agent in self.reads for ref in left[agent]], notes

    def _nobody(self, agent: str, known: list[str], bare: bool) -> InvalidRequest:
        there = ", ".join(known) or "nobody yet"
        way_out = (
            "Its input has no `latents`: let the Send or the input_schema that it comes from hand them on."
            if bare
            else "Correct reads=..., let it run first, or leave reads out to read whoever has run."
        )
        return InvalidRequest(
            f"Agent {self.name!r} reads {agent!r}, who left nothing in the state (there: {there}). {way_out}"
        )

    def _tell_of(self, node: str, known: Sequence[LatentRef], agents: set[str], config: RunnableConfig) -> None:
        """Says that nothing of a node beside it is there; LangGraph tells nobody whether that node has run."""
        ids = {ref["id"] for ref in known}
        strangers = sorted(agent for agent in agents - {self.name} if not _is_node(agent, config))
        # Many may lack a parent: memories taken over from elsewhere, or read through a marker.
        lost = len(known) == 1 and any(parent not in ids for ref in known for parent in ref["parents"])
        if not strangers and not lost:
            logger.info("agent %r reads nothing of %r, who has not run", self.name, node)
            return
        self._missed.add(node)
        logger.warning(
            "Agent %r reads nothing of node %r, of which nothing is in the state. If that node has run, %s.",
            *(self.name, node),
            f"reads= takes the name of its agent instead (there: {', '.join(strangers)})"
            if strangers
            else "its reference was overwritten, as others were that were read: `latents` needs merge_latents",
        )

    def _chat_model(self, plan: _Plan) -> ChatLatentMAS:
        # Kept, since LangChain describes every new model to its callbacks anew, which takes as long as a small tick.
        if (llm := self._llm) is None or llm.service is not plan.service:
            self._llm = llm = ChatLatentMAS(service=plan.service, max_tokens=self.max_tokens, **self.sampling)
        return llm


def told_by(function: Any) -> str:
    """What tells one function from others where it is known by its name; anything else is told by how it is written."""
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{getattr(function, '__module__', '')}.{name}"


def _service_of_the_run() -> Any:
    """`service` in the context of the graph that runs, if there is one."""
    try:
        runtime: Runtime | None = get_runtime()
    except (RuntimeError, KeyError):  # called outside of a graph
        return None
    return None if runtime is None else field_of(runtime.context, "service")


def _loses(channel: str, state: Any, config: RunnableConfig) -> bool:
    """Whether the graph around a run drops what it returns for a channel."""
    if _has(state, channel):
        return False
    # Tasks of the functional API return what they like.
    return any(_is_node(name, config) for name in node_path(config)[-1:]) and not _has_channel(channel, config)


def _is_node(name: str, config: RunnableConfig) -> bool:
    """Whether the graph that runs has a node; only a `StateGraph` has a channel that leads to it."""
    return _has_channel(f"branch:to:{name}", config)


def _has_channel(name: str, config: RunnableConfig) -> bool:
    """Whether the graph that runs has a channel."""
    read = config.get("configurable", {}).get("__pregel_read")
    if read is None:
        return False
    try:
        read(name)
    except KeyError:
        return False
    return True


def _speaker(message: BaseMessage) -> str:
    """Name of the agent that said a message, "" if none did; LangChain drops `name` where somebody listens."""
    return str(message.response_metadata.get("agent") or "")


def _said(message: AIMessage, plan: _Plan) -> dict[str, Any]:
    message.name = _speaker(message)
    if plan.leaves_text:
        return {"messages": [message]}
    mark(message, plan.conversation)
    return {"messages": [message], "latents": [message.response_metadata["latent_ref"]]}


def field_of(state: Any, name: str) -> Any:
    """A field of a state, whether that is a mapping, a dataclass or a pydantic model."""
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)


def _has(state: Any, name: str) -> bool:
    return name in state if isinstance(state, Mapping) else hasattr(state, name)


def _with_notes(messages: list[BaseMessage], notes: Sequence[AIMessage]) -> list[BaseMessage]:
    """Puts what others said at the head of the last human message; chat templates may want roles to alternate.

    Where tools have answered since, it follows on their answers.
    """
    if not notes:
        return messages
    noted = {key_of(note) for note in notes}
    messages = [message for message in messages if key_of(message) not in noted]
    text = "\n\n".join(f"{_speaker(note)}: {note.text}" for note in notes)
    at = last_human(messages)
    if at < 0 or any(isinstance(message, ToolMessage) for message in messages[at:]):
        return [*messages, HumanMessage(text)]
    content: Any = messages[at].content
    content = f"{text}\n\n{content}" if isinstance(content, str) else [f"{text}\n\n", *content]
    return [*messages[:at], messages[at].model_copy(update={"content": content}), *messages[at + 1 :]]
