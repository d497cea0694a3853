"""The layers of CONTRIBUTING.md: imports point one way, and what is optional is imported where it is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import langchain_latentmas

PACKAGE = Path(langchain_latentmas.__file__).parent
LANGCHAIN = {"langchain", "langchain_core", "langgraph", "langsmith"}
SERVE = {"fastapi", "starlette", "uvicorn", "httpx", "tenacity", "prometheus_client"}
EXTRAS = SERVE | {"vllm", "latentmas_vllm", "datasets", "math_verify", "matplotlib", "torchao"}
# langchain-core brings httpx and tenacity along.
LEFT_OUT = sorted(EXTRAS - {"httpx", "tenacity"})


def imports(path: Path, at_once: bool = False) -> Iterator[str]:
    """Full names of the modules that a module imports; with `at_once`, of those it cannot be imported without."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)

    def found(node: ast.AST) -> Iterator[str]:
        if at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if at_once and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = resolve_name("." * node.level + (node.module or ""), package)
            yield from [name] if node.module else (f"{name}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from found(child)

    return found(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("layer", "below"),
    [
        ("service/*.py", {"service", "engine", "bundled", "state", "errors"}),
        ("engine/*.py", {"engine", "errors"}),
        ("state.py", {"errors"}),
        ("errors.py", set()),
    ],
)
def test_a_layer_imports_nothing_that_lies_above_it(layer: str, below: set[str]) -> None:
    paths = list(PACKAGE.glob(layer))
    assert paths
    for path in paths:
        own = {name.split(".")[1] for name in imports(path) if name.startswith("langchain_latentmas.")}
        assert own <= below, path


def test_the_engine_knows_nothing_of_langchain() -> None:
    for path in PACKAGE.glob("engine/*.py"):
        assert not LANGCHAIN & {name.split(".")[0] for name in imports(path)}, path


def test_extras_are_imported_where_they_are_used() -> None:
    for path in PACKAGE.rglob("*.py"):
        there = SERVE if path.parent.name == "service" else set()  # a server, its clients, and what they share
        assert EXTRAS & {name.split(".")[0] for name in imports(path, at_once=True)} <= there, path


def test_without_extras_all_works_but_what_needs_them() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({LEFT_OUT}))
from langchain_latentmas import *
from langchain_latentmas.cli import app
from langchain_latentmas.errors import MissingExtra
with LatentService.load("bundled", device="cpu") as service:
    print(service.think("What is 12 plus 30?", steps=2)["steps"])
try:
    LatentService.load("http://127.0.0.1:1")
except MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    steps, missing = done.stdout.splitlines()
    assert steps == "2"
    assert "starlette" in missing
    assert "pip install -e '.[serve]'" in missing
