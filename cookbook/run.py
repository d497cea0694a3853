"""Runs the notebooks from top to bottom: `python cookbook/run.py [--inplace] [NOTEBOOK ...]`."""

import asyncio
import os
import subprocess
import time
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
AT_ONCE = 2  # most of the time goes into imports, on one core each


async def execute(path: Path, inplace: bool, free: asyncio.Semaphore) -> bool:
    """Runs a notebook in a kernel of its own.

    Args:
        path: The notebook.
        inplace: Whether to write what it shows into it, without what differs between runs and machines: times of
            execution, versions, and the warnings and progress bars on stderr.
        free: Limits how many run at once.

    Returns:
        Whether it ran to its end.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    async with free:
        begun = time.perf_counter()
        try:
            await client.async_execute(stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            print(f"{path.name} failed:\n{error}", flush=True)
            return False
        print(f"{path.name}  {time.perf_counter() - begun:.1f} s", flush=True)
    if inplace:
        notebook.metadata.language_info = {"name": "python"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)
    return True


async def execute_all(paths: list[Path], inplace: bool) -> bool:
    """Runs all notebooks, failed ones included; returns whether none failed."""
    free = asyncio.Semaphore(AT_ONCE)
    return all(await asyncio.gather(*(execute(path, inplace, free) for path in paths)))


def main(
    notebooks: Annotated[list[Path] | None, typer.Argument(help="All of the cookbook by default.")] = None,
    inplace: Annotated[bool, typer.Option("--inplace", help="Write what they show into them.")] = False,
) -> None:
    """Runs notebooks from top to bottom, and fails if one does."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the bundled model is faster on one thread than on two
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if not asyncio.run(execute_all(notebooks or sorted(HERE.glob("*.ipynb")), inplace)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
