"""The model service in this process: transformers, one tick thread, memories on the device."""

import hashlib
import queue
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import torch
from langchain_core.stores import BaseStore
from pydantic import Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import bundled
from ..engine.device import free_bytes_for
from ..engine.graphs import Graphs
from ..engine.kv import KV, AnyKV
from ..engine.lens import read_out
from ..engine.model import LanguageModel
from ..engine.scheduler import Scheduler
from ..engine.tick import Result, Row, Ticker
from ..errors import InvalidRequest, ModelNotSupported, first_fault
from ..state import LatentRef
from .alteration import original
from .base import LensRow
from .budget import Budget
from .identity import Signer
from .kv_pool import KVPool
from .memory import Layout, Memory, MergeMode, Recipe
from .recipes import RecipeService, RecipeSettings
from .spill import Spill
from .transfer import check_recipes, read_memory, write_memory
from .units import Bytes

LOADING = ("device", "dtype", "quantization", "revision", "trust_remote_code")  # go to `LanguageModel.load`
KV_FRACTION = 0.35  # of the device memory that is free once the model is loaded
LIVE_FRACTION = 1 / 3  # and a quarter of it more for a moment, whenever the slots grow
CPU_FRACTION = 0.2


class LocalSettings(RecipeSettings):
    """Settings of a model service in this process, besides those of `RecipeSettings`.

    Attributes:
        realign: Whether the alignment uses `W`, or only rescales (the paper treats it as a setting).
        compile: Whether decode steps go through `torch.compile`. On a CPU that takes a C++ compiler. The first steps
            take seconds for the bundled model, and minutes for one of 28 layers; torch keeps what it compiled.
        pack: Whether to keep large matrices a second time, in the layout that a CPU reads fastest (docs/speed.md).
        cuda_graphs: Whether decode steps on one CUDA device are recorded and replayed.
        kv_dtype: "int8" keeps the KV of memories in 8 bits until somebody reads it, in every place where it is kept:
            about half of bfloat16's bytes or a quarter of float32's, rounded (docs/precision.md). "auto" keeps it as
            the model computed it.
        kv_budget: Bytes of KV to keep on the device for later readers, a number or such as "4GiB"; None takes 35 % of
            the free device memory.
        kv_cpu_budget: Bytes of KV to keep in CPU memory when there is no room on the device; None takes 20 % of what is
            free, and nothing where the CPU is the device.
        kv_disk_budget: Bytes of KV to keep on the disk when there is no room there either.
        kv_folder: Where that is; None takes the folder `kv` of a store that is a folder. One process at a time.
        live_budget: Bytes of slots for the rows that are at work; None takes a third of the free device memory,
            whatever `kv_budget` is. Where slots grow up to it, a quarter more is in use for a moment, and what rows
            leave when they end is a copy, which takes its own room until it is kept.
        max_rows: Most rows in a tick.
        prefill_chunk: Most positions of one row that a tick prefills.
        merge: "rotate" re-rotates the keys of moved segments, "rebuild" computes them anew; "auto" rotates where the
            model allows it.
    """

    realign: bool = True
    compile: bool = False
    pack: bool = False
    cuda_graphs: bool = True
    kv_dtype: Literal["auto", "int8"] = "auto"
    kv_budget: Bytes | None = None
    kv_cpu_budget: Bytes | None = None
    kv_disk_budget: Bytes = 0
    kv_folder: Path | None = None
    live_budget: Bytes | None = None
    max_rows: int = Field(64, ge=1)
    prefill_chunk: int = Field(512, ge=1)
    merge: Literal["auto", "rotate", "rebuild"] = "auto"


