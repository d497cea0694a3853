"""Checkpointers: what a graph leaves in them, and what another process makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from langchain_latentmas.errors import UnknownReference
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import hierarchical, sequential

from ..support import PARITY

MODEL = str(PARITY / "qwen3-tied" / "model")
QUESTION = "What is 12 plus 30 minus 5?"
WORKER = """
import sys
import warnings
warnings.filterwarnings("error", category=DeprecationWarning, module="langchain_latentmas")
from langgraph.checkpoint.sqlite import SqliteSaver
from langchain_latentmas import LatentService
from langchain_latentmas.teams import hierarchical
what, model, store, database = sys.argv[1:]
with LatentService.load(model, device="cpu", store=store) as service, SqliteSaver.from_conn_string(database) as saver:
    graph = hierarchical(service, steps=6, max_tokens=12).compile(checkpointer=saver, interrupt_before=["judger"])
    config = {"configurable": {"thread_id": "1"}}
    if what == "begin":
        graph.invoke({"messages": [("human", sys.stdin.read())]}, config)
        assert graph.get_state(config).next == ("judger",)
    else:
        print(graph.invoke(None, config)["messages"][-1].text.encode().hex(), service.info()["rebuilds"])
"""


def worker(what: str, tmp_path: Path, **environment: str) -> str:
    """Runs a part of a graph in a process of its own, where user warnings and deprecations in this package raise."""
    command = [sys.executable, "-W", "error::UserWarning"]
    arguments = [what, MODEL, str(tmp_path / "store"), str(tmp_path / "graph.sqlite")]
    done = subprocess.run(
        [*command, "-c", WORKER, *arguments],
        input=QUESTION,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "unregistered" not in done.stderr.lower()
    return done.stdout.strip()


@pytest.mark.parametrize("strict", ["false", "true"])
def test_a_graph_interrupted_in_one_process_ends_in_another_with_the_same_answer(
    tmp_path: Path, fresh_service: Any, strict: str
) -> None:
    worker("begin", tmp_path, LANGGRAPH_STRICT_MSGPACK=strict)
    answer, rebuilds = worker("resume", tmp_path, LANGGRAPH_STRICT_MSGPACK=strict).split()
    graph = hierarchical(fresh_service(dtype="float32"), steps=6, max_tokens=12).compile()
    undisturbed = graph.invoke({"messages": [("human", QUESTION)]})["messages"][-1].text
    assert bytes.fromhex(answer).decode() == undisturbed
    assert int(rebuilds) == 3  # one for each expert: nothing but recipes outlived the first process


def test_the_latent_state_of_a_superstep_stays_under_2_kb(fresh_service: Any, recwarn: Any, tmp_path: Path) -> None:
    config: Any = {"configurable": {"thread_id": "1"}}
    with SqliteSaver.from_conn_string(str(tmp_path / "graph.sqlite")) as saver:
        graph = sequential(fresh_service(dtype="float32"), steps=4, max_tokens=4).compile(checkpointer=saver)
        graph.invoke({"messages": [("human", QUESTION)]}, config)
        held = [snapshot.values.get("latents", []) for snapshot in graph.get_state_history(config)]
    assert max(map(len, held)) == 4  # one of each agent
    assert max(len(json.dumps(refs)) for refs in held) <= 2048
    assert not [w for w in recwarn if "langgraph" in str(w.message).lower() or "msgpack" in str(w.message).lower()]


def test_a_fork_answers_differently_only_where_it_was_changed(fresh_service: Any, tmp_path: Path) -> None:
    service: LocalService = fresh_service(dtype="float32")
    config: Any = {"configurable": {"thread_id": "1"}}
    with SqliteSaver.from_conn_string(str(tmp_path / "graph.sqlite")) as saver:
        graph = sequential(service, steps=6, max_tokens=12).compile(checkpointer=saver)
        first = graph.invoke({"messages": [("human", QUESTION)]}, config)
        before_critic = next(s for s in graph.get_state_history(config) if s.next == ("critic",))
        replayed = graph.invoke(None, before_critic.config)
        changed = graph.update_state(
            before_critic.config,
            {"messages": [(first["messages"][0].model_copy(update={"content": "What is 9 plus 9?"}))]},
        )
        forked = graph.invoke(None, changed)
    ids = {ref["agent"]: ref["id"] for ref in first["latents"]}
    ids_replayed = {ref["agent"]: ref["id"] for ref in replayed["latents"]}
    ids_forked = {ref["agent"]: ref["id"] for ref in forked["latents"]}
    assert ids_replayed == ids
    assert replayed["messages"][-1].text == first["messages"][-1].text
    assert ids_forked["planner"] == ids["planner"]
    assert all(ids_forked[agent] != ids[agent] for agent in ("critic", "refiner", "judger"))
    assert forked["messages"][-1].text != first["messages"][-1].text


async def test_an_async_checkpointer_round_trips_the_state(fresh_service: Any, tmp_path: Path) -> None:
    config: Any = {"configurable": {"thread_id": "1"}}
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "graph.sqlite")) as saver:
        graph = hierarchical(fresh_service(dtype="float32"), steps=4, max_tokens=4).compile(checkpointer=saver)
        state = await graph.ainvoke({"messages": [("human", QUESTION)]}, config)
        saved = await graph.aget_state(config)
    assert saved.values["latents"] == state["latents"]
    assert len(state["latents"]) == 4


def test_references_do_not_outlive_a_store_that_was_in_memory(fresh_service: Any) -> None:
    one: LocalService = fresh_service(dtype="float32", key=b"k" * 32)
    other: LocalService = fresh_service(dtype="float32", key=b"k" * 32)
    ref = one.think(QUESTION, steps=2)
    with pytest.raises(UnknownReference, match="store="):
        other.think(QUESTION, [ref], steps=2)


def test_two_turns_on_one_thread_share_their_memory(fresh_service: Any, tmp_path: Path) -> None:
    config: Any = {"configurable": {"thread_id": "1"}}
    with SqliteSaver.from_conn_string(str(tmp_path / "graph.sqlite")) as saver:
        graph = sequential(fresh_service(dtype="float32"), steps=3, max_tokens=4).compile(checkpointer=saver)
        first = graph.invoke({"messages": [("human", QUESTION)]}, config)
        second = graph.invoke({"messages": [("human", "And 2 more?")]}, config)
    planner = second["latents"][len(first["latents"])]
    assert planner["agent"] == "planner"
    assert planner["parents"] == [first["latents"][-1]["id"]]
