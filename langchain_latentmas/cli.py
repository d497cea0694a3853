"""The command line: `latentmas demo` and `latentmas ask`."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .errors import InvalidRequest, LatentMASError

if TYPE_CHECKING:
    # torch and transformers take seconds to import, and `latentmas --help` needs neither.
    from .demo import Score, Transcript, Turn
    from .service import LatentService

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

Model = Annotated[str, typer.Option(envvar="LATENTMAS_SERVICE", help="'bundled', a hub id, or a folder.")]
Steps = Annotated[int, typer.Option(help="Latent steps of each thinker.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens that one agent decodes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

WIDTH = 100  # of the picture, and the most that is used of a terminal
SHADES = (
    (0.9, "#06231a on #4cbb8a"),
    (0.6, "#e3fff4 on #277a5a"),
    (0.3, "#cfe3da on #2f4f44"),
    (0.0, "#b4b4b4 on #3c3c3c"),
)
MODES = {"text": "text", "latent": "latent", "cut": "edge cut"}


@app.callback()
def main() -> None:
    """LangGraph agents that pass latent memory instead of text."""


@app.command()
def demo(
    n: Annotated[int, typer.Option("--n", help="Held-out word problems.")] = 16,
    model: Model = "bundled",
    steps: Steps = 24,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    max_tokens: MaxTokens = 256,
    as_json: AsJson = False,
    svg: Annotated[Path | None, typer.Option(help="Also write the picture to this file.")] = None,
) -> None:
    """Two teams of agents on the same problems: first as text, then with latent edges."""
    with _reported(as_json):
        with _loading(show=not as_json):
            from . import demo as shown

            problems = shown.held_out(n, seed)
            loaded = _load(model)
        options: dict[str, Any] = {"steps": steps, "max_tokens": max_tokens}
        if model != "bundled":
            options["judger"] = shown.BOXED
        with loaded as service:
            # One other problem first, so that nobody's seconds include what is done once in a process.
            shown.run(service, "sequential", "latent", shown.held_out(1, seed + 1), **options)
            runs = []
            with _bars(service, show=not as_json) as bars:
                for arrangement in shown.ARRANGEMENTS:
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
            about = _about(service, model)
        ratios = shown.ratios(scores)
        if as_json:
            _print_json(
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
            _headline("demo", about, f"{n} held-out word problems, {steps} latent steps a thinker"),
            *_example(problems[0].question, problems[0].answer, example),
            Rule("text against latent edges", style="dim"),
            _table(scores, ratios),
            Text(),
            _footnote(n),
        )
        if not as_json:
            _console().print(picture)
        if svg is not None:
            _write_svg(picture, svg)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What the agents are to answer.")],
    model: Model = "bundled",
    arrangement: Annotated[
        Literal["sequential", "hierarchical"], typer.Option(help="Experts one after the other, or in parallel.")
    ] = "sequential",
    steps: Steps = 24,
    edges: Annotated[Literal["latent", "text"], typer.Option(help="What the agents pass on.")] = "latent",
    max_tokens: MaxTokens = 256,
    as_json: AsJson = False,
) -> None:
    """A team of agents on your own question."""
    with _reported(as_json):
        if not question.strip():
            raise InvalidRequest("The question is empty; ask something.")
        with _loading(show=not as_json):
            from langchain_core.messages import HumanMessage

            from . import demo as shown

            loaded = _load(model)
        with loaded as service:
            # The bundled judger was trained to know the question from the others alone.
            builder = shown.ARRANGEMENTS[arrangement](
                service, steps=steps, max_tokens=max_tokens, relay=model == "bundled"
            )
            console, about = _console(), _about(service, model)
            if not as_json:
                console.print(_headline("ask", about, f"{arrangement}, {edges} edges"))
                if model == "bundled":
                    console.print(
                        Text(
                            "The bundled model was trained on arithmetic word problems with values up to 99 only.",
                            style="dim",
                        )
                    )
                console.print()
            begun = time.perf_counter()
            state, reading = _follow(
                builder.compile().stream(
                    {"messages": [HumanMessage(question)], "latents": []},
                    {"configurable": {"edges": edges}},
                    stream_mode=["custom", "messages", "updates", "values"],
                ),
                service,
                [name for name in builder.nodes if name != "judger"],
                None if as_json else console,
                steps,
            )
            seconds = time.perf_counter() - begun - reading
            cost = shown.cost(state)
            if as_json:
                _print_json(
                    model=about,
                    question=question,
                    arrangement=arrangement,
                    edges=edges,
                    answer=state["messages"][-1].text,
                    agents=[asdict(turn) for turn in shown.turns(service, state)],
                    **cost._asdict(),
                    seconds=seconds,
                )
            else:
                line = f"{cost.output_tokens} tokens decoded, {cost.latent_steps} latent steps, {seconds:.2f} s"
                console.print(Text(f"\n{line}", style="dim"))


def _follow(
    events: Iterator[Any], service: "LatentService", thinkers: Sequence[str], console: Console | None, steps: int
) -> tuple[dict[str, Any], float]:
    """Shows a graph at work, if there is a console.

    Returns:
        The graph's last state, and the seconds that went into reading thoughts out.
    """
    columns = TextColumn("{task.description:<10}"), BarColumn(24), TextColumn("{task.fields[count]}", style="dim")
    state: dict[str, Any] = {}
    reading, speaking = 0.0, False
    with Progress(
        *columns, console=console, transient=True, disable=console is None or not console.is_terminal
    ) as progress:
        tasks = {name: progress.add_task(name, total=None, visible=False, count="") for name in thinkers}
        for kind, event in events:
            if kind == "values":
                state = event
            elif console is None:
                continue
            elif kind == "custom":
                step = event["step"]
                progress.update(
                    tasks[event["agent"]], total=steps, completed=step, visible=True, count=f"{step} latent steps"
                )
            elif kind == "messages":
                chunk, agent = event[0], event[1]["langgraph_node"]
                if agent in tasks:
                    progress.update(tasks[agent], advance=1, visible=True)
                    spoken = progress.tasks[tasks[agent]].completed
                    progress.update(tasks[agent], count=f"{spoken:.0f} tokens")
                elif chunk.text:
                    if not speaking:
                        progress.stop()
                        console.print(f"[bold]{agent:<10}[/]", end=" ")
                        speaking = True
                    console.print(Text(_printable(chunk.text)), end="", soft_wrap=True)
            elif kind == "updates":
                begun = time.perf_counter()
                for agent, update in event.items():
                    if agent in tasks:
                        progress.update(tasks[agent], visible=False)
                        grid = _grid(10)
                        grid.add_row(agent, _content_of(service, update))
                        console.print(grid)
                reading += time.perf_counter() - begun
    if speaking and console is not None:
        console.print()
    return state, reading


def _content_of(service: "LatentService", update: dict[str, Any]) -> Text:
    """What a thinker or a speaker hands on, as people can read it."""
    if "messages" in update:
        return Text(_printable(update["messages"][-1].text))
    rows = service.lens(update["latents"][-1], 1)
    return _strip([row.tokens for row in rows]) if rows else Text("no latent steps: its prompt's KV alone", style="dim")


@contextmanager
def _loading(show: bool) -> Iterator[None]:
    """A sign of life on stderr, since importing torch and transformers takes seconds by itself."""
    if not show:
        yield
        return
    with Console(stderr=True).status("loading the model"):
        yield


def _load(model: str) -> "LatentService":
    import torch
    from transformers.utils import logging as transformers_logging

    from .service import LatentService
    from .service.shared import SharedSettings

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    own = logging.getLogger(__package__)
    if not any(isinstance(handler, _OneLine) for handler in own.handlers):
        own.addHandler(_OneLine())
    if model == "bundled":
        torch.set_num_threads(1)  # its matrices are so small that sharing them out costs more than it brings
    # A durable store would answer with thoughts of earlier runs, in no time at all.
    settings = SharedSettings()
    return LatentService.load(model, device=settings.device, dtype=settings.dtype)


class _OneLine(logging.Handler):
    """Warnings as single lines; what belongs to an error is in the error's message."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            Console(stderr=True).print(Text(_printable(record.getMessage()), style="yellow"), soft_wrap=True)


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """Turns errors that a user can meet into one line and exit code 2."""
    try:
        yield
    except LatentMASError as error:
        if as_json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}, ensure_ascii=False))
        else:
            Console(stderr=True, highlight=False).print(
                f"[bold red]{type(error).__name__}:[/] [red]{escape(_printable(str(error)))}[/]", soft_wrap=True
            )
        raise typer.Exit(2) from None


