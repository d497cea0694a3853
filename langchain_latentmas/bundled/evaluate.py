"""What the bundled model, or one that was trained like it, can do: `python -m langchain_latentmas.bundled.evaluate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from langchain_latentmas import LatentService
from langchain_latentmas.bundled import MODEL
from langchain_latentmas.evaluation.run import Evaluation
from langchain_latentmas.evaluation.task import BUNDLED_TASKS, Relay, Task

SWEEP = (0, 4, 8, 12, 16, 24, 32, 48, 80)


def figures(folder: Path, n: int, seed: int = 0, sweep: Sequence[int] = SWEEP) -> dict[str, float]:
    """Right answers in % on held-out questions: every task, mode and arrangement, and relay over latent steps.

    Args:
        folder: Weights and tokenizer.
        n: Questions per task.
        seed: Which ones.
        sweep: Latent steps.
    """
    runs: dict[str, tuple[Task, dict[str, Any]]] = {name: (task(), {}) for name, task in BUNDLED_TASKS.items()}
    runs |= {
        f"relay, {steps} steps": (Relay(), {"modes": ["latent"], "arrangements": ["sequential"], "steps": steps})
        for steps in sweep
    }
    found: dict[str, float] = {}
    torch.set_num_threads(1)  # the service's ticks are small
    with _progress() as progress:
        for name, (task, options) in progress.track(runs.items(), description="asking"):
            # A service of its own for each, so that none finds what another one thought.
            with LatentService.load(str(folder)) as service:
                for row in Evaluation(service, task, n=n, seed=seed, batch=n, **options).run().rows:
                    found[f"{name}: {row.mode}" + ("" if row.mode == "single" else f" {row.arrangement}")] = (
                        row.accuracy
                    )
    return found


def table(n: int, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures of several models side by side."""
    shown = Table("right answers in %", *columns, title=f"{n} held-out questions of each task, greedy")
    for name in next(iter(columns.values())):
        shown.add_row(name, *(f"{column[name]:.1f}" for column in columns.values()))
    return shown


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with weights and tokenizer.")] = MODEL,
    n: Annotated[int, typer.Option(help="Held-out questions of each task.")] = 300,
    seed: Annotated[int, typer.Option(help="Which questions.")] = 0,
) -> None:
    """Print right answers on every task, in every mode and arrangement, and over latent steps."""
    Console().print(table(n, {folder.name: figures(folder, n, seed)}))


if __name__ == "__main__":
    typer.run(report)
