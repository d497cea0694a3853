"""The tick against vLLM, on the same machine in one run: `.venv-vllm/bin/python -m benchmarks.speak`."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from rich.progress import Progress
from rich.table import Table

from benchmarks.report import Spread, machine, prepare, ratios, show
from langchain_latentmas import LatentService
from langchain_latentmas.bundled import ROLES
from langchain_latentmas.demo import held_out

WHAT = {"think": "thoughts / s", "speak": "tokens / s"}


class Work(NamedTuple):
    """What all agents together made, in how many seconds, and what they said."""

    made: int
    seconds: float
    said: list[tuple[int, ...]]


def main(
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    vllm: Annotated[str | None, typer.Option(help="vllm+http://host:port; without it, vLLM starts here.")] = None,
    agents: Annotated[str, typer.Option(help="How many at a time.")] = "1 4 16 32",
    repeats: int = 5,
    steps: Annotated[int, typer.Option(help="Latent steps of a thinker, and most tokens of a speaker.")] = 32,
    seed: int = 0,
    dtype: str = "float32",
    eager: Annotated[bool, typer.Option(help="Whether vLLM that starts here compiles nothing.")] = False,
    kv_budget: Annotated[str | None, typer.Option(help="Of vLLM that starts here, say 1GiB; else most memory.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of all GPU memory that vLLM that starts here has, beside the tick's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch for the tick, at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """As many agents at a time as are named, all on prompts of their own, on either service in turn."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    prepare(threads)
    sizes = [int(size) for size in agents.replace(",", " ").split()]
    # Nobody asks the same twice: what was thought before is known, and what was read before is cached.
    questions = iter([problem.question for problem in held_out(2 * sum(sizes) * repeats + 2 * max(sizes), seed)])
    begun = time.perf_counter()
    engine: dict[str, Any] = {"enforce_eager": eager}
    if gpu_memory_utilization is not None:
        engine["gpu_memory_utilization"] = gpu_memory_utilization
    settings = {} if vllm else {"dtype": dtype, "kv_budget": kv_budget, "engine": engine}
    with (
        LatentService.load(model, dtype=dtype) as tick,
        LatentService.load(vllm or f"vllm:{model}", **settings) as other,
        Progress(transient=True, disable=as_json) as progress,
    ):
        started = time.perf_counter() - begun
        bar = progress.add_task("measuring", total=2 * len(sizes) * repeats)
        services = {"tick": tick, "vllm": other}
        for kind in WHAT:  # the first pass allocates
            asked = [next(questions) for _ in range(max(sizes))]
            for service in services.values():
                asyncio.run(at_once(service, kind, asked, steps))
        results = []
        for kind in WHAT:
            for size in sizes:
                works: dict[str, list[Work]] = {name: [] for name in services}
                for _ in range(repeats):
                    asked = [next(questions) for _ in range(size)]
                    for name, service in services.items():
                        works[name].append(asyncio.run(at_once(service, kind, asked, steps)))
                    progress.advance(bar)
                results.append({"kind": kind, "agents": size, **compared(works["tick"], works["vllm"])})
        about, served = machine(str(tick.info()["device"])), other.info()
    show(
        {
            "machine": about,
            "model": f"{model} ({tick.info()['fingerprint']}), {dtype} in both",
            "vllm": f"{served['vllm']}, {vllm or ('eager' if eager else 'compiled')}, started in {started:.0f} s",
            "agents": f"{steps} latent steps, or at most {steps} tokens, greedy; prefill included",
            "repeats": f"{repeats}, seed {seed}",
        },
        *(table(kind, [one for one in results if one["kind"] == kind]) for kind in WHAT),
        as_json=as_json,
        results={"results": results},
    )


async def at_once(service: LatentService, kind: str, questions: Sequence[str], steps: int) -> Work:
    """One agent per question, all at the same moment."""
    work = think if kind == "think" else speak
    begun = time.perf_counter()
    said = await asyncio.gather(*(work(service, question, steps) for question in questions))
    seconds = time.perf_counter() - begun
    return Work(steps * len(questions) if kind == "think" else sum(map(len, said)), seconds, said)


async def think(service: LatentService, question: str, steps: int) -> tuple[int, ...]:
    await service.athink([("system", ROLES["planner"]), ("human", question)], steps=steps, agent="planner")
    return ()


async def speak(service: LatentService, question: str, tokens: int) -> tuple[int, ...]:
    asked = [("system", ROLES["solver"]), ("human", question)]
    return tuple([i async for chunk in service.aspeak(asked, max_tokens=tokens) for i in chunk.token_ids])


def compared(tick: Sequence[Work], vllm: Sequence[Work]) -> dict[str, Any]:
    one, other = ([work.made / work.seconds for work in works] for works in (tick, vllm))
    return {
        "tick_per_second": Spread.of(one),
        "vllm_per_second": Spread.of(other),
        "ratio": ratios(other, one),
        "other_tokens": sum(a != b for x, y in zip(tick, vllm, strict=True) for a, b in zip(x[2], y[2], strict=True)),
        "texts": sum(len(work.said) for work in tick),
    }


def table(kind: str, results: Sequence[dict[str, Any]]) -> Table:
    title = {"think": "Thinkers", "speak": "Speakers"}[kind]
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2), header_style="dim")
    for name in ("agents", f"{WHAT[kind]}, tick", f"{WHAT[kind]}, vLLM", "vLLM is"):
        shown.add_column(name, justify="right")
    if kind == "speak":
        shown.add_column("other tokens", justify="right")
    for one in results:
        rates = [one[name].show(0) for name in ("tick_per_second", "vllm_per_second")]
        same = [f"{one['other_tokens']} of {one['texts']}"] if kind == "speak" else []
        shown.add_row(str(one["agents"]), *rates, one["ratio"].show(2, "×"), *same)
    return shown


if __name__ == "__main__":
    typer.run(main)
