"""A command at work: the model it loads, the errors it reports, the progress it shows."""

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.text import Text

from ..errors import LatentMASError
from .options import named
from .terminal import printable

if TYPE_CHECKING:
    # torch and transformers take seconds to import, and `latentmas --help` needs neither.
    from langgraph.graph import StateGraph

    from ..service import LatentService
    from ..state import LatentState


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turns errors that a user can meet into one line and exit code 2."""
    try:
        yield
    except LatentMASError as error:
        if as_json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}, ensure_ascii=False))
        else:
            Console(stderr=True, highlight=False).print(
                f"[bold red]{type(error).__name__}:[/] [red]{escape(printable(str(error)))}[/]", soft_wrap=True
            )
        raise typer.Exit(2) from None


@contextmanager
def loading(show: bool) -> Iterator[None]:
    """A sign of life on a terminal, since importing torch and transformers takes seconds by itself.

    It ends where a download begins, which shows how far it is.
    """
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield
        return
    status = console.status("loading the model")
    with redirect_stderr(cast(TextIO, _Beside(status, console))), status:
        yield


@contextmanager
def settled() -> Iterator[None]:
    """What is there by now stays until the end, and no garbage collection looks through it meanwhile.

    With torch, transformers and LangChain loaded one takes 0.2 s, and hundreds of questions at work set off many.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def load(model: str, options: Sequence[str] | None = None) -> "LatentService":
    """A service on a model, with what the environment says but for the store; warnings become single lines on stderr.

    Args:
        model: What `LatentService.load` takes.
        options: Settings that go before those of the environment, each as NAME=VALUE.

    Raises:
        InvalidRequest: If one of them does not read so.
    """
    from ..service.shared import SharedSettings

    hush()
    # A durable store would answer with thoughts of earlier runs, in no time at all.
    return SharedSettings(store=None).load(model, options=named(options))


def hush() -> None:
    """Warnings of this package become single lines on stderr, and transformers loads without a word."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    show_downloads_only()
    own = logging.getLogger("langchain_latentmas")
    if not any(isinstance(handler, _OneLine) for handler in own.handlers):
        own.addHandler(_OneLine())


def show_downloads_only() -> None:
    """Of the bars that loading a model shows, leaves those of a download, which takes minutes, on a terminal."""
    from transformers.utils import logging as transformers_logging

    if sys.stderr.isatty():
        transformers_logging.set_tqdm_hook(lambda make, given, options: make(*given, **{**options, "disable": True}))
    else:
        transformers_logging.disable_progress_bar()  # and with it those of the hub


def team(
    service: "LatentService", model: str, arrangement: str, *, steps: int, max_tokens: int
) -> "StateGraph[LatentState]":
    """The agents that answer a question of the user's own.

    Args:
        service: The model service.
        model: What it was loaded by.
        arrangement: One of `teams.ARRANGEMENTS`.
        steps: Latent steps of each thinker.
        max_tokens: Most tokens that one agent decodes.
    """
    from .. import teams

    # The bundled judger was trained to know the question from the others alone.
    relay = model == "bundled"
    return teams.ARRANGEMENTS[arrangement](service, steps=steps, max_tokens=max_tokens, relay=relay)


def describe(service: "LatentService", model: str) -> dict[str, Any]:
    """What ran, for headlines and JSON."""
    info = service.info()
    kept = ("architecture", "parameters", "device", "dtype", "fingerprint")
    return {"name": "bundled" if model == "bundled" else info["model"], **{k: info[k] for k in kept if k in info}}


@contextmanager
def progress_bars(service: "LatentService", show: bool) -> "Iterator[Callable[[str, int], Callable[[], None]]]":
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


def print_json(**document: Any) -> None:
    """Prints one JSON document on stdout."""
    print(json.dumps(document, ensure_ascii=False, indent=2))


class _Beside(FileProxy):
    """stderr beside a spinner: lines go above it, and it ends with the first bar, which returns to begin its line."""

    def __init__(self, spinner: Status, console: Console) -> None:
        super().__init__(console, sys.stderr)
        self.spinner, self.bars = spinner, False

    def write(self, text: str) -> int:
        if not self.bars and "\r" in text:
            self.spinner.stop()
            self.bars = True
        return self.rich_proxied_file.write(text) if self.bars else super().write(text)

    def flush(self) -> None:
        if self.bars:
            self.rich_proxied_file.flush()
        else:
            super().flush()


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


class _OneLine(logging.Handler):
    """Warnings as single lines; what belongs to an error is in the error's message."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            console = Console(stderr=True)
            with console.capture() as line:
                console.print(Text(printable(record.getMessage()), style="yellow"), soft_wrap=True)
            sys.stderr.write(line.get())  # where a spinner or bars are, above these
