"""Text edges against latent ones on held-out problems: `python -m benchmarks.latent_vs_text`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from benchmarks.report import Spread, machine, prepare, ratios, show
from langchain_latentmas.bundled import STEPS
from langchain_latentmas.bundled.tasks import Problem
from langchain_latentmas.demo import MODES, TEAMS, Score, answer_all, held_out, run
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.evaluation.statistics import wilson
from langchain_latentmas.evaluation.task import Relay
from langchain_latentmas.service import LatentService
from langchain_latentmas.service.local import LocalService, LocalSettings

NAMES = {"text": "text", "latent": "latent", "cut": "latent, edge cut"}


def single(service: LatentService, problems: list[Problem], **options: Any) -> Score:
    """One agent that solves the question in text, alone."""
    graph = Relay().graph(service, "single", **options).compile()
    return Score.of("single agent", "text", *answer_all(graph, problems))


def main(
    n: Annotated[int, typer.Option("--n", help="Held-out problems.")] = 100,
    repeats: int = 3,
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    steps: Annotated[int, typer.Option(help="Latent steps of each thinker.")] = STEPS,
    seed: int = 0,
    max_tokens: int = 256,
    device: str | None = None,
    threads: Annotated[int | None, typer.Option(help="Of torch, at most; by default as many as it chooses.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Both teams as text, latent, and with the judger's edge cut, and a single agent, on the same problems."""
    prepare(threads)
    problems = held_out(n, seed)
    with LocalService.load(model, device=device) as service:
        loaded, settings = service.model, service.settings
    about = machine(loaded.device)
    team: dict[str, Any] = {"steps": steps, "max_tokens": max_tokens}

    def cell(arrangement: str, mode: str) -> Callable[[LatentService], Score]:
        return lambda service: run(service, arrangement, mode, problems, **team)[0]

    cells = [cell(arrangement, mode) for arrangement in TEAMS for mode in MODES]
    cells.append(lambda service: single(service, problems, max_tokens=max_tokens))
    once(loaded, settings, lambda service: run(service, "sequential", "latent", held_out(8, seed + 1), **team)[0])
    # A B A B: whatever else the machine does meets text and latent alike.
    rounds = [
        [once(loaded, settings, one) for one in cells]
        for _ in track(range(repeats), "measuring", transient=True, disable=as_json)
    ]
    measured = list(zip(*rounds, strict=True))
    by = {(scores[0].arrangement, scores[0].mode): scores for scores in measured}
    against = {
        arrangement: {
            "output_tokens": ratios(*([s.output_tokens for s in by[arrangement, mode]] for mode in ("text", "latent"))),
            "seconds": ratios(*([s.seconds for s in by[arrangement, mode]] for mode in ("text", "latent"))),
        }
        for arrangement in TEAMS
    }
    show(
        {
            "machine": about,
            "model": f"{model} ({loaded.fingerprint}), {loaded.dtype}",
            "questions": f"{n} held-out word problems, seed {seed}, all at once; greedy",
            "agents": f"{steps} latent steps a thinker, at most {max_tokens} tokens a speaker",
            "repeats": repeats,
        },
        table(measured, against),
        "[dim]Seconds: wall clock for all questions together, median (min..max) of the repeats. Right: 95 % Wilson "
        "interval over the questions. Edge cut: the judger reads none of the thinkers, and guesses.[/]",
        as_json=as_json,
        results={
            "rows": [
                {
                    **asdict(scores[0]),
                    "right": [score.right for score in scores],
                    "right_interval": [100 * end for end in wilson(scores[0].right, n)],
                    "output_tokens": Spread.of(s.output_tokens for s in scores),
                    "seconds": Spread.of(s.seconds for s in scores),
                }
                for scores in measured
            ],
            "text_over_latent": against,
        },
    )


def once(model: LanguageModel, settings: LocalSettings, measure: Callable[[LatentService], Score]) -> Score:
    """One measurement on a service of its own: one that has thought a thought before returns it without work."""
    with LocalService(model, settings) as service:
        return measure(service)


def table(measured: list[tuple[Score, ...]], against: dict[str, dict[str, Spread]]) -> Table:
    shown = Table(box=None, padding=(0, 2), header_style="dim")
    shown.add_column()
    for name in ("right", "output tokens\nper question", "latent steps\nper question", "seconds"):
        shown.add_column(name, justify="right")
    for arrangement in dict.fromkeys(scores[0].arrangement for scores in measured):
        shown.add_row(f"[bold]{arrangement}[/]")
        for scores in measured:
            first = scores[0]
            if first.arrangement != arrangement:
                continue
            # Greedy answers differ between repeats only where rounding does.
            right = Spread.of(100 * score.right / score.questions for score in scores)
            low, high = wilson(first.right, first.questions)
            shown.add_row(
                f"  {NAMES[first.mode]}",
                f"{right.show(0, ' %')} [dim]{100 * low:.0f} to {100 * high:.0f}[/]",
                Spread.of(score.output_tokens for score in scores).show(1),
                f"{first.latent_steps:.0f}" + (" [dim](none read)[/]" if first.mode == "cut" else ""),
                Spread.of(score.seconds for score in scores).show(),
            )
        if arrangement in against:
            tokens, seconds = against[arrangement]["output_tokens"], against[arrangement]["seconds"]
            shown.add_row("  [bold green]text / latent[/]", "", tokens.show(1, "×"), "", seconds.show(2, "×"))
    return shown


if __name__ == "__main__":
    typer.run(main)
