"""`latentmas serve`: the model service for several processes; `latentmas rotate-key`: a fresh signing key."""

import logging
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MissingExtra
from .options import Options, named
from .session import loading, reported, settled, show_downloads_only

SWITCH_SECONDS = 0.0005


def serve(
    model: Annotated[str | None, typer.Option(help="'bundled', a hub id, or a folder.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; chosen by itself otherwise.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Name of a torch dtype, or auto.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of recipes and signing key; ~/.local/state/latentmas by default.")
    ] = None,
    option: Options = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, 127.0.0.1 by default; any but loopback needs a token.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="8765 by default; 0 takes a free one.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, for HTTPS.")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Most requests at work; 128 by default.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Most requests that wait; 256 by default.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds that a request may take; 600 by default.")] = None,
    drain: Annotated[float | None, typer.Option(help="Seconds for work to end after SIGTERM; 30 by default.")] = None,
    keep_alive: Annotated[
        float | None, typer.Option(help="Seconds of silence after which a stream shows that it lives; 5 by default.")
    ] = None,
    max_body: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most of a request, such as 2MiB; 1 MiB by default.")
    ] = None,
    max_depth: Annotated[int | None, typer.Option(help="Most nested JSON values in it; 32 by default.")] = None,
    max_headers: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most of its headers; 32 KiB by default.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most of a memory in or out, such as 2GiB; 1 GiB by default.")
    ] = None,
    max_connections: Annotated[int | None, typer.Option(help="Most connections; 2048 by default.")] = None,
    body_seconds: Annotated[float | None, typer.Option(help="Seconds for a body to come; 30 by default.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info (by default), warning or error.")] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="LATENTMAS_CONFIG", help="TOML file with any of these settings, and tokens.")
    ] = None,
) -> None:
    """One process owns the model; others use it with LatentService.load("http://...").

    Every option is also an environment variable, LATENTMAS_PORT and so on, and a line of the --config file. Tokens are
    not flags, since others can read those: set LATENTMAS_TOKEN, or write them into the file.
    """
    flags = {name: value for name, value in locals().items() if value is not None and name not in ("option", "config")}
    with reported(as_json=False):
        if option:
            flags["options"] = named(option)
        _require_extra()
        from ..service.port import Port
        from ..service.serving import ServeSettings

        settings = ServeSettings.gather(config, flags)
        with _json_lines(settings.log_level):
            # Tick and store let go of the interpreter all the time, and wait up to this long to have it back from the
            # event loop. 5 ms, as by default, is a whole tick of a small model.
            sys.setswitchinterval(SWITCH_SECONDS)
            with closing(Port(settings)) as taken:  # before the model is loaded, which can take minutes
                with loading(show=True):
                    from ..service.server import Server

                    server = Server(_service(settings), settings)
                with settled():
                    server.run(taken)


def rotate_key(
    store: Annotated[
        Path | None,
        typer.Option(
            envvar="LATENTMAS_STORE", help="The store; by default that of --config, else ~/.local/state/latentmas."
        ),
    ] = None,
    keep_days: Annotated[float, typer.Option(help="Days for which old references are still accepted.")] = 30,
    config: Annotated[
        Path | None, typer.Option(envvar="LATENTMAS_CONFIG", help="TOML file of the server whose store it is.")
    ] = None,
) -> None:
    """Puts a fresh signing key into a store; a server that runs takes it within a second.

    References and markers that were signed with the old key are accepted for --keep-days more.
    """
    with reported(as_json=False):
        from ..service.identity import rotate_key as rotate
        from ..service.serving import ServeSettings

        folder = store or ServeSettings.gather(config, {}).store
        rotate(folder / "key", keep_days * 86400)
        print(f"{folder / 'key'}: fresh key; what the old one signed is accepted for {keep_days:g} days more.")
        print("A server that runs takes it within a second.")


@contextmanager
def _json_lines(level: str) -> Iterator[None]:
    """Logs as JSON lines on stderr, of all packages."""
    from ..service.logs import JSONLines

    root, handler = logging.getLogger(), logging.StreamHandler()
    before = root.level, root.handlers[:]
    handler.setFormatter(JSONLines())
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("uvicorn.error", "httpx", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def _service(settings: Any) -> Any:
    from ..service.local import LocalService

    show_downloads_only()  # all else in the log is JSON lines
    own = {"device": settings.device, "dtype": settings.dtype, "store": settings.store}
    return LocalService.load(settings.model, **{**own, **settings.options})


def _require_extra() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise MissingExtra.of("serve", f"{missing[0]} is not installed")
