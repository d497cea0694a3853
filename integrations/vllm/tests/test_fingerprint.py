import json
from pathlib import Path

import pytest
import torch
from latentmas_vllm.fingerprint import fingerprint, vocabulary_digest
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_latentmas.bundled import MODEL
from langchain_latentmas.engine.model import LanguageModel

PARITY = Path(__file__).parents[3] / "tests" / "data" / "parity"


@pytest.mark.parametrize(
    ("folder", "tied"),
    [(MODEL, True), (PARITY / "qwen3-tied" / "model", True), (PARITY / "llama-untied" / "model", False)],
    ids=["bundled", "tied", "untied"],
)
def test_as_for_the_same_model_in_process(folder: Path, tied: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert fingerprint(str(folder), None, tokenizer, tied) == LanguageModel.load(str(folder)).fingerprint


def test_values_count_and_not_files_or_dtypes(tmp_path: Path) -> None:
    folder = PARITY / "llama-untied" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow", max_shard_size="200KB")
    model.float().save_pretrained(tmp_path / "wide")
    narrow = fingerprint(str(tmp_path / "narrow"), None, tokenizer, False)
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 1
    assert narrow == fingerprint(str(tmp_path / "wide"), None, tokenizer, False)
    assert narrow != fingerprint(str(folder), None, tokenizer, False)


def test_a_model_of_the_hub_of_which_only_what_vllm_takes_is_here(tmp_path: Path) -> None:
    folder, commit = PARITY / "llama-untied" / "model", "c" * 40
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / commit
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(snapshot, max_shard_size="200KB")
    for name, text in {
        "refs/main": commit,
        # What the hub's client noted when vLLM loaded: the repository's files, and not only those that are here.
        f"trees/{commit}.json": json.dumps(
            {"format_version": 1, "files": {"original/params.json": {"size": 1, "blob_id": "b" * 40}}}
        ),
    }.items():
        (cache / name).parent.mkdir()
        (cache / name).write_text(text)
    known = fingerprint(str(folder), None, tokenizer, False)
    assert fingerprint("some/model", None, tokenizer, False, str(tmp_path)) == known
    assert fingerprint("some/model", commit, tokenizer, False, str(tmp_path)) == known
    assert fingerprint("some/other", None, tokenizer, False, str(tmp_path)) is None


def test_another_vocabulary_is_another_model() -> None:
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (MODEL, PARITY / "qwen3-tied" / "model"))
    assert vocabulary_digest(one) != vocabulary_digest(other)


def test_weights_in_other_files_have_none(tmp_path: Path) -> None:
    assert fingerprint(str(tmp_path), None, AutoTokenizer.from_pretrained(MODEL), True) is None
