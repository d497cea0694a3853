"""The bundled model: small enough to ship, trained to think; `MODEL` is the folder to load it from."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
