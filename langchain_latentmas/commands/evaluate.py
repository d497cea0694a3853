"""`latentmas eval`: a task under several modes and arrangements, with what the paper reports beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .folder import ANSWERS, run_bars, run_folder
from .options import AsJson, Model, Options
from .session import describe, load, loading, print_json, reported, settled
from .terminal import headline, open_console, tone

if TYPE_CHECKING:
    from ..evaluation.run import Row, Summary

RESULT = "summary.json"


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
    option: Options = None,
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
            loaded = load(model, option)
        with loaded as service, settled():
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
            settings = [evaluation.settings, evaluation.cells]
            with run_folder(out, "eval", asked.name, settings, RESULT, _errors) as folder:
                with run_bars(show=not as_json) as bars:
                    summary = evaluation.run(
                        folder / ANSWERS,
                        lambda mode, arrangement, *done: bars(_name(mode, arrangement), *done),
                    )
                about = describe(service, model)
                document = {"model": about, **summary.as_json()}
                (folder / RESULT).write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
        if as_json:
            print_json(**document)
        else:
            open_console().print(picture(summary, about))


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _errors(document: dict[str, Any]) -> Iterator[str]:
    return (name for row in document["rows"] for name in row["failed"])


def _name(mode: str, arrangement: str) -> str:
    return "single agent" if mode == "single" else f"{arrangement}, {mode}"


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
        for name in ("paper:\nright", "output\ntokens", "seconds\nof all"):
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
                style=f"bold {tone(comparison.low, comparison.high)}",
            )
            table.add_row(
                "  text / latent",
                "",
                "",
                _times(comparison.output_tokens),
                "",
                _times(comparison.seconds),
                style="bold",
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
            named = ", ".join(f"{count} × {name}" for name, count in row.failed.items())
            what = f"Failed and counted as wrong, in the differences too: {row.mode}, {row.arrangement}: {named}."
            yield Text(what, style="yellow")
    yield Text(
        "Tokens and steps are per question, by all agents; seconds are wall clock for all questions together, which "
        "share the ticks of one model service, loading and grading not included. Intervals: Wilson for a share, paired "
        "bootstrap over the questions for a difference.",
        style="dim",
    )
    if any(row.published for row in summary.rows):
        yield Text("The paper's seconds are for all questions of the benchmark, on the authors' machine.", style="dim")
    if len(summary.sessions) > 1:
        yield Text(
            f"The run took {len(summary.sessions)} sessions; its seconds are those of all of them, from one answer to "
            "the next. What was at work when a session ended was asked again and counts once more.",
            style="dim",
        )
    if not summary.on_one_machine:
        yield Text("Its sessions ran on different machines, so that seconds are not compared.", style="yellow")
    last = summary.sessions[-1]
    if last.get("sandbox_missing"):
        yield Text(
            f"The sandbox could not guarantee here: {'; '.join(last['sandbox_missing'])}. Run it in a container.",
            style="yellow",
        )
    packages = ", ".join(f"{name} {version}" for name, version in last["packages"].items())
    yield Text(f"{last['processor']}, {last['cores']} cores, Python {last['python']}, {packages}.", style="dim")
    yield Text(f"Every answer: {summary.answers}", style="dim", no_wrap=True, overflow="fold")
