"""`latentmas bench`: how fast it thinks and speaks here, against the memory's speed and against transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..errors import InvalidRequest
from .options import AsJson
from .session import hush, loading, print_json, reported, settled
from .terminal import headline, open_console

if TYPE_CHECKING:
    from ..engine.model import LanguageModel

NOTICED = 0.02  # of the processors' time; less is the noise of any virtual machine
WHAT = {"think": ("Thinking", "thoughts / s"), "speak": ("Speaking", "tokens / s")}


def bench(
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model: its shape, with random weights; say Qwen3-4B.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; CUDA if there is one otherwise.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Name of a torch dtype; auto takes the checkpoint's, of a shape bfloat16 on CUDA.")
    ] = "auto",
    quantization: Annotated[str | None, typer.Option(help="int8 or fp8 weights (extra quant).")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Decode through torch.compile.")] = False,
    pack: Annotated[
        bool, typer.Option("--pack", help="Keep large matrices a second time, as a CPU reads them fastest.")
    ] = False,
    rows: Annotated[str, typer.Option(help="How many rows side by side.")] = "1 2 4 8 16 32 64",
    positions: Annotated[str, typer.Option(help="How long their memories are.")] = "256 2048 8192",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each loop.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch, at most; by default as many as torch chooses.")
    ] = None,
    graphs: Annotated[
        bool | None, typer.Option(help="Whole graphs too; by default for the bundled model and on CUDA.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Latent steps of a graph's three thinkers.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of its judger, and of each agent as text.")] = 256,
    questions: Annotated[
        str | None, typer.Option(help="How many questions at once are put to them; 1, and on CUDA 32 too.")
    ] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Questions at once, against one at a time.")] = 64,
    alone: Annotated[
        int | None, typer.Option(min=1, help="Questions one at a time; an eighth of those at once.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw ticks against rows, .svg or .png (extra viz).")] = None,
    as_json: AsJson = False,
) -> None:
    """Milliseconds per tick, thoughts and tokens per second, GB/s, and how far from what the memory allows.

    In turns with a plain transformers loop over the whole model and with generate, on the same work.
    """
    with reported(as_json):
        counts, lengths = _numbers("--rows", rows), _numbers("--positions", positions)
        asked = None if questions is None else _numbers("--questions", questions)
        if svg is not None:
            from ..evaluation.pictures import check_path

            check_path(svg)
        with loading(show=not as_json):
            loaded = _load(model, shape, device, dtype, quantization, threads, compile=compiled, pack=pack)
            from ..benchmark.run import Bench, Graphs

            cuda = loaded.device.type == "cuda"
            if graphs is None:
                graphs = loaded.name == "bundled" or cuda
            asked = asked or ([1, 32] if cuda else [1])
            whole = Graphs(asked, steps, tokens, concurrent, alone or max(1, concurrent // 8)) if graphs else None
            measuring = Bench(loaded, counts, lengths, repeats, whole)
            if svg is not None and (why := measuring.obstacle):
                raise InvalidRequest(f"There is nothing to draw: every size is left out ({why}).")
        with settled(), _progress(show=not as_json) as bar:
            result = measuring.run(bar)
        if as_json:
            print_json(**result)
        else:
            open_console().print(picture(result))
        if svg is not None:
            from ..evaluation.pictures import draw_bench

            draw_bench(result, svg)


def _load(
    model: str,
    shape: str | None,
    device: str | None,
    dtype: str,
    quantization: str | None,
    threads: int | None,
    **how: Any,
) -> "LanguageModel":
    import torch

    from .. import bundled
    from ..benchmark.shapes import build
    from ..engine.device import device_at_hand
    from ..engine.model import LanguageModel

    hush()
    if "://" in model:
        raise InvalidRequest(f"{model}: a server cannot be measured from here; name the model that it runs.")
    device = device or device_at_hand()
    if threads:
        torch.set_num_threads(threads)
    if shape is not None:
        chosen = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
        named = getattr(torch, chosen, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point or named.itemsize < 2:
            raise InvalidRequest(f"{dtype!r} is no dtype of weights; take bfloat16, float16 or float32.")
        return build(shape, device, named, quantization, **how)
    source = str(bundled.MODEL) if model == "bundled" else model
    loaded = LanguageModel.load(source, device=device, dtype=dtype, quantization=quantization, **how)
    loaded.name = model
    return loaded


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InvalidRequest(f"{option} takes whole numbers from 1 on, such as '1 8 32', not {text!r}.")
    return list(dict.fromkeys(numbers))


@contextmanager
def _progress(show: bool) -> "Iterator[Callable[[str, int, int], None]]":
    """A bar on stderr; what it yields says what comes next, how much is done, and of how much."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        task = progress.add_task("measuring", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def picture(result: dict[str, Any]) -> RenderableType:
    """What `Bench.run` returned, as tables."""
    machine, about = result["machine"], result["model"]
    where = f"{machine['device']}, " if machine["device"] != "cpu" else ""
    decoder = "" if about["decoder"] == "own" else f"\nlayers computed by transformers: {about['decoder']}"
    weights = {what: _size(size) for what, size in about["weights_gb"].items()}
    rest = (
        f"{where}{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} threads\n"
        f"memory: {result['bandwidth_gb_s']:,.1f} GB/s, copied · weights to read: "
        f"{weights['think']} a thought, {weights['speak']} a token{decoder}"
    )
    parts: list[RenderableType] = [
        headline("bench", {**about, "dtype": _dtype(about), "device": machine["device"]}, rest)
    ]
    for what in WHAT:
        if cells := [row for row in result["rows"] if row["what"] == what]:
            parts += [Text(), _table(what, cells)]
    if "graphs" in result:
        parts += [Text(), _graphs(result["graphs"]), _concurrency(result["concurrency"])]
    if result["targets"]:
        parts += [Text(), _targets(result["targets"])]
    parts += [Text(), *_notes(result)]
    return Group(*parts)


