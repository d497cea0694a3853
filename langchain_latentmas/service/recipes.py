"""A model service whose memories are recipes kept here, wherever the model runs."""

import asyncio
import json
import logging
import queue
import secrets
import threading
import weakref
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.stores import BaseStore
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from ..engine.sampling import Sampling
from ..engine.tick import Result, Row, Spoken
from ..errors import (
    ContextTooLong,
    DroppedReference,
    InvalidRequest,
    ServiceClosed,
    StoreCorrupted,
    TamperedReference,
    UnknownReference,
    WrongModel,
    check_whole,
)
from ..state import LatentRef
from .alteration import original
from .base import READING, Chunk, LatentService, StoredReference, Usage
from .budget import Budget
from .identity import KEY_BYTES, MAX_PARENTS, Signer, check_agent, checked_ref, key_ring, listed, memory_id
from .kept import KeptRecipes
from .mailbox import Mailbox
from .marker import Marker, take_markers
from .memory import Alignment, Layout, Lineage, Merge, Recipe, Segment
from .prompts import Prompts
from .retention import Retention
from .store import PINNED, FolderStore, Header, RecipeStore
from .units import Bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECIPES_KEPT = 1 << 24  # bytes of decoded ones; all others are read from the store again
COLLECT_SECONDS = 3600.0
TAG_TOKENS = 16  # at the end of a prompt and the beginning of a text, among which a "<think>" is looked for
QUICK_TEXT = 4096  # characters that are encoded on an event loop; others wait for as long, a millisecond or less
QUICK_REFERENCES = 16  # likewise, for references that are verified


