"""`latentmas eval`: a task under several modes and arrangements, with what the paper reports beside it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import InvalidRequest
from .options import AsJson, Model
from .session import describe, load, loading, print_json, reported
from .terminal import headline, open_console

if TYPE_CHECKING:
    from ..evaluation.run import Evaluation, Row, Summary


def evaluate(
    task: Annotated[
        str,
        typer.Option(
            help="words, relay, split; gsm8k, aime24, aime25, gpqa-diamond, arc-easy, arc-challenge, mbpp+, "
            "humaneval+, medqa; or a path that ends in .jsonl."
        ),
    ] = "words",
    n: Annotated[int | None, typer.Option("--n", help="Questions; by default 100, or all of a benchmark.")] = None,
    model: Model = "bundled",
    modes: Annotated[str, typer.Option(help="Of single, text and latent, with commas.")] = "single,text,latent",
    arrangements: Annotated[
        str, typer.Option(help="Of sequential and hierarchical, with commas.")
    ] = "sequential,hierarchical",
    steps: Annotated[int | None, typer.Option(help="Latent steps of each thinker; by default the task's.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens that one agent decodes; by default the task's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which questions, and of sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 means greedy; the paper has 0.6.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; the paper has 0.95.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Questions at work at a time.")] = 64,
    grader: Annotated[str | None, typer.Option(help="For a .jsonl file: number, letter, code or exact.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for answers.jsonl and summary.json; a run that is there already goes on."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Single agent, team over text, team over latent edges: accuracy and cost on a task.

    Every answer is written down as it comes: the same command goes on where an interrupted one stopped.
    """
    with reported(as_json):
        with loading(show=not as_json):
            from ..evaluation.benchmarks import task_named
            from ..evaluation.run import Evaluation

            asked = task_named(task, grader)
            asked.questions(n, seed)  # a data set that is not there is found before the model is loaded
            loaded = load(model)
        with loaded as service:
            evaluation = Evaluation(
                service,
                asked,
                modes=_listed(modes),
                arrangements=_listed(arrangements),
                n=n,
                seed=seed,
                steps=steps,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                batch=batch,
            )
            summary = _measure(evaluation, out, show=not as_json)
            about = describe(service, model)
        if as_json:
            print_json(model=about, **summary.as_json())
        else:
            open_console().print(picture(summary, about))


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _measure(evaluation: "Evaluation", out: Path | None, show: bool) -> "Summary":
    """Runs the evaluation in its folder, with a bar per mode and arrangement."""
    with _claimed(out or _default_folder(evaluation), named=out is not None) as folder:
        answers = folder / "answers.jsonl"
        try:
            with _progress(show) as on_answer:
                summary = evaluation.run(answers, on_answer)
            if out is None:
                # Nobody asked for this folder: it is there for interrupted runs, and the next one measures anew.
                summary = replace(summary, answers=str(answers.replace(folder / "answers-last.jsonl")))
            (folder / "summary.json").write_text(json.dumps(summary.as_json(), indent=2, ensure_ascii=False))
        except KeyboardInterrupt:
            Console(stderr=True).print(f"Interrupted; the same command goes on from {answers}.", markup=False)
            raise typer.Exit(130) from None
        except OSError as error:
            raise InvalidRequest(f"{answers} cannot be written ({error}); see to it, and call again.") from error
    return summary


def _default_folder(evaluation: "Evaluation") -> Path:
    """In the cache, by task and settings."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    settings = json.dumps([evaluation.settings, evaluation.cells], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return cache / "latentmas" / "eval" / f"{evaluation.task.name}-{digest}"


@contextmanager
def _claimed(folder: Path, named: bool) -> Iterator[Path]:
    """The folder, for this process alone; another one beside it, where that is taken and nobody named it."""
    from filelock import FileLock, Timeout

    for i in count(2):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire(blocking=False)
            break
        except OSError as error:
            if not isinstance(error, Timeout):
                raise InvalidRequest(
                    f"{folder} cannot be written ({error}); name another folder with --out."
                ) from error
            if named:
                raise InvalidRequest(f"Another run is at work in {folder}; name another folder with --out.") from error
            folder = folder.with_name(f"{folder.name.removesuffix(f'_{i - 1}')}_{i}")
    try:
        yield folder
    finally:
        lock.release()


@contextmanager
def _progress(show: bool) -> "Iterator[Callable[[str, str, int, int], None]]":
    """One bar on stderr per mode and arrangement."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        bars: dict[tuple[str, str], TaskID] = {}

        def on_answer(mode: str, arrangement: str, done: int, total: int) -> None:
            cell = mode, arrangement
            if cell not in bars:
                name = "single agent" if mode == "single" else f"{arrangement}, {mode}"
                note = f"{done} from before" if done else ""
                bars[cell] = progress.add_task(name, total=total, note=note)
            progress.update(bars[cell], completed=done)

        yield on_answer


