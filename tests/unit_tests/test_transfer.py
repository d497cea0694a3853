"""A memory that comes from outside is what its id says, or nothing of it is kept."""

import json
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
from langchain_latentmas.service.identity import memory_id

from ..conftest import Fresh

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


def test_a_memory_of_another_model_is_refused(fresh_service: Fresh, bundled: LatentService, exported: Path) -> None:
    """Also of one whose thoughts have another width."""
    for service in (fresh_service("llama-untied"), bundled):
        known = service.references()
        with pytest.raises(WrongModel, match=r"memory belongs to model [0-9a-f]{32}.*load that model"):
            service.import_memory(exported)
        assert service.references() == known