class RecipeSettings(BaseModel):
    r"""Settings of prompts and recipes.

    Attributes:
        think_tag: What the generation prompt of a thinking agent ends in, say "<think>"; "" for nothing; None takes
            what the model's configuration says, which is nothing but for models that were trained for it.
        speak_tag: The same for a speaking agent; nothing by default. For models that think aloud before they answer,
            such as Qwen3, "<think>\n\n</think>\n\n" lets them answer at once.
        chat_template: A Jinja chat template, for tokenizers that bring none.
        template_args: Passed to the chat template, say `{"enable_thinking": False}`.
        max_positions: A lower limit of positions than the model's own.
        store: Where recipes go: None keeps them in this process, a folder makes them durable, and any LangChain byte
            store does what it does. Several processes may share a folder.
        store_budget: Most bytes of recipes in a folder, such as "2GiB"; what would exceed it is refused before it is
            worked on. None for as many as the disk has.
        keep_for: How long after its last use a reference may be removed from a folder: seconds, or ISO 8601 such as
            "P30D"; pinned ones, and what others that stay descend from, are spared. None removes none for its age.
        key: Signing key; None takes the one in the store's folder (mode 600, made if missing), else a fresh one, whose
            references end with the process.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    think_tag: str | None = None
    speak_tag: str = ""
    chat_template: str | None = None
    template_args: dict[str, Any] = Field(default_factory=dict)
    max_positions: int | None = None
    store: str | Path | BaseStore | None = None
    store_budget: Bytes | None = None
    keep_for: timedelta | None = Field(None, ge=timedelta(0))
    key: bytes | None = None


class ServedModel(Protocol):
    """What has to be known of a model, wherever it runs.

    Attributes:
        name: For messages.
        fingerprint: Of its weights and its tokenizer.
        realign: Whether the alignment uses `W`, or only rescales.
        max_positions: Most positions of a memory and what is put to it.
        config: Of the decoder, with `hidden_size` as thoughts have it here, and maybe a `think_tag`.
        tokenizer: Its tokenizer.
        dtype: Of thoughts.
    """

    name: str
    fingerprint: str
    realign: bool
    max_positions: int
    config: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype


class RecipeService(LatentService):
    """`LatentService` that checks and encodes requests and keeps recipes; where rows are worked on is another's.

    Attributes:
        model: What is known of the model.
        settings: As given.
        name: The model's.
        chat_template: The one in use.
        think_tag: The one in use.
    """

    model: ServedModel
    settings: RecipeSettings

    def __init__(
        self, model: ServedModel, settings: RecipeSettings, *, moved: Merge, signer: Signer | None = None
    ) -> None:
        """Opens the store.

        Args:
            model: What is known of the model.
            settings: Prompts, store, key.
            moved: What becomes of segments that a merge moves.
            signer: Signs references, manifests and markers; None takes that of `settings`.

        Raises:
            ModelNotSupported: If the tokenizer has no chat template.
            InvalidRequest: If a budget or an age is given for a store that is no folder, or the key file is readable
                for others.
        """
        self.model, self.settings, self._moved = model, settings, moved
        self.name, self.max_positions = model.name, model.max_positions
        self._prompts = Prompts(model, settings)
        self.chat_template = self._prompts.template
        tag = settings.think_tag
        self.think_tag: str = (getattr(model.config, "think_tag", None) or "") if tag is None else tag
        store = settings.store
        if settings.key is not None:
            signer = Signer(settings.key)
        if isinstance(store, (str, Path)):
            signer = signer or key_ring(Path(store) / "key")
            store = FolderStore(Path(store) / "recipes")
        elif store is not None and signer is None:
            logger.warning("no key=... for the store: references will not outlive this process")
        self._signer = signer or Signer(secrets.token_bytes(KEY_BYTES))
        how = self._signer.timeless(), model.config.hidden_size, model.dtype, settings.store_budget
        self._store = KeptRecipes(*how) if store is None else RecipeStore(store, *how)
        self._retention = Retention(self._store, settings.keep_for)
        self._recipes: Budget[Recipe] = Budget(RECIPES_KEPT, lambda recipe: recipe.segment.nbytes)
        self._lineage = Lineage(self._recipe)
        self._said_of_open_thoughts = False
        self._ended = threading.Event()
        weakref.finalize(self, self._ended.set)  # also when the service is forgotten

    @property
    def identity(self) -> str:
        """See `LatentService.identity`."""
        model, kept = self.model, str(self.settings.store or self._store)
        how = {"model": model.fingerprint, "realign": model.realign, "chat_template": self.chat_template, "store": kept}
        return self._signer.sign({**how, **self._prompting})

    @property
    def _prompting(self) -> dict[str, str]:
        """What of `info` says how prompts are made."""
        settings = self.settings
        args = json.dumps(settings.template_args, sort_keys=True, default=str)
        return {"think_tag": self.think_tag, "speak_tag": settings.speak_tag, "template_args": args}

    def _look_for_open_thoughts(self, prompted: Sequence[int], spoken: Sequence[int]) -> None:
        """Says, once, that models which think aloud do not come to an answer.

        Args:
            prompted: The end of a prompt.
            spoken: What was said until there were no tokens left.
        """
        decode = self.model.tokenizer.decode
        if self._said_of_open_thoughts or "<think>" not in decode([*prompted, *spoken[:TAG_TOKENS]]):
            return
        _, thinks, thought = decode([*prompted, *spoken]).rpartition("<think>")
        if thinks and "</think>" not in thought:
            self._said_of_open_thoughts = True
            logger.warning(
                "%s: a text ended at max_tokens while the model was still thinking aloud, so it has no answer; give it "
                r"more tokens, or close its thinking with speak_tag='<think>\n\n</think>\n\n'",
                self.name,
            )

    @abstractmethod
    def _start(self, row: Row, layout: Layout, after: Sequence[str]) -> None:
        """Starts a row on a memory; what fails from then on goes to the row.

        Args:
            row: Its first input is a prompt.
            layout: The memory.
            after: What the KV of a prompt depends on besides its tokens: the model, and the memories that were read.
        """

    def _starts_at_once(self, layout: Layout) -> bool:
        """Whether to start a row on a memory takes so little time that an event loop may do it."""
        return not layout

    @abstractmethod
    def _keep(self, key: str, result: Result) -> None:
        """Keeps the KV of a finished row for its readers."""

    def _keeps_at_once(self, result: Result) -> bool:
        """Whether to keep a finished row takes so little time that an event loop may do it."""
        return True

    def think(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        steps: int = 20,
        agent: str = "agent",
        on_step: Callable[[int], None] | None = None,
    ) -> LatentRef:
        """See `LatentService.think`."""
        request = _Request(self, messages, latents, agent, steps=steps)
        if (known := request.known()) is not None:
            return _as_if_new(known, on_step)
        for event in request.events(notify=on_step is not None):
            if isinstance(event, Result):
                return request.kept(event, lambda ref: ref).result()
            if on_step is not None and isinstance(event, int):
                on_step(event)
        raise AssertionError("a request ends with a result or an error")

    async def athink(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        steps: int = 20,
        agent: str = "agent",
        on_step: Callable[[int], None] | None = None,
    ) -> LatentRef:
        """See `LatentService.athink`."""

        def begun() -> tuple[_Request, LatentRef | None]:  # reads recipes, and makes tokens of the messages
            request = _Request(self, messages, latents, agent, steps=steps)
            return request, request.known()

        request, known = await self._aside(begun, quick=_quick(messages, latents))
        if known is not None:
            return _as_if_new(known, on_step)
        # Closed here: one that is left to the event loop costs it a task and a wake-up.
        async with aclosing(request.aevents(notify=on_step is not None)) as events:
            async for event in events:
                if isinstance(event, Result):
                    return await self._arrived(event, partial(request.kept, event, lambda ref: ref))
                if on_step is not None and isinstance(event, int):
                    on_step(event)
        raise AssertionError("a request ends with a result or an error")

    def speak(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """See `LatentService.speak`."""
        request = self._speaking(messages, latents, tools=tools, prefix=prefix, agent=agent, **sampling)
        with request.room():
            pass  # a store that is full is known at the call

        def chunks() -> Iterator[Chunk]:
            for event in request.events(notify=True):
                if isinstance(event, Spoken):
                    yield Chunk(event.text, (event.token,))
                elif isinstance(event, Result):
                    yield request.last_chunk(event).result()

        return chunks()

    def aspeak(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
        **sampling: Any,
    ) -> AsyncIterator[Chunk]:
        """See `LatentService.aspeak`."""
        request = self._speaking(messages, latents, tools=tools, prefix=prefix, agent=agent, **sampling)
        with request.room():
            pass  # a store that is full is known at the call

        async def chunks() -> AsyncIterator[Chunk]:
            async for event in request.aevents(notify=True):
                if isinstance(event, Spoken):
                    yield Chunk(event.text, (event.token,))
                elif isinstance(event, Result):
                    yield await self._arrived(event, partial(request.last_chunk, event))

        return chunks()

    def say(self, messages: LanguageModelInput, latents: Sequence[LatentRef] = (), **options: Any) -> Chunk:
        """See `LatentService.say`."""
        request = self._speaking(messages, latents, **options)
        for event in request.events(notify=False):
            if isinstance(event, Result):
                return request.last_chunk(event, whole=True).result()
        raise AssertionError("a request ends with a result or an error")

    async def asay(self, messages: LanguageModelInput, latents: Sequence[LatentRef] = (), **options: Any) -> Chunk:
        """See `LatentService.asay`."""
        begun = partial(self._speaking, messages, latents, **options)
        request = await self._aside(begun, quick=_quick(messages, latents))
        async with aclosing(request.aevents(notify=False)) as events:
            async for event in events:
                if isinstance(event, Result):
                    return await self._arrived(event, partial(request.last_chunk, event, whole=True))
        raise AssertionError("a request ends with a result or an error")

    def _speaking(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
        **sampling: Any,
    ) -> "_Request":
        how = Sampling.of(**sampling)
        return _Request(self, messages, latents, agent, sampling=how, tools=tools, prefix=prefix)

    async def _arrived(self, result: Result, keep: Callable[[], "Future[T]"]) -> T:
        """What comes of keeping a finished row: in a thread of its own, unless that is quick."""
        return await Mailbox.arrival(keep() if self._keeps_at_once(result) else await asyncio.to_thread(keep))

    async def _aside(self, call: Callable[[], T], quick: bool) -> T:
        """Calls what needs the store: in a thread of its own, unless it is quick and there is nothing to wait for."""
        return call() if quick and self._store.in_memory else await asyncio.to_thread(call)

    def marker(self, ref: LatentRef) -> str:
        """See `LatentService.marker`."""
        self.verify([ref])
        return self.signed_marker(ref)

    def take_markers(self, text: str, left: str = "") -> tuple[str, list[LatentRef]]:
        """See `LatentService.take_markers`."""
        text, markers = take_markers(text, left)
        return text, [self._marked(marker) for marker in markers]

    def references(self) -> list[StoredReference]:
        """See `LatentService.references`."""
        return self.page()[0]

    def page(self, after: str = "", size: int | None = None) -> tuple[list[StoredReference], str]:
        """A part of `references`.

        Args:
            after: What the page before returned; "" for the first one.
            size: How many recipes are looked at; None for all that are left.

        Returns:
            What can be read of these, and what to ask for the next page with; "" if this was the last one. Whatever
            comes or goes meanwhile moves no other from page to page.
        """
        own = [header for header in self._retention.headers() if header.model == self.model.fingerprint]
        begin = bisect_right(own, _place(after), key=Header.place) if after else 0
        page, looked_at = [], own[begin:][:size]
        for header in looked_at:
            with suppress(UnknownReference, StoreCorrupted):  # it, or what it descends from, is gone by now or damaged
                ref = self.signed_ref(header.id, header.agent, header.parents, header.steps)
                made, used = (datetime.fromtimestamp(at, UTC) for at in (header.made, self._retention.used(header)))
                pinned = self._store.marked(header.id, PINNED)
                page.append(StoredReference(ref, made, used, self._store.size_of(header.id), pinned))
        more = begin + len(looked_at) < len(own)
        return page, f"{looked_at[-1].made!r}/{looked_at[-1].id}" if more else ""

    def pin(self, ref: LatentRef, pinned: bool = True) -> None:
        """See `LatentService.pin`."""
        self._retention.pin(_stored(self.verify([ref])[0]), pinned)

    def drop(self, ref: LatentRef) -> None:
        """See `LatentService.drop`."""
        try:
            self.verify([ref])
        except DroppedReference:
            pass  # whoever dropped it may have been stopped before it was removed
        except UnknownReference:
            return
        key = _stored(ref["id"])
        self._retention.drop(key, self._forget)
        self._forget([key])  # though it stays while others descend from it

    def collect(self) -> int:
        """Removes references that have not been used for `keep_for`; runs by itself, at the start and every hour.

        Returns:
            How many were removed.
        """
        return len(self._retention.collect(self._forget))

    def close(self) -> None:
        """See `LatentService.close`."""
        self._ended.set()

    def verify(self, latents: Sequence[LatentRef] | LatentRef | None) -> list[str]:
        """Checks references and returns their ids.

        Raises:
            WrongModel: If one belongs to another model.
            TamperedReference: If one is malformed or its signature does not match.
            UnknownReference: If the recipe of one is not in the store.
            DroppedReference: If one was dropped.
        """
        refs = listed(latents)
        if len(refs) > MAX_PARENTS:
            raise InvalidRequest(f"One request reads at most {MAX_PARENTS} memories, not {len(refs)}.")
        for ref in map(checked_ref, refs):
            if ref["model"] != self.model.fingerprint:
                raise WrongModel(
                    f"The reference of agent {ref['agent']!r} belongs to model {ref['model']}, but this service runs "
                    f"{self.model.name} ({self.model.fingerprint}); hand its text over instead, or load that model."
                )
            if not self._signer.matches(ref):
                raise TamperedReference(
                    f"The signature of the reference of agent {ref['agent']!r} does not match: it was changed, or "
                    "another service made it with another key (key=..., or the key file of store=...)."
                )
            self._recipe(ref["id"])
        self._store.check([original(ref["id"]) for ref in refs])
        return [ref["id"] for ref in refs]

    def encode(
        self, messages: LanguageModelInput, tag: str, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Token ids of messages in the chat template, with a generation prompt that ends in `tag`.

        Raises:
            InvalidRequest: If there are no messages, or the template or this model cannot take them.
        """
        return self._prompts.encode(messages, tag, tools)

    def token_ids(self, messages: LanguageModelInput, tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """See `LatentService.token_ids`."""
        if isinstance(messages, str):
            return self._prompts.token_ids(messages)
        return list(self.encode(messages, "", tools))

    def signed_ref(self, key: str, agent: str, parents: Sequence[str], steps: int) -> LatentRef:
        """The reference of a memory whose recipe is there."""
        ref = LatentRef(
            id=key,
            agent=agent,
            model=self.model.fingerprint,
            parents=list(parents),
            positions=self._lineage.line(key)[-1].end,
            steps=steps,
            mac="",
        )
        ref["mac"] = self._signer.sign(ref)
        return ref

    def signed_marker(self, ref: LatentRef) -> str:
        """The marker of a reference that this service has just made, or verified."""
        return str(Marker.of(ref, self._signer))

    def _marked(self, marker: Marker) -> LatentRef:
        if marker.model != self.model.fingerprint[:8]:
            raise WrongModel(
                f"The marker of agent {marker.agent!r} belongs to model {marker.model}, but this service runs "
                f"{self.model.name} ({self.model.fingerprint[:8]}); switch the edge between them to text."
            )
        if not marker.genuine(self._signer):
            raise TamperedReference(
                f"The signature of the marker of agent {marker.agent!r} does not match: it was edited, or another "
                "service made it with another key (key=..., or the key file of store=...)."
            )
        how = marker.id.removeprefix(original(marker.id))
        parents = [parent + how for parent in self._recipe(marker.id).parents]
        self._store.check([original(marker.id)])
        return self.signed_ref(marker.id, marker.agent, parents, marker.steps)

    def _recipe(self, key: str) -> Recipe:
        key = original(key)
        if (recipe := self._recipes.get(key)) is None:
            recipe = self._store.get(key)
            self._recipes.put(key, recipe)
        if recipe.model != self.model.fingerprint:  # also where weights were changed while it was made
            raise UnknownReference(f"The memory {key} was made by another model ({recipe.model}).")
        return recipe

    def _forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._recipes.pop(key)

    def _merge_of(self, layout: Layout) -> Merge:
        return self._moved if any(piece.moved for piece in layout) else "none"

    def _collect_regularly(self) -> None:
        """The last step of a constructor: what is collected is forgotten everywhere."""
        if (keep_for := self.settings.keep_for) is not None:
            often = min(COLLECT_SECONDS, keep_for.total_seconds() + 1)
            collecting = (weakref.ref(self), self._ended, often)
            threading.Thread(target=_collect, args=collecting, name="latentmas-collect", daemon=True).start()


class _Request:
    """One checked call of think or speak, not yet begun."""

    def __init__(
        self,
        service: RecipeService,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef],
        agent: str,
        *,
        steps: int = 0,
        sampling: Sampling | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
    ) -> None:
        if service.closed:
            raise ServiceClosed("The service is closed; load another one.")
        check_whole("steps", steps)
        check_agent(agent)
        self.service, self.agent, self.steps, self.sampling = service, agent, steps, sampling
        given = listed(latents)
        self.parents = self.named = service._lineage.tips(service.verify(given))
        self.reading = READING.get()
        if self.reading is not None:
            refs = {ref["id"]: ref for ref in reversed(given)}
            would, instead = self.reading.read(service, agent, [refs[key] for key in self.parents], steps)
            self.named = [ref["id"] for ref in would]
            self.parents = service._lineage.tips(service.verify(instead))
        tag = service.think_tag if sampling is None else service.settings.speak_tag + prefix
        self.prompt_ids = service.encode(messages, tag, tools)
        if sampling is not None and sampling.seed is not None:
            # Else all that is said under one seed, whatever the question, would be drawn by the same numbers. A prompt
            # may leave the question to the memory; an audit's stand-ins for that change nothing here.
            drawn = sha256(f"{sampling.seed} {agent} {self.prompt_ids} {self.named}".encode(errors="replace")).digest()
            self.sampling = replace(sampling, seed=int.from_bytes(drawn[:7]))
        self.layout = service._lineage.layout(self.parents)
        self.start = self.layout[-1].end if self.layout else 0
        self.model = service.model.fingerprint
        self.alignment: Alignment = "realign" if service.model.realign else "rescale"
        to_come, limit = steps + (self.sampling is not None), service.model.max_positions
        free = limit - self.start - len(self.prompt_ids)
        if to_come > free:
            raise ContextTooLong(
                f"Agent {agent!r} needs {limit - free + to_come} positions ({self.start} of memory, "
                f"{len(self.prompt_ids)} of prompt, {to_come} to come), the model has {limit}. Read fewer memories, "
                "shorten the prompt, or take fewer steps."
            )
        if self.sampling is not None and self.sampling.max_tokens > free:
            logger.info("agent %r: %d positions are left, so it says at most as many tokens", agent, free)
            self.sampling = replace(self.sampling, max_tokens=free)

    def known(self, spoken_ids: Sequence[int] = ()) -> LatentRef | None:
        """The reference of this think or of these words, if it was made before."""
        key = self._id(spoken_ids)
        try:
            self.service._recipe(key)
            self.service._store.renew(key)
        except (UnknownReference, StoreCorrupted):  # what is damaged is made again
            return None
        return self._ref(key)

    def events(self, notify: bool) -> Iterator[int | Spoken | Result]:
        """Does the work; yields steps and tokens if `notify`, then the result. Closing it frees the slot.

        Without `notify`, nobody is woken up before the result, which has the whole text then.
        """
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        row = self._row(inbox.put, notify)
        with self.room():
            try:
                self._start(row)
                while not isinstance(event := inbox.get(), (Result, BaseException)):
                    yield event
                if isinstance(event, BaseException):
                    raise event
                yield event
            finally:
                row.cancelled = True

    async def aevents(self, notify: bool) -> AsyncGenerator[int | Spoken | Result, None]:
        """Like `events`, for `async for`."""
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        row = self._row(partial(Mailbox.of(loop).put, loop, inbox), notify)
        if not self.service._store.counted:
            await asyncio.to_thread(self.service._store.count)
        with self.room(counted=True):
            try:
                if self.service._starts_at_once(self.layout):
                    self._start(row)
                else:  # whoever goes meanwhile cancels the row, and it never joins
                    await asyncio.to_thread(self._start, row)
                while not isinstance(event := await inbox.get(), (Result, BaseException)):
                    yield event
                if isinstance(event, BaseException):
                    raise event
                yield event
            finally:
                row.cancelled = True

    def kept(self, result: Result, then: Callable[[LatentRef], T]) -> "Future[T]":
        """Stores recipe and KV of a finished row; a future of what `then` makes of its reference."""

        def made() -> Recipe:
            segment = Segment(self.agent, self.prompt_ids, result.thoughts, tuple(result.tokens))
            return Recipe(self._id(result.tokens), self.model, self.alignment, tuple(self.parents), segment)

        def stored(recipe: Recipe, fresh: bool) -> T:
            if fresh:  # else somebody was faster, and his stays
                self.service._forget([recipe.id])
                self.service._recipes.put(recipe.id, recipe)
                self.service._keep(recipe.id, result)
            return then(self._ref(recipe.id))

        return self.service._store.put_soon(made, stored)

    def room(self, counted: bool = False) -> AbstractContextManager[None]:
        """Holds room in the store for what comes of it; see `RecipeStore.room`.

        Raises:
            StoreFull: If there is not that much.
        """
        spoken = self.sampling.max_tokens if self.sampling else 0
        store = self.service._store
        most = store.most_bytes(self.agent, self.parents, len(self.prompt_ids), self.steps, spoken)
        return store.room(most, counted)

    def last_chunk(self, result: Result, whole: bool = False) -> "Future[Chunk]":
        """What closes a stream of chunks, once its recipe is stored; `whole` of one without any others."""
        if result.finish == "length":
            self.service._look_for_open_thoughts(self.prompt_ids[-TAG_TOKENS:], result.tokens)

        def chunk(ref: LatentRef) -> Chunk:
            usage = Usage(
                input_tokens=len(self.prompt_ids),
                output_tokens=len(result.tokens),
                latent_steps=sum(piece.steps for piece in self.layout),
                positions_read=self.start,
                merge=self.service._merge_of(self.layout),
            )
            tokens = tuple(result.tokens) if whole else ()
            return Chunk(result.text, tokens, ref=ref, usage=usage, finish_reason=result.finish)

        return self.kept(result, chunk)

    def _row(self, put: Callable[[object], None], notify: bool) -> Row:
        return Row(
            past=(),
            start=self.start,
            inputs=[self.prompt_ids],
            steps=self.steps,
            sampling=self.sampling,
            on_step=put if notify else None,
            on_token=put if notify else None,
            on_done=put,
            on_error=put,
        )

    def _start(self, row: Row) -> None:
        self.service._start(row, self.layout, (self.model, *self.parents))

    def _id(self, spoken_ids: Sequence[int] = ()) -> str:
        return self._computed_id(spoken_ids) if spoken_ids else self._thought_id

    @cached_property
    def _thought_id(self) -> str:
        """Asked for before the work and after."""
        return self._computed_id(())

    def _computed_id(self, spoken_ids: Sequence[int]) -> str:
        return memory_id(
            model=self.model,
            alignment=self.alignment,
            parents=self.parents,
            prompt_ids=self.prompt_ids,
            steps=self.steps,
            spoken_ids=spoken_ids,
        )

    def _ref(self, key: str) -> LatentRef:
        ref = self.service.signed_ref(key, self.agent, self.named, self.steps)
        if self.reading is not None:
            self.reading.made(ref)
        return ref


