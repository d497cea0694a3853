"""Identity and signatures: ids are digests of what a memory was made from, references are signed."""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidRequest, TamperedReference
from ..state import LatentRef

IDENTITY = "latentmas-1"
KEY_BYTES = 32
MAX_AGENT = 200
MAX_PARENTS = 1024

# Behind a dot stands how a memory was altered; see `alteration`.
ID = r"lat_[0-9a-f]{32}(?:\.(?:zeroed|random[0-9]{1,9})){0,9}"
_Id = Annotated[str, Field(pattern=f"^{ID}$")]
_Count = Annotated[int, Field(ge=0, lt=2**40)]


class _WireRef(BaseModel):
    """`LatentRef` with its bounds, for checking one that comes from outside."""

    model_config = ConfigDict(strict=True, extra="forbid")
    id: _Id
    agent: Annotated[str, Field(max_length=MAX_AGENT)]
    model: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    parents: Annotated[list[_Id], Field(max_length=MAX_PARENTS)]
    positions: _Count
    steps: _Count
    mac: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def memory_id(
    *,
    model: str,
    alignment: str,
    parents: Sequence[str],
    prompt_ids: Sequence[int],
    steps: int,
    spoken_ids: Sequence[int] = (),
) -> str:
    """The id of a memory: a digest of what it is made from and free of float noise (design, rule 5)."""
    made_from = [IDENTITY, model, alignment, list(parents), list(prompt_ids), steps, list(spoken_ids)]
    return "lat_" + hashlib.sha256(_canonical(made_from)).hexdigest()[:32]


class Signer:
    """Signs plain-JSON mappings with HMAC-SHA256."""

    def __init__(self, key: bytes) -> None:
        """Takes the key.

        Raises:
            InvalidRequest: If it is shorter than 16 bytes.
        """
        if len(key) < 16:
            raise InvalidRequest(f"A signing key must have at least 16 bytes, not {len(key)}.")
        self._key = key

    def sign(self, fields: Mapping[str, Any]) -> str:
        """64 hex digits over all fields but `mac`."""
        rest = {name: value for name, value in fields.items() if name != "mac"}
        return hmac.new(self._key, _canonical(rest), hashlib.sha256).hexdigest()

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether `fields["mac"]` is their signature; takes the same time whatever the answer."""
        mac = fields.get("mac")
        return isinstance(mac, str) and mac.isascii() and hmac.compare_digest(mac, self.sign(fields))


def checked_ref(ref: object) -> LatentRef:
    """Checks the form of a reference from outside, not yet its signature.

    Raises:
        TamperedReference: If a field is missing, of another type, or out of bounds.
    """
    try:
        return LatentRef(**_WireRef.model_validate(ref).model_dump())  # type: ignore[typeddict-item]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise TamperedReference(
            f"This is no reference of a memory ({where}: {first['msg']}). Pass on what think, speak or a node returned."
        ) from error


def key_file(path: Path) -> bytes:
    """Reads a signing key, or makes one that only this user can read (mode 600).

    Raises:
        InvalidRequest: If the file holds something else, or others can read it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)  # unlike a rename, this never replaces the key of a process that was faster
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    if path.stat().st_mode & 0o077:
        raise InvalidRequest(f"Others can read the signing key {path}; run: chmod 600 {path}")
    try:
        key = bytes.fromhex(path.read_text())
    except ValueError:
        key = b""
    if len(key) < KEY_BYTES:
        raise InvalidRequest(f"{path} holds no signing key; move it away to have a new one made.")
    return key


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
