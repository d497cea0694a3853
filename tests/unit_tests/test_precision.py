"""`python -m benchmarks.precision`: what is refused, and the settings that all precisions have."""

import json

import pytest
import typer

from benchmarks import precision
from langchain_latentmas.engine import quantization


@pytest.fixture(autouse=True)
def precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of them, of which one is refused by a model in float16, and one for want of torchao."""
    monkeypatch.setattr(quantization, "is_torchao_available", lambda: False)
    some = {
        "float16, int8 KV": {"dtype": "float16", "kv_dtype": "int8"},
        "float32": {"dtype": "float32"},
        "int8 weights": {"dtype": "float32", "quantization": "int8"},
        "int8 KV": {"dtype": "float32", "kv_dtype": "int8"},
    }
    monkeypatch.setattr(precision, "PRECISIONS", some)


def test_what_is_refused_says_why_and_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(n=1, device="cpu", as_json=True)
    rows = {row["precision"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [name for name, row in rows.items() if "refused" in row] == ["float16, int8 KV", "int8 weights"]
    assert rows["float16, int8 KV"]["refused"].startswith("ModelNotSupported: ")
    assert rows["float32"]["thoughts_off"] == 0  # the first that ran
    assert 0 < rows["int8 KV"]["thoughts_off"] < 0.1


def test_the_reasons_stand_below_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(n=1, device="cpu")
    tables, reason = capsys.readouterr().out.split("MissingExtra: ")
    assert "bytes of weights" in tables
    assert "pip install -e '.[quant]'" in " ".join(reason.split())


def test_an_option_goes_to_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:  # where none is left
        precision.main(n=1, device="cpu", option=["max_positions=4"], as_json=True)
    assert ended.value.exit_code == 2
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert ["max_positions" in row["refused"] for row in rows] == [True, True, False, True]
