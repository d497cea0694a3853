"""The envelope of files in a store: magic, version, header, payload, checksum, signature (docs/store-format.md)."""

import hashlib
import struct
from enum import IntEnum
from typing import NamedTuple, Self

from ..errors import StoreCorrupted
from .identity import Signer

MAGIC = b"LATENTMS"
VERSION = 1
MAX_HEADER = 1 << 20  # bytes: a recipe with the most parents there may be has 44 kB
_START = struct.Struct("<8sHHIQ")  # magic, version, kind, bytes of the header, bytes of the payload
_DIGEST = hashlib.sha256().digest_size
OVERHEAD = _START.size + 2 * _DIGEST


class Kind(IntEnum):
    """What a file holds."""

    RECIPE = 1
    KV = 2


class Envelope(NamedTuple):
    """What was written, once checksum and signature were found right."""

    kind: Kind
    header: bytes
    """JSON."""
    payload: bytes
    """Safetensors."""

    def sealed(self, signer: Signer) -> list[bytes]:
        """The file, in parts that are written one behind the other."""
        start = _START.pack(MAGIC, VERSION, self.kind, len(self.header), len(self.payload))
        digest = _checksum(start, self.header, self.payload)
        return [start, self.header, self.payload, digest, bytes.fromhex(signer.sign(_signed(digest)))]

    @classmethod
    def opened(cls, file: bytes, kind: Kind, signer: Signer) -> Self:
        """Reads a file, trusting nothing in it.

        Args:
            file: Its bytes.
            kind: What it must hold.
            signer: Who must have signed it.

        Raises:
            StoreCorrupted: If it is torn, foreign, of a later version or another kind, or fails checksum or signature.
        """
        if file[: len(MAGIC)] != MAGIC[: len(file)]:
            raise StoreCorrupted("it is no file of a latentmas store")
        if len(file) < OVERHEAD:
            raise StoreCorrupted(f"it ends after {len(file)} bytes")
        _, version, found, header, payload = _START.unpack_from(file)
        if version != VERSION:
            raise StoreCorrupted(f"it has format {version}, and this version of langchain-latentmas reads {VERSION}")
        if found != kind:
            raise StoreCorrupted(f"it holds something else (kind {found}, not {kind})")
        if header > MAX_HEADER or OVERHEAD + header + payload != len(file):
            raise StoreCorrupted(f"it has {len(file)} bytes and declares {OVERHEAD + header + payload}")
        body = memoryview(file)[: -2 * _DIGEST]
        digest = _checksum(body)
        if file[-2 * _DIGEST : -_DIGEST] != digest:
            raise StoreCorrupted("it fails its checksum")
        if not signer.matches(_signed(digest), file[-_DIGEST:].hex()):
            raise StoreCorrupted("its signature is that of another key")
        end = _START.size + header
        return cls(kind, bytes(body[_START.size : end]), bytes(body[end:]))


def _checksum(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _signed(digest: bytes) -> dict[str, str]:
    return {"sha256": digest.hex()}
