"""Whatever is sent, the answer is a problem document or a result: never a 500, never a foreign exception."""

import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.errors import InvalidReference, InvalidRequest, TamperedReference, WrongModel
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.memory import Recipe, Segment
from langchain_latentmas.service.server import Server
from langchain_latentmas.service.transfer import MAX_HEADER, MAX_SEGMENTS, check_recipes, read_memory, write_memory
from langchain_latentmas.service.wire import PROBLEM
from tests.conftest import load_parts
from tests.served import client, serving
from tests.support import messages

MOST_BYTES = 64 << 20
KEPT: list[Any] = [status_code_conformance, content_type_conformance, response_schema_conformance]
MUTANTS = int(os.environ.get("MUTANTS", "250"))  # of each kind
ODD = [
    "",
    "\x00",
    "\ud7ff",
    "../../etc/passwd",
    "http://169.254.169.254/",
    "[latent a 1 steps ",
    "{{7*7}}",
    "a" * 5000,
    "é",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(LocalService.from_model(*load_parts("qwen3-tied", "float64")), deadline=5, max_memory=1 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def remote(server: Server) -> Iterator[LatentService]:
    with client(server) as service:
        yield service


@pytest.fixture(scope="module")
def ref(remote: LatentService) -> LatentRef:
    return remote.think(messages("What is 12 plus 30?"), [remote.think("And?", steps=1)], steps=2, agent="planner")


def mutated_text(text: str, rng: random.Random) -> str:
    """One or two edits of a text: a character changed, dropped, doubled, swapped, or a piece cut out or put in."""
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(text))
        piece = rng.choice([chr(rng.randrange(32, 127)), rng.choice("0123456789abcdef"), *ODD])
        text = rng.choice(
            [
                text[:at] + piece + text[at + 1 :],
                text[:at] + text[at + 1 :],
                text[:at] + piece + text[at:],
                text[:at] + text[at + rng.randint(1, 9) :],
                text[at:] + text[:at],
            ]
        )
        if not text:
            break
    return text


def mutated(value: Any, rng: random.Random) -> Any:
    """The same JSON value, with something in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {name: each for name, each in value.items() if name != key}
        what = rng.random()
        if what < 0.1:
            return rest
        if what < 0.2:
            return {**value, rng.choice(["model", "url", "path", "__class__", key + "x"]): value[key]}
        return {**rest, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.7:
        return mutated_text(value, rng)
    return rng.choice([None, True, -1, 0, 2**63, 2**70, 1.5, "", [], {}, [[]], *ODD, [value], {"value": value}])


def test_mutated_references_are_refused_by_the_client_or_the_server(remote: LatentService, ref: LatentRef) -> None:
    rng, refused = random.Random(1), 0
    for _ in range(MUTANTS):
        bad = mutated(ref, rng)
        if bad == ref:
            continue
        with pytest.raises((InvalidReference, InvalidRequest)):
            remote.marker(bad)
        refused += 1
    assert refused > MUTANTS / 2


def test_mutated_references_are_refused_by_the_server_itself(server: Server, ref: LatentRef) -> None:
    rng = random.Random(2)
    with httpx.Client(base_url=server.address) as http:
        for _ in range(MUTANTS):
            bad = mutated(ref, rng)
            if bad == ref:
                continue
            reply = http.post("/v1/markers", json={"ref": bad})
            assert 400 <= reply.status_code < 500, bad
            assert reply.headers["content-type"] == PROBLEM


def test_mutated_markers_are_refused_or_are_no_markers(server: Server, remote: LatentService, ref: LatentRef) -> None:
    rng, marker = random.Random(3), remote.marker(ref)
    with client(server) as fresh:
        for _ in range(MUTANTS):
            text = mutated_text(marker, rng)
            try:
                without, refs = fresh.take_markers(text)
            except (InvalidReference, InvalidRequest):
                continue
            # What was not refused is the marker itself, whole, among other text, or text that is no marker.
            assert refs in ([], [ref])
            if refs:
                assert "".join(text.split()).count("".join(marker.split())) == 1
            else:
                assert without == text


def test_mutated_messages_get_an_answer(server: Server, ref: LatentRef) -> None:
    rng = random.Random(4)
    bodies = [
        ("/v1/think", {"messages": [{"role": "user", "content": "hi"}], "latents": [ref], "steps": 1, "agent": "a"}),
        ("/v1/speak", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "seed": 1, "stop": ["x"]}),
        ("/v1/lens", {"ref": ref, "top_k": 2}),
        ("/v1/markers/take", {"text": "no marker", "left": ""}),
        ("/v1/references/pin", {"ref": ref, "pinned": False}),
        ("/v1/memory/export", {"ref": ref, "kv": True}),
    ]
    with httpx.Client(base_url=server.address, timeout=30) as http:
        for _ in range(MUTANTS):
            path, body = rng.choice(bodies)
            sent = json.dumps(mutated(body, rng))
            if rng.random() < 0.2:
                sent = mutated_text(sent, rng)
            headers = {"content-type": "application/json"}
            reply = http.post(path, content=sent.encode("utf-8", "surrogatepass"), headers=headers)
            assert reply.status_code < 500 or reply.status_code == 504, sent
            assert reply.status_code == 200 or reply.headers["content-type"] == PROBLEM


def test_mutated_files_are_refused_or_sound(remote: LatentService, ref: LatentRef, tmp_path: Path) -> None:
    rng, sound = random.Random(5), b"".join(remote.export_memory(ref))
    (tmp_path / "sound").write_bytes(sound)
    assert remote.import_memory(tmp_path / "sound") == ref
    path, accepted = tmp_path / "memory", 0
    how = ref["model"], load_parts("qwen3-tied", "float64")[0].config.hidden_size, torch.float64, 10**6
    said = list(map(made_from, read_memory(tmp_path / "sound", *how)))
    for _ in range(MUTANTS):
        at = rng.randrange(len(sound) if rng.random() < 0.3 else 2000)
        piece = rng.choice([rng.randbytes(rng.randint(0, 4)), rng.choice(b"0123456789").to_bytes()])  # a digit may fit
        path.write_bytes(sound[:at] + piece + sound[at + rng.choice([0, len(piece), len(piece) + 3]) :])
        tracemalloc.start()
        try:
            recipes = read_memory(path, *how)
            check_recipes(recipes, 10**6)
        except (InvalidRequest, WrongModel):
            continue
        finally:
            assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
            tracemalloc.stop()
        assert list(map(made_from, recipes)) == said
        accepted += 1
    assert accepted


def made_from(recipe: Recipe) -> tuple[Any, ...]:
    """What an id vouches for; thoughts differ in their last bits from batch to batch."""
    own = recipe.segment
    return recipe.id, recipe.alignment, recipe.parents, own.prompt_ids, len(own.thoughts), own.spoken_ids


@pytest.mark.parametrize("length", [0, MAX_HEADER + 1, 2**40, 2**63, 2**64 - 1])
def test_the_length_that_a_file_announces_is_not_allocated(remote: LatentService, tmp_path: Path, length: int) -> None:
    path = tmp_path / "memory"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(InvalidRequest):
        remote.import_memory(path)


@pytest.mark.parametrize("segments", [MAX_SEGMENTS, MAX_SEGMENTS + 1])
def test_a_memory_of_too_many_segments_is_neither_written_nor_read(tmp_path: Path, segments: int) -> None:
    ids = [f"lat_{i:032x}" for i in range(segments)]
    own, none = Segment("a", (5,), torch.empty(0, 64)), {"steps": 0, "spoken_ids": []}
    about = {"id": "", "agent": "a", "alignment": "realign", "parents": [], "prompt_ids": [5], **none}
    written = {"model": "0" * 32, "hidden_size": 64, "segments": [{**about, "id": key} for key in ids]}
    header = json.dumps({"__metadata__": {"memory": json.dumps(written)}}).encode()
    path = tmp_path / "memory"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    calls = [
        lambda: read_memory(path, "0" * 32, 64, torch.float64, 10**7),
        lambda: list(write_memory([Recipe(key, "0" * 32, "realign", (), own) for key in ids], None)),
    ]
    for call in calls:
        if segments > MAX_SEGMENTS:
            with pytest.raises(InvalidRequest, match="segments"):
                call()
        else:
            assert call()


def test_a_header_of_nothing_but_tokens_stays_small(tmp_path: Path) -> None:
    segment = {"id": f"lat_{0:032x}", "agent": "a", "alignment": "realign", "parents": [], "steps": 0, "spoken_ids": []}
    about = {"model": "0" * 32, "hidden_size": 64, "segments": [{**segment, "prompt_ids": [300]}]}
    room = MAX_HEADER - len(json.dumps({"__metadata__": {"memory": json.dumps(about)}}))
    text = json.dumps(about).replace("[300]", f"[300{',300' * (room // 4)}]")
    header = json.dumps({"__metadata__": {"memory": text}}).encode()
    assert MAX_HEADER - 4 < len(header) <= MAX_HEADER
    path = tmp_path / "memory"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    tracemalloc.start()
    try:
        recipes = read_memory(path, "0" * 32, 64, torch.float64, 10**7)
        with pytest.raises(InvalidRequest):
            check_recipes(recipes, 1000)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def test_the_description_is_kept_and_nothing_breaks_the_server(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 14
    for operation in operations:
        if operation.path == "/v1/memory/import":  # it makes no safetensors files; those are mutated above
            continue

        @settings(
            max_examples=8,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(timeout=30)
            assert response.status_code < 500 or response.status_code == 504, case.as_curl_command()  # a tiny deadline
            assert response.status_code < 400 or response.headers["content-type"] == [PROBLEM]
            case.validate_response(response, checks=KEPT)

        check()


def test_the_description_says_what_a_server_in_trouble_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    monkeypatch.setattr(server.guard, "draining", True)
    monkeypatch.setattr(LocalService, "fault", "the device is gone")
    for path in ("/health", "/ready"):
        case = schema[path]["GET"].Case()
        response = case.call(timeout=30)
        assert response.status_code == 503
        case.validate_response(response, checks=KEPT)


def test_a_forged_signature_is_not_found_digit_by_digit(remote: LatentService, ref: LatentRef) -> None:
    for at in range(0, 64, 7):
        digit = "0" if ref["mac"][at] != "0" else "1"
        with pytest.raises(TamperedReference):
            remote.marker({**ref, "mac": ref["mac"][:at] + digit + ref["mac"][at + 1 :]})


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"0,", b'"",', b'{"":{}},'])
def test_a_body_of_nothing_but_small_values_stays_small(server: Server, filler: bytes) -> None:
    most = server.settings.max_body
    sent = b'{"messages": [' + filler * ((most - 20) // len(filler) - 1) + b"0]}"
    tracemalloc.start()
    try:
        headers = {"content-type": "application/json"}
        reply = httpx.post(f"{server.address}/v1/think", content=sent, headers=headers, timeout=120)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert reply.status_code == (422 if filler in (b"0,", b'"",') else 413)
