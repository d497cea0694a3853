"""The code of the README runs as it stands."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_its_code_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    there: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, there)
    assert "boxed{14}" in there["thought"]
    assert "boxed{14}" in there["written"]["messages"][-1].text
    assert "boxed{14}" in there["answer"]
    assert "planner -> judger     latent" in capsys.readouterr().out
    there["service"].close()
    assert sorted(path.name for path in (tmp_path / "memories").iterdir()) == ["key", "recipes"]


@pytest.mark.parametrize("name", ["README.md", "docs/*.md", "cookbook/README.md", "CONTRIBUTING.md"])
def test_what_it_links_to_is_there(name: str) -> None:
    for page in sorted(README.parent.glob(name)):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def installed_by(folder: Path, *extras: str) -> set[str]:
    """The packages that a pyproject.toml names, as they are imported."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    return {re.split(r"[<>=\[ ]", name)[0].replace("-", "_") for name in named}


def imported_by(code: str) -> set[str]:
    """The packages that code imports, but for those that come with Python."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("name", ["agent", "supervisor", "swarm"])
def test_an_integration_installs_what_its_readme_imports(name: str) -> None:
    folder = README.parent / "integrations" / name
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    there = installed_by(folder) | installed_by(README.parent) | {f"langchain_latentmas_{name}"}
    assert imported_by(code) - there == set()


def test_the_package_installs_what_it_imports() -> None:
    there = installed_by(README.parent, "serve", "vllm", "eval", "quant", "viz") | {"langchain_latentmas"}
    there |= {"starlette", "tokenizers"}  # what fastapi and transformers are made of
    for module in sorted((README.parent / "langchain_latentmas").rglob("*.py")):
        assert imported_by(module.read_text()) - there == set(), module
