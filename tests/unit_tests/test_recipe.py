"""The recipe of the bundled model: its rows, and how it finds what was not learned yet."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_latentmas.bundled import MODEL, train
from langchain_latentmas.bundled.tasks import grade
from langchain_latentmas.bundled.train import SPEAKERS, SPLIT_TEXTS, SPOKEN, TEXTS, Data, Row, Trainer, weak_speakers

THINKERS = ("alone", "latent", "latent patterns")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def spoken(row: Row, tokenizer: Any) -> str:
    ids = [token for token, kind in zip(row.ids, row.kinds, strict=True) if kind == SPOKEN]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("kind", [*THINKERS, "text", "text patterns", *TEXTS, *SPLIT_TEXTS])
def test_batches_hold_all_rows_and_no_more_tokens_than_asked_for(kind: str, tokenizer: Any) -> None:
    batches = Data(tokenizer, seed=3).pool(kind, 60, tokens=1200)
    assert sum(map(len, batches)) == 60
    for batch in batches:
        longest = max(len(row.ids) for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= 1200
        assert all(len(row.ids) == len(row.kinds) == len(row.blocks) for row in batch)
        assert all(SPOKEN in row.kinds for row in batch)


@pytest.mark.parametrize("kind", ["sum", "all"])
def test_turns_about_three_facts_end_in_the_sum_of_what_they_say(kind: str, tokenizer: Any) -> None:
    for batch in Data(tokenizer, seed=4).pool(kind, 20, tokens=2000):
        for row in batch:
            said = spoken(row, tokenizer)
            assert grade(said, int(said.split(" = ")[-1].split(".")[0]))


def test_turns_that_end_at_the_name_say_it_and_no_more(tokenizer: Any) -> None:
    for batch in Data(tokenizer, seed=5).pool("name", 20, tokens=2000):
        for row in batch:
            asked = str(tokenizer.decode([id for id, kind in zip(row.ids, row.kinds, strict=True) if kind != SPOKEN]))
            said = spoken(row, tokenizer).removeprefix("Let us go step by step. ")
            assert said.endswith(".")
            assert f"user\n{said}" in asked
            assert row.kinds[-1] == SPOKEN


def test_what_is_told_wrong_is_found_and_what_is_right_is_left_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda body, **_: body)
    monkeypatch.setattr(train, "MEASURED", 12)
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager")
    trainer = Trainer(model, alignment=0.5)
    # Of twelve rows one may be wrong by chance; the recipe looks at hundreds.
    monkeypatch.setattr(train, "RIGHT", 0.9)
    assert weak_speakers(trainer, tokenizer) == {}
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.zero_()  # it writes on, but cannot add
    weak = weak_speakers(trainer, tokenizer)
    assert {"all", "sum"} <= weak.keys() <= set(SPEAKERS)
    assert all(0.1 < share <= 1 for share in weak.values())
