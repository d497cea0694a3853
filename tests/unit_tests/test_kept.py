"""Recipes that a service without a store keeps as they are behave like stored ones."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.errors import DroppedReference, InvalidRequest, UnknownReference
from langchain_latentmas.service.identity import Signer
from langchain_latentmas.service.kept import KeptRecipes
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.memory import Recipe
from langchain_latentmas.service.retention import Retention

from ..conftest import Fresh
from .test_store import HIDDEN, recipe, recipe_store, shelve


def kept_recipes() -> KeptRecipes:
    return KeptRecipes(Signer(b"k" * 32), HIDDEN, torch.float32)


def same(a: Recipe, b: Recipe) -> bool:
    ours, theirs = a.segment, b.segment
    parts = [(s.agent, s.prompt_ids, s.spoken_ids) for s in (ours, theirs)]
    whole = [(r.id, r.model, r.alignment, r.parents) for r in (a, b)]
    return parts[0] == parts[1] and whole[0] == whole[1] and torch.equal(ours.thoughts, theirs.thoughts)


@given(st.integers(0, 6), st.lists(st.integers(0, 2**31 - 1), max_size=5))
def test_a_recipe_comes_back_as_a_store_would_give_it(steps: int, spoken: list[int]) -> None:
    kept, stored, put = kept_recipes(), recipe_store(), recipe(steps, tuple(spoken))
    assert shelve(kept, put) is put
    shelve(stored, put)
    assert same(kept.get(put.id), put)
    assert same(kept.get(put.id), stored.get(put.id))
    ours, theirs = kept.header(put.id), stored.header(put.id)
    assert ours.model_copy(update={"made": theirs.made}) == theirs
    assert abs(ours.made - theirs.made) < 60
    assert 0 < kept.size_of(put.id) <= stored.size_of(put.id)


def test_what_has_a_reference_stays_as_it_was() -> None:
    kept, first, second = kept_recipes(), recipe(), recipe(add=1e-7)
    shelve(kept, first)
    assert shelve(kept, second) is not second
    assert torch.equal(kept.get(first.id).segment.thoughts, first.segment.thoughts)


def test_what_is_not_there_is_unknown_and_no_parent() -> None:
    kept, parent = kept_recipes(), recipe()
    child = recipe(steps=1, parents=(parent.id,))
    for look in (kept.get, kept.header, kept.size_of, kept.renew):
        with pytest.raises(UnknownReference, match="store="):
            look(parent.id)
    with pytest.raises(DroppedReference, match="while agent 'planner' read it"):
        shelve(kept, child)
    shelve(kept, parent)
    assert shelve(kept, child) is child


def test_what_was_dropped_can_be_made_again() -> None:
    kept, parent = kept_recipes(), recipe()
    shelve(kept, parent)
    shelve(kept, recipe(steps=1, parents=(parent.id,)))  # so that the parent is kept for it
    assert Retention(kept).drop(parent.id) == []
    with pytest.raises(DroppedReference):
        kept.check([parent.id])
    shelve(kept, parent)
    kept.check([parent.id])


def test_a_service_without_a_store_keeps_them_and_takes_no_budget(fresh_service: Fresh) -> None:
    assert isinstance(fresh_service()._store, KeptRecipes)
    with pytest.raises(InvalidRequest, match="store_budget needs a folder"):
        fresh_service(store_budget=1000)


def test_what_is_kept_is_rebuilt_when_its_decoded_form_is_forgotten(fresh_service: Fresh) -> None:
    service: LocalService = fresh_service(kv_budget=0)
    ref = service.think("Plan.", steps=3)
    before = service.memory(ref).segments[0]
    service._recipes.clear()
    after = service.memory(ref).segments[0]
    assert after.prompt_ids == before.prompt_ids
    assert torch.equal(after.thoughts, before.thoughts)


def test_an_imported_memory_does_not_change_with_its_file(fresh_service: Fresh, tmp_path: Path) -> None:
    one, other, file = fresh_service(), fresh_service(), tmp_path / "memory"
    file.write_bytes(b"".join(one.export_memory(one.think("Plan.", steps=3))))
    moved = other.import_memory(file)
    thoughts = other.memory(moved).segments[-1].thoughts.clone()
    whole = file.read_bytes()
    with file.open("r+b") as there:
        there.write(bytes(len(whole)))
    assert torch.equal(other.memory(moved).segments[-1].thoughts, thoughts)
