"""The command line, `latentmas`: one file per command in `commands/`."""

import logging
from typing import Annotated

import typer

from . import spinning  # noqa: F401 (before torch, so before the commands)
from .commands.ask import ask
from .commands.audit import audit
from .commands.bench import bench
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.lens import lens
from .commands.picture import picture
from .commands.serve import rotate_key, serve
from .evaluation.machine import PACKAGES, version_of

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _versions(wanted: bool) -> None:
    if wanted:
        print("\n".join(f"{name} {version}" for name in PACKAGES if (version := version_of(name))))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_versions, help="Print versions, for bug reports.")
    ] = False,
) -> None:
    """LangGraph agents that pass latent memory instead of text."""
    # Where torchao is installed, transformers imports it, and it says at length what it does not need.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


app.command()(demo)
app.command()(ask)
app.command("eval")(evaluate)
app.command()(audit)
app.command()(lens)
app.add_typer(picture, name="picture")
app.command()(serve)
app.command()(bench)
app.command()(doctor)
app.command("rotate-key")(rotate_key)

if __name__ == "__main__":
    app()
