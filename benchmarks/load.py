"""Many graphs against one server: `python -m benchmarks.load`.

The long one: `python -m benchmarks.load --graphs 200 --seconds 120 --warm-up 40 --kv-budget 320MiB`.
"""

import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from langchain_core.messages import HumanMessage
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from benchmarks.report import machine, show
from langchain_latentmas import LatentService, teams
from langchain_latentmas.bundled.tasks import problem

SAMPLE_SECONDS = 1.0


@dataclass
class Load:
    """What a number of graphs do to a server, each starting over when it is done, in a window of time."""

    graphs: int
    seconds: float
    warm_up: float = 0.0
    """Seconds of the same load before the window."""
    done: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    longest: float = 0.0
    cpu_seconds: float = 0.0  # of this process
    more: Counter[str] = field(default_factory=Counter)  # by how much the server's counters grew
    counting: bool = False

    @property
    def per_second(self) -> float:
        return self.done / self.seconds

    @property
    def quarters(self) -> tuple[float, float]:
        """Mean resident bytes of the server in the first and in the last quarter."""
        part = max(1, len(self.memory) // 4)
        return sum(self.memory[:part]) / part, sum(self.memory[-part:]) / part

    async def run(self, service: Any, steps: int, questions: random.Random) -> None:
        graph = teams.sequential(service, steps=steps, max_tokens=24).compile()
        end = time.perf_counter() + self.warm_up + self.seconds

        async def one() -> None:
            while (at := time.perf_counter()) < end:
                asked = problem(questions, "test").question + f" ({questions.random():.6f})"  # never asked before
                try:
                    await graph.ainvoke({"messages": [HumanMessage(asked)], "latents": []})
                    self.done += self.counting
                except Exception as error:  # what a user would have met
                    self.errors[type(error).__name__] += 1
                if self.counting:
                    self.longest = max(self.longest, time.perf_counter() - at)

        with httpx.Client(base_url=service.url, timeout=30) as http:
            await asyncio.gather(self._watch(http), *(one() for _ in range(self.graphs)))

    async def _watch(self, http: httpx.Client) -> None:
        await asyncio.sleep(self.warm_up)
        before = await asyncio.to_thread(counters, http)
        begun, worked, self.counting = time.perf_counter(), time.process_time(), True
        while time.perf_counter() < begun + self.seconds:
            now = await asyncio.to_thread(counters, http)
            self.memory.append(now["process_resident_memory_bytes"])
            await asyncio.sleep(SAMPLE_SECONDS)
        self.counting = False
        self.seconds, self.cpu_seconds = time.perf_counter() - begun, time.process_time() - worked
        self.more = await asyncio.to_thread(counters, http) - before  # those that grew


def counters(http: httpx.Client) -> Counter[str]:
    """The server's own figures, by name; those with labels are added up."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def started(folder: str, max_running: int, max_waiting: int, kv_budget: str) -> tuple["subprocess.Popen[str]", str]:
    """A server on a free port, and its address."""
    port = free_port()  # the server names the one it takes at the level "info" only
    command = [sys.executable, "-m", "langchain_latentmas.cli", "serve", "--port", str(port), "--store", folder]
    command += ["--max-running", str(max_running), "--max-waiting", str(max_waiting), "--log-level", "warning"]
    command += ["--option", f"kv_budget={kv_budget}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.stderr is not None
    threading.Thread(target=lambda: [print(line, end="", file=sys.stderr) for line in process.stderr or ()]).start()
    address = f"http://127.0.0.1:{port}"
    while not _ready(address):
        if process.poll() is not None:
            raise SystemExit(f"The server ended with status {process.returncode} before it was ready.")
        time.sleep(0.1)
    return process, address


def _ready(address: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{address}/ready").is_success
    return False


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def main(
    graphs: Annotated[int, typer.Option(help="Graphs at a time.")] = 20,
    seconds: Annotated[float, typer.Option(help="How long it is measured.")] = 15,
    steps: Annotated[int, typer.Option(help="Latent steps of each of the three thinkers.")] = 8,
    max_running: Annotated[int, typer.Option(help="Requests that the server works on at a time.")] = 128,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; fewer make more 429s.")] = 48,
    kv_budget: Annotated[
        str, typer.Option(help="KV that the server keeps: memory grows until it is full, and too little is rebuilt.")
    ] = "160MiB",
    warm_up: Annotated[
        float, typer.Option(help="Seconds of the same load before it is measured: until its KV is full, memory grows.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """A server of the bundled model, a single graph, then many at once, each asking new questions until time is up."""
    questions = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        process, address = started(folder, max_running, max_waiting, kv_budget)
        try:
            with LatentService.load(address, patience=600) as service:
                # What is done once in a process is not to count for one graph either.
                loads = Load(1, max(5.0, seconds / 4), min(5.0, warm_up)), Load(graphs, seconds, warm_up)
                for load in loads:
                    asyncio.run(load.run(service, steps, questions))
        finally:
            process.terminate()
            process.wait(60)
    alone = loads[0]
    columns = ("graphs", "seconds", "done", "per second", "times one", "CPU ms each: server, client", "429s retried")
    table = Table(*columns, "errors", "rebuilds", "ticks/s", "MiB")
    results = []
    for load in loads:
        more = load.more
        refused, rebuilds = int(more["latentmas_refused_total"]), int(more["latentmas_kv_rebuilds_total"])
        ticks = more["latentmas_ticks_total"] / load.seconds
        first, last = load.quarters
        errors = ", ".join(f"{count} {name}" for name, count in load.errors.items()) or "none"
        grown = f"{first / 2**20:.0f} to {last / 2**20:.0f} ({last / first - 1:+.1%})"
        times = load.per_second / alone.per_second
        server_ms, client_ms = (1000 * cpu / load.done for cpu in (more["process_cpu_seconds_total"], load.cpu_seconds))
        cells = (load.graphs, f"{load.seconds:.1f}", load.done, f"{load.per_second:.2f}", f"{times:.1f}")
        cells += (f"{server_ms:.1f}, {client_ms:.1f}", refused)
        table.add_row(*map(str, cells), errors, str(rebuilds), f"{ticks:.0f}", grown)
        results.append(
            {
                "graphs": load.graphs,
                "seconds": load.seconds,
                "done": load.done,
                "per_second": load.per_second,
                "times_one": times,
                "server_cpu_ms_per_graph": server_ms,
                "client_cpu_ms_per_graph": client_ms,
                "refused_and_retried": refused,
                "errors": dict(load.errors),
                "kv_rebuilds": rebuilds,
                "longest_seconds": load.longest,
                "ticks_per_second": ticks,
                "resident_first_quarter": first,
                "resident_last_quarter": last,
            }
        )
    run = {
        "graph": f"sequential, three thinkers of {steps} steps and a judger, bundled model, one server process",
        "server": f"{max_running} requests at work, {max_waiting} may wait, {kv_budget} of KV kept, measured after "
        f"{warm_up:g} s of the same load ({loads[0].warm_up:g} s for one graph)",
        "machine": machine(),
    }
    show(run, table, as_json=as_json, results={"runs": results})


if __name__ == "__main__":
    typer.run(main)