def _concurrency(at_once: dict[str, Any]) -> Text:
    return Text.from_markup(
        f" {at_once['concurrent']} questions at once, the demo's graph: {at_once['per_second']:.1f} answers a second; "
        f"one at a time: {at_once['per_second_alone']:.1f}; {_times(at_once['times'], at_once['times_spread'])}"
    )


def _graphs(rows: Sequence[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"Graphs: three thinkers of {first['steps']} steps and a judger of {first['tokens']} tokens"
    table = _open_table(title, "graph", "questions\nat once", "text\nseconds", "latent\nseconds", "times", "ticks")
    for row in rows:
        table.add_row(
            row["arrangement"],
            str(row["questions"]),
            f"{row['text_seconds']:.2f}",
            f"{row['latent_seconds']:.2f}",
            _times(row["text_over_latent"], row["text_over_latent_spread"]),
            f"[dim]{row['text_ticks']} and {row['latent_ticks']}[/]",
        )
    return table


def _targets(rows: Sequence[dict[str, Any]]) -> Table:
    from ..benchmark.targets import Target

    table = _open_table("Targets", "", "reached", "wanted", "")
    for row in rows:
        table.add_row(row["name"], *Target.of(row).cells())
    return table


def _open_table(title: str, *columns: str) -> Table:
    """A table without lines; its first column is text, the others are numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
        header_style="dim",
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", vertical="bottom")
    return table


def _times(median: float, spread: Sequence[float]) -> str:
    return f"{median:.1f}× [dim]({spread[0]:.1f}..{spread[1]:.1f})[/]"


def _table(what: str, cells: Sequence[dict[str, Any]]) -> Table:
    title, per_second = WHAT[what]
    names = [
        "rows",
        "positions",
        "ms a tick",
        per_second,
        "GB/s",
        "times\nthe floor",
        "plain loop\nms",
        "share of\nthat",
    ]
    if what == "speak":
        names.append("generate\nms")
    table = _open_table(title, *names)
    table.columns[0].justify = "right"  # a number as well
    for cell in cells:
        low, high = cell["ms_spread"]
        values = [
            f"{cell['rows']}",
            f"{cell['positions']:,}",
            f"{_digits(cell['ms'])} [dim]({_digits(low)}..{_digits(high)})[/]",
            f"{cell['per_second']:,.0f}" if cell["per_second"] >= 100 else f"{cell['per_second']:.1f}",
            f"{cell['gb_s']:,.1f}",
            f"{cell['floor_ratio']:.2f}×",
            _digits(cell["full_lm_ms"]),
            f"{cell['full_lm_ratio']:.2f}",
        ]
        if what == "speak":
            values.append(_digits(cell["generate_ms"]))
        table.add_row(*values)
    return table


def _notes(result: dict[str, Any]) -> Iterator[RenderableType]:
    if (steal := result["steal"] or 0) >= NOTICED:
        yield Text(
            f"The host gave {steal:.0%} of the processors' time to others meanwhile: what takes all cores is slower "
            "than it can be, and ratios to what takes one come out low.",
            "yellow",
        )
    for why, group in groupby(result["skipped"], key=lambda one: (one["what"], one["positions"], one["why"])):
        counts = ", ".join(str(one["rows"]) for one in group)
        yield Text(f"Left out: {why[0]}, {why[1]:,} positions, {counts} rows: {why[2]}.", "yellow")
    for why in dict.fromkeys(row["cuda_graphs"] for row in result["rows"]):
        if why not in ("on", "off"):
            yield Text(f"Not all ticks were replayed as CUDA graphs: {why}.", "yellow")
    yield Text(
        "Medians of a tick (smallest..largest turn). Floor: weights read once and the live KV of all rows, at the "
        "speed of the copy. Plain loop: the whole causal model with logits, where it thinks with all hidden states "
        "too, a DynamicCache, rows of equal length; share: tick over plain loop, turn by turn.",
        style="dim",
    )


def _dtype(about: dict[str, Any]) -> str:
    how = [f"{about['quantization']} weights"] if about["quantization"] else []
    return ", ".join([about["dtype"], *how, *(option for option in ("compiled", "packed") if about[option])])


def _size(gb: float) -> str:
    return f"{gb:.2f} GB" if gb >= 0.1 else f"{1000 * gb:.1f} MB"


def _digits(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"
