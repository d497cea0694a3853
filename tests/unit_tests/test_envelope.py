import hashlib
import hmac
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import torch as safetensors
from torch import Tensor

from langchain_latentmas.errors import StoreCorrupted
from langchain_latentmas.service.envelope import OVERHEAD, Envelope, Kind
from langchain_latentmas.service.identity import RetiredKey, Signer

SIGNER = Signer(b"k" * 32)
FILE = b"".join(Envelope(Kind.RECIPE, b'{"id": "x"}', b"payload").sealed(SIGNER))


def parts(file: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, read as docs/store-format.md says, and not by what wrote them."""
    header, payload = struct.unpack_from("<IQ", file, 12)
    end = 24 + header
    return json.loads(file[24:end]), safetensors.load(file[end : end + payload])


@given(st.sampled_from(Kind), st.binary(max_size=200), st.binary(max_size=200))
def test_what_was_sealed_is_opened(kind: Kind, header: bytes, payload: bytes) -> None:
    file = b"".join(Envelope(kind, header, payload).sealed(SIGNER))
    assert len(file) == OVERHEAD + len(header) + len(payload)
    assert Envelope.opened(file, kind, SIGNER) == (kind, header, payload)


@given(st.data())
def test_no_changed_byte_is_accepted(data: st.DataObject) -> None:
    file = bytearray(FILE)
    file[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StoreCorrupted):
        Envelope.opened(bytes(file), Kind.RECIPE, SIGNER)


@pytest.mark.parametrize("length", range(len(FILE)))
def test_no_cut_is_accepted(length: int) -> None:
    with pytest.raises(StoreCorrupted):
        Envelope.opened(FILE[:length], Kind.RECIPE, SIGNER)


@given(st.binary(max_size=300))
def test_what_is_no_file_of_a_store_raises_nothing_else(file: bytes) -> None:
    with pytest.raises(StoreCorrupted):
        Envelope.opened(file, Kind.RECIPE, SIGNER)


@pytest.mark.parametrize(
    ("file", "kind", "signer", "why"),
    [
        (b"PK\3\4" + FILE, Kind.RECIPE, SIGNER, "no file of a latentmas store"),
        (FILE[:8] + struct.pack("<H", 2) + FILE[10:], Kind.RECIPE, SIGNER, "format 2"),
        (FILE, Kind.KV, SIGNER, "something else"),
        (FILE + b"0", Kind.RECIPE, SIGNER, "declares"),
        (FILE[:12] + struct.pack("<IQ", 2**32 - 1, 2**63) + FILE[24:], Kind.RECIPE, SIGNER, "declares"),
        (FILE, Kind.RECIPE, Signer(b"x" * 32), "another key"),
    ],
)
def test_each_reason_is_named(file: bytes, kind: Kind, signer: Signer, why: str) -> None:
    with pytest.raises(StoreCorrupted, match=why):
        Envelope.opened(file, kind, signer)


def test_a_retired_key_opens_files_for_good() -> None:
    renewed = Signer(b"n" * 32, [RetiredKey(b"k" * 32, until=0)])
    with pytest.raises(StoreCorrupted, match="another key"):
        Envelope.opened(FILE, Kind.RECIPE, renewed)
    assert Envelope.opened(FILE, Kind.RECIPE, renewed.timeless()).payload == b"payload"


def test_the_layout_is_that_of_the_page_on_the_format() -> None:
    """docs/store-format.md states these offsets; whoever changes one changes the version."""
    assert FILE[:24] == b"LATENTMS" + bytes([1, 0, 1, 0, 11, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0])
    assert FILE[24:42] == b'{"id": "x"}payload'
    assert FILE[42:74] == hashlib.sha256(FILE[:42]).digest()
    assert FILE[74:] == hmac.digest(b"k" * 32, b'{"sha256":"%s"}' % FILE[42:74].hex().encode(), "sha256")
    spilled = b"".join(Envelope(Kind.KV, b"{}", b"").sealed(SIGNER))
    assert spilled[:12] == b"LATENTMS" + bytes([1, 0, 2, 0])
