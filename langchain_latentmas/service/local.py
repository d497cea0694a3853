"""The model service in this process: transformers, one tick thread, memories on the device."""

import asyncio
import hashlib
import json
import logging
import queue
import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jinja2
import psutil
import torch
from langchain_core.language_models import LanguageModelInput
from langchain_core.stores import BaseStore, InMemoryByteStore
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import bundled
from ..engine.graphs import Graphs
from ..engine.kv import KV, AnyKV
from ..engine.lens import read_out
from ..engine.model import LanguageModel
from ..engine.sampling import Sampling
from ..engine.scheduler import Scheduler
from ..engine.tick import Result, Row, Spoken, Ticker
from ..errors import (
    ContextTooLong,
    InvalidRequest,
    ModelNotSupported,
    ServiceClosed,
    StoreCorrupted,
    TamperedReference,
    UnknownReference,
    WrongModel,
    first_fault,
)
from ..state import LatentRef
from .alteration import original
from .base import READING, Chunk, LatentService, LensRow, Merge, StoredReference, Usage
from .budget import Budget
from .identity import KEY_BYTES, MAX_AGENT, MAX_PARENTS, Signer, checked_ref, key_ring, memory_id
from .kv_pool import KVPool
from .marker import Marker, take_markers
from .memory import Layout, Lineage, Memory, MergeMode, Recipe, Segment
from .messages import as_openai
from .retention import Retention
from .spill import Spill
from .store import DROPPED, PINNED, FolderStore, RecipeStore
from .transfer import read_memory, write_memory

logger = logging.getLogger(__name__)


def _bytes(value: object) -> object:
    """A number with a unit, such as "4GiB" or "500 MB", as a number."""
    return TypeAdapter(ByteSize).validate_python(value) if isinstance(value, str) else value


LOADING = ("device", "dtype", "quantization", "revision", "trust_remote_code")  # go to `LanguageModel.load`
RECIPES_KEPT = 1 << 24  # bytes of decoded ones; all others are read from the store again
KV_FRACTION = 0.4  # of the device memory that is free once the model is loaded
LIVE_FRACTION = 0.4
CPU_FRACTION = 0.2
COLLECT_SECONDS = 3600.0

Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]


