"""`latentmas demo`: text edges against latent ones on the bundled model's word problems."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..bundled import STEPS
from ..evaluation.files import check_file
from .options import AsJson, MaxTokens, Model, Options, Steps
from .session import describe, load, loading, print_json, progress_bars, reported
from .terminal import (
    headline,
    legend,
    lens_strip,
    one_line,
    open_console,
    open_grid,
    percent,
    token_text,
    write_svg,
)

if TYPE_CHECKING:
    from ..demo import Score, Transcript, Turn

MODES = {"text": "text", "latent": "latent", "cut": "edge cut"}


def demo(
    n: Annotated[int, typer.Option("--n", help="Held-out word problems.")] = 16,
    model: Model = "bundled",
    steps: Steps = STEPS,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    max_tokens: MaxTokens = 256,
    option: Options = None,
    as_json: AsJson = False,
    svg: Annotated[Path | None, typer.Option(help="Also write the picture to this file.")] = None,
) -> None:
    """Two teams of agents on the same problems: first as text, then with latent edges."""
    with reported(as_json):
        if svg is not None:
            check_file(svg)
        with loading(show=not as_json):
            from .. import demo as shown

            problems = shown.held_out(n, seed)
            loaded = load(model, option)
        options: dict[str, Any] = {"steps": steps, "max_tokens": max_tokens}
        with loaded as service:
            # One other problem first, so that nobody's seconds include what is done once in a process.
            shown.run(service, "sequential", "latent", shown.held_out(1, seed + 1), **options)
            runs = []
            with progress_bars(service, show=not as_json) as bars:
                for arrangement in shown.TEAMS:
                    for mode in shown.MODES:
                        done = bars(f"{arrangement}, {MODES[mode]}", 4 * n)
                        runs.append(shown.run(service, arrangement, mode, problems, on_agent=done, **options))
            scores = [score for score, _ in runs]
            # The first question, whatever became of it.
            example = [
                shown.Transcript(
                    score.arrangement, score.mode, answers[0].right, shown.turns(service, answers[0].state)
                )
                for score, answers in runs
            ]
            about = describe(service, model)
        ratios = shown.ratios(scores)
        if as_json:
            print_json(
                model=about,
                questions=n,
                seed=seed,
                steps=steps,
                scores=[asdict(score) for score in scores],
                ratios=ratios,
                example={
                    "question": problems[0].question,
                    "answer": problems[0].answer,
                    "transcripts": [asdict(transcript) for transcript in example],
                },
            )
        picture = Group(
            headline("demo", about, f"{n} held-out word problems, {steps} latent steps a thinker"),
            *_example(problems[0].question, problems[0].answer, example),
            Rule("text against latent edges", style="dim"),
            _table(scores, ratios),
            Text(),
            _footnote(n),
        )
        if not as_json:
            open_console().print(picture)
        if svg is not None:
            write_svg(picture, svg, "latentmas demo")


def _example(question: str, answer: int, transcripts: "Sequence[Transcript]") -> Iterator[RenderableType]:
    yield Text()
    yield Rule("the first question", style="dim")
    yield Text(question)
    yield Text(f"The right answer is {answer}. A judger never sees the question; it reads what the others did.", "dim")
    for arrangement, group in groupby(transcripts, key=lambda transcript: transcript.arrangement):
        grid = open_grid(9, 10)
        for transcript in group:
            # A cut edge leaves the thoughts as they were.
            shown = transcript.turns[-1:] if transcript.mode == "cut" else transcript.turns
            for turn in shown:
                content = lens_strip(turn.lens) if turn.text is None else one_line(turn.text)
                if turn is shown[-1]:
                    content.append("  right" if transcript.right else "  wrong", "green" if transcript.right else "red")
                grid.add_row(MODES[transcript.mode] if turn is shown[0] else "", turn.agent, content)
        yield Text()
        yield Text(arrangement, style="bold")
        yield grid
    yield Text()
    yield _top3(next(t for t in transcripts if t.mode == "latent").turns[0])
    yield Text()


def _top3(turn: "Turn") -> RenderableType:
    """What else the first thoughts of a thinker could have been, and what the colours mean."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=9)
    table.add_column(width=10, style="dim", no_wrap=True)
    steps = turn.lens[:8]
    for _ in steps:
        table.add_column(ratio=1, no_wrap=True)
    table.add_row(
        Text("lens of", "dim"), f"{turn.agent}", *(Text(str(step), style="dim") for step in range(1, len(steps) + 1))
    )
    for rank in range(len(steps[0]) if steps else 0):
        cells = [
            Text.assemble(f"{token_text(tokens[rank][0])} ", (percent(tokens[rank][1]), "dim")) for tokens in steps
        ]
        table.add_row("", ("likeliest", "second", "third")[rank], *cells)
    return Group(legend(), table)


def _table(scores: "Sequence[Score]", ratios: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim", expand=False)
    table.add_column()
    for name in ("right", "output tokens\nper question", "latent steps\nper question", "seconds"):
        table.add_column(name, justify="right")
    for arrangement, group in groupby(scores, key=lambda score: score.arrangement):
        table.add_row(Text(arrangement, style="bold"))
        for score in group:
            cut = score.mode == "cut"
            table.add_row(
                f"  {MODES[score.mode]}",
                f"{score.right} of {score.questions}",
                f"{score.output_tokens:.1f}",
                f"{score.latent_steps_read if cut else score.latent_steps:.0f}",
                "" if cut else f"{score.seconds:.2f}",
                style="dim" if cut else None,
            )
        ratio = ratios[arrangement]
        table.add_row(
            "  text / latent", "", f"{ratio['output_tokens']:.1f}×", "", f"{ratio['seconds']:.1f}×", style="bold green"
        )
    return table


def _footnote(n: int) -> Text:
    return Text(
        f"Seconds are for all {n} questions together, which share the ticks of one model service. Edge cut: the same "
        "thinkers, but the judger reads none of them, so that this is what it gets right by guessing.",
        style="dim",
    )
