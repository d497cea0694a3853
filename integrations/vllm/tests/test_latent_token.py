from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latentmas_vllm.latent_token import latent_token_id
from transformers import AutoConfig, AutoTokenizer

from langchain_latentmas.bundled import MODEL

PARITY = Path(__file__).parents[3] / "tests" / "data" / "parity"


def tokenizer(special: dict[str, int], size: int = 100, **named: Any) -> SimpleNamespace:
    class Token(SimpleNamespace):
        def __str__(self) -> str:
            return self.text

    added = {i: Token(text=text, special=True) for text, i in special.items()}
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None, **named}
    vocabulary = {f"t{i}": i for i in range(size) if i not in added} | special
    return SimpleNamespace(get_vocab=lambda: vocabulary, added_tokens_decoder=added, **ids)


def config(size: int = 100, **named: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"vocab_size": size, "pad_token_id": None, **named})


def test_the_bundled_model_has_a_token_for_it() -> None:
    there = AutoTokenizer.from_pretrained(MODEL)
    assert there.convert_ids_to_tokens(latent_token_id(AutoConfig.from_pretrained(MODEL), there)) == "<|latent|>"


@pytest.mark.parametrize("model", ["qwen3-tied", "llama-untied"])
def test_the_parity_models_have_padding_to_spare(model: str) -> None:
    folder = PARITY / model / "model"
    assert latent_token_id(AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)) == 0


def test_a_row_beyond_the_tokenizer_comes_before_reserved_tokens() -> None:
    assert latent_token_id(config(128), tokenizer({"<|reserved_special_token_1|>": 50})) == 127


@pytest.mark.parametrize("name", ["<|reserved_special_token_{}|>", "[control_{}]", "<unused{}>", "<extra_id_{}>"])
def test_the_last_reserved_special_token(name: str) -> None:
    assert latent_token_id(config(), tokenizer({name.format(7): 50, name.format(9): 60, "<|im_end|>": 70})) == 60


def test_the_configuration_decides() -> None:
    assert latent_token_id(config(latent_token_id=3), tokenizer({"<|latent|>": 9})) == 3


@pytest.mark.parametrize("named", [100, -1, "5", True])
def test_a_token_that_is_none_is_refused(named: object) -> None:
    with pytest.raises(ValueError, match="below 100"):
        latent_token_id(config(latent_token_id=named), tokenizer({}))


def test_a_model_without_a_row_to_spare_is_refused_and_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match="latent_token_id"):
        latent_token_id(config(), tokenizer({"</s>": 2}, pad_token_id=2))