def picture(summary: "Summary", about: dict[str, Any]) -> RenderableType:
    """The closing table, with everything it takes to repeat it."""
    settings = summary.settings
    sampling = (
        "greedy"
        if settings["temperature"] == 0
        else f"temperature {settings['temperature']}, top-p {settings['top_p']}"
    )
    rest = (
        f"{summary.task}, {summary.n} questions, seed {settings['seed']}; {settings['steps']} latent steps a thinker, "
        f"at most {settings['max_tokens']} tokens a speaker, {sampling}, {settings['batch']} questions at a time"
    )
    return Group(headline("eval", about, rest), Text(), _table(summary), Text(), *_notes(summary))


def _table(summary: "Summary") -> Table:
    compared = any(row.published for row in summary.rows)
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=False)
    table.add_column()
    for name in ("right", "95 %", "output\ntokens", "latent\nsteps", "seconds"):
        table.add_column(name, justify="right")
    if compared:
        for name in ("paper:\nright", "output\ntokens", "seconds"):
            table.add_column(name, justify="right", style="dim")
    for arrangement in dict.fromkeys(row.arrangement for row in summary.rows):
        if arrangement != "single":
            table.add_row(Text(arrangement, style="bold"))
        for row in summary.rows:
            if row.arrangement == arrangement:
                table.add_row(*_cells(row, compared))
        if arrangement in summary.comparisons:
            comparison = summary.comparisons[arrangement]
            table.add_row(
                "  latent - text",
                f"{comparison.points:+.1f}",
                f"{comparison.low:+.1f} to {comparison.high:+.1f}",
                style="bold green",
            )
            table.add_row(
                "  text / latent",
                "",
                "",
                _times(comparison.output_tokens),
                "",
                _times(comparison.seconds),
                style="bold green",
            )
    return table


def _cells(row: "Row", compared: bool) -> list[str]:
    known = row.published
    return [
        "single agent" if row.mode == "single" else f"  {row.mode}",
        f"{row.accuracy:.1f} %",
        f"{row.low:.1f} to {row.high:.1f}",
        f"{row.output_tokens:,.1f}",
        f"{row.latent_steps:,.0f}",
        f"{row.seconds:,.2f}",
        *(
            [f"{known.accuracy:.1f} %", f"{known.output_tokens:,.0f}", f"{known.seconds:,.0f}"]
            if known
            else [""] * 3 * compared
        ),
    ]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}×"


def _notes(summary: "Summary") -> Iterator[RenderableType]:
    for row in summary.rows:
        if row.failed:
            named = ", ".join(f"{count} {name}" for name, count in row.failed.items())
            yield Text(f"Failed and counted as wrong: {row.mode}, {row.arrangement}: {named}.", style="yellow")
    yield Text(
        "Tokens and steps are per question, by all agents; seconds are wall clock for all questions together, which "
        "share the ticks of one model service, loading and grading not included. Intervals: Wilson for a share, paired "
        "bootstrap over the questions for a difference.",
        style="dim",
    )
    if any(row.published for row in summary.rows):
        yield Text("The paper's seconds were measured on the authors' machine.", style="dim")
    if len(summary.sessions) > 1:
        yield Text(
            f"The run took {len(summary.sessions)} sessions; its seconds are those of all of them, from one answer to "
            "the next. What was at work when a session ended was asked again and counts once more.",
            style="dim",
        )
    last = summary.sessions[-1]
    if last.get("sandbox_missing"):
        yield Text(
            f"The sandbox could not guarantee here: {'; '.join(last['sandbox_missing'])}. Run it in a container.",
            style="yellow",
        )
    packages = ", ".join(f"{name} {version}" for name, version in last["packages"].items())
    yield Text(f"{last['processor']}, {last['cores']} cores, Python {last['python']}, {packages}.", style="dim")
    yield Text(f"Every answer: {summary.answers}", style="dim", no_wrap=True, overflow="fold")
