"""Identity and signatures: ids are digests of what a memory was made from, references are signed."""

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidRequest, TamperedReference, first_fault
from ..state import LatentRef
from .private import FOLDER, flush, private

logger = logging.getLogger(__name__)

IDENTITY = "latentmas-1"
LOOK_SECONDS = 1.0  # between two looks at a key file
KEY_BYTES = 32
MAX_AGENT = 200
MAX_PARENTS = 1024
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))  # json.dumps makes one in every call

# Behind a dot stands how a memory was altered; see `alteration`.
ID = r"lat_[0-9a-f]{32}(?:\.(?:zeroed|random[0-9]{1,9})){0,9}"
Id = Annotated[str, Field(pattern=f"^{ID}$")]
_Count = Annotated[int, Field(ge=0, lt=2**40)]


class WireRef(BaseModel):
    """`LatentRef` with its bounds, for checking one that comes from outside."""

    model_config = ConfigDict(strict=True, extra="forbid")
    id: Id
    agent: Annotated[str, Field(max_length=MAX_AGENT)]
    model: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    parents: Annotated[list[Id], Field(max_length=MAX_PARENTS)]
    positions: _Count
    steps: _Count
    mac: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def ref(self) -> LatentRef:
        """As plain JSON; the signature is not verified."""
        return LatentRef(**vars(self))  # type: ignore[typeddict-item]


def memory_id(
    *,
    model: str,
    alignment: str,
    parents: Sequence[str],
    prompt_ids: Sequence[int],
    steps: int,
    spoken_ids: Sequence[int] = (),
) -> str:
    """The id of a memory: a digest of what it is made from and free of float noise."""
    made_from = [IDENTITY, model, alignment, list(parents), list(prompt_ids), steps, list(spoken_ids)]
    return "lat_" + hashlib.sha256(_canonical(made_from)).hexdigest()[:32]


class RetiredKey(NamedTuple):
    """A signing key that signs no more."""

    key: bytes
    until: float
    """Unix time up to which what it signed is accepted."""


class Signer:
    """Signs plain-JSON mappings with HMAC-SHA256."""

    def __init__(self, key: bytes, retired: Sequence[RetiredKey] = (), *, path: Path | None = None) -> None:
        """Takes the key.

        Args:
            key: Signs.
            retired: Keys that signed before; what they signed is accepted for a while.
            path: The key file, whose keys count instead, now and after every rotation.

        Raises:
            InvalidRequest: If it is shorter than 16 bytes.
        """
        if len(key) < 16:
            raise InvalidRequest(f"A signing key must have at least 16 bytes, not {len(key)}.")
        self._ring = _Ring([RetiredKey(key, math.inf), *retired], path)

    def sign(self, fields: Mapping[str, Any]) -> str:
        """64 hex digits over all fields but `mac`."""
        return _mac(self._keys()[0].key, fields)

    def matches(self, fields: Mapping[str, Any], mac: str | None = None) -> bool:
        """Whether a signature is that of the fields; how long it takes says nothing of how much of it is right.

        Args:
            fields: What was signed.
            mac: The signature, or as many of its first digits as were kept; None takes `fields["mac"]`, whole.
        """
        signed, digits = (fields.get("mac"), 64) if mac is None else (mac, len(mac))
        if not (isinstance(signed, str) and signed.isascii()):
            return False

        def known() -> bool:
            now = time.time()
            keys = [key.key for key in self._keys() if now < key.until]
            return True in [hmac.compare_digest(signed, _mac(key, fields)[:digits]) for key in keys]

        tried = self._ring.keys()
        # A process that has seen a fresh key first may have signed with it.
        return known() or (self._ring.latest() is not tried and known())

    def timeless(self) -> "Signer":
        """One that accepts what retired keys signed for good: what lies in a store outlives the references to it."""
        return _View(self, lambda key: key._replace(until=math.inf))

    def derived(self, name: str) -> "Signer":
        """The signer of a tenant: neither accepts what the other signed."""
        return _View(self, lambda key: key._replace(key=_derived(key.key, name)))

    def _keys(self) -> list[RetiredKey]:
        """Every key with the time up to which it counts; the first one signs."""
        return self._ring.keys()


class _View(Signer):
    """A signer whose keys are made from those of another one, also from those that come later."""

    def __init__(self, other: Signer, made: Callable[[RetiredKey], RetiredKey]) -> None:
        self._ring, self._other, self._made = other._ring, other, made

    def _keys(self) -> list[RetiredKey]:
        return [self._made(key) for key in self._other._keys()]


class _Ring:
    """Keys, and the file that they are from; when that is rotated, the fresh key comes in."""

    def __init__(self, keys: Sequence[RetiredKey], path: Path | None = None) -> None:
        self._path, self._looked = path, time.monotonic()
        self._read = self._named = _version(path)
        self._all = list(keys) if path is None else _keys(path)
        self._lock = threading.Lock()  # who comes while another one reads fresh keys waits for them

    def keys(self) -> list[RetiredKey]:
        return self.latest() if time.monotonic() - self._looked >= LOOK_SECONDS else self._all

    def latest(self) -> list[RetiredKey]:
        """Looks at the file: another list than before if that has other keys, unless it cannot be read."""
        with self._lock:
            self._looked = time.monotonic()
            if self._path is None or (version := _version(self._path)) == self._read:
                return self._all
            try:
                self._all, self._read = _keys(self._path), version
            except (InvalidRequest, OSError) as error:  # it is tried again: what mends it may leave it as old as it was
                if version != self._named:
                    self._named = version
                    logger.error(
                        "the signing key has changed and cannot be read; the one before stays in use: %s", error
                    )
            else:
                logger.info("a fresh signing key is in use", extra={"fields": {"key": str(self._path)}})
            return self._all


