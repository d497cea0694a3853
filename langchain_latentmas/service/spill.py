"""KV on the disk, under a byte budget: a cache that outlives the process, and is worth nothing without the recipes."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ..engine.kv import AnyKV, stacked
from ..errors import ServiceClosed, StoreCorrupted
from .budget import Budget
from .envelope import MAX_HEADER, OVERHEAD, Envelope, Kind
from .identity import Signer
from .private import FOLDER, private

logger = logging.getLogger(__name__)

MAX_WAITING = 1 << 28  # bytes of KV that wait to be written; what comes on top of it is rebuilt one day instead
DISK_RESERVE = 1 << 28  # bytes of the disk that are left to others, such as the recipes
SUFFIX = ".kv"


class Spill:
    """Writes and reads in a thread of its own, so that nobody waits for a disk.

    Attributes:
        files: Size of each file, by memory id.
        refused: Files that could not be read as what they should be; they are removed and their KV is rebuilt.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        signer: Signer,
        made_for: Mapping[str, str],
        blank: Callable[[int], AnyKV],
        known: Container[str],
    ) -> None:
        """Opens a folder and takes over the files that an earlier process left there.

        Args:
            folder: Where the files lie.
            limit: Most bytes of all files together. If another process spills to this folder already: 0.
            signer: Signs the files.
            made_for: What the KV depends on besides the id, such as the dtype; files made for anything else are
                refused.
            blank: A KV of so many positions as it has to be, on the meta device.
            known: Ids of the memories that there are; files of others are removed.
        """
        self.folder, self.refused, self._process = folder, 0, os.getpid()
        self._signer, self._made_for, self._blank = signer, dict(made_for), blank
        self._waiting: dict[str, AnyKV] = {}
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "latentmas-spill")
        folder.mkdir(FOLDER, parents=True, exist_ok=True)
        self._alone = FileLock(folder / ".lock", timeout=0, mode=0o600, thread_local=False)
        try:
            self._alone.acquire()
        except Timeout:
            logger.warning("another process spills to %s, so this one does not spill to the disk", folder)
            limit = 0
        self.files: Budget[int] = Budget(limit, lambda size: size)
        if self._alone.is_locked:
            for half in folder.glob(".*.part"):
                half.unlink(missing_ok=True)
            for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
                if (key := path.name.removesuffix(SUFFIX)) in known:
                    self._count(key, path.stat().st_size)
                else:
                    path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self.files

    def put(self, key: str, kv: AnyKV) -> None:
        """Has a KV written, unless it is there already or too many wait.

        Args:
            key: Id of the memory that it is the last segment of.
            kv: In CPU memory.
        """
        with self._lock:
            full = self._waiting and self._waiting_bytes + kv.nbytes > MAX_WAITING
            if full or key in self or kv.nbytes > self.files.limit:
                return
            self._waiting[key] = kv
            self._waiting_bytes += kv.nbytes
        with contextlib.suppress(RuntimeError):  # closed: nobody will read it either
            self._thread.submit(self._write, key)

    def get(self, key: str, positions: int) -> "Future[AnyKV]":
        """Reads a KV.

        Args:
            key: Id of a memory.
            positions: How many it must have.

        Returns:
            A future of the KV, in CPU memory, bit by bit what was put; fails with `StoreCorrupted` if the file is gone,
            damaged, or made for another model, dtype or kind of merge.

        Raises:
            ServiceClosed: If it was closed, or opened before this process was forked.
        """
        if os.getpid() != self._process:  # its thread is not there
            raise ServiceClosed("The service was loaded before the process was forked; load it in the new one.")
        with self._lock:
            waiting = self._waiting.get(key)
        if waiting is not None:
            done: Future[AnyKV] = Future()
            done.set_result(waiting)
            return done
        try:
            return self._thread.submit(self._read, key, positions)
        except RuntimeError as error:
            raise ServiceClosed("The service is closed; load another one.") from error

    def drop(self, key: str) -> None:
        """Removes a KV, if it is there."""
        with self._lock:
            if (kv := self._waiting.pop(key, None)) is not None:
                self._waiting_bytes -= kv.nbytes
        if self.files.pop(key) is not None:
            self._path(key).unlink(missing_ok=True)

    def flush(self) -> None:
        """Returns once everything that waits is written."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Gives up what waits to be written, and lets another process spill to the folder."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._alone.release()

    def _write(self, key: str) -> None:
        with self._lock:
            kv = self._waiting.get(key)
        if kv is None:
            return
        fresh = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            if shutil.disk_usage(self.folder).free < kv.nbytes + DISK_RESERVE:
                logger.warning("the disk of %s is nearly full, so KV is rebuilt instead of spilled", self.folder)
                return
            header = json.dumps({"id": key, "positions": kv.positions, **self._made_for}).encode()
            tensors = {f"{side}.{i}": t.contiguous() for side, i, t in _tensors(kv)}
            # Not flushed to the disk: what a crash of the machine tears fails its checksum and is rebuilt.
            with open(fresh, "xb", opener=private) as file:
                file.writelines(Envelope(Kind.KV, header, safetensors.save(tensors)).sealed(self._signer))
                size = file.tell()
            fresh.replace(self._path(key))
            self._count(key, size)
            if self._waiting.get(key) is not kv:  # dropped in the meantime, maybe made anew
                self.files.pop(key)
                self._path(key).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a KV could not be spilled to %s (%s)", self.folder, error)
        finally:
            fresh.unlink(missing_ok=True)
            with self._lock:
                if self._waiting.get(key) is kv:
                    del self._waiting[key]
                    self._waiting_bytes -= kv.nbytes

    def _read(self, key: str, positions: int) -> AnyKV:
        path = self._path(key)
        try:
            kv = self._opened(path, key, positions)
        except (StoreCorrupted, OSError) as error:
            self.refused += 1
            self.drop(key)
            raise StoreCorrupted(f"The spilled KV of {key} cannot be read ({error}), so it is rebuilt.") from error
        self.files.get(key)
        with contextlib.suppress(OSError):
            os.utime(path)
        return kv

    def _opened(self, path: Path, key: str, positions: int) -> AnyKV:
        # Before anything of that size is allocated: a KV has as many bytes as it has to have.
        blank = self._blank(positions)
        content = blank.nbytes
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not content <= size <= content + MAX_HEADER + OVERHEAD:
                raise StoreCorrupted(f"it has {size} bytes, and the KV has {content}")
            _, header, payload = Envelope.opened(file.read(size), Kind.KV, self._signer)
        if json.loads(header) != {"id": key, "positions": positions, **self._made_for}:
            raise StoreCorrupted("it was made for something else")
        try:
            tensors = safetensors.load(payload)
        except (SafetensorError, ValueError) as error:
            raise StoreCorrupted("its tensors cannot be read") from error
        shapes = {f"{side}.{i}": (t.shape, t.dtype) for side, i, t in _tensors(blank)}
        if {name: (t.shape, t.dtype) for name, t in tensors.items()} != shapes:
            raise StoreCorrupted("its tensors have other shapes than it says")
        layers = range(len(blank[0]))
        return type(blank)(*(stacked([tensors[f"{side}.{i}"] for i in layers]) for side in blank._fields))

    def _count(self, key: str, size: int) -> None:
        for old, _ in self.files.put(key, size):
            self._path(old).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def _tensors(kv: AnyKV) -> Iterator[tuple[str, int, Tensor]]:
    """All tensors of a KV, with the names of their side and their layers."""
    for side in kv._fields:
        for i, tensor in enumerate(getattr(kv, side)):
            yield side, i, tensor
