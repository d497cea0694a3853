"""The folder of a run that may be interrupted, and its progress."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import InvalidRequest, ServiceUnreachable

ANSWERS = "answers.jsonl"


@contextmanager
def run_folder(
    out: Path | None, command: str, name: str, settings: Any, result: str, errors: Callable[[Any], Iterable[str]]
) -> Iterator[Path]:
    """Claims the folder of a run for this process.

    Where the user names none, it lies in the cache, by name and settings. There an interrupted run goes on too, and one
    with answers that failed for want of a device, a server or a grader; any other that has its result is begun anew.

    Args:
        out: The folder that the user names.
        command: Of `latentmas`.
        name: What the run is about.
        settings: What its answers depend on, in plain JSON.
        result: Name of the file that the command writes at the end, JSON.
        errors: Which errors are in it.

    Yields:
        The folder.

    Raises:
        InvalidRequest: If it cannot be written, or another process is at work there.
        ServiceUnreachable: If the server is gone, with word that the same command goes on.
        typer.Exit: With code 130, if the user interrupts the run.
    """
    folder, lock = _claimed(out or _in_cache(command, name, settings), named=out is not None)
    try:
        if out is None and _is_finished(folder / result, errors):
            (folder / ANSWERS).unlink(missing_ok=True)
            (folder / result).unlink()
        yield folder
    except KeyboardInterrupt:
        console = Console(stderr=True, markup=False, highlight=False)
        console.print(f"Interrupted; the same command goes on from {folder / ANSWERS}.", soft_wrap=True)
        raise typer.Exit(130) from None
    except ServiceUnreachable as error:
        raise ServiceUnreachable(f"{error} The same command goes on from {folder / ANSWERS}.") from error
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be written ({error}); see to it, and call again.") from error
    finally:
        lock.release()


@contextmanager
def run_bars(show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr; what it yields is called with a bar's name, answers so far, and number of questions."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        bars: dict[str, TaskID] = {}

        def on_answer(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total, note=f"{done} from before" if done else "")
            progress.update(bars[name], completed=done)

        yield on_answer


def _in_cache(command: str, name: str, settings: Any) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return cache / "latentmas" / command / f"{Path(name.replace(':', '-')).name}-{digest}"


def _is_finished(result: Path, errors: Callable[[Any], Iterable[str]]) -> bool:
    from ..evaluation.journal import is_mended

    try:
        return not any(map(is_mended, errors(json.loads(result.read_text(encoding="utf-8")))))
    except (OSError, ValueError):  # not there, or cut off
        return False


def _claimed(folder: Path, named: bool) -> tuple[Path, Any]:
    """The folder, or another one beside it, where that is taken and nobody named it; and its lock."""
    from filelock import FileLock, Timeout

    for i in count(2):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire(blocking=False)
            return folder, lock
        except Timeout as error:
            if named:
                raise InvalidRequest(f"Another run is at work in {folder}; name another folder with --out.") from error
            folder = folder.with_name(f"{folder.name.removesuffix(f'_{i - 1}')}_{i}")
        except OSError as error:
            raise InvalidRequest(f"{folder} cannot be written ({error}); name another with --out.") from error
    raise AssertionError("it counts on")
