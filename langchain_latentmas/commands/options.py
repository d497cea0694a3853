"""Options that several commands have."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import InvalidRequest

Model = Annotated[
    str,
    typer.Option(
        envvar="LATENTMAS_SERVICE",
        help="'bundled', a hub id, a folder, http://host:port, vllm+http://host:port, or vllm:<model>.",
    ),
]
LocalModel = Annotated[
    str, typer.Option(envvar="LATENTMAS_SERVICE", help="'bundled', a hub id, or a folder; a server is not enough here.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="Another setting of the model service, a value of JSON or a word, such as kv_budget=4GiB; may repeat.",
    ),
]
Steps = Annotated[int, typer.Option(help="Latent steps of each thinker.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens that one agent decodes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


def named(options: Sequence[str] | None) -> dict[str, Any]:
    """Settings by name, of NAME=VALUE.

    Raises:
        InvalidRequest: If one does not read so.
    """
    return dict(map(_named, options or ()))


def _named(option: str) -> tuple[str, Any]:
    name, given, value = option.partition("=")
    if not (name and given):
        raise InvalidRequest(f"--option {option!r} should read NAME=VALUE, such as kv_budget=4GiB.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
