import json
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas import LatentRef, LatentService, merge_latents
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.state import ancestry, tips

from ..support import FIELDS, messages


def ref(name: str, agent: str = "a", parents: tuple[str, ...] = ()) -> LatentRef:
    return LatentRef(id=name, agent=agent, model="m", parents=list(parents), positions=3, steps=1, mac="")


@st.composite
def families(draw: st.DrawFn) -> list[LatentRef]:
    """References whose parents come before them, as a state holds them."""
    made: list[LatentRef] = []
    for i in range(draw(st.integers(0, 8))):
        ids = [r["id"] for r in made]
        parents = draw(st.lists(st.sampled_from(ids), max_size=3, unique=True)) if ids else []
        made.append(ref(f"lat_{i}", draw(st.sampled_from("abc")), tuple(parents)))
    return made


REFS = st.lists(st.builds(ref, st.sampled_from(["lat_0", "lat_1", "lat_2"]), st.sampled_from("abc")), max_size=6)


@given(REFS, REFS)
def test_merging_again_changes_nothing(left: list[LatentRef], right: list[LatentRef]) -> None:
    once = merge_latents(left, right)
    assert merge_latents(once, right) == once
    assert merge_latents(once, once) == once


def keys(refs: list[LatentRef]) -> list[tuple[str, str]]:
    return [(r["id"], r["agent"]) for r in refs]


@given(REFS, REFS)
def test_a_subgraph_leaves_what_its_nodes_would_have_left(left: list[LatentRef], thought: list[LatentRef]) -> None:
    """It emits all of its state, and so what the graph around it has already."""
    left = merge_latents(left, [])
    inside = left
    for each in thought:
        inside = merge_latents(inside, [each])
    assert merge_latents(left, inside) == inside


def test_what_is_thought_again_goes_to_the_end_and_what_is_handed_on_stays() -> None:
    a, b, c, d = map(ref, "abcd")
    assert merge_latents([a, b], [a]) == [b, a]
    assert merge_latents([a, b], [a, b, c]) == [a, b, c]
    assert merge_latents([a, b, c], [a, b, d]) == [a, b, c, d]  # c comes from beside the subgraph
    assert merge_latents([a, b, c], [b, d, a]) == [b, c, d, a]


@given(REFS, REFS)
def test_merging_loses_nobody_and_repeats_nobody(left: list[LatentRef], right: list[LatentRef]) -> None:
    merged = keys(merge_latents(left, right))
    assert sorted(merged) == sorted({*keys(left), *keys(right)})
    untouched = [key for key in dict.fromkeys(keys(left)) if key not in keys(right)]
    assert [key for key in merged if key in untouched] == untouched


@given(REFS, REFS)
def test_merging_leaves_its_arguments_alone(left: list[LatentRef], right: list[LatentRef]) -> None:
    before = deepcopy((left, right))
    merged = merge_latents(left, right)
    assert (left, right) == before
    assert merged is not left
    assert merged is not right


@pytest.mark.parametrize("returned", [{"id": "lat_1", "agent": "a"}, "lat_1", ["lat_1"], [None], [{"agent": "a"}]])
def test_what_is_no_list_of_references_is_refused(returned: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"takes a list of references, such as \[ref\]"):
        merge_latents([], returned)


def test_merging_takes_none_for_an_empty_state() -> None:
    assert merge_latents(None, None) == []
    assert merge_latents(None, [ref("lat_0")]) == [ref("lat_0")]
    assert merge_latents([ref("lat_0")], None) == [ref("lat_0")]


def test_the_first_reference_of_an_id_and_agent_stays() -> None:
    first, forged = ref("lat_0"), {**ref("lat_0"), "positions": 9}
    assert merge_latents([first], [forged]) == [first]  # type: ignore[list-item]


@given(families())
def test_tips_are_those_that_nobody_descends_from(refs: list[LatentRef]) -> None:
    found = tips(refs)
    parents = {parent for r in refs for parent in r["parents"]}
    assert [r["id"] for r in found] == [r["id"] for r in refs if r["id"] not in parents]
    assert bool(found) == bool(refs)


@given(families())
def test_all_tips_together_descend_from_every_reference(refs: list[LatentRef]) -> None:
    assert ancestry(tips(refs), refs) == {r["id"] for r in refs}


def test_ancestry_follows_parents_as_far_as_they_are_known() -> None:
    a, b, c = ref("a"), ref("b", parents=("a", "unknown")), ref("c")
    assert ancestry([b], [a, b, c]) == {"a", "b", "unknown"}
    assert ancestry([], [a]) == set()


def test_a_reference_is_plain_json_of_a_few_hundred_bytes(service: LatentService) -> None:
    made = service.think(messages("What is 1 + 1?"), steps=2, agent="planner")
    assert tuple(made) == FIELDS
    assert json.loads(json.dumps(made)) == made
    assert len(json.dumps(made)) < 500


def test_the_state_needs_no_torch() -> None:
    code = """
import sys
class NoTorch:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
from langchain_latentmas import LatentRef, LatentState, merge_latents
from langchain_latentmas.state import tips
from langgraph.graph import StateGraph
StateGraph(LatentState)
assert "torch" not in sys.modules
try:
    from langchain_latentmas import LatentAgentNode
except ImportError:
    print("no torch, and a state")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "no torch, and a state\n", done.stderr