@contextmanager
def _bars(service: "LatentService", show: bool) -> "Iterator[Callable[[str, int], Callable[[], None]]]":
    """Progress on stderr; what it yields opens the next bar and returns what moves it."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(28),
        MofNCompleteColumn(),
        TextColumn("agents", style="dim"),
        TimeElapsedColumn(),
        _Work(service),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:

        def bar(name: str, total: int) -> Callable[[], None]:
            at = service.info()
            task = progress.add_task(name, total=total, thoughts=at.get("thoughts", 0), tokens=at.get("tokens", 0))
            return lambda: progress.advance(task)

        yield bar


class _Work(ProgressColumn):
    """Thoughts and tokens since a bar was opened."""

    def __init__(self, service: "LatentService") -> None:
        super().__init__()
        self.service = service

    def render(self, task: Task) -> Text:
        if task.finished:  # the counters go on with the next bar
            return Text(task.fields.get("seen", ""), style="dim")
        now = self.service.info()
        parts = [
            f"{now[name] - task.fields[name]:,} {what}"
            for name, what in (("thoughts", "latent steps"), ("tokens", "tokens"))
            if now.get(name, 0) > task.fields[name]
        ]
        task.fields["seen"] = ", ".join(parts)
        return Text(task.fields["seen"], style="dim")


def _about(service: "LatentService", model: str) -> dict[str, Any]:
    info = service.info()
    kept = ("architecture", "parameters", "device", "dtype", "fingerprint")
    return {"name": "bundled" if model == "bundled" else info["model"], **{k: info[k] for k in kept if k in info}}


def _headline(command: str, about: dict[str, Any], rest: str) -> Text:
    size = f"{about['parameters'] / 1e6:,.1f} M parameters" if "parameters" in about else ""
    where = " on ".join(about[name] for name in ("dtype", "device") if name in about)
    parts = " · ".join(filter(None, [f"{about['name']} model", size, where]))
    return Text.assemble((f"latentmas {command}", "bold"), "  ", (f"{parts}\n{rest}", "dim"))


def _example(question: str, answer: int, transcripts: "Sequence[Transcript]") -> Iterator[RenderableType]:
    yield Text()
    yield Rule("the first question", style="dim")
    yield Text(question)
    yield Text(f"The right answer is {answer}. A judger never sees the question; it reads what the others did.", "dim")
    for arrangement, group in groupby(transcripts, key=lambda transcript: transcript.arrangement):
        grid = _grid(9, 10)
        for transcript in group:
            # A cut edge leaves the thoughts as they were.
            shown = transcript.turns[-1:] if transcript.mode == "cut" else transcript.turns
            for turn in shown:
                content = _strip(turn.lens) if turn.text is None else _one_line(turn.text)
                if turn is shown[-1]:
                    content.append("  right" if transcript.right else "  wrong", "green" if transcript.right else "red")
                grid.add_row(MODES[transcript.mode] if turn is shown[0] else "", turn.agent, content)
        yield Text()
        yield Text(arrangement, style="bold")
        yield grid
    yield Text()
    yield _top3(next(t for t in transcripts if t.mode == "latent").turns[0])
    yield Text()


def _grid(*widths: int) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    for width in widths:
        grid.add_column(width=width, style="dim" if width is not widths[-1] else None, no_wrap=True)
    grid.add_column(ratio=1)
    return grid


def _strip(lens: "Sequence[Sequence[tuple[str, float]]]") -> Text:
    """The likeliest token of each latent step, its probability as colour; long runs of one token are counted."""
    strip = Text()
    for token, group in groupby((tokens[0] for tokens in lens), key=lambda top: _token(top[0])):
        shares = [share for _, share in group]
        if len(shares) > 3:
            strip.append(f" {token} ×{len(shares)} ", _shade(sum(shares) / len(shares)))
        else:
            for share in shares:
                strip.append(f" {token} ", _shade(share))
    return strip


def _shade(share: float) -> str:
    return next(style for least, style in SHADES if share >= least)


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
        cells = [Text.assemble(f"{_token(tokens[rank][0])} ", (_percent(tokens[rank][1]), "dim")) for tokens in steps]
        table.add_row("", ("likeliest", "second", "third")[rank], *cells)
    legend = Text.assemble(("A cell is the token one latent step would have written; its probability: ", "dim"))
    for least, style in SHADES:
        legend.append(f" ≥ {_percent(least)} " if least else " less ", style)
    return Group(legend, table)


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


def _token(token: str) -> str:
    """A token on one line and without its blanks; the one that ends a text is an end mark."""
    if token in ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>"):
        return "∎"
    shown = _printable(token.replace("\n", "⏎").replace("\t", "⇥"))
    return shown.strip() or "␣"


def _printable(text: str) -> str:
    """A model's text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _one_line(text: str) -> Text:
    return Text(_printable(text).replace("\n", "⏎"), no_wrap=True, overflow="ellipsis")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _console() -> Console:
    console = Console(highlight=False)
    piped = not console.is_terminal and "COLUMNS" not in os.environ
    console.width = WIDTH if piped else min(console.width, WIDTH)
    return console


def _print_json(**document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=2))


def _write_svg(picture: RenderableType, path: Path) -> None:
    console = Console(
        record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    console.print(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(path), title="latentmas demo")


if __name__ == "__main__":
    app()
