"""What a terminal shows: sizes and colours, thoughts as strips of tokens, pictures."""

import os
from collections.abc import Sequence
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 100  # of the picture, and the most that is used of a terminal
SHADES = (
    (0.9, "#06231a on #4cbb8a"),
    (0.6, "#e3fff4 on #277a5a"),
    (0.3, "#cfe3da on #2f4f44"),
    (0.0, "#b4b4b4 on #3c3c3c"),
)


def open_console() -> Console:
    """Stdout, no wider than the pictures."""
    console = Console(highlight=False)
    piped = not console.is_terminal and "COLUMNS" not in os.environ
    console.width = WIDTH if piped else min(console.width, WIDTH)
    return console


def headline(command: str, about: dict[str, Any], rest: str) -> Text:
    """The first lines of an output: the command, the model, and what else identifies the run."""
    size = f"{about['parameters'] / 1e6:,.1f} M parameters" if "parameters" in about else ""
    where = " on ".join(about[name] for name in ("dtype", "device") if name in about)
    parts = " · ".join(filter(None, [f"{about['name']} model", size, where]))
    return Text.assemble((f"latentmas {command}", "bold"), "  ", (f"{parts}\n{rest}", "dim"))


def tone(low: float, high: float) -> str:
    """The colour of a difference with its interval: of none where it may be 0."""
    return "green" if low > 0 else "red" if high < 0 else ""


def open_grid(*widths: int) -> Table:
    """A table without lines: dim columns of these widths, then one for the rest."""
    grid = Table.grid(padding=(0, 1), expand=True)
    for width in widths:
        grid.add_column(width=width, style="dim" if width is not widths[-1] else None, no_wrap=True)
    grid.add_column(ratio=1)
    return grid


def lens_strip(lens: "Sequence[Sequence[tuple[str, float]]]") -> Text:
    """The likeliest token of each latent step, its probability as colour; long runs of one token are counted."""
    strip = Text()
    for token, group in groupby((tokens[0] for tokens in lens), key=lambda top: token_text(top[0])):
        shares = [share for _, share in group]
        if len(shares) > 3:
            strip.append(f" {token} ×{len(shares)} ", shade(sum(shares) / len(shares)))
        else:
            for share in shares:
                strip.append(f" {token} ", shade(share))
    return strip


def legend() -> Text:
    """What a cell with a token and the colours of `shade` mean."""
    words = Text.assemble(("A cell is the token one latent step would have written; its probability: ", "dim"))
    for least, style in SHADES:
        words.append(f" ≥ {percent(least)} " if least else " less ", style)
    return words


def shade(share: float) -> str:
    """The colours of a probability."""
    return next(style for least, style in SHADES if share >= least)


def token_text(token: str) -> str:
    """A token on one line and without its blanks; the one that ends a text is an end mark."""
    if token in ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>"):
        return "∎"
    shown = printable(token.replace("\n", "⏎").replace("\t", "⇥"))
    return shown.strip() or "␣"


def printable(text: str) -> str:
    """A model's text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def one_line(text: str) -> Text:
    """Text on one line, cut where the line ends."""
    return Text(printable(text).replace("\n", "⏎"), no_wrap=True, overflow="ellipsis")


def percent(share: float) -> str:
    """A share as people write it."""
    return f"{100 * share:.0f}%"


def write_svg(picture: RenderableType, path: Path, title: str) -> None:
    """Writes a picture of a terminal."""
    console = Console(
        record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    console.print(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(path), title=title)
