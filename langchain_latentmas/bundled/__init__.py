"""The bundled model: small enough to ship, trained to think."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""The folder to load it from."""
STEPS = 10
"""Latent steps that its thinkers need."""
