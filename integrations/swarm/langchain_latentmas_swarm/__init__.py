"""LatentMAS for langgraph-swarm: a handoff that takes the memories along."""

from .handoff import LatentSwarmState, create_latent_handoff_tool

__all__ = ["LatentSwarmState", "create_latent_handoff_tool"]
