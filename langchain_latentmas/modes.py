"""`configurable.edges`: which edges of a run are latent, and which are text. All readers of the setting are here."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

from .errors import InvalidRequest

Mode = Literal["latent", "text"]
Edge = tuple[str, str]


def edge_modes(
    config: RunnableConfig,
    edges: Iterable[Edge],
    known: Iterable[Edge] | None = None,
    there: Iterable[Edge] = (),
) -> dict[Edge, Mode]:
    """What `configurable.edges` makes of latent edges.

    Args:
        config: Of the run, from `ensure_config`: "latent" (the default), "text", or a mapping from "source->target"
            (or "source -> target", as reports print it) to one of them.
        edges: Edges that are latent by themselves.
        known: All that a mapping may name; None lets it name others.
        there: Others that a mapping may call "text", since they are.

    Raises:
        InvalidRequest: If it is none of these, or names another edge.
    """
    asked = _asked(config)
    named = asked if isinstance(asked, Mapping) else dict.fromkeys(("->".join(edge) for edge in edges), asked)
    names = None if known is None else ["->".join(edge) for edge in known]
    spoken = {"->".join(edge) for edge in there}
    for key, mode in named.items():
        if names is not None and key not in names and not (mode == "text" and key in spoken):
            raise InvalidRequest(
                f"configurable.edges names {key!r}, which is no latent edge of this graph (there are: "
                f"{', '.join(sorted(names))}); correct it, or switch that edge with switch_edges first."
            )
    return {edge: named.get("->".join(edge), "latent") for edge in edges}


def runs_as_text(config: RunnableConfig, *sources: str) -> bool:
    """Whether all edges run as text, or one that leaves a node of these names.

    Args:
        config: See `edge_modes`.
        *sources: What the node is called: its own name and its agent's, where they differ, and the nodes around it,
            which leave what it leaves.

    Raises:
        InvalidRequest: If the setting is of another form. An edge that a mapping names need not exist: the edges of the
            graph are not known here.
    """
    asked = _asked(config)
    if not isinstance(asked, Mapping):
        return asked == "text"
    return any(mode == "text" and key.split("->")[0] in sources for key, mode in asked.items())


def agent_leaves_text(config: RunnableConfig, agent: str) -> bool:
    """`runs_as_text` for an agent of `create_agent`, asked in one of its own nodes, such as "model" or "tools".

    Args:
        config: See `edge_modes`.
        agent: What the agent is called; the node that it is in the graph around it counts as well, and those around it.

    Raises:
        InvalidRequest: As for `runs_as_text`.
    """
    return runs_as_text(config, agent, *node_path(config)[:-1])


@contextmanager
def inside(config: RunnableConfig | None) -> Iterator[RunnableConfig]:
    """Makes the configuration of a call the one that `ensure_config` and `get_runtime` find meanwhile.

    In a chain that is a node, LangGraph does that for the first step alone, and LangChain does it for no model call.

    Args:
        config: As the call got it. Where no graph made it, it only adds to that of the node that calls.

    Yields:
        All of it.
    """
    around, merged = ensure_config(), ensure_config(config)
    if "checkpoint_ns" not in merged["configurable"]:
        merged["configurable"] = {**around["configurable"], **merged["configurable"]}
    token = var_child_runnable_config.set(merged)
    try:
        yield merged
    finally:
        var_child_runnable_config.reset(token)


def node_path(config: RunnableConfig) -> tuple[str, ...]:
    """Names of the graph nodes that a run is in, the outermost first."""
    return names_in(namespace(config))


def namespace(config: RunnableConfig) -> str:
    """LangGraph's `checkpoint_ns` of a run; "" outside of any node."""
    return config.get("configurable", {}).get("checkpoint_ns") or ""


def names_in(namespace: str) -> tuple[str, ...]:
    """Names of the graph nodes in a namespace, the outermost first."""
    parts = (part for part in namespace.split("|") if part and not part.isdigit())  # digits count calls of a subgraph
    return tuple(part.split(":")[0] for part in parts)


def _asked(config: RunnableConfig) -> Mode | Mapping[str, Mode]:
    asked = config.get("configurable", {}).get("edges", "latent")
    if not isinstance(asked, Mapping):
        return _checked(asked, asked)
    named: dict[str, Mode] = {}
    for key, mode in asked.items():
        source, _, target = (part.strip() for part in str(key).partition("->"))
        if not (source and target):
            raise InvalidRequest(f"configurable.edges names edges as 'source->target', and {key!r} is none.")
        named[f"{source}->{target}"] = _checked(mode, asked, f" (at {key!r})")
    return named


def _checked(mode: Mode, asked: object, where: str = "") -> Mode:
    if mode not in ("latent", "text"):
        raise InvalidRequest(
            f"configurable.edges must be 'latent', 'text', or a mapping of 'source->target' to these, not {asked!r}"
            f"{where}."
        )
    return mode