def checked_ref(ref: object) -> LatentRef:
    """Checks the form of a reference from outside, not yet its signature.

    Raises:
        TamperedReference: If a field is missing, of another type, or out of bounds.
    """
    try:
        return WireRef.model_validate(ref).ref
    except ValidationError as error:
        raise TamperedReference(
            f"This is no reference of a memory ({first_fault(error)}). Pass on what think, speak or a node returned."
        ) from error


@contextmanager
def checked_on_failure(refs: Iterable[object]) -> Iterator[None]:
    """Calls a fault of references from outside that, where it shows; to look through many of them at once takes long.

    Raises:
        TamperedReference: If something inside fails on a reference that `checked_ref` refuses.
    """
    try:
        yield
    except (TypeError, KeyError):
        for ref in refs:
            checked_ref(ref)
        raise


def check_agent(agent: object) -> None:
    """Checks an agent's name.

    Raises:
        InvalidRequest: If it is none.
    """
    # What has no UTF-8, a lone surrogate, could not be stored once the work is done.
    text = isinstance(agent, str) and agent.encode(errors="replace").decode() == agent
    if not (text and isinstance(agent, str) and 0 < len(agent) <= MAX_AGENT):
        raise InvalidRequest(f"An agent needs a name of 1 to {MAX_AGENT} characters, not {agent!r}.")


def listed(refs: Any) -> list[Any]:
    """References as a list, where a caller gave one, several or None."""
    several = isinstance(refs, Iterable) and not isinstance(refs, Mapping)
    return list(refs) if several else [] if refs is None else [refs]


def key_file(path: Path) -> bytes:
    """Reads a signing key, or makes one that only this user can read (mode 600).

    Raises:
        InvalidRequest: If the file holds something else, or others can read it, or this user cannot, or it cannot be
            made.
    """
    try:
        if not path.exists():
            path.parent.mkdir(FOLDER, parents=True, exist_ok=True)
            fresh = _written(path, secrets.token_hex(KEY_BYTES))
            try:
                os.link(fresh, path)  # unlike a rename, this never replaces the key of a process that was faster
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
            flush(path.parent)  # else a crash may lose the key, and with it all that it is about to sign
    except OSError as error:
        raise InvalidRequest(
            f"No signing key can be kept at {path} ({error.strerror}); give a folder that this user may write to."
        ) from error
    return _keys(path)[0].key


def key_ring(path: Path) -> Signer:
    """The signer of a key file, which is made if it is not there; see `key_file` and `rotate_key`.

    Raises:
        InvalidRequest: If the file holds something else, or others can read it, or this user cannot.
    """
    return Signer(key_file(path), path=path)


def rotate_key(path: Path, keep: float) -> None:
    """Puts a fresh key in front of those of a file.

    Services that run take it within `LOOK_SECONDS`.

    Args:
        path: The key file.
        keep: Seconds for which references and markers signed with the present key are still accepted.

    Raises:
        InvalidRequest: If there is no key file, it holds something else, or others can read it, or this user cannot.
    """
    if not keep >= 0:
        raise InvalidRequest(f"References cannot be kept readable for {keep} seconds; give 0 or more.")
    try:
        current, *retired = _keys(path)
    except FileNotFoundError:
        raise InvalidRequest(
            f"There is no signing key at {path}; name the folder that the service has as its store."
        ) from None
    until = time.time() + keep if keep else 0.0  # at once, also where a clock is behind
    keys = [RetiredKey(current.key, until), *retired]
    lines = [secrets.token_hex(KEY_BYTES), *(f"{old.key.hex()} {old.until // 1:.0f}" for old in keys)]
    fresh = _written(path, "\n".join(lines))
    owner = path.stat()
    os.chown(fresh, owner.st_uid, owner.st_gid)  # root may rotate what a service has to read
    fresh.replace(path)
    flush(path.parent)


def _version(path: Path | None) -> tuple[int, int] | None:
    """Is another one when the file is."""
    with suppress(OSError):
        if path is not None:
            there = path.stat()
            return there.st_ino, there.st_mtime_ns
    return None


def _keys(path: Path) -> list[RetiredKey]:
    """The keys of a file: the current one, then those before it, each with the time up to which it counts."""
    try:
        others, lines = path.stat().st_mode & 0o077, path.read_text(errors="replace").splitlines()
    except PermissionError as error:
        raise InvalidRequest(f"This user cannot read the signing key {path}; ask as its owner, or chown it.") from error
    if others:
        raise InvalidRequest(f"Others can read the signing key {path}; run: chmod 600 {path}")
    keys = []
    try:
        for line in lines:
            key, _, until = line.partition(" ")
            keys.append(RetiredKey(bytes.fromhex(key), float(until or "inf")))
    except ValueError:
        keys = []
    if not keys or any(len(key.key) < KEY_BYTES for key in keys):
        raise InvalidRequest(f"{path} holds no signing key; move it away to have a new one made.")
    return keys


def _written(path: Path, text: str) -> Path:
    """A new file beside a path, that only this user can read, flushed to the disk."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(fresh, "x", opener=private) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return fresh


def _derived(key: bytes, name: str) -> bytes:
    return hmac.new(key, b"tenant\0" + name.encode(), hashlib.sha256).digest()


def _mac(key: bytes, fields: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if name != "mac"}
    return hmac.digest(key, _canonical(rest), "sha256").hex()


def _canonical(value: object) -> bytes:
    return _JSON.encode(value).encode()
