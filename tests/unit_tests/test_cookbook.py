"""The notebooks as they are committed; `make notebooks` runs them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

COOKBOOK = Path(__file__).parents[2] / "cookbook"
NOTEBOOKS = sorted(path.name for path in COOKBOOK.glob("*.ipynb"))


def read(name: str) -> dict[str, Any]:
    return json.loads((COOKBOOK / name).read_text())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_rendered_from_top_to_bottom_and_leaves_the_machine_out(name: str) -> None:
    code = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not [cell["metadata"] for cell in code if cell["metadata"]]
    pictures = [output["data"].pop("image/png", None) for output in outputs if "data" in output]
    assert any(pictures) or any("text/html" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(home|root|Users|tmp|work)/|site-packages", json.dumps(outputs))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_what_it_shows_and_what_to_change(name: str) -> None:
    prose = ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown"]
    assert prose[0].startswith("# ")
    assert "**What this shows:**" in prose[0]
    assert "## With your model" in prose[-1]
    for target in re.findall(r"\]\((?!http)([^)#]+)", "\n".join(prose)):
        assert (COOKBOOK / target).exists()


def test_the_index_names_every_notebook() -> None:
    assert re.findall(r"\]\((\w+\.ipynb)\)", (COOKBOOK / "README.md").read_text()) == NOTEBOOKS
