"""LatentMAS for langgraph-supervisor: workers report in memories, the supervisor routes by text."""

from .supervisor import create_latent_supervisor

__all__ = ["create_latent_supervisor"]
