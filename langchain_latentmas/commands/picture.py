"""`latentmas picture`: accuracy against steps, thoughts among tokens, text against latent."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..errors import InvalidRequest
from .options import AsJson, LocalModel, Model, Options
from .session import describe, load, loading, print_json, reported
from .terminal import headline, open_console

picture = typer.Typer(no_args_is_help=True, help="Pictures as .png or .svg files (extra viz).")

Out = Annotated[Path, typer.Argument(help="A .png or .svg file.")]
Task = Annotated[str, typer.Option(help="words, relay, split, a benchmark, or a path that ends in .jsonl.")]
Grader = Annotated[str | None, typer.Option(help="For a .jsonl file: number, letter, code or exact.")]
Seed = Annotated[int, typer.Option(min=0, help="Which questions.")]


@picture.command()
def steps(
    out: Out,
    task: Task = "relay",
    grader: Grader = None,
    n: Annotated[int | None, typer.Option("--n", help="Questions; by default as many as there are, up to 100.")] = None,
    model: Model = "bundled",
    at: Annotated[str, typer.Option(help="Latent steps of each thinker, with commas.")] = "0,4,8,12,16,20,24,32,48,80",
    arrangements: Annotated[str, typer.Option(help="Of sequential and hierarchical.")] = "sequential,hierarchical",
    text: Annotated[bool, typer.Option(help="Also what text reaches.")] = True,
    seed: Seed = 0,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Right answers against the latent steps of each thinker (the paper's figure 8)."""
    with reported(as_json):
        counts = _counts(at)
        teams = [name.strip() for name in arrangements.split(",")]
        with _ready(out, task, grader, n, 100, seed, model, option, as_json) as (asked, n, service):
            from ..evaluation.pictures import draw_steps
            from ..evaluation.run import Evaluation
            from ..evaluation.steps import curve

            levels: dict[str, float] = {}
            curves = {}
            with _bar(n * len(teams) * (len(counts) + text), not as_json) as advance:
                for team in teams:
                    curves[team] = curve(service, asked, team, counts, n=n, seed=seed, on_answer=advance)
                    if text:
                        said = Evaluation(service, asked, modes=["text"], arrangements=[team], n=n, seed=seed)
                        levels[f"{team}, text"] = said.run(on_answer=advance).rows[0].accuracy
            about = describe(service, model)
        draw_steps(curves, out, levels=levels, about=f"{task}, {about['name']} model, {n} questions")
        if as_json:
            points = {team: [point._asdict() for point in line] for team, line in curves.items()}
            print_json(model=about, task=task, n=n, seed=seed, curves=points, text=levels, picture=str(out))
            return
        table = Table("steps", *(f"{team}, %" for team in teams), box=None, padding=(0, 2), header_style="dim")
        for i, count in enumerate(counts):
            shown = (f"{p.accuracy:.1f} ({p.low:.0f} to {p.high:.0f})" for p in (curves[team][i] for team in teams))
            table.add_row(str(count), *shown)
        if text:
            table.add_row("text", *(f"{levels[f'{team}, text']:.1f}" for team in teams))
        _show(about, f"{task}, {n} questions, seed {seed}", table, out)


