import json
import sys

import pytest
from typer.testing import CliRunner

from langchain_latentmas.cli import app
from langchain_latentmas.commands.doctor import Finding, diagnose
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.errors import InvalidRequest

from ..conftest import load_parts
from ..support import PARITY
from ..vllm_double import VLLMDouble

FOLDER = str(PARITY / "qwen3-tied" / "model")


@pytest.fixture
def double() -> VLLMDouble:
    return VLLMDouble(*load_parts("qwen3-tied", "float32"), FOLDER)


def by_name(double: VLLMDouble, model: str | None = None, **settings: object) -> dict[str, Finding]:
    return {f.name: f for f in diagnose("http://there:8000", model, {"patience": 0, **settings}, double.transport)}


def test_a_server_that_is_as_it_should_be(double: VLLMDouble) -> None:
    assert double.facts
    double.facts["fingerprint"] = LanguageModel(*load_parts("qwen3-tied", "float32")).fingerprint
    found = by_name(double, FOLDER)
    assert [finding.fine for finding in found.values()] == [True] * 10
    assert found["LATENT"].said.startswith("token 0 of LatentQwen3ForCausalLM")
    assert not any(finding.way_out for finding in found.values())


def test_another_model_than_expected(double: VLLMDouble) -> None:
    found = by_name(double, str(PARITY / "llama-untied" / "model"))
    assert (found["weights"].fine, found["greedy probe"].fine) == (False, False)
    assert "--model" in found["greedy probe"].way_out


def test_what_the_environment_tells_a_client_is_not_for_the_model_that_is_loaded_to_compare(
    double: VLLMDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTMAS_OPTIONS", json.dumps({"tokenizer": FOLDER, "patience": 3}))
    assert by_name(double, FOLDER)["greedy probe"].fine


def test_a_model_that_cannot_be_loaded_takes_nothing_away_that_was_found(double: VLLMDouble) -> None:
    found = by_name(double, "/no/such/model")
    assert [name for name, finding in found.items() if finding.fine is False] == ["weights"]
    assert "/no/such/model" in found["weights"].said
    assert found["thinks and speaks"].fine


@pytest.mark.parametrize(
    ("facts", "name", "fine", "flag"),
    [
        (None, "plugin", False, "VLLM_PLUGINS=latentmas"),
        ({"latent_token_id": None}, "plugin", False, "--hf-overrides"),
        ({"prefix_caching": False}, "prefix caching", None, "--enable-prefix-caching"),
        ({"block_size": 128}, "prefix caching", None, "--block-size 32"),
        ({"max_logprobs": 0}, "lens", None, "--max-logprobs"),
        ({"logprobs_mode": "raw_logits"}, "lens", None, "--logprobs-mode raw_logprobs"),
        ({"vocabulary": "other"}, "tokenizer", False, "--tokenizer"),
    ],
)
def test_each_line_that_is_not_fine_names_the_flag(
    facts: dict[str, object] | None, name: str, fine: bool | None, flag: str, double: VLLMDouble
) -> None:
    double.facts = facts and {**(double.facts or {}), **facts}
    finding = by_name(double)[name]
    assert finding.fine is fine
    assert flag in finding.way_out


def test_a_key_that_is_wrong(double: VLLMDouble) -> None:
    double.key = "secret"
    assert "token=" in by_name(double)["server"].said
    assert by_name(double, token="secret")["server"].fine


def test_nobody_there_is_told_with_exit_code_1() -> None:
    result = CliRunner().invoke(app, ["doctor", "http://127.0.0.1:9", "--json"])
    assert result.exit_code == 1
    [finding] = json.loads(result.stdout)["findings"]
    assert (finding["name"], finding["fine"]) == ("server", False)
    assert "vllm serve" in finding["way_out"]
    assert CliRunner().invoke(app, ["doctor", "http://127.0.0.1:9"]).exit_code == 1


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain_latentmas.service.vllm", None)  # as if httpx were not installed
    result = CliRunner().invoke(app, ["doctor", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "MissingExtra" in result.stderr


def test_a_token_that_is_none_is_said_in_one_line(double: VLLMDouble) -> None:
    with pytest.raises(InvalidRequest, match="printable ASCII"):
        by_name(double, token="two\nlines")
