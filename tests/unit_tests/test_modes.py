from typing import Any

import pytest

from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.modes import edge_modes, node_path, runs_as_text

EDGES = [("planner", "critic"), ("critic", "judger")]


def config(edges: Any) -> Any:
    return {"configurable": {"edges": edges}}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["latent", "latent"]),
        (config("latent"), ["latent", "latent"]),
        (config("text"), ["text", "text"]),
        (config({}), ["latent", "latent"]),
        (config({"critic->judger": "text"}), ["latent", "text"]),
        (config({" critic -> judger": "text"}), ["latent", "text"]),  # as reports print it
    ],
)
def test_each_edge_has_a_mode(asked: Any, expected: list[str]) -> None:
    assert list(edge_modes(asked, EDGES, EDGES).values()) == expected


def test_a_mapping_may_name_only_what_is_known() -> None:
    assert edge_modes(config({"a->b": "text"}), EDGES) == dict.fromkeys(EDGES, "latent")
    with pytest.raises(InvalidRequest, match=r"'a->b', which is no latent edge .*: critic->judger, planner->critic"):
        edge_modes(config({"a->b": "text"}), EDGES, EDGES)


def test_a_node_runs_as_text_under_any_of_its_names() -> None:
    mapped = config({"planner->critic": "text", "critic->judger": "latent"})
    assert runs_as_text(config("text"))
    assert not runs_as_text({})
    assert not runs_as_text(mapped)
    assert runs_as_text(mapped, "agent", "planner")
    assert not runs_as_text(mapped, "critic", "judger")
    assert runs_as_text(config({"planner -> critic": "text"}), "planner")


@pytest.mark.parametrize("bad", ["Text", None, 1, ["text"], {"a->b": "off"}, {"a->b": None}])
def test_an_unknown_mode_is_refused_by_every_reader(bad: Any) -> None:
    for read in (lambda: edge_modes(config(bad), EDGES), lambda: runs_as_text(config(bad), "a")):
        with pytest.raises(InvalidRequest, match=r"configurable\.edges must be 'latent', 'text', or a mapping"):
            read()


def test_a_path_leaves_out_what_counts_calls() -> None:
    assert node_path({"configurable": {"checkpoint_ns": "team:1f0e|2|critic:77ab"}}) == ("team", "critic")
    assert node_path({}) == ()
