"""`latentmas lens`: what agents think on the way to an answer, step by step."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from ..bundled import STEPS
from ..errors import InvalidRequest
from ..evaluation.files import check_file
from .options import AsJson, MaxTokens, Model, Options, Steps
from .session import describe, load, loading, print_json, reported, team
from .terminal import headline, legend, open_console, percent, printable, shade, token_text

if TYPE_CHECKING:
    from ..service.base import LensRow

LEAST = 0.005  # what would show as 0 %


def lens(
    question: Annotated[str, typer.Argument(help="What the agents are to answer.")],
    model: Model = "bundled",
    arrangement: Annotated[
        Literal["sequential", "hierarchical"], typer.Option(help="Experts one after the other, or in parallel.")
    ] = "sequential",
    steps: Steps = STEPS,
    top_k: Annotated[int, typer.Option(help="Tokens per step.")] = 3,
    max_tokens: MaxTokens = 256,
    option: Options = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page that needs nothing else.")] = None,
    as_json: AsJson = False,
) -> None:
    """A team's thoughts as a table: a row for each latent step, a column for each agent."""
    with reported(as_json):
        if not question.strip():
            raise InvalidRequest("The question is empty; ask something.")
        if html is not None:
            check_file(html)
        with loading(show=not as_json):
            from langchain_core.messages import HumanMessage

            from ..evaluation.lens_page import lens_page

            service = load(model, option)
        with service:
            graph = team(service, model, arrangement, steps=steps, max_tokens=max_tokens).compile()
            state = graph.invoke({"messages": [HumanMessage(question)], "latents": []})
            said = state["messages"][-1]
            spoken = said.response_metadata["latent_ref"]["id"]
            lenses = {ref["agent"]: service.lens(ref, top_k) for ref in state["latents"] if ref["id"] != spoken}
            about = describe(service, model)
        thoughts = {agent: [row.tokens for row in rows] for agent, rows in lenses.items()}
        rest = f"{arrangement}, {steps} latent steps a thinker"
        if html is not None:
            page = lens_page(question, thoughts, said.text, about=f"{about['name']} model, {rest}")
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(page, encoding="utf-8")
        if as_json:
            print_json(model=about, question=question, arrangement=arrangement, agents=thoughts, answer=said.text)
            return
        console = open_console()
        console.print(headline("lens", about, rest), Text(), Text(printable(question)), Text(), sep="\n")
        console.print(_table(lenses))
        console.print(Text.assemble(("\nanswer  ", "dim"), printable(said.text)))
        console.print(Text(), legend(), sep="\n")


def _table(lenses: "Mapping[str, Sequence[LensRow]]") -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("step", justify="right", style="dim")
    for agent in lenses:
        table.add_column(agent, no_wrap=True)
    depth = max(map(len, lenses.values()), default=0)
    lines = [[_cell(rows[i]) if i < len(rows) else Text() for rows in lenses.values()] for i in range(depth)]
    # Steps that say the same, most of all those after the end of a thought, are one line.
    for _, group in groupby(enumerate(lines, 1), key=lambda line: [cell.plain for cell in line[1]]):
        (first, cells), *more = group
        table.add_row(f"{first} to {more[-1][0]}" if more else str(first), *cells)
    return table


def _cell(row: "LensRow") -> Text:
    cell = Text()
    for rank, (token, share) in enumerate(row.tokens):
        if rank and share < LEAST:
            break
        shown = token_text(token)
        cell.append(f" {shown} " if rank == 0 else f" {shown}", shade(share) if rank == 0 else "dim")
        cell.append(f" {percent(share)}", "dim")
    return cell
