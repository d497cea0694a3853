"""LatentMAS for LangChain's `create_agent`: agents that read and leave memories in the graph's state."""

from .middleware import LatentAgentState, LatentMiddleware

__all__ = ["LatentAgentState", "LatentMiddleware"]
