"""LatentMAS for LangGraph: agents that pass latent memory instead of text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing import audit
    from .chat_model import ChatLatentMAS
    from .edges import switch_edges
    from .node import LatentAgentNode
    from .service import LatentService
    from .state import LatentRef, LatentState, merge_latents

__all__ = [
    "ChatLatentMAS",
    "LatentAgentNode",
    "LatentRef",
    "LatentService",
    "LatentState",
    "audit",
    "merge_latents",
    "switch_edges",
]

_HOMES = {
    "ChatLatentMAS": "chat_model",
    "LatentAgentNode": "node",
    "LatentRef": "state",
    "LatentService": "service",
    "LatentState": "state",
    "audit": "auditing",  # a module of the same name would hide the function
    "merge_latents": "state",
    "switch_edges": "edges",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the state can be imported where torch is not installed.
    if name == "__version__":
        from importlib.metadata import version

        return version("langchain-latentmas")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