class LocalService(RecipeService):
    """`LatentService` over a transformers model in this process."""

    model: LanguageModel
    settings: LocalSettings

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
            InvalidRequest: If a budget or an age is given for a store or a disk that is not there, or the key file is
                readable for others.
        """
        if settings.merge == "rotate" and model.rotary is None:
            raise ModelNotSupported(f"{model.name}: its keys cannot be rotated; take merge='auto' or 'rebuild'.")
        if settings.kv_dtype == "int8" and model.dtype == torch.float16:
            raise ModelNotSupported(
                f"{model.name}: in float16 the scales of kv_dtype='int8' lose small numbers; take dtype='bfloat16' or "
                "'float32', or kv_dtype='auto'."
            )
        rotates = model.rotary is not None and settings.merge != "rebuild"
        super().__init__(model, settings, moved="rotated" if rotates else "rebuilt", signer=signer)
        free = free_bytes_for(model.kv_devices)
        live = int(free * LIVE_FRACTION) if settings.live_budget is None else settings.live_budget
        kept = int(free * KV_FRACTION) if settings.kv_budget is None else settings.kv_budget
        self._host, self._tenants = host, weakref.WeakSet[LocalService]()
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
        mode: MergeMode = "rotate" if rotates else "rebuild"
        disk = self._spill(mode) if settings.kv_disk_budget else None
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
        # Also runs when the service is forgotten, and at exit: a tick must not outlive the interpreter.
        budgets = self._pool.kept, self._pool.spilled
        self._finalizer = weakref.finalize(self, _close, None if host else self._scheduler, budgets, disk)
        self._collect_regularly()

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
        self._tenants.update(made.values())
        return made

    def memory(self, ref: LatentRef) -> Memory:
        """See `LatentService.memory`."""
        return self._memory(ref)

    def _memory(self, ref: LatentRef, device: torch.device | None = None) -> Memory:
        """A memory, on this device or on the model's."""
        layout = self._lineage.layout(self.verify([ref]))
        placed = self._pool.place(layout).result()
        if device is not None:
            placed = [each._replace(kv=each.kv.to([device] * len(self.model.kv_devices))) for each in placed]
        rotary = self.model.rotary
        kv = KV.join([rotary.turn(kv, shift) if shift and rotary else kv for kv, _, shift in placed])
        segments = tuple(self._recipe(piece.id).segment for piece in layout)
        return Memory(segments, kv.positions, list(kv.keys), list(kv.values), self._merge_of(layout))

    def export_memory(self, ref: LatentRef, kv: bool = False) -> Iterator[bytes]:
        """See `LatentService.export_memory`."""
        layout = self._lineage.layout(self.verify([ref]))
        if altered := next((piece.id for piece in layout if original(piece.id) != piece.id), None):
            raise InvalidRequest(f"{altered} is an altered memory; export the one it was made of.")
        recipes = [self._recipe(piece.id) for piece in layout]
        return write_memory(recipes, self._memory(ref, torch.device("cpu")) if kv else None)

    def import_memory(self, file: str | Path) -> LatentRef:
        """See `LatentService.import_memory`."""
        model = self.model
        model.refresh_if_changed()
        width, most_positions = model.config.hidden_size, model.max_positions
        recipes = read_memory(Path(file), model.fingerprint, width, model.dtype, most_positions)
        check_recipes(recipes, model.config.vocab_size)

        def stored(recipe: Recipe, fresh: bool) -> None:
            if fresh:  # another process may have dropped what is still in memory here under this id
                self._forget([recipe.id])

        most = 0
        for recipe in recipes:
            own = recipe.segment
            sizes = len(own.prompt_ids), len(own.thoughts), len(own.spoken_ids)
            most += self._store.most_bytes(own.agent, recipe.parents, *sizes)
        with self._store.room(most):  # what is known here already stays as it is
            self._store.put_all(recipes, stored)
        last = recipes[-1]
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
        self._pool.submit(row, seen)  # with all its hidden states, so that nothing is reused
        result = events.get()
        if isinstance(result, BaseException):
            raise result
        assert result.hidden is not None
        # The state that became a thought is the one at the position before it.
        states = result.hidden[len(segment.prompt_ids) - 1 : -1]
        rows = read_out(self.model, states, top_k)
        return [LensRow(segment.agent, step, tokens) for step, tokens in enumerate(rows, 1)]

    def forget_prefixes(self) -> bool:
        """See `LatentService.forget_prefixes`."""
        self._pool.forget_prefixes()
        return True

    def altered(self, ref: LatentRef, how: Literal["zeroed", "random"], seed: int = 0) -> LatentRef:
        """See `LatentService.altered`."""
        if how not in ("zeroed", "random"):
            raise InvalidRequest(f"A memory can be 'zeroed' or 'random', not {how!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 10**9:
            raise InvalidRequest(f"seed must be a whole number from 0 to 999,999,999, not {seed!r}.")
        key = self.verify([ref])[0]
        suffix = ".zeroed" if how == "zeroed" else f".random{seed}"
        return self.signed_ref(key + suffix, ref["agent"], [parent + suffix for parent in ref["parents"]], ref["steps"])

    def info(self) -> dict[str, Any]:
        """See `LatentService.info`."""
        model, ticker, kept, pool = self.model, self._ticker, self._pool.kept, self._pool
        ticks = {
            "waiting": self._scheduler.waiting,
            "rows": len(ticker.rows),
            "ticks": ticker.ticks,
            "thoughts": ticker.thoughts,
            "tokens": ticker.spoken,
            "prefilled": ticker.prefilled,
            "reused": ticker.reused,
        }
        return {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "architecture": type(model.model).__name__,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization or "none",
            "weight_bytes": model.weight_bytes,
            "compiled": model.compiled,
            "packed": model.packed,
            "decoder": f"transformers, since {model.decoder_fault}" if model.decoder_fault else "own",
            "cuda_graphs": ticker.cuda_graphs,
            "max_positions": model.max_positions,
            "realign": model.realign,
            **self._prompting,
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
            # Of all tenants together, so none is told: the difference that a request makes says how long its prompt is.
            **(ticks if self._host is None else {}),
            **({} if self._store.budget is None else {"store_budget": self._store.budget}),
        }

    def close(self) -> None:
        """See `LatentService.close`."""
        for tenant in list(self._tenants):
            tenant.close()
        super().close()
        self._finalizer()

    def verify(self, latents: Sequence[LatentRef] | LatentRef | None) -> list[str]:
        """See `RecipeService.verify`."""
        self.model.refresh_if_changed()
        return super().verify(latents)

    @property
    def fault(self) -> str:
        """Why no work is done any more, whatever is asked; "" while it is."""
        return self._scheduler.fault

    @property
    def closed(self) -> bool:
        """See `LatentService.closed`."""
        return self._ended.is_set() or self._scheduler.closed

    def _start(self, row: Row, layout: Layout, after: Sequence[str]) -> None:
        self._pool.submit(row, layout, after)

    def _starts_at_once(self, layout: Layout) -> bool:
        return True  # what takes longer waits until the row's turn is near

    def _keeps_at_once(self, result: Result) -> bool:
        return not self._store.in_memory or self._pool.keeps_at_once(result.kv)  # else what writes recipes keeps it

    def _keep(self, key: str, result: Result) -> None:
        self._pool.keep(key, result.kv)

    def _forget(self, keys: Sequence[str]) -> None:
        super()._forget(keys)
        for key in keys:
            self._pool.forget(key)

    def _spill(self, mode: MergeMode) -> Spill:
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
        limit, signer = self.settings.kv_disk_budget, self._signer.timeless()
        return Spill(folder, limit, signer, made_for, blank, known=self._store.ids())


def _of_the_model(settings: LocalSettings) -> dict[str, Any]:
    return settings.model_dump(include={"realign", "max_positions", "compile", "pack"})


def _checked_settings(settings: dict[str, Any]) -> LocalSettings:
    try:
        return LocalSettings(**settings)
    except ValidationError as error:
        known = ", ".join([*LOADING, *LocalSettings.model_fields])
        raise InvalidRequest(f"Setting {first_fault(error)}. Settings: {known}.") from error


def _cpu_budget(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(psutil.virtual_memory().available * CPU_FRACTION)


def _close(scheduler: Scheduler | None, budgets: Sequence[Budget[AnyKV]], disk: Spill | None) -> None:
    if scheduler is not None:
        scheduler.close()
    if disk is not None:
        disk.close()
    for budget in budgets:
        budget.clear()