def _quick(messages: LanguageModelInput, latents: Sequence[LatentRef]) -> bool:
    """Whether a request is so small that to check and encode it takes less than a thread to do it in."""
    if READING.get() is not None or not (isinstance(messages, list) and isinstance(latents, (list, tuple))):
        return False
    texts = [message.content if isinstance(message, BaseMessage) else None for message in messages]
    if len(latents) > QUICK_REFERENCES or not all(isinstance(text, str) for text in texts):
        return False
    return sum(map(len, texts)) <= QUICK_TEXT  # type: ignore[arg-type]


def _as_if_new(known: LatentRef, on_step: Callable[[int], None] | None) -> LatentRef:
    """A thought that was found, told of step by step, so that a progress bar ends."""
    if on_step is not None:
        for step in range(1, known["steps"] + 1):
            on_step(step)
    return known


def _place(after: str) -> tuple[float, str]:
    """Where in the order of `RecipeService.page` a page ended."""
    made, between, key = after.partition("/")
    try:
        if not between:
            raise ValueError
        return -float(made), key
    except ValueError:
        raise InvalidRequest(f"after must be what the page before named as its next, not {after[:80]!r}.") from None


def _stored(key: str) -> str:
    if original(key) != key:
        raise InvalidRequest(f"{key} is an altered memory, which is never stored; name the one it was made of.")
    return key


def _collect(service_ref: "weakref.ref[RecipeService]", closed: threading.Event, seconds: float) -> None:
    while (service := service_ref()) is not None and not closed.is_set():
        try:
            service.collect()
        except Exception:  # a disk that does not answer today
            logger.exception("old references could not be removed; they are tried again later")
        del service
        closed.wait(seconds)
