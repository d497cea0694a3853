"""`latentmas doctor`: does a vLLM server think, and as expected? Told before any work."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from ..errors import LatentMASError, MissingExtra
from .options import AsJson
from .session import loading, print_json, reported
from .terminal import open_console, printable

if TYPE_CHECKING:
    import httpx

    from ..service.base import LatentService
    from ..service.vllm import VLLMService
    from ..service.vllm_server import VLLMServer

STEPS, TOKENS = 4, 8
LARGE_BLOCK = 32  # positions; a reader computes anew what lies in a memory's last, unfinished block
MARKS = {True: ("ok", "green"), False: ("fails", "bold red"), None: ("note", "yellow")}


class Finding(NamedTuple):
    """One line of a diagnosis."""

    name: str
    fine: bool | None
    """None for what works, but not well."""
    said: str
    way_out: str = ""
    """The flag to set, if it is not fine."""


def doctor(
    url: Annotated[str, typer.Argument(help="Address of a vLLM server, http://host:port.")],
    model: Annotated[
        str | None, typer.Option(help="What should run there: 'bundled', a hub id, or a folder; loaded to compare.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Its tokenizer, if not where the server has its own.")] = None,
    token: Annotated[str | None, typer.Option(envvar="LATENTMAS_TOKEN", help="The server's --api-key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Checks a vLLM server before any work: reachable, plugin, LATENT, tokenizer, weights, prefix caching, versions.

    Ends with exit code 1 if something fails; each line that is not fine says what to set.
    """
    with reported(as_json):
        with loading(show=not as_json):
            settings = {"tokenizer": tokenizer, "token": token, "patience": 0}
            findings = list(diagnose(url, model, settings))
        if as_json:
            print_json(url=url, findings=[finding._asdict() for finding in findings])
        else:
            open_console().print(_table(findings))
    raise typer.Exit(int(any(finding.fine is False for finding in findings)))


def diagnose(
    url: str,
    model: str | None = None,
    settings: dict[str, Any] | None = None,
    transport: "httpx.AsyncBaseTransport | None" = None,
) -> Iterator[Finding]:
    """Checks one thing after the other; stops where the next one makes no sense any more.

    Args:
        url: Address of the server.
        model: What should run there; None to take what does.
        settings: Fields of `VLLMSettings`.
        transport: For tests.

    Raises:
        InvalidRequest: If a setting is out of range, or the address is none.
        MissingExtra: If what it takes to ask a server is not installed.
    """
    try:
        from ..service.vllm import PREFIX, VLLMService, checked_settings
        from ..service.vllm_server import VLLMServer, VLLMSettings
    except ModuleNotFoundError as error:
        raise MissingExtra.of("serve", f"{error.name} is not installed") from error

    checked = checked_settings(VLLMSettings, dict(settings or {}))
    address = url.removeprefix(PREFIX).rstrip("/")
    server = VLLMServer(address, checked, transport)
    try:
        facts = yield from _facts(server)
    finally:
        server.close()
    if facts is None:
        return
    try:
        service = VLLMService(VLLMServer(address, checked, transport), checked)
    except LatentMASError as error:
        yield Finding("tokenizer", False, str(error), "--tokenizer <folder or hub id>")
        return
    with service:
        yield Finding("tokenizer", True, "the server's own")
        yield from _round_trip(service)
        if model is not None:
            yield from _weights(service, model)


def _facts(server: "VLLMServer") -> "Any":
    try:
        served = server.call(server.served())
        yield Finding("server", True, f"serves {served['id']}")
        facts = server.call(server.facts())
    except LatentMASError as error:
        name = "plugin" if server.model else "server"
        flags = "VLLM_PLUGINS=latentmas and --hf-overrides" if server.model else "vllm serve <model> --host --port"
        yield Finding(name, False, str(error), flags)
        return None
    yield Finding("plugin", True, f"latentmas-vllm {facts['latentmas_vllm']}")
    yield Finding("LATENT", True, f"token {facts['latent_token_id']} of {facts['architecture']}, {facts['alignment']}")
    yield Finding("version", True, f"vLLM {facts['vllm']}; the plugin runs with {facts.get('vllm_supported', '?')}")
    caching, block = facts["prefix_caching"], facts["block_size"]
    said, way_out = f"in blocks of {block} positions", ""
    if not caching:
        said, way_out = "off: works, but every agent computes all anew", "--enable-prefix-caching"
    elif block > LARGE_BLOCK:
        said, way_out = f"{said}: works, but readers think up to {block} thoughts again", f"--block-size {LARGE_BLOCK}"
    yield Finding("prefix caching", None if way_out else True, said, way_out)
    said, way_out = f"up to {facts['max_logprobs']} tokens a step", ""
    if (mode := facts["logprobs_mode"]) != "raw_logprobs":
        said, way_out = f"none with {mode}: all else works", "--logprobs-mode raw_logprobs"
    elif facts["max_logprobs"] == 0:
        way_out = "--max-logprobs 20"
    yield Finding("lens", None if way_out else True, said, way_out)
    return facts


def _round_trip(service: "VLLMService") -> Iterator[Finding]:
    try:
        first = _probe(service)
        again = _probe(service)
    except LatentMASError as error:
        yield Finding("thinks and speaks", False, str(error), "see the server's log")
        return
    same = first == again
    said = f"{STEPS} latent steps, then {len(first)} tokens, " + ("the same twice" if same else "but others each time")
    yield Finding("thinks and speaks", same or None, said, "" if same else "VLLM_BATCH_INVARIANT=1")


def _weights(service: "VLLMService", model: str) -> Iterator[Finding]:
    from ..service.local import LocalService
    from .session import hush

    hush()
    try:
        local = LocalService.load(model)  # without the environment, whose options are for the client
    except LatentMASError as error:
        yield Finding("weights", False, str(error), "--model")
        return
    with local:
        here, there = local.info()["fingerprint"], service.facts["fingerprint"]
        yield Finding("weights", here == there, f"{there} there, {here} in {model}", "" if here == there else "--model")
        try:
            same = _probe(local) == _probe(service)
        except LatentMASError as error:
            yield Finding("greedy probe", False, str(error), "see the server's log")
            return
    said = "greedy tokens after thinking are those of the model here"
    yield Finding("greedy probe", same, said if same else f"not: {said}", "" if same else "--model, --dtype")


def _probe(service: "LatentService") -> tuple[int, ...]:
    ref = service.think("What is 12 plus 30?", steps=STEPS, agent="doctor")
    return tuple(i for chunk in service.speak("Answer.", [ref], max_tokens=TOKENS) for i in chunk.token_ids)


def _table(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark, style = MARKS[finding.fine]
        said = Text(printable(finding.said))
        if finding.way_out:
            said.append(f"\nset: {finding.way_out}", "bold")
        table.add_row(Text(mark, style), finding.name, said)
    return table
