"""The model service: what nodes talk to, and where it runs."""

from .base import Chunk, LatentService, LensRow, Usage
from .memory import Memory, Segment

__all__ = ["Chunk", "LatentService", "LensRow", "Memory", "Segment", "Usage"]
