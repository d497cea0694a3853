"""The code of the README runs as it stands."""

import re
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
