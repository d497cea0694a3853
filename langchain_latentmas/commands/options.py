"""Options that several commands have."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(envvar="LATENTMAS_SERVICE", help="'bundled', a hub id, a folder, or http://host:port of a server."),
]
LocalModel = Annotated[
    str, typer.Option(envvar="LATENTMAS_SERVICE", help="'bundled', a hub id, or a folder; a server is not enough here.")
]
Steps = Annotated[int, typer.Option(help="Latent steps of each thinker.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens that one agent decodes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
