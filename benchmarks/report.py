"""What all benchmarks print: the machine, medians with their spread, and the same as JSON."""

import json
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from transformers.utils import logging as transformers_logging

from langchain_latentmas.benchmark.spread import Spread, ratios
from langchain_latentmas.evaluation.machine import machine

__all__ = ["Spread", "machine", "prepare", "ratios", "show"]


def prepare(threads: int | None) -> None:
    """Keeps progress bars of loading out of the tables, and sets torch's threads if a number is asked for."""
    if threads:
        torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def show(run: dict[str, Any], *parts: RenderableType, as_json: bool, results: dict[str, Any]) -> None:
    """Prints what was run and what came of it, as text or as one JSON document."""
    if as_json:
        print(json.dumps(_plain({"run": run, **results}), indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    facts = Table.grid(padding=(0, 2))
    for name, value in run.items():
        facts.add_row(f"[dim]{name}[/]", _flat(value) if isinstance(value, dict) else str(value))
    console.print(facts)
    for part in parts:
        console.print()
        console.print(part)


def _plain(value: Any) -> Any:
    """JSON would make a list of a `Spread`."""
    if isinstance(value, Spread):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _flat(facts: dict[str, Any]) -> str:
    """`processor X, cores 2, ...`"""
    parts = (f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if not isinstance(value, dict))
    return ", ".join([*parts, *(_flat(value) for value in facts.values() if isinstance(value, dict))])
