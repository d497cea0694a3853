"""The scripts of `benchmarks/`: each can be called."""

from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", [path.stem for path in FILES if "def main(" in path.read_text()])
def test_a_benchmark_says_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main = import_module(f"benchmarks.{name}").main
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0, result.output
    assert main.__doc__ in result.stdout
