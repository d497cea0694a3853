"""Recipes on a shelf: one value per recipe, in a folder or in any LangChain byte store (docs/store-format.md)."""

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar

import torch
from filelock import FileLock, Timeout
from langchain_core.stores import BaseStore, InMemoryByteStore
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ..errors import (
    DroppedReference,
    InvalidRequest,
    StoreBusy,
    StoreCorrupted,
    StoreFull,
    UnknownReference,
    first_fault,
)
from .alteration import original
from .envelope import MAX_HEADER, OVERHEAD, Envelope, Kind
from .identity import MAX_AGENT, MAX_PARENTS, Signer, memory_id
from .memory import Alignment, Recipe, Segment
from .private import FOLDER, flush, private

logger = logging.getLogger(__name__)

MAX_VALUE = 1 << 26  # bytes: 80 thoughts of a 14B model in float32 are a fortieth of it
DISK_RESERVE = 1 << 24  # bytes of the disk that are left free
LOCK_SECONDS = 60.0
TOGETHER = 128  # recipes that are written together; as many files are open at a time
FLUSHERS = 8  # flushes under way at a time, which a disk does as one
RECIPE, PINNED, DROPPED = ".recipe", ".pinned", ".dropped"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ID = re.compile(rb"lat_[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
A = TypeVar("A")


class FolderStore(BaseStore[str, bytes]):
    """A folder with one file per key; a file is there whole or not at all, also after a crash.

    Several processes may share one folder: they write and delete in turns, under a lock that ends with its holder.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens the folder, making it if need be, and removes what a crash left half-written.

        Args:
            folder: Where the files lie.

        Raises:
            StoreBusy: If another process holds its lock for a minute.
        """
        self.folder = Path(folder)
        self._inside = os.path.join(folder, "")  # paths are made of strings: `Path` takes longer than the disk
        self.folder.mkdir(FOLDER, parents=True, exist_ok=True)
        self._lock, self._process = FileLock(self.folder / ".lock", mode=0o600), os.getpid()
        self._thread_lock, self._depth = threading.RLock(), 0
        self._flushers = ThreadPoolExecutor(FLUSHERS - 1, "latentmas-flush")
        with self.locked():
            for half in self.folder.glob(".*.part"):
                half.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps all others, threads and processes, from writing; may be nested.

        Raises:
            StoreBusy: If it does not become free within a minute, or the folder was opened before a fork.
        """
        _refuse_after_a_fork(self._process)  # another thread may have held the lock
        until = time.monotonic() + LOCK_SECONDS
        if not self._thread_lock.acquire(timeout=LOCK_SECONDS):
            raise self._busy()
        try:
            if not self._depth:  # the file's lock is dear, even for who has it
                self._acquire(max(0.0, until - time.monotonic()))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._lock.release()
        finally:
            self._thread_lock.release()

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Reads files; None for a key that is not there.

        Raises:
            StoreCorrupted: If a file cannot be opened, or is larger than any recipe can be.
        """
        return [self._read(self._path(key)) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Writes files; when this returns, the disk has all of them.

        Raises:
            StoreFull: If the disk is full; what is there stays.
        """
        with self.locked(), _full_disk(self.folder), contextlib.ExitStack() as written:
            halves: list[tuple[BinaryIO, str, str]] = []
            for key, value in key_value_pairs:
                path, half = self._path(key), f"{self._inside}.{secrets.token_hex(8)}.part"
                written.callback(_remove, half)
                file = written.enter_context(open(half, "xb", opener=private))
                file.write(value)
                file.flush()
                halves.append((file, half, path))
            self._flush([file for file, _, _ in halves])
            for _, half, path in halves:
                os.replace(half, path)
            flush(self.folder)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Removes files; a key that is not there is no error."""
        with self.locked():
            for key in keys:
                _remove(self._path(key))
            flush(self.folder)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """All keys, or those that begin with `prefix`."""
        with os.scandir(self.folder) as files:
            names = sorted(file.name for file in files)
        yield from (name for name in names if name.startswith(prefix or "") and _KEY.fullmatch(name))

    def has(self, key: str) -> bool:
        """Whether there is such a file."""
        return os.path.exists(self._path(key))

    def touch(self, key: str) -> None:
        """Notes that a file was used just now; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(key))

    def touched(self, key: str) -> float:
        """Unix time of its last use.

        Raises:
            UnknownReference: If it is not there.
        """
        try:
            return os.stat(self._path(key)).st_mtime
        except FileNotFoundError:
            raise UnknownReference(f"{key} is not in {self.folder}.") from None

    def size_of(self, key: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._path(key)).st_size
        return None

    def set_aside(self, key: str) -> Path:
        """Moves a file that cannot be read to the folder `<folder>.aside`, where nobody looks for it.

        Returns:
            Where it lies now.
        """
        aside = self.folder.with_name(f"{self.folder.name}.aside")
        aside.mkdir(FOLDER, exist_ok=True)
        to = aside / key
        if to.exists():
            to = aside / f"{key}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path(key), to)
        return to

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        total = 0
        with os.scandir(self.folder) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    total += file.stat().st_size
        return total

    @property
    def changed(self) -> int:
        """Moves on whenever a file comes or goes, whoever did it."""
        return self.folder.stat().st_mtime_ns

    @property
    def free(self) -> int:
        """Bytes that the disk has left."""
        return shutil.disk_usage(self.folder).free

    def _acquire(self, seconds: float) -> None:
        try:
            self._lock.acquire(timeout=seconds, poll_interval=0.002)
        except Timeout as error:
            raise self._busy() from error

    def _busy(self) -> StoreBusy:
        return StoreBusy(
            f"{self.folder} has been held for {LOCK_SECONDS:.0f} s, by another process or by other work of this one; "
            "try again."
        )

    def _flush(self, files: Sequence[BinaryIO]) -> None:
        mine, *parts = [files[i::FLUSHERS] for i in range(FLUSHERS)]
        others = []
        for part in filter(None, parts):
            try:
                others.append(self._flushers.submit(_fsync, part))
            except RuntimeError:  # the interpreter ends, and takes no new work for threads
                mine = [*mine, *part]
        try:
            _fsync(mine)
        finally:
            wait(others)  # whatever happens: they must not be closed before
        for other in others:
            other.result()

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"{key!r} cannot be a key of a store: letters, digits, '_', '-' and '.' only.")
        return self._inside + key

    @staticmethod
    def _read(path: str) -> bytes | None:
        try:
            with open(path, "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) > MAX_VALUE:
                    raise StoreCorrupted(f"it has {size} bytes, more than any recipe")
                return file.read(size)
        except FileNotFoundError:
            return None
        except (PermissionError, IsADirectoryError) as error:  # a fault of this file; others end the call
            raise StoreCorrupted(f"it cannot be opened ({error.strerror})") from error


class Header(BaseModel):
    """The JSON part of a stored recipe; everything else is in its tensors."""

    model_config = ConfigDict(strict=True, extra="forbid")
    id: str
    agent: str = Field(max_length=MAX_AGENT)
    model: str
    alignment: Alignment
    parents: list[str] = Field(max_length=MAX_PARENTS)
    prompt: Annotated[int, Field(ge=0)]
    """Tokens of the prompt."""
    steps: Annotated[int, Field(ge=0)]
    spoken: Annotated[int, Field(ge=0)]
    """Tokens that were spoken."""
    made: float
    """Unix time."""

    def place(self) -> tuple[float, str]:
        """Where it stands among others: the latest made come first."""
        return -self.made, self.id


class _Put(NamedTuple):
    """A recipe that waits to be written, and who waits for it."""

    made: Callable[[], Recipe]
    then: Callable[[Recipe, bool], Any]
    done: "Future[Any]"


class RecipeStore:
    """Puts recipes into a byte store and takes them out again, trusting nothing that it reads.

    A recipe is the value of `<id>.recipe`. `<id>.pinned` and `<id>.dropped` are marks without content. Whatever has a
    recipe here has those of its parents here too.
    """

    def __init__(
        self,
        store: BaseStore[str, bytes],
        signer: Signer,
        hidden_size: int,
        dtype: torch.dtype,
        budget: int | None = None,
    ) -> None:
        """Wraps a store.

        Args:
            store: Where the bytes go.
            signer: Signs the recipes.
            hidden_size: Width of a thought.
            dtype: Dtype of a thought.
            budget: Most bytes of all files together; None for as many as the disk has.

        Raises:
            InvalidRequest: If a budget is asked of a store that is no folder.
        """
        self.store, self.signer, self.hidden_size, self.dtype, self.budget = store, signer, hidden_size, dtype, budget
        self.folder = store if isinstance(store, FolderStore) else None
        self.in_memory = isinstance(store, InMemoryByteStore)  # nothing here waits
        if budget is not None and self.folder is None:
            raise InvalidRequest("store_budget needs a folder as store; other stores have limits of their own.")
        self._thread_lock = threading.RLock()
        self._writer, self._process = ThreadPoolExecutor(1, "latentmas-store"), os.getpid()
        self._waiting: list[_Put] = []
        self._waiting_lock = threading.Lock()
        # Never held while a disk is written or a folder is counted, so event loops may wait for it. A stream that was
        # forgotten gives its room back when it is collected, which may happen to the thread that holds it.
        self._room_lock = threading.RLock()
        self._reserved = self._used = 0
        self._counted = -1  # the folder's `changed` that `_used` belongs to
        self._writing = False  # what moves the folder on right now is ours alone, and `_used` will know of it

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps all other writers out: the threads of this process, and for a folder other processes too."""
        with self.folder.locked() if self.folder else self._thread_lock:
            yield

    @contextlib.contextmanager
    def room(self, nbytes: int, counted: bool = False) -> Iterator[None]:
        """Holds room for a recipe that is still being made.

        Args:
            nbytes: From `most_bytes`.
            counted: Whether `count` was called just now; else it is called here.

        Raises:
            StoreFull: If there is not that much.
        """
        if not counted:
            self.count()
        with self._room_lock:
            self._check_room(nbytes + self._reserved)
            self._reserved += nbytes
        try:
            yield
        finally:
            with self._room_lock:
                self._reserved -= nbytes

    def most_bytes(self, agent: str, parents: Sequence[str], prompt: int, steps: int, spoken: int) -> int:
        """The most bytes that a recipe with so many parts takes."""
        header = 400 + 6 * len(agent) + sum(len(parent) + 3 for parent in parents)
        tensors = 400 + 4 * (prompt + spoken) + steps * self.hidden_size * self.dtype.itemsize
        return OVERHEAD + header + tensors

    @property
    def nbytes(self) -> int | None:
        """Bytes of all files of a folder; None for other stores."""
        self.count(always=True)
        return self._used if self.folder else None

    @property
    def counted(self) -> bool:
        """Whether `count` has nothing to do."""
        with self._room_lock:
            return self.folder is None or self.budget is None or self._writing or self._counted == self.folder.changed

    def count(self, always: bool = False) -> None:
        """Sees to it that the bytes in use are known, where there is a budget for them, or `always`.

        To look at all files of a folder may take long: no event loop calls it, and nobody who holds the room's lock.
        """
        if self.folder is None or not (always or self.budget is not None):
            return
        with self._room_lock:
            known = self._counted
            if self._writing or known == self.folder.changed:
                return
        changed, used = self.folder.changed, self.folder.nbytes
        with self._room_lock:
            if not self._writing and self._counted == known:  # else somebody else was faster
                self._counted, self._used = changed, used

    def put_all(self, recipes: Sequence[Recipe], then: Callable[[Recipe, bool], A]) -> list[A]:
        """Writes recipes together; when this returns, a durable store has them.

        Args:
            recipes: Each behind its parents.
            then: As `put_soon` takes it.

        Returns:
            What `then` returns of each.

        Raises:
            InvalidRequest: If one is larger than `get` would read.
            DroppedReference: If a parent of one is no longer there.
            StoreFull: If there is no room.
        """

        def begun(recipe: Recipe) -> "Future[A]":
            return self.put_soon(lambda: recipe, then)

        puts = list(map(begun, recipes))
        wait(puts)  # also where one fails: the others are written in the room that whoever calls holds
        return [put.result() for put in puts]

    def put_soon(self, made: Callable[[], Recipe], then: Callable[[Recipe, bool], A]) -> "Future[A]":
        """Has a recipe written, without waiting for a disk or a network; those that come together are written together.

        What somebody put there under the same id stays: floats differ in their last bits from batch to batch, and what
        has a reference stays as it was.

        Args:
            made: Returns the recipe; called, like `then`, in the thread that writes.
            then: Called with what the store has now, and whether that is this recipe.

        Returns:
            A future of what `then` returns, or of what `put_all` would raise.
        """
        _refuse_after_a_fork(self._process)  # the thread that writes is not there
        put = _Put(made, then, Future[A]())
        with self._waiting_lock:
            self._waiting.append(put)
        try:
            if not self.in_memory:
                self._writer.submit(self._write)
                return put.done
        except RuntimeError:  # the interpreter ends, and takes no new work for threads
            pass
        self._write()
        return put.done

    def get(self, key: str) -> Recipe:
        """Reads and verifies a recipe; one that cannot be read is set aside.

        Raises:
            UnknownReference: If it is not there.
            StoreCorrupted: If it is not what was put in.
        """
        try:
            header, payload = self._open(key)
            return Recipe(key, header.model, header.alignment, tuple(header.parents), self._segment(header, payload))
        except StoreCorrupted as error:
            raise StoreCorrupted(
                f"The stored recipe {key} cannot be read: {error}. {self._set_aside(key)}Run the graph again."
            ) from error

    def header(self, key: str) -> Header:
        """Reads what a recipe says of itself, of whichever model.

        Raises:
            UnknownReference: If it is not there.
            StoreCorrupted: If it is not what was put in.
        """
        return self._open(key)[0]

    def named(self, key: str) -> set[str]:
        """Ids that stand at the beginning of a recipe, whoever signed it and whatever became of the rest.

        Raises:
            StoreCorrupted: If it cannot be opened.
        """
        value = self.store.mget([key + RECIPE])[0] or b""
        return {named.decode() for named in _ID.findall(value, 0, OVERHEAD + MAX_HEADER)}

    def ids(self) -> set[str]:
        """Those of all recipes, also where they cannot be read."""
        return {name.removesuffix(RECIPE) for name in self.store.yield_keys() if name.endswith(RECIPE)}

    def check(self, keys: Sequence[str]) -> None:
        """Makes sure that references can be used, and notes that they are.

        Raises:
            UnknownReference: If a recipe is not there.
            DroppedReference: If one was dropped.
        """
        for key in keys:
            self.check_not_dropped(key)
            if self.folder:
                if not self._has(key + RECIPE):
                    raise self._unknown(key)
                self.folder.touch(key + RECIPE)

    def check_not_dropped(self, key: str) -> None:
        """Makes sure that a recipe was not dropped.

        Raises:
            DroppedReference: If it was.
        """
        if self._has(key + DROPPED):
            raise DroppedReference(f"The memory {key} was dropped; run the graph again to make it anew.")

    def renew(self, key: str) -> None:
        """Makes a reference as good as one just made: used now, and no longer dropped.

        Raises:
            UnknownReference: If the recipe is not there.
        """
        with self.locked():
            if not self._has(key + RECIPE):
                raise self._unknown(key)
            if self._has(key + DROPPED):
                self.store.mdelete([key + DROPPED])
            if self.folder:
                self.folder.touch(key + RECIPE)

    def size_of(self, key: str) -> int:
        """Bytes that a recipe takes.

        Raises:
            UnknownReference: If it is not there.
        """
        if self.folder is not None and (size := self.folder.size_of(key + RECIPE)) is not None:
            return size
        if (value := self.store.mget([key + RECIPE])[0]) is None:
            raise self._unknown(key)
        return len(value)

    def marked(self, key: str, mark: str) -> bool:
        """Whether a recipe is `PINNED` or `DROPPED`."""
        return self._has(key + mark)

    def _write(self) -> None:
        """Puts those that wait, as many as go together; for each there is a call, so that none is left."""
        with self._waiting_lock:
            puts, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
        puts = [put for put in puts if put.done.set_running_or_notify_cancel()]
        if not puts:  # they went along with those before
            return
        try:
            for put, stored in zip(puts, self._stored([put.made for put in puts]), strict=True):
                try:
                    if isinstance(stored, Exception):
                        raise stored
                    put.done.set_result(put.then(*stored))
                except Exception as error:
                    put.done.set_exception(error)
        except BaseException as error:  # this thread is interrupted, but others wait too
            for put in puts:
                if not put.done.done():
                    put.done.set_exception(error)
            raise

    def _stored(self, recipes: Sequence[Callable[[], Recipe]]) -> list[tuple[Recipe, bool] | Exception]:
        """Writes those that are not there yet. For each: what is there, and whether it is new, or why it is not."""
        fresh: dict[str, tuple[Recipe, bytes]] = {}
        made = list(map(_made, recipes))  # first: to fetch thoughts from a device takes as long as its queue is
        stored: list[tuple[Recipe, bool] | Exception] = []
        try:
            with self.locked():
                for recipe in made:
                    try:
                        stored.append(recipe if isinstance(recipe, Exception) else self._there(recipe, fresh))
                    except Exception as error:  # the others do not suffer from it
                        stored.append(error)
                self._mset({key + RECIPE: value for key, (_, value) in fresh.items()})
                for key in fresh:
                    with contextlib.suppress(UnknownReference):  # one that a store of the user's dropped again
                        self.renew(key)
        except Exception as error:
            return [error] * len(recipes)
        return stored

    def _mset(self, values: dict[str, bytes]) -> None:
        if not values:
            return
        if self.folder is None:
            self.store.mset(list(values.items()))
            return
        with self._room_lock:
            self._writing = self._counted == self.folder.changed  # else others wrote as well, and all is counted anew
        try:
            self.store.mset(list(values.items()))
            with self._room_lock:
                if self._writing:  # counted on
                    self._counted = self.folder.changed
                    self._used += sum(map(len, values.values()))
        finally:
            self._writing = False

    def _there(self, recipe: Recipe, fresh: dict[str, tuple[Recipe, bytes]]) -> tuple[Recipe, bool]:
        """What is there under a recipe's id, or among those to be written; else this one joins them, as a new one."""
        if recipe.id in fresh:
            return fresh[recipe.id][0], False
        if self._has(recipe.id + RECIPE):
            with contextlib.suppress(UnknownReference, StoreCorrupted):
                there = self.get(recipe.id)
                self.renew(recipe.id)
                return there, False
        self._check_parents(recipe, fresh)
        value = self._sealed(recipe)
        self.count()
        with self._room_lock:
            self._check_room(len(value) + sum(len(other) for _, other in fresh.values()))
        fresh[recipe.id] = recipe, value
        return recipe, True

    def _check_parents(self, recipe: Recipe, fresh: Container[str] = ()) -> None:
        for parent in map(original, recipe.parents):
            if parent not in fresh and not self._has(parent + RECIPE):
                raise DroppedReference(f"The memory {parent} was dropped while agent {recipe.segment.agent!r} read it.")

    def _sealed(self, recipe: Recipe) -> bytes:
        segment = recipe.segment
        header = Header(
            id=recipe.id,
            agent=segment.agent,
            model=recipe.model,
            alignment=recipe.alignment,
            parents=list(recipe.parents),
            prompt=len(segment.prompt_ids),
            steps=len(segment.thoughts),
            spoken=len(segment.spoken_ids),
            made=time.time(),
        )
        tensors = {"thoughts": segment.thoughts.contiguous(), "prompt_ids": _ids(segment.prompt_ids)}
        if segment.spoken_ids:
            tensors["spoken_ids"] = _ids(segment.spoken_ids)
        envelope = Envelope(Kind.RECIPE, header.model_dump_json().encode(), safetensors.save(tensors))
        value = b"".join(envelope.sealed(self.signer))
        if len(value) > MAX_VALUE:
            raise InvalidRequest(
                f"The recipe of {recipe.id} takes more than {MAX_VALUE} bytes; take fewer latent steps."
            )
        return value

    def _open(self, key: str) -> tuple[Header, bytes]:
        value = self.store.mget([key + RECIPE])[0]
        if value is None:
            raise self._unknown(key)
        if len(value) > MAX_VALUE:
            raise StoreCorrupted(f"it has {len(value)} bytes, more than any recipe")
        _, written, payload = Envelope.opened(value, Kind.RECIPE, self.signer)
        try:
            header = Header.model_validate_json(written)
        except ValidationError as error:
            raise StoreCorrupted(f"its header is none ({first_fault(error)})") from error
        if header.id != key:
            raise StoreCorrupted(f"it is that of {header.id}")
        return header, payload

    def _segment(self, header: Header, payload: bytes) -> Segment:
        try:
            tensors = safetensors.load(payload)
            thoughts, prompt = tensors["thoughts"], tensors["prompt_ids"]
            spoken = tensors["spoken_ids"] if header.spoken else torch.empty(0, dtype=torch.int32)
        except (SafetensorError, KeyError, ValueError) as error:
            raise StoreCorrupted("its tensors cannot be read") from error
        if thoughts.shape != (header.steps, self.hidden_size) or [len(prompt), len(spoken)] != [
            header.prompt,
            header.spoken,
        ]:
            raise StoreCorrupted("its tensors have other shapes than it says")
        segment = Segment(header.agent, tuple(prompt.tolist()), thoughts, tuple(spoken.tolist()))
        made = memory_id(
            model=header.model,
            alignment=header.alignment,
            parents=header.parents,
            prompt_ids=segment.prompt_ids,
            steps=header.steps,
            spoken_ids=segment.spoken_ids,
        )
        if made != header.id:
            raise StoreCorrupted("its content does not match its id")
        return segment

    def _set_aside(self, key: str) -> str:
        """Takes a recipe that cannot be read out of the way, if it still cannot; says where it is."""
        with self.locked():
            with contextlib.suppress(StoreCorrupted, UnknownReference):
                self._segment(*self._open(key))
                return ""  # another process has just made it anew
            if self.folder is None:
                return ""
            if not self._has(key + RECIPE):
                return ""
            to = self.folder.set_aside(key + RECIPE)
        logger.warning("the recipe of %s cannot be read and was moved to %s", key, to)
        return f"It was moved to {to}. "

    def _has(self, name: str) -> bool:
        return self.folder.has(name) if self.folder else self.store.mget([name])[0] is not None

    def _check_room(self, nbytes: int) -> None:
        if self.folder is None:
            return
        if self.budget is not None and self._used + nbytes > self.budget:
            raise StoreFull(
                f"The store has {self._used} of its {self.budget} bytes in use, and this request may need {nbytes}, "
                "those at work included; drop references, or raise store_budget."
            )
        if (free := self.folder.free) < nbytes + DISK_RESERVE:
            raise StoreFull(f"The disk of the store has {free} bytes left; make room, or drop references.")

    @staticmethod
    def _unknown(key: str) -> UnknownReference:
        return UnknownReference(
            f"The memory {key} is not in this service's store: it was made elsewhere, or dropped, or grew too old. "
            "Load the service with the store it was made in (store=...), or run the graph again."
        )


def _refuse_after_a_fork(process: int) -> None:
    if os.getpid() != process:
        raise StoreBusy("This store was opened before the process was forked; load the service in the new one.")


def _made(make: Callable[[], Recipe]) -> Recipe | Exception:
    try:
        return make()
    except Exception as error:
        return error


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _fsync(files: Sequence[BinaryIO]) -> None:
    for file in files:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull(f"The disk of {folder} is full; make room, or drop references.") from error
