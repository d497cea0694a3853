"""What every model service can do, wherever it runs."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

from langchain_core.language_models import LanguageModelInput
from typing_extensions import TypedDict

from ..errors import InvalidRequest, MissingExtra, ModelNotFound
from ..state import LatentRef
from .memory import Memory, Merge


class Usage(TypedDict):
    """What one `speak` cost."""

    input_tokens: int
    """Prompt tokens, also those whose KV was copied from an earlier prompt; the memory is not among them."""
    output_tokens: int
    """Tokens that were decoded, the end token included."""
    latent_steps: int
    """Thoughts in the memory that was read."""
    positions_read: int
    """Positions of the memory that was read."""
    merge: Merge
    """How several memories became one: keys re-rotated, recomputed at their new positions, or, on
    vLLM, all computed anew as one chain in which each later memory sees the earlier ones."""


@dataclass(frozen=True)
class Chunk:
    """A piece of spoken text.

    Attributes:
        text: Text that became certain; may be empty.
        token_ids: The tokens behind it, special ones included.
        ref: On the last chunk: the memory with what was spoken.
        usage: On the last chunk.
        finish_reason: On the last chunk: "stop" or "length".
    """

    text: str
    token_ids: tuple[int, ...] = ()
    ref: LatentRef | None = None
    usage: Usage | None = None
    finish_reason: str | None = None


class LensRow(NamedTuple):
    """The vocabulary read-out of one thought."""

    agent: str
    step: int
    """From 1."""
    tokens: list[tuple[str, float]]
    """The most likely tokens and their probabilities, the likeliest first."""


class StoredReference(NamedTuple):
    """A reference that a service can still read, as `LatentService.references` lists it."""

    ref: LatentRef
    """Under the name of the agent that made it first, and with the memories it was really made of as parents."""
    made: datetime
    """When, in UTC."""
    used: datetime
    """When it was last handed out or read, in UTC; age counts from here."""
    nbytes: int
    """Bytes of its recipe in the store."""
    pinned: bool
    """Whether age spares it."""


class Reading(Protocol):
    """Decides, for the runs in whose context it is set, what agents read; the audit's way in.

    A service asks it in every `think` and `speak`, once the references are verified and reduced to tips. What was read
    instead is what the new memory is made of, and so is its id. But its reference names as parents what would have
    been read: the graph must go on as if nothing had been changed.

    Attributes:
        name: Unlike that of any other, so that no model cache takes an answer of one run for that of another.
    """

    name: str

    def read(
        self, service: "LatentService", agent: str, refs: Sequence[LatentRef], steps: int
    ) -> tuple[Sequence[LatentRef], Sequence[LatentRef]]:
        """What an agent would read, and what it reads instead.

        Args:
            service: Who was called.
            agent: The reader.
            refs: Tips only (an ancestor of another one is not among them), in their order.
            steps: Latent steps that it will take; 0 for one that speaks.

        Returns:
            Those of `refs` that are tips had nothing been changed before, and what stands for them.
        """

    def made(self, ref: LatentRef) -> None:
        """Told of what came of it."""


READING: ContextVar[Reading | None] = ContextVar("latentmas_reading", default=None)


class LatentService(ABC):
    """Thinks, speaks, and owns the memories; references stand for them. Safe to share between threads and event loops.

    A service is a context manager that closes itself.

    Attributes:
        name: What the model was loaded from.
        chat_template: The chat template in use.
        max_positions: Most positions of a memory and what is put to it; None if that is not known here.
    """

    name: str
    chat_template: str
    max_positions: int | None = None

    @classmethod
    def load(cls, model: str = "bundled", **settings: Any) -> "LatentService":
        """Loads a model into this process, or talks to a server that did.

        Args:
            model: "bundled", a hub id, a folder, the address of `latentmas serve`, such as "http://127.0.0.1:8765", or
                that of a vLLM server, such as "vllm+http://127.0.0.1:8000"; "vllm:" and a model for vLLM in this
                process.
            **settings: See `langchain_latentmas.service.local.LocalSettings`, for a server
                `langchain_latentmas.service.http.HTTPSettings`, for a vLLM server
                `langchain_latentmas.service.vllm_server.VLLMSettings`, for vLLM in this process
                `langchain_latentmas.service.vllm_in_process.EngineSettings`.

        Returns:
            A running service.

        Raises:
            ModelNotFound: If there is no such model.
            ModelNotSupported: If the model cannot think exactly; the message says why.
            InvalidRequest: If a setting is unknown or out of range.
        """
        if model.startswith(("http://", "https://")):
            try:
                from .http import HTTPService
            except ModuleNotFoundError as error:
                raise MissingExtra.of("serve", f"{error.name} is not installed") from error
            return HTTPService.load(model, **settings)
        if model.startswith(("vllm+http://", "vllm+https://", "vllm:")):
            try:
                from .vllm import VLLMService
            except ModuleNotFoundError as error:
                extra = "vllm" if model.startswith("vllm:") else "serve"
                raise MissingExtra.of(extra, f"{error.name} is not installed") from error
            return VLLMService.load(model, **settings)
        if "://" in model:
            raise ModelNotFound(
                f"{model!r} is no model: give 'bundled', a hub id, a folder, http://host:port, vllm+http://host:port, "
                "or vllm: and a model."
            )
        from .local import LocalService

        return LocalService.load(model, **settings)

    @abstractmethod
    def think(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        steps: int = 20,
        agent: str = "agent",
        on_step: Callable[[int], None] | None = None,
    ) -> LatentRef:
        """Prefills the messages on top of a memory and takes latent steps; decodes nothing.

        Thinking is deterministic: the same call returns the same reference, without work where it is still known.

        Args:
            messages: Anything LangChain accepts as messages; goes through the model's chat template.
            latents: The memories to read, merged in this order; one that another descends from counts once.
            steps: Latent steps; 0 hands over the prompt's KV alone.
            agent: Who thinks.
            on_step: Called in the caller's thread with the number of each step taken; those of a memory that is still
                known, at once.

        Returns:
            The reference of the memory, this segment included.

        Raises:
            InvalidRequest: Negative steps, no messages, ...
            ContextTooLong: If memory, prompt and steps exceed the model's positions.
            InvalidReference: If a reference is tampered with, unknown, dropped, or of another model.
            StoreFull: If there is no room for the recipe; raised before the work starts.
            NotFinite: If the model's numbers overflow in its dtype.
            EngineFailed: If the device fails; may be retried.
            ServiceClosed: If the service is closed.
        """

    @abstractmethod
    async def athink(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        steps: int = 20,
        agent: str = "agent",
        on_step: Callable[[int], None] | None = None,
    ) -> LatentRef:
        """Like `think`; cancelling the task frees its slot at the next tick."""

    @abstractmethod
    def speak(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] | None = None,
        seed: int | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
    ) -> Iterator[Chunk]:
        """Prefills the messages on top of a memory and decodes text.

        Checks everything at the call; the work starts with the first `next`, and closing the iterator ends it.

        Args:
            messages: Anything LangChain accepts as messages.
            latents: The memories to read, merged in this order.
            max_tokens: Most tokens to decode, at least 1. Where fewer positions are left, the text ends there, with the
                finish reason "length".
            temperature: 0 means greedy.
            top_p: Nucleus sampling.
            top_k: Only so many most likely tokens.
            stop: Strings that end the text; they are not part of it.
            seed: For the same sample again.
            tools: OpenAI descriptions of functions, for the chat template to present.
            prefix: What the text begins with; part of the prompt, not of the chunks.
            agent: Who speaks.

        Returns:
            Chunks as they come; the last one has `ref`, `usage` and `finish_reason`.

        Raises:
            InvalidRequest: If a value is out of range.
            ContextTooLong: If memory and prompt leave no position to speak in.
            InvalidReference: If a reference is tampered with, unknown, dropped, or of another model.
            StoreFull: If there is no room for the recipe; raised before the work starts.
            NotFinite: If the model's numbers overflow in its dtype.
            EngineFailed: If the device fails; may be retried.
            ServiceClosed: If the service is closed.
        """

    @abstractmethod
    def aspeak(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] | None = None,
        seed: int | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
    ) -> AsyncIterator[Chunk]:
        """Like `speak`, for `async for`."""

    def say(self, messages: LanguageModelInput, latents: Sequence[LatentRef] = (), **options: Any) -> Chunk:
        """Like `speak`, all at once; where the model is in this process, nobody is woken up for each token.

        Args:
            messages: Anything LangChain accepts as messages.
            latents: The memories to read, merged in this order.
            **options: As `speak` takes them.

        Returns:
            One chunk with the whole text and all tokens, and what the last one of `speak` has.
        """
        return _joined(list(self.speak(messages, latents, **options)))

    async def asay(self, messages: LanguageModelInput, latents: Sequence[LatentRef] = (), **options: Any) -> Chunk:
        """Like `say`, without blocking the event loop; cancelling the task frees its slot at the next tick."""
        return _joined([chunk async for chunk in self.aspeak(messages, latents, **options)])

    @abstractmethod
    def memory(self, ref: LatentRef) -> Memory:
        """Everything behind a reference: segments, and KV (rebuilt if it was evicted).

        Raises:
            InvalidReference: If it is tampered with, unknown, or of another model.
        """

    @abstractmethod
    def lens(self, ref: LatentRef, top_k: int = 5) -> list[LensRow]:
        """Reads the thoughts of a reference's own segment out in the vocabulary, for people.

        Args:
            ref: A reference that `think` returned.
            top_k: Tokens per thought.

        Returns:
            One row per latent step: what the model would have written there had it decoded.

        Raises:
            InvalidReference: If it is tampered with, unknown, or of another model.
            InvalidRequest: If `top_k` is below 1.
        """

    def export_memory(self, ref: LatentRef, kv: bool = False) -> Iterator[bytes]:
        """A memory as one safetensors file, for `import_memory` of another service (docs/serving.md has the format).

        Args:
            ref: Any reference.
            kv: Whether its keys and values go along, for people; `import_memory` computes them anew.

        Returns:
            The file, at most a mebibyte at a time.

        Raises:
            InvalidReference: If it is tampered with, unknown, or of another model.
            InvalidRequest: If this service exports no memories.
        """
        raise InvalidRequest(f"{type(self).__name__} neither exports nor imports memories.")

    def import_memory(self, file: str | Path) -> LatentRef:
        """Takes in a memory that another service of the same model exported.

        Its thoughts are taken as they are: like a prompt, they are as trustworthy as who wrote them. What this service
        knows already stays as it is.

        Args:
            file: What `export_memory` returned, written to a file.

        Returns:
            Its reference, signed by this service.

        Raises:
            InvalidRequest: If the file is no exported memory, does not fit together, or holds an altered memory.
            WrongModel: If it belongs to another model.
            StoreFull: If there is no room for its recipes.
        """
        raise InvalidRequest(f"{type(self).__name__} neither exports nor imports memories.")

    @abstractmethod
    def marker(self, ref: LatentRef) -> str:
        """Writes a reference as a short signed string, for graphs that pass text.

        Raises:
            InvalidReference: If it is tampered with, unknown, or of another model.
        """

    @abstractmethod
    def take_markers(self, text: str, left: str = "") -> tuple[str, list[LatentRef]]:
        """Takes the markers out of a text.

        Args:
            text: Any text.
            left: What is left in a marker's place; at most 1000 characters.

        Returns:
            The text without them, and the references they stand for, in order.

        Raises:
            InvalidRequest: If `left` is longer, or the text has more than 1024 markers.
            InvalidReference: If one was edited or cut, names an unknown memory, or belongs to another model.
        """

    def forget_prefixes(self) -> bool:
        """Lets no prompt to come take over what an earlier one began with, for measurements that stand by themselves.

        Returns:
            Whether that was done; False where the model runs in another process.
        """
        return False

    def altered(self, ref: LatentRef, how: Literal["zeroed", "random"], seed: int = 0) -> LatentRef:
        """The same memory with other values: positions and keys to attend to, and no content behind them.

        What it stands for is a memory of its own, with an id of its own; `ref` stays what it is.

        Args:
            ref: Any reference.
            how: "zeroed", or "random": noise of the same norm per layer, head and position.
            seed: Of the noise.

        Raises:
            InvalidReference: If it is tampered with, unknown, or of another model.
            InvalidRequest: If this service cannot alter memories, or not that way.
        """
        raise InvalidRequest(f"{type(self).__name__} alters no memories; take a model service in this process.")

    def token_ids(self, messages: LanguageModelInput, tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a text as it stands, or of messages in the chat template with its generation prompt.

        Args:
            messages: A string is a text; anything else goes through the template.
            tools: OpenAI descriptions of functions, for the template to present.

        Raises:
            InvalidRequest: If the template refuses the messages, or the tokenizer is elsewhere.
        """
        raise InvalidRequest(
            f"{type(self).__name__} has no tokenizer here to count with; load the model in this process, or count with "
            "langchain_core.messages.utils.count_tokens_approximately."
        )

    def references(self) -> list[StoredReference]:
        """Everything in the store that can be read, the latest made first; what was dropped is not among it.

        Reads every recipe that it has not seen before, so the first call on a large store takes a while.

        Raises:
            InvalidRequest: If this service keeps no recipes.
        """
        raise InvalidRequest(f"{type(self).__name__} keeps no recipes, so it lists, pins and drops none.")

    def pin(self, ref: LatentRef, pinned: bool = True) -> None:
        """Keeps a reference, and so all that it descends from, whatever its age; or no longer.

        Args:
            ref: Any reference but one of an altered memory, which is never stored.
            pinned: False takes the pin off.

        Raises:
            InvalidReference: If it is tampered with, unknown, dropped, or of another model.
            InvalidRequest: If this service keeps no recipes.
        """
        raise InvalidRequest(f"{type(self).__name__} keeps no recipes, so it lists, pins and drops none.")

    def drop(self, ref: LatentRef) -> None:
        """Forgets a reference; who uses it from now on gets `DroppedReference` or `UnknownReference`.

        What others that were not dropped descend from is kept for them. To think the same again makes the reference
        anew. To drop what is gone already is no error.

        Args:
            ref: Any reference but one of an altered memory, which is never stored.

        Raises:
            InvalidReference: If it is tampered with, or of another model.
            InvalidRequest: If it is pinned, or this service keeps no recipes.
        """
        raise InvalidRequest(f"{type(self).__name__} keeps no recipes, so it lists, pins and drops none.")

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What runs here and how it fares: model, fingerprint, settings, counters; plain JSON."""

    @property
    def address(self) -> str:
        """What `load` takes for a service of this model."""
        return self.name

    @property
    @abstractmethod
    def identity(self) -> str:
        """A digest, the same only for services that say the same, and read each other's memories and markers.

        It tells neither keys nor tokens.
        """

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether it takes no work any more."""

    @abstractmethod
    def close(self) -> None:
        """Ends all work and frees slots and KV; recipes in a durable store stay. Idempotent.

        The weights go with the last variable that holds the service.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    text, ids = "".join(chunk.text for chunk in chunks), (chunk.token_ids for chunk in chunks)
    return replace(chunks[-1], text=text, token_ids=tuple(chain.from_iterable(ids)))