class LocalSettings(BaseModel):
    """Settings of a model service in this process.

    Attributes:
        realign: Whether the alignment uses `W`, or only rescales (design, rule 2; the paper treats it as a setting).
        think_tag: What the generation prompt of a thinking agent ends in, say "<think>"; "" for nothing; None takes
            what the model's configuration says, which is nothing but for models that were trained for it.
        speak_tag: The same for a speaking agent; nothing by default.
        chat_template: A Jinja chat template, for tokenizers that bring none.
        template_args: Passed to the chat template, say `{"enable_thinking": False}`.
        max_positions: A lower limit of positions than the model's own.
        compile: Whether decode steps go through `torch.compile`. On a CPU that takes a C++ compiler. The first steps
            take seconds for the bundled model, and minutes for one of 28 layers; torch keeps what it compiled.
        cuda_graphs: Whether decode steps on one CUDA device are recorded and replayed.
        store: Where recipes go: None keeps them in this process, a folder makes them durable, and any LangChain byte
            store does what it does. Several processes may share a folder.
        store_budget: Most bytes of recipes in a folder, such as "2GiB"; what would exceed it is refused before it is
            worked on. None for as many as the disk has.
        keep_for: How long after its last use a reference may be removed from a folder: seconds, or ISO 8601 such as
            "P30D"; pinned ones, and what others that stay descend from, are spared. None removes none for its age.
        key: Signing key; None takes the one in the store's folder (mode 600, made if missing), else a fresh one, whose
            references end with the process.
        kv_dtype: "int8" keeps the KV of memories in 8 bits until somebody reads it, in every place where it is kept:
            about half of bfloat16's bytes or a quarter of float32's, rounded (docs/precision.md). "auto" keeps it as
            the model computed it.
        kv_budget: Bytes of KV to keep on the device for later readers, a number or such as "4GiB"; None takes 40 % of
            the free device memory.
        kv_cpu_budget: Bytes of KV to keep in CPU memory when there is no room on the device; None takes 20 % of what is
            free, and nothing where the CPU is the device.
        kv_disk_budget: Bytes of KV to keep on the disk when there is no room there either.
        kv_folder: Where that is; None takes the folder `kv` of a store that is a folder. One process at a time.
        live_budget: Bytes of slots for the rows that are at work; None takes as much as `kv_budget`.
        max_rows: Most rows in a tick.
        prefill_chunk: Most positions of one row that a tick prefills.
        merge: "rotate" re-rotates the keys of moved segments, "rebuild" computes them anew; "auto" rotates where the
            model allows it.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    realign: bool = True
    think_tag: str | None = None
    speak_tag: str = ""
    chat_template: str | None = None
    template_args: dict[str, Any] = Field(default_factory=dict)
    max_positions: int | None = None
    compile: bool = False
    cuda_graphs: bool = True
    store: str | Path | BaseStore | None = None
    key: bytes | None = None
    store_budget: Bytes | None = None
    keep_for: timedelta | None = Field(None, ge=timedelta(0))
    kv_dtype: Literal["auto", "int8"] = "auto"
    kv_budget: Bytes | None = None
    kv_cpu_budget: Bytes | None = None
    kv_disk_budget: Bytes = 0
    kv_folder: Path | None = None
    live_budget: Bytes | None = None
    max_rows: int = Field(64, ge=1)
    prefill_chunk: int = Field(512, ge=1)
    merge: Literal["auto", "rotate", "rebuild"] = "auto"


class LocalService(LatentService):
    """`LatentService` over a transformers model in this process."""

    def __init__(
        self,
        model: LanguageModel,
        settings: LocalSettings,
        *,
        signer: Signer | None = None,
        host: "LocalService | None" = None,
    ) -> None:
        """Starts a service on a loaded model; `load`, `from_model` and `tenants` are the ways in.

        Args:
            model: The model.
            settings: How to serve it.
            signer: Signs references, manifests and markers; None takes that of `settings`.
            host: The service whose ticks this one shares; None for ticks of its own.

        Raises:
            ModelNotSupported: If the tokenizer has no chat template, `merge="rotate"` is asked of a model whose keys
                cannot be rotated, or `kv_dtype="int8"` of one in float16.
            InvalidRequest: If a budget is given for a store or a disk that is not there, or the key file is readable
                for others.
        """
        self.model, self.settings = model, settings
        self.name = model.name
        self.chat_template = settings.chat_template or model.tokenizer.chat_template or ""
        if not self.chat_template:
            raise ModelNotSupported(f"{model.name}: its tokenizer has no chat template; pass chat_template=...")
        if settings.merge == "rotate" and model.rotary is None:
            raise ModelNotSupported(f"{model.name}: its keys cannot be rotated; take merge='auto' or 'rebuild'.")
        if settings.kv_dtype == "int8" and model.dtype == torch.float16:
            raise ModelNotSupported(
                f"{model.name}: in float16 the scales of kv_dtype='int8' lose small numbers; take dtype='bfloat16' or "
                "'float32', or kv_dtype='auto'."
            )
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
        shelf, signs = store or InMemoryByteStore(), self._signer.timeless()
        self._store = RecipeStore(shelf, signs, model.config.hidden_size, model.dtype, settings.store_budget)
        self._retention = Retention(self._store, settings.keep_for)
        self._recipes: Budget[Recipe] = Budget(RECIPES_KEPT, lambda recipe: recipe.segment.nbytes)
        free = _free_bytes(model.device)
        live = int(free * LIVE_FRACTION) if settings.live_budget is None else settings.live_budget
        kept = int(free * KV_FRACTION) if settings.kv_budget is None else settings.kv_budget
        self._host = host
        if host is None:
            self._ticker = Ticker(
                model,
                max_rows=settings.max_rows,
                live_bytes=live,
                chunk=settings.prefill_chunk,
                graphs=Graphs.of(model) if settings.cuda_graphs else None,
            )
            self._scheduler = Scheduler(self._ticker)
        else:
            self._ticker, self._scheduler = host._ticker, host._scheduler
        self._lineage = Lineage(self._recipe)
        rotates = model.rotary is not None and settings.merge != "rebuild"
        mode: MergeMode = "rotate" if rotates else "rebuild"
        disk = self._spill(signs, mode) if settings.kv_disk_budget else None
        self._pool = KVPool(
            self._scheduler,
            self._lineage,
            self._recipe,
            kept,
            mode,
            cpu_limit=_cpu_budget(model.device) if settings.kv_cpu_budget is None else settings.kv_cpu_budget,
            disk=disk,
            devices=model.kv_devices,
            packed=settings.kv_dtype == "int8",
        )
        closed = threading.Event()
        # Also runs when the service is forgotten, and at exit: a tick must not outlive the interpreter.
        scheduler = None if host else self._scheduler
        self._finalizer = weakref.finalize(self, _close, scheduler, self._pool.kept, disk, closed)
        if settings.keep_for is not None:
            often = min(COLLECT_SECONDS, settings.keep_for.total_seconds() + 1)
            collecting = (weakref.ref(self), closed, often)
            threading.Thread(target=_collect, args=collecting, name="latentmas-collect", daemon=True).start()

    @classmethod
    def load(cls, model: str = "bundled", **settings: Any) -> Self:
        """Loads a model by name. See `LatentService.load`, `LocalSettings` and `LanguageModel.load`.

        Args:
            model: "bundled", a hub id, or a folder.
            **settings: Fields of `LocalSettings`, and `device`, `dtype`, `quantization`, `revision`,
                `trust_remote_code`.
        """
        loading = {name: settings.pop(name) for name in LOADING if name in settings}
        checked = _checked_settings(settings)
        source = str(bundled.MODEL) if model == "bundled" else model
        loaded = LanguageModel.load(source, **_of_the_model(checked), **loading)
        loaded.name = model
        return cls(loaded, checked)

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Self:
        """Serves a transformers model that is already loaded.

        Args:
            model: A decoder-only causal language model.
            tokenizer: Its tokenizer.
            **settings: Fields of `LocalSettings`.
        """
        checked = _checked_settings(settings)
        return cls(LanguageModel(model, tokenizer, **_of_the_model(checked)), checked)

    def tenants(self, names: Sequence[str]) -> "dict[str, LocalService]":
        """The same model for others, once: to each, references, markers, recipes and KV of their own.

        Nobody can read, list or drop what another one made, and nobody's KV is evicted for another one's: the budget
        for it is shared out evenly, this service itself included, and so are those of store, CPU memory and disk. All
        rows share the ticks.

        Args:
            names: Whose services; the same name finds its memories again in a durable store.

        Returns:
            By name. They end with this service; closing one does not close it.

        Raises:
            InvalidRequest: If this service's store is neither a folder nor its own memory.
        """
        store, parts = self.settings.store, len(names) + 1
        if isinstance(store, BaseStore):
            raise InvalidRequest("A service for several tenants takes a folder as its store, or none.")
        self._pool.kept.limit //= parts
        self._pool.spilled.limit //= parts
        if self._pool.disk is not None:
            self._pool.disk.files.limit //= parts
        if self._store.budget is not None:
            self._store.budget //= parts
        made = {}
        for name in names:
            folder_name = Path("tenants") / hashlib.sha256(name.encode()).hexdigest()[:32]
            folder = store and Path(store) / folder_name
            own = {
                "store": folder,
                "key": None,
                "store_budget": self._store.budget,
                "kv_budget": self._pool.kept.limit,
                "kv_cpu_budget": self._pool.spilled.limit,
                "kv_disk_budget": self.settings.kv_disk_budget // parts,
                "kv_folder": self.settings.kv_folder and self.settings.kv_folder / folder_name,
            }
            settings = self.settings.model_copy(update=own)
            made[name] = LocalService(self.model, settings, signer=self._signer.derived(name), host=self)
        return made

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
            return known
        for event in request.events(notify=on_step is not None):
            if isinstance(event, Result):
                return request.keep(event)
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

        request, known = await asyncio.to_thread(begun)
        if known is not None:
            return known
        async for event in request.aevents(notify=on_step is not None):
            if isinstance(event, Result):
                return await asyncio.to_thread(request.keep, event)
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
        request = _Request(self, messages, latents, agent, sampling=_sampling(sampling), tools=tools, prefix=prefix)
        with request.room():
            pass  # a store that is full is known at the call

        def chunks() -> Iterator[Chunk]:
            for event in request.events(notify=True):
                if isinstance(event, Spoken):
                    yield Chunk(event.text, (event.token,))
                elif isinstance(event, Result):
                    yield request.last_chunk(event)

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
        request = _Request(self, messages, latents, agent, sampling=_sampling(sampling), tools=tools, prefix=prefix)
        with request.room():
            pass  # a store that is full is known at the call

        async def chunks() -> AsyncIterator[Chunk]:
            async for event in request.aevents(notify=True):
                if isinstance(event, Spoken):
                    yield Chunk(event.text, (event.token,))
                elif isinstance(event, Result):
                    yield await asyncio.to_thread(request.last_chunk, event)

        return chunks()

    def memory(self, ref: LatentRef) -> Memory:
        """See `LatentService.memory`."""
        layout = self._lineage.layout(self.verify([ref]))
        placed = self._pool.place(layout).result()
        rotary = self.model.rotary
        kv = KV.join([rotary.turn(kv, shift) if shift and rotary else kv for kv, _, shift in placed])
        segments = tuple(self._recipe(piece.id).segment for piece in layout)
        return Memory(segments, kv.positions, kv.keys, kv.values, self._merge_of(layout))

    def export_memory(self, ref: LatentRef, kv: bool = False) -> Iterator[bytes]:
        """See `LatentService.export_memory`."""
        recipes = [self._recipe(piece.id) for piece in self._lineage.layout(self.verify([ref]))]
        return write_memory(recipes, self.memory(ref) if kv else None)

    def import_memory(self, file: str | Path) -> LatentRef:
        """See `LatentService.import_memory`."""
        model = self.model
        model.refresh_if_changed()
        if (exported := read_memory(Path(file), model.config.hidden_size, model.dtype)).model != model.fingerprint:
            raise WrongModel(
                f"The memory in {Path(file).name} belongs to model {exported.model}, but this service runs "
                f"{model.name} ({model.fingerprint}); load that model."
            )
        exported.check(model.config.vocab_size, model.max_positions)
        for recipe in exported.recipes:
            own = recipe.segment
            sizes = len(own.prompt_ids), len(own.thoughts), len(own.spoken_ids)
            with self._store.room(self._store.most_bytes(own.agent, recipe.parents, *sizes)):
                self._store.put(recipe)  # what is known here already stays as it is (design, rule 4)
        last = exported.recipes[-1]
        return self.signed_ref(last.id, last.segment.agent, last.parents, len(last.segment.thoughts))

    def lens(self, ref: LatentRef, top_k: int = 5) -> list[LensRow]:
        """See `LatentService.lens`."""
        if not 1 <= top_k <= self.model.config.vocab_size:
            raise InvalidRequest(f"top_k must lie between 1 and {self.model.config.vocab_size}, not at {top_k}.")
        recipe = self._recipe(self.verify([ref])[0])
        segment = recipe.segment
        if not len(segment.thoughts):
            return []
        events: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        seen = self._lineage.layout(recipe.parents)
        row = Row(
            past=(),
            start=seen[-1].end if seen else 0,
            inputs=[segment.prompt_ids, segment.thoughts],
            keep_hidden=True,
            on_done=events.put,
            on_error=events.put,
        )
        self._pool.submit(row, self._pool.place(seen))
        result = events.get()
        if isinstance(result, BaseException):
            raise result
        assert result.hidden is not None
        # The state that became a thought is the one at the position before it.
        states = result.hidden[len(segment.prompt_ids) - 1 : -1]
        rows = read_out(self.model, states, top_k)
        return [LensRow(segment.agent, step, tokens) for step, tokens in enumerate(rows, 1)]

    def marker(self, ref: LatentRef) -> str:
        """See `LatentService.marker`."""
        self.verify([ref])
        return self.signed_marker(ref)

    def take_markers(self, text: str, left: str = "") -> tuple[str, list[LatentRef]]:
        """See `LatentService.take_markers`."""
        text, markers = take_markers(text, left)
        return text, [self._marked(marker) for marker in markers]

    def altered(self, ref: LatentRef, how: Literal["zeroed", "random"], seed: int = 0) -> LatentRef:
        """See `LatentService.altered`."""
        if how not in ("zeroed", "random"):
            raise InvalidRequest(f"A memory can be 'zeroed' or 'random', not {how!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 10**9:
            raise InvalidRequest(f"seed must be a whole number from 0 to 999,999,999, not {seed!r}.")
        key = self.verify([ref])[0]
        suffix = ".zeroed" if how == "zeroed" else f".random{seed}"
        return self.signed_ref(key + suffix, ref["agent"], [parent + suffix for parent in ref["parents"]], ref["steps"])

    def references(self) -> list[StoredReference]:
        """See `LatentService.references`."""
        listed = []
        for key, header in self._retention.headers().items():
            if header.model != self.model.fingerprint or self._store.marked(key, DROPPED):
                continue
            with suppress(UnknownReference, StoreCorrupted):  # it, or what it descends from, is gone by now or damaged
                ref = self.signed_ref(key, header.agent, header.parents, header.steps)
                made, used = (datetime.fromtimestamp(at, UTC) for at in (header.made, self._retention.used(key)))
                pinned = self._store.marked(key, PINNED)
                listed.append(StoredReference(ref, made, used, self._store.size_of(key), pinned))
        return sorted(listed, key=lambda stored: stored.made, reverse=True)

    def pin(self, ref: LatentRef, pinned: bool = True) -> None:
        """See `LatentService.pin`."""
        self._retention.pin(_stored(self.verify([ref])[0]), pinned)

    def drop(self, ref: LatentRef) -> None:
        """See `LatentService.drop`."""
        try:
            key = _stored(self.verify([ref])[0])
        except UnknownReference:
            return
        self._forget([key, *self._retention.drop(key)])

    def collect(self) -> int:
        """Removes references that have not been used for `keep_for`; runs by itself, at the start and every hour.

        Returns:
            How many were removed.
        """
        removed = self._retention.collect()
        self._forget(removed)
        return len(removed)

    def info(self) -> dict[str, Any]:
        """See `LatentService.info`."""
        model, ticker, kept, pool = self.model, self._ticker, self._pool.kept, self._pool
        return {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "architecture": type(model.model).__name__,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization or "none",
            "weight_bytes": model.weight_bytes,
            "compiled": model.compiled is not None,
            "cuda_graphs": ticker.cuda_graphs,
            "max_positions": model.max_positions,
            "realign": model.realign,
            "think_tag": self.think_tag,
            "merge": self._pool.mode,
            "kv_dtype": "int8" if pool.packed else str(model.dtype).removeprefix("torch."),
            "kv_bytes_per_position": model.bytes_per_position,
            "kv_budget": kept.limit,
            "kv_bytes": kept.used,
            "kv_segments": len(kept),
            "kv_hits": pool.hits["device"],
            "evictions": kept.evictions,
            "kv_cpu_budget": pool.spilled.limit,
            "kv_cpu_bytes": pool.spilled.used,
            "kv_cpu_hits": pool.hits["cpu"],
            "kv_cpu_evictions": pool.spilled.evictions,
            "kv_disk_budget": pool.disk.files.limit if pool.disk else 0,
            "kv_disk_bytes": pool.disk.files.used if pool.disk else 0,
            "kv_disk_hits": pool.hits["disk"],
            "kv_disk_evictions": pool.disk.files.evictions if pool.disk else 0,
            "kv_disk_refused": pool.disk.refused if pool.disk else 0,
            "rebuilds": pool.rebuilds,
            "store_bytes": self._store.nbytes or 0,
            "waiting": self._scheduler.waiting,
            "rows": len(ticker.rows),
            "ticks": ticker.ticks,
            "thoughts": ticker.thoughts,
            "tokens": ticker.spoken,
            "prefilled": ticker.prefilled,
            **({} if self._store.budget is None else {"store_budget": self._store.budget}),
        }

    def close(self) -> None:
        """See `LatentService.close`."""
        self._finalizer()

    def verify(self, latents: Sequence[LatentRef] | LatentRef | None) -> list[str]:
        """Checks references and returns their ids.

        Raises:
            WrongModel: If one belongs to another model.
            TamperedReference: If one is malformed or its signature does not match.
            UnknownReference: If the recipe of one is not in the store.
            DroppedReference: If one was dropped.
        """
        self.model.refresh_if_changed()
        refs = _listed(latents)
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
        listed = _as_messages(messages)
        if tools and "tools" not in self.chat_template:
            raise InvalidRequest(
                f"The chat template of {self.model.name} presents no tools, so the model would never see them; "
                "pass chat_template=... that does, or bind none."
            )
        tokenizer = self.model.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                listed,
                chat_template=self.chat_template,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
                **self.settings.template_args,
            )
            ids = tokenizer(text + tag, add_special_tokens=False)["input_ids"]
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}") from error
        if not ids:
            raise InvalidRequest(
                "The model's chat template makes no tokens of these messages; it must make at least one."
            )
        return tuple(ids)

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
            if recipe.model != self.model.fingerprint:
                raise UnknownReference(f"The memory {key} was made by another model ({recipe.model}).")
            self._recipes.put(key, recipe)
        return recipe

    def _spill(self, signer: Signer, mode: MergeMode) -> Spill:
        store, folder = self.settings.store, self.settings.kv_folder
        if folder is None and isinstance(store, (str, Path)):
            folder = Path(store) / "kv"
        if folder is None:
            raise InvalidRequest("kv_disk_budget needs a folder: kv_folder=..., or a folder as store.")
        model, packed = self.model, self.settings.kv_dtype == "int8"
        dtype = str(model.dtype).removeprefix("torch.")
        made_for = {"model": model.fingerprint, "dtype": dtype, "merge": mode}

        def blank(positions: int) -> AnyKV:
            kv = model.blank_kv(positions)
            return kv.packed() if packed else kv

        if packed:
            made_for["kv_dtype"] = "int8"
        return Spill(folder, self.settings.kv_disk_budget, signer, made_for, blank)

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._recipes.pop(key)
            self._pool.forget(key)

    def _merge_of(self, layout: Layout) -> Merge:
        if all(piece.start == self._lineage.line(piece.id)[-1].start for piece in layout):
            return "none"
        return "rotated" if self._pool.mode == "rotate" else "rebuilt"


class _Request:
    """One checked call of think or speak, not yet begun."""

    def __init__(
        self,
        service: LocalService,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef],
        agent: str,
        *,
        steps: int = 0,
        sampling: Sampling | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
    ) -> None:
        if service._scheduler.closed:
            raise ServiceClosed("The service is closed; load another one.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise InvalidRequest(f"steps must be a whole number from 0 on, not {steps!r}.")
        if not _can_name(agent):
            raise InvalidRequest(f"An agent needs a name of 1 to {MAX_AGENT} characters, not {agent!r}.")
        self.service, self.agent, self.steps, self.sampling = service, agent, steps, sampling
        listed = _listed(latents)
        self.parents = self.named = service._lineage.tips(service.verify(listed))
        self.reading = READING.get()
        if self.reading is not None:
            refs = {ref["id"]: ref for ref in reversed(listed)}
            would, instead = self.reading.read(service, agent, [refs[key] for key in self.parents], steps)
            self.named = [ref["id"] for ref in would]
            self.parents = service._lineage.tips(service.verify(instead))
        tag = service.think_tag if sampling is None else service.settings.speak_tag + prefix
        self.prompt_ids = service.encode(messages, tag, tools)
        self.layout = service._lineage.layout(self.parents)
        self.start = self.layout[-1].end if self.layout else 0
        self.model = service.model.fingerprint
        self.alignment = "realign" if service.model.realign else "rescale"
        to_come = steps + (sampling.max_tokens if sampling else 0)
        needed, limit = self.start + len(self.prompt_ids) + to_come, service.model.max_positions
        if needed > limit:
            raise ContextTooLong(
                f"Agent {agent!r} needs {needed} positions ({self.start} of memory, {len(self.prompt_ids)} of prompt, "
                f"{to_come} to come), the model has {limit}. Read fewer memories, shorten the prompt, or "
                "take fewer steps."
            )

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
        """Does the work; yields steps and tokens if `notify`, then the result. Closing it frees the slot."""
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self.room():
            row = self._begin(inbox.put, notify)
            try:
                while not isinstance(event := inbox.get(), (Result, BaseException)):
                    yield event
                if isinstance(event, BaseException):
                    raise event
                yield event
            finally:
                row.cancelled = True

    async def aevents(self, notify: bool) -> AsyncIterator[int | Spoken | Result]:
        """Like `events`, for `async for`."""
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: object) -> None:
            with suppress(RuntimeError):  # the loop was closed while the row was at work; nobody waits any more
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        with self.room():
            row = self._begin(put, notify)
            try:
                while not isinstance(event := await inbox.get(), (Result, BaseException)):
                    yield event
                if isinstance(event, BaseException):
                    raise event
                yield event
            finally:
                row.cancelled = True

    def keep(self, result: Result) -> LatentRef:
        """Stores recipe and KV of a finished row; returns its reference."""
        key = self._id(result.tokens)
        segment = Segment(self.agent, self.prompt_ids, result.thoughts.cpu(), tuple(result.tokens))
        recipe = Recipe(key, self.model, self.alignment, tuple(self.parents), segment)
        service = self.service
        if service._store.put(recipe) is recipe:  # else somebody was faster, and his stays
            service._forget([key])
            service._recipes.put(key, recipe)
            service._pool.keep(key, result.kv)
        return self._ref(key)

    def room(self) -> AbstractContextManager[None]:
        """Holds room in the store for what comes of it.

        Raises:
            StoreFull: If there is not that much.
        """
        spoken = self.sampling.max_tokens if self.sampling else 0
        store = self.service._store
        return store.room(store.most_bytes(self.agent, self.parents, len(self.prompt_ids), self.steps, spoken))

    def last_chunk(self, result: Result) -> Chunk:
        """What closes a stream of chunks."""
        service = self.service
        read = [service._recipe(piece.id).segment for piece in self.layout]
        usage = Usage(
            input_tokens=len(self.prompt_ids),
            output_tokens=len(result.tokens),
            latent_steps=sum(len(segment.thoughts) for segment in read),
            positions_read=self.start,
            merge=service._merge_of(self.layout),
        )
        return Chunk(result.text, ref=self.keep(result), usage=usage, finish_reason=result.finish)

    def _begin(self, put: Callable[[object], None], notify: bool) -> Row:
        row = Row(
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
        pool = self.service._pool
        pool.submit(row, pool.place(self.layout))
        return row

    def _id(self, spoken_ids: Sequence[int] = ()) -> str:
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


def _listed(latents: Any) -> list[Any]:
    several = isinstance(latents, Iterable) and not isinstance(latents, Mapping)
    return list(latents) if several else [] if latents is None else [latents]


def _of_the_model(settings: LocalSettings) -> dict[str, Any]:
    return settings.model_dump(include={"realign", "max_positions", "compile"})


def _checked_settings(settings: dict[str, Any]) -> LocalSettings:
    try:
        return LocalSettings(**settings)
    except ValidationError as error:
        known = ", ".join([*LOADING, *LocalSettings.model_fields])
        raise InvalidRequest(f"Setting {first_fault(error)}. Settings: {known}.") from error


def _sampling(values: dict[str, Any]) -> Sampling:
    stop = values.pop("stop", None)
    try:
        return Sampling(**values, stop=(stop,) if isinstance(stop, str) else tuple(stop or ()))
    except TypeError as error:
        raise InvalidRequest(f"speak takes max_tokens, temperature, top_p, top_k, stop and seed: {error}") from error


def _as_messages(messages: LanguageModelInput) -> list[dict[str, Any]]:
    listed = as_openai(messages)
    for message in listed:
        for call in message.get("tool_calls") or ():  # templates want the arguments as an object
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return listed


def _can_name(agent: object) -> bool:
    # What has no UTF-8, a lone surrogate, could not be stored once the work is done.
    return isinstance(agent, str) and 0 < len(agent) <= MAX_AGENT and agent.encode(errors="replace").decode() == agent


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _cpu_budget(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(psutil.virtual_memory().available * CPU_FRACTION)


def _stored(key: str) -> str:
    if original(key) != key:
        raise InvalidRequest(f"{key} is an altered memory, which is never stored; name the one it was made of.")
    return key


def _collect(service_ref: "weakref.ref[LocalService]", closed: threading.Event, seconds: float) -> None:
    while (service := service_ref()) is not None and not closed.is_set():
        try:
            service.collect()
        except Exception:  # a disk that does not answer today
            logger.exception("old references could not be removed; they are tried again later")
        del service
        closed.wait(seconds)


def _close(scheduler: Scheduler | None, kept: Budget[AnyKV], disk: Spill | None, closed: threading.Event) -> None:
    closed.set()
    if scheduler is not None:
        scheduler.close()
    if disk is not None:
        disk.close()
    kept.clear()