@picture.command()
def thoughts(
    out: Out,
    task: Task = "relay",
    grader: Grader = None,
    n: Annotated[int | None, typer.Option("--n", help="Questions; by default as many as there are, up to 40.")] = None,
    model: LocalModel = "bundled",
    arrangement: Annotated[Literal["sequential", "hierarchical"], typer.Option(help="Who works on it.")] = "sequential",
    steps: Annotated[int | None, typer.Option(help="Latent steps of each thinker.")] = None,
    seed: Seed = 0,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Thoughts among token embeddings, in two principal components (the paper's figure 5)."""
    with reported(as_json), _ready(out, task, grader, n, 40, seed, model, option, as_json) as (asked, n, service):
        from ..evaluation.cloud import Cloud
        from ..evaluation.pictures import draw_thoughts
        from ..service.local import LocalService

        if not isinstance(service, LocalService):
            raise InvalidRequest("Token embeddings are only at hand where the model runs in this process.")
        graph = asked.graph(service, arrangement, steps=steps).compile()
        inputs: Any = [asked.input(question) for question in asked.questions(n, seed)]
        segments: list[Any] = []
        for edges in ("latent", "text"):
            config: Any = {"configurable": {"edges": edges}, "max_concurrency": 64}
            for state in graph.batch(inputs, config):
                refs = state.get("latents") or []
                spoken = [message.response_metadata.get("latent_ref") for message in state["messages"]]
                tips = refs if edges == "latent" else [ref for ref in spoken if ref]
                segments += [service.memory(ref).segments[-1] for ref in tips]
        # What the last agent says is an answer and no thought: only what thinkers do is compared.
        thinkers = {segment.agent for segment in segments if len(segment.thoughts)}
        said = [token for segment in segments if segment.agent in thinkers for token in segment.spoken_ids]
        thought = [vector for segment in segments for vector in segment.thoughts.double().numpy()]
        every = range(service.model.config.vocab_size)
        embeddings = service.model.embedded(every).detach().double().cpu().numpy()
        import numpy as np

        cloud = Cloud.of(embeddings, said, np.stack(thought) if thought else np.zeros((0, embeddings.shape[1])), seed)
        about = describe(service, model)
        draw_thoughts(cloud, out, about=f"{task}, {arrangement}, {about['name']} model, {n} questions")
        figures = {
            "thoughts": len(cloud.thoughts),
            "spoken_tokens": len(cloud.spoken),
            "coverage": cloud.coverage,
            "overlap": cloud.overlap,
            "noise_coverage": cloud.noise_coverage,
            "noise_overlap": cloud.noise_overlap,
            "explained": cloud.explained,
        }
        if as_json:
            print_json(model=about, task=task, n=n, seed=seed, **figures, picture=str(out))
            return
        table = Table("", "thoughts", "noise of their length", box=None, padding=(0, 2), header_style="dim")
        table.add_row("coverage", f"{100 * cloud.coverage:.1f} %", f"{100 * cloud.noise_coverage:.1f} %")
        table.add_row("overlap", f"{100 * cloud.overlap:.1f} %", f"{100 * cloud.noise_overlap:.1f} %")
        rest = (
            f"{task}, {n} questions, {len(cloud.thoughts)} thoughts, {len(cloud.spoken)} distinct tokens said as text"
        )
        _show(about, rest, table, out)


@picture.command()
def bars(
    out: Out,
    summary: Annotated[Path, typer.Option(help="What `latentmas eval` wrote as summary.json, or printed with --json.")],
) -> None:
    """Output tokens and seconds, text against latent edges."""
    with reported(False):
        from ..evaluation.pictures import check_path, draw_bars

        check_path(out)
        try:
            document = json.loads(summary.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"The evaluation cannot be read: {error}") from error
        draw_bars(document, out)
        open_console().print(Text(f"The picture: {out}", "dim"))


def _counts(at: str) -> list[int]:
    try:
        counts = sorted({int(count) for count in at.split(",")})
    except ValueError as error:
        raise InvalidRequest(f"--at takes whole numbers with commas between them, not {at!r}.") from error
    if counts[0] < 0:
        raise InvalidRequest(f"Latent steps are 0 or more, not {counts[0]}.")
    return counts


@contextmanager
def _ready(
    out: Path,
    task: str,
    grader: str | None,
    n: int | None,
    most: int,
    seed: int,
    model: str,
    options: list[str] | None,
    as_json: bool,
) -> Iterator[tuple[Any, int, Any]]:
    """A task, the number of its questions (`n`, else all, up to `most`), and a service; sure that it can be drawn."""
    from ..evaluation.pictures import check_path

    check_path(out)
    with loading(show=not as_json):
        from ..evaluation.benchmarks import task_named

        asked = task_named(task, grader)
        # What is not there is found before the model is loaded.
        n = min(most, len(asked.questions())) if n is None else len(asked.questions(n, seed))
        service = load(model, options)
    with service:
        yield asked, n, service


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        task = progress.add_task("", total=total)

        def advance(mode: str, arrangement: str, done: int, total: int) -> None:
            if done:  # it is also called before the first answer
                progress.update(task, advance=1, description=f"{arrangement}, {mode}")

        yield advance


def _show(about: dict[str, Any], rest: str, table: Table, out: Path) -> None:
    console = open_console()
    console.print(headline("picture", about, rest), Text(), table, Text(), sep="\n")
    console.print(Text(f"The picture: {out}", "dim"))
