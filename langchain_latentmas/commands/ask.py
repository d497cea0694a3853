"""`latentmas ask`: a team of agents on one question."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from ..bundled import STEPS
from ..errors import InvalidRequest
from .options import AsJson, MaxTokens, Model, Options, Steps
from .session import describe, load, loading, print_json, reported, team
from .terminal import headline, lens_strip, open_console, open_grid, printable

if TYPE_CHECKING:
    from ..service import LatentService


def ask(
    question: Annotated[str, typer.Argument(help="What the agents are to answer.")],
    model: Model = "bundled",
    arrangement: Annotated[
        Literal["sequential", "hierarchical"], typer.Option(help="Experts one after the other, or in parallel.")
    ] = "sequential",
    steps: Steps = STEPS,
    edges: Annotated[Literal["latent", "text"], typer.Option(help="What the agents pass on.")] = "latent",
    max_tokens: MaxTokens = 256,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """A team of agents on your own question."""
    with reported(as_json):
        if not question.strip():
            raise InvalidRequest("The question is empty; ask something.")
        with loading(show=not as_json):
            from langchain_core.messages import HumanMessage

            from .. import demo as shown

            loaded = load(model, option)
        with loaded as service:
            builder = team(service, model, arrangement, steps=steps, max_tokens=max_tokens)
            console, about = open_console(), describe(service, model)
            if not as_json:
                console.print(headline("ask", about, f"{arrangement}, {edges} edges"))
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
                print_json(
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
                    console.print(Text(printable(chunk.text)), end="", soft_wrap=True)
            elif kind == "updates":
                begun = time.perf_counter()
                for agent, update in event.items():
                    if agent in tasks:
                        progress.update(tasks[agent], visible=False)
                        grid = open_grid(10)
                        grid.add_row(agent, _content_of(service, update))
                        console.print(grid)
                reading += time.perf_counter() - begun
    if speaking and console is not None:
        console.print()
    return state, reading


def _content_of(service: "LatentService", update: dict[str, Any]) -> Text:
    """What a thinker or a speaker hands on, as people can read it."""
    if "messages" in update:
        return Text(printable(update["messages"][-1].text))
    rows = service.lens(update["latents"][-1], 1)
    return (
        lens_strip([row.tokens for row in rows])
        if rows
        else Text("no latent steps: its prompt's KV alone", style="dim")
    )
