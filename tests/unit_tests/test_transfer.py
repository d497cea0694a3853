"""A memory that comes from outside is what its id says, or nothing of it is kept."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors import torch as safetensors
from torch import Tensor

from langchain_latentmas import LatentService
from langchain_latentmas.errors import ContextTooLong, InvalidRequest, WrongModel
from langchain_latentmas.service import transfer
from langchain_latentmas.service.identity import memory_id
from langchain_latentmas.service.server import Server

from ..conftest import Fresh
from ..support import say

VOCABULARY = 384
UNKNOWN = "lat_" + "0" * 32
About = dict[str, Any]  # what a file says of itself
Tensors = dict[str, Tensor]


@pytest.fixture
def exported(fresh_service: Fresh, tmp_path: Path) -> Path:
    """Two thoughts of three steps, one made on the other."""
    service, path = fresh_service(), tmp_path / "memory"
    plan = service.think("Plan.", steps=3, agent="planner")
    check = service.think("Check.", [plan], steps=3, agent="critic")
    path.write_bytes(b"".join(service.export_memory(check)))
    return path


def opened(path: Path) -> tuple[About, Tensors]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        return json.loads(file.metadata()["memory"]), tensors


def write(path: Path, about: About, tensors: Tensors) -> None:
    safetensors.save_file(tensors, path, {"memory": json.dumps(about)})


def test_a_memory_is_written_as_the_page_on_serving_says(fresh_service: Fresh, tmp_path: Path) -> None:
    """Whoever changes one of these names cannot read the files that there are."""
    service, path = fresh_service(), tmp_path / "memory"
    plan = service.think("Plan.", steps=3, agent="planner")
    said = say(service, "Answer.", [plan], max_tokens=4, agent="judger")
    path.write_bytes(b"".join(service.export_memory(said.ref, kv=True)))
    about, tensors = opened(path)
    memory, config = service.memory(said.ref), service.model.config
    planned, answered = ([list(ids) for ids in (part.prompt_ids, part.spoken_ids)] for part in memory.segments)
    assert len(answered[1]) == said.usage["output_tokens"]
    assert about == {
        "format": "latentmas-memory",
        "version": 1,
        "model": plan["model"],
        "hidden_size": config.hidden_size,
        "merge": "none",
        "segments": [
            {
                "id": plan["id"],
                "agent": "planner",
                "alignment": "realign",
                "parents": [],
                "prompt_ids": planned[0],
                "steps": 3,
                "spoken_ids": [],
            },
            {
                "id": said.ref["id"],
                "agent": "judger",
                "alignment": "realign",
                "parents": [plan["id"]],
                "prompt_ids": answered[0],
                "steps": 0,
                "spoken_ids": answered[1],
            },
        ],
    }
    layers = range(config.num_hidden_layers)
    assert tensors.keys() == {"thoughts.0", *(f"{side}.{i}" for side in ("keys", "values") for i in layers)}
    assert torch.equal(tensors["thoughts.0"], memory.segments[0].thoughts)
    for i in layers:
        assert torch.equal(tensors[f"keys.{i}"], memory.keys[i])
        assert torch.equal(tensors[f"values.{i}"], memory.values[i])


def test_a_memory_whose_header_nobody_would_read_is_not_written(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    ref = service.think("Plan.", steps=3)
    header = len(next(service.export_memory(ref))) - 8
    monkeypatch.setattr(transfer, "MAX_HEADER", header)
    assert b"".join(service.export_memory(ref))
    monkeypatch.setattr(transfer, "MAX_HEADER", header - 1)
    with pytest.raises(InvalidRequest, match=f"too long to be exported: its header has {header} bytes"):
        next(service.export_memory(ref))


def with_id(about: About, **changed: Any) -> None:
    """Changes the last segment, and gives it the id of what it is now."""
    segment = about["segments"][-1]
    segment.update(changed)
    made_from = {name: value for name, value in segment.items() if name not in ("id", "agent")}
    segment["id"] = memory_id(model=about["model"], **made_from)


def another_prompt(about: About, _: Tensors) -> None:
    about["segments"][1]["prompt_ids"][0] += 1


def another_prompt_before(about: About, _: Tensors) -> None:
    about["segments"][0]["prompt_ids"][0] += 1


def other_words(about: About, _: Tensors) -> None:
    about["segments"][1]["spoken_ids"] = [5]


def another_alignment(about: About, _: Tensors) -> None:
    about["segments"][1]["alignment"] = "rescale"


def no_parents(about: About, _: Tensors) -> None:
    about["segments"][1]["parents"] = []


def an_unknown_parent(about: About, _: Tensors) -> None:
    with_id(about, parents=[UNKNOWN])


def a_child_before_its_parent(about: About, _: Tensors) -> None:
    about["segments"].reverse()


def a_thought_that_is_nan(_: About, tensors: Tensors) -> None:
    tensors["thoughts.1"][0, 0] = torch.nan


def a_thought_that_is_infinite(_: About, tensors: Tensors) -> None:
    tensors["thoughts.0"][2, 1] = torch.inf


def fewer_thoughts(_: About, tensors: Tensors) -> None:
    tensors["thoughts.1"] = tensors["thoughts.1"][:2].clone()


def fewer_thoughts_and_steps(about: About, tensors: Tensors) -> None:
    fewer_thoughts(about, tensors)
    about["segments"][1]["steps"] = 2


def narrow_thoughts(_: About, tensors: Tensors) -> None:
    tensors["thoughts.1"] = tensors["thoughts.1"][:, :64].clone()


def a_token_beyond_the_vocabulary(about: About, _: Tensors) -> None:
    with_id(about, prompt_ids=[5, VOCABULARY])


def a_word_beyond_the_vocabulary(about: About, _: Tensors) -> None:
    with_id(about, spoken_ids=[VOCABULARY])


def no_prompt(about: About, _: Tensors) -> None:
    with_id(about, prompt_ids=[])


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (another_prompt, "is not what its id says; export the memory again"),
        (another_prompt_before, "is not what its id says"),
        (other_words, "is not what its id says"),
        (another_alignment, "is not what its id says"),
        (no_parents, "is not what its id says"),
        (fewer_thoughts_and_steps, "is not what its id says"),
        (an_unknown_parent, f"was made on {UNKNOWN}, which is not among those before it"),
        (a_child_before_its_parent, "Segment 0 was made on lat_.*, which is not among those before it"),
        (a_thought_that_is_nan, "The thoughts of segment 1 are not finite"),
        (a_thought_that_is_infinite, "The thoughts of segment 0 are not finite"),
        (fewer_thoughts, "The thoughts of segment 1 do not have its steps"),
        (narrow_thoughts, "or not this width"),
        (a_token_beyond_the_vocabulary, "or a token beyond the vocabulary"),
        (a_word_beyond_the_vocabulary, "or a token beyond the vocabulary"),
        (no_prompt, "has no prompt"),
    ],
)
def test_a_forged_memory_is_refused_and_leaves_nothing(
    fresh_service: Fresh, exported: Path, forge: Callable[[About, Tensors], None], why: str
) -> None:
    about, tensors = opened(exported)
    forge(about, tensors)
    write(exported, about, tensors)
    service = fresh_service()
    with pytest.raises(InvalidRequest, match=why):
        service.import_memory(exported)
    assert service.references() == []


def test_a_memory_that_was_written_anew_and_not_changed_is_taken(fresh_service: Fresh, exported: Path) -> None:
    about, tensors = opened(exported)
    with_id(about)
    write(exported, about, tensors)
    service = fresh_service()
    ref = service.import_memory(exported)
    assert ref["id"] == about["segments"][-1]["id"]
    assert {stored.ref["id"] for stored in service.references()} == {part["id"] for part in about["segments"]}
    for i, segment in enumerate(service.memory(ref).segments):
        assert torch.equal(segment.thoughts, tensors[f"thoughts.{i}"])


def test_a_memory_longer_than_the_model_can_see_is_refused(fresh_service: Fresh, exported: Path) -> None:
    service = fresh_service(max_positions=20)
    with pytest.raises(ContextTooLong, match="longer than the model's 20 positions"):
        service.import_memory(exported)
    assert service.references() == []


def test_of_a_memory_that_says_it_is_too_long_no_thoughts_are_read(fresh_service: Fresh, exported: Path) -> None:
    about, _ = opened(exported)
    about["segments"][1]["steps"] = 2**50
    write(exported, about, {})  # there are none, and nobody finds out
    service = fresh_service()
    with pytest.raises(ContextTooLong, match=f"longer than the model's {service.max_positions} positions"):
        service.import_memory(exported)
    with pytest.raises(WrongModel):
        fresh_service("llama-untied").import_memory(exported)


def test_a_memory_of_another_model_is_refused(fresh_service: Fresh, bundled: LatentService, exported: Path) -> None:
    """Also of one whose thoughts have another width."""
    for service in (fresh_service("llama-untied"), bundled):
        known = service.references()
        with pytest.raises(WrongModel, match=r"memory belongs to model [0-9a-f]{32}.*load that model"):
            service.import_memory(exported)
        assert service.references() == known


def test_a_memory_that_comes_in_lies_in_no_folder_where_a_kill_would_leave_it(
    server: Server, remote: LatentService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, file = tmp_path / "temporary", tmp_path / "memory"
    temporary.mkdir()
    file.write_bytes(b"as it was sent")
    there: list[tuple[bytes, list[Path]]] = []

    def look(path: Path) -> None:
        there.append((path.read_bytes(), list(temporary.iterdir())))
        raise InvalidRequest("seen")

    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(server.service, "import_memory", look)
    with pytest.raises(InvalidRequest, match="seen"):
        remote.import_memory(file)
    assert there == [(b"as it was sent", [])]
