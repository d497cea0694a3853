"""The bundled model: small enough to ship, trained to think."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""The folder to load it from."""
STEPS = 10
"""Latent steps that its thinkers need."""
ROLES: dict[str, str] = {
    "planner": "You are a planner. Plan the steps for the question.",
    "critic": "You are a critic. Check the plan for the question.",
    "refiner": "You are a refiner. Improve the plan for the question.",
    "judger": "You are a judger. Give the final answer.",
    "solver": "You are a helpful assistant. Solve the question step by step.",
    "arithmetic": "You are an arithmetic expert. Solve the question.",
    "logic": "You are a logic expert. Solve the question.",
    "reading": "You are a reading expert. Solve the question.",
}
"""By agent name: what it was trained to be told."""
SEQUENTIAL = ("planner", "critic", "refiner")
"""Those who think one after the other."""
EXPERTS = ("arithmetic", "logic", "reading")
"""Those who think at the same time."""
