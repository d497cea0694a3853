"""Kills a process while graphs run: `python -m tests.chaos` prints a table, with `--serve` another one.

Fifty graphs run at once, their checkpoints in one SQLite file, their recipes in one folder. Without `--serve`, graphs
and model are in one process; with it, `latentmas serve` has the model. That process is killed (-9) at random moments
and started again; what was running goes on from its last checkpoint. In the end every graph must have the answer of a
run that nobody disturbed, every reference that a checkpoint ever held must be read, and no file may be torn.

The moments are counted in recipes, so that they fall into the work however fast the machine is: the process ends itself
once so many are there, some milliseconds later.
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from langgraph.checkpoint.sqlite import SqliteSaver

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.errors import LatentMASError, ServiceBusy, ServiceClosed, ServiceUnreachable, StoreCorrupted
from langchain_latentmas.service.envelope import Envelope, Kind
from langchain_latentmas.service.identity import key_ring
from langchain_latentmas.teams import hierarchical, sequential

from .support import PARITY

MODEL = str(PARITY / "qwen3-tied" / "model")
SPILLING: dict[str, Any] = {"kv_budget": 100_000, "kv_disk_budget": 10**9}  # so that files of KV are hit as well
NODES = 4  # of each graph, and as many recipes
LATEST = 0.9  # of the recipes, for the last kill
PATIENCE = 600.0  # seconds: this may run on a machine that has other things to do
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tests.chaos", "langchain_latentmas.service.local", "langchain_latentmas.service.server"]
)


def load(folder: Path, **settings: Any) -> LatentService:
    """In float64, so that company in a batch changes no token of a model that is so small."""
    transformers.utils.logging.disable_progress_bar()
    return LatentService.load(MODEL, device="cpu", dtype="float64", store=folder / "store", **settings)


def config_of(number: int) -> Any:
    return {"configurable": {"thread_id": str(number)}}


def graph_of(service: LatentService, number: int, saver: Any) -> Any:
    """Chains and merges by turns."""
    team = hierarchical if number % 2 else sequential
    return team(service, steps=4, max_tokens=8).compile(checkpointer=saver)


def go_on(service: LatentService, saver: Any, number: int) -> str:
    """Runs a graph from where it is to its end; returns its answer."""
    graph, config = graph_of(service, number, saver), config_of(number)
    begun = graph.get_state(config).created_at is not None
    # Not only where the state has a `next`: nodes that left their writes and no checkpoint are not named there.
    asked = None if begun else {"messages": [("human", f"What is {number} plus {number * 7 % 50}?")]}
    return graph.invoke(asked, config)["messages"][-1].text


def all_at_once(service: LatentService, database: Path, graphs: int, retried: bool = False) -> dict[int, str]:
    """Runs all graphs, each in a thread; returns their answers."""

    def run(number: int) -> str:
        while True:
            try:
                return go_on(service, saver, number)
            except (ServiceUnreachable, ServiceClosed, ServiceBusy):
                if not retried:
                    raise
                time.sleep(0.05)

    with SqliteSaver.from_conn_string(str(database)) as saver, ThreadPoolExecutor(graphs) as threads:
        saver.setup()
        return dict(enumerate(threads.map(run, range(graphs))))


class Moment(NamedTuple):
    """When a process is killed."""

    recipes: int
    """Once so many are in the store,"""
    seconds: float
    """and so much later."""

    def await_in(self, folder: Path) -> None:
        """Has this process killed at the moment."""

        def kill() -> None:
            while count(folder) < self.recipes:
                time.sleep(0.001)
            time.sleep(self.seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()


def count(folder: Path) -> int:
    """Recipes in a store."""
    recipes = folder / "store" / "recipes"
    return sum(name.endswith(".recipe") for name in os.listdir(recipes)) if recipes.exists() else 0


def work(folder: Path, graphs: int, moment: Moment) -> None:
    """What the process does that is killed: all graphs, and the model."""
    with load(folder, **SPILLING) as service:
        moment.await_in(folder)
        all_at_once(service, folder / "graphs.sqlite", graphs)


def serve(folder: Path, port: int, moment: Moment | None) -> None:
    """The same for a server: `latentmas serve`."""
    from langchain_latentmas.commands.serve import serve as command

    if moment:
        moment.await_in(folder)
    options = [f"{name}={value}" for name, value in SPILLING.items()]
    store = folder / "store"
    command(model=MODEL, device="cpu", dtype="float64", store=store, option=options, port=port, log_level="error")


@dataclass
class Store:
    """What lies on the disk, seen by somebody who has nothing to do with the process that writes it."""

    folder: Path
    seen: dict[str, LatentRef] = field(default_factory=dict)
    """Every reference that was ever found in a checkpoint."""

    def look(self, graphs: int) -> dict[str, int]:
        """Reads all checkpoints and files."""
        done = 0
        with SqliteSaver.from_conn_string(str(self.folder / "graphs.sqlite")) as saver:
            saver.setup()
            for number in range(graphs):
                found = saver.get_tuple(config_of(number))
                values = found.checkpoint["channel_values"] if found else {}
                refs = [*values.get("latents", [])]
                for _, channel, value in (found.pending_writes or []) if found else []:
                    refs += value if channel == "latents" else []
                self.seen |= {ref["id"]: ref for ref in refs}
                done += any(ref["agent"] == "judger" for ref in refs)
        recipes = self.folder / "store" / "recipes"
        signer = key_ring(self.folder / "store" / "key").timeless()
        torn = 0
        for path in recipes.glob("*.recipe"):
            try:
                Envelope.opened(path.read_bytes(), Kind.RECIPE, signer)
            except StoreCorrupted:
                torn += 1
        aside = len(list((self.folder / "store").glob("recipes.aside/*")))
        return {
            "recipes": count(self.folder),
            "halves": len(list(recipes.glob(".*.part"))),
            "references": len(self.seen),
            "graphs done": done,
            "torn": torn + aside,
        }

    def lost(self) -> int:
        """How many of the references that were seen cannot be read."""
        lost = 0
        with load(self.folder) as service:
            for ref in self.seen.values():
                try:
                    lost += service.memory(ref).positions != ref["positions"]
                except LatentMASError as error:
                    print(f"lost: {error}", file=sys.stderr)
                    lost += 1
        return lost


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    started = _context.Process(target=target, args=arguments)
    started.start()
    try:
        yield started
    finally:
        if started.is_alive():
            started.kill()
        started.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def table_row(cells: Any) -> str:
    return "".join(f"{cell!s:>14}" for cell in cells)


def chaos(kills: int, graphs: int, seed: int, served: bool) -> bool:
    """Prints the table; returns whether all is well."""
    rng = random.Random(seed)
    moments = [
        Moment(recipes, rng.uniform(0, 0.03))
        for recipes in sorted(rng.randrange(int(LATEST * graphs * NODES)) for _ in range(kills))
    ]
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as disturbed:
        with load(Path(calm)) as service:
            expected = all_at_once(service, Path(calm) / "graphs.sqlite", graphs)
        what = "latentmas serve" if served else "the process with graphs and model"
        print(f"{graphs} graphs; {what} is killed {kills} times; seed {seed}")
        print(table_row(("kill", "at recipe", "recipes", "halves", "references", "graphs done", "torn")), flush=True)
        store, torn = Store(Path(disturbed)), 0
        rows = (_serve_and_kill if served else _work_and_kill)(store, moments, graphs)
        answers = next(rows)
        for kill, (moment, found) in enumerate(zip(moments, rows, strict=True), 1):
            torn += found["torn"]
            print(table_row((kill, moment.recipes, *found.values())), flush=True)
        end = store.look(graphs)
        torn += end["torn"]
        print(table_row(("end", "", *end.values())))
        right = sum(answers.get(number) == answer for number, answer in expected.items())
        lost = store.lost()
        print(
            f"answers as undisturbed: {right} of {graphs}; references lost: {lost} of {len(store.seen)}; torn: {torn}"
        )
        return right == end["graphs done"] == graphs and not lost and not torn


Rows = Iterator[Any]  # first the answers, to be filled in, then what lies on the disk after each kill


def _work_and_kill(store: Store, moments: list[Moment], graphs: int) -> Rows:
    answers: dict[int, str] = {}
    yield answers
    for moment in moments:
        with process(work, store.folder, graphs, moment) as worker:
            worker.join(PATIENCE)
            assert worker.exitcode == -signal.SIGKILL, f"the process ended by itself ({worker.exitcode})"
        yield store.look(graphs)
    with load(store.folder, **SPILLING) as service:
        answers |= all_at_once(service, store.folder / "graphs.sqlite", graphs)


def _serve_and_kill(store: Store, moments: list[Moment], graphs: int) -> Rows:
    answers: dict[int, str] = {}
    yield answers
    port = free_port()
    url, database = f"http://127.0.0.1:{port}", store.folder / "graphs.sqlite"
    with ThreadPoolExecutor(1) as client:
        running = client.submit(_use, url, database, graphs)
        for moment in moments:
            with process(serve, store.folder, port, moment) as server:
                server.join(PATIENCE)
                assert server.exitcode == -signal.SIGKILL, f"the server ended by itself ({server.exitcode})"
            assert not running.done()
            yield store.look(graphs)
        with process(serve, store.folder, port, None):
            answers |= running.result(PATIENCE)


def _use(url: str, database: Path, graphs: int) -> dict[int, str]:
    LatentService.load(url, patience=PATIENCE).close()
    # From here on without patience: a graph that is cut off fails, and goes on from its checkpoint.
    return all_at_once(LatentService.load(url, patience=0), database, graphs, retried=True)


if __name__ == "__main__":
    logging.disable()
    os.environ["PYTHONWARNINGS"] = "ignore::RuntimeWarning:runpy"  # each process reads this file again
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--graphs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="kill `latentmas serve`, not the graphs' own process")
    options = parser.parse_args()
    sys.exit(0 if chaos(options.kills, options.graphs, options.seed, options.serve) else 1)
