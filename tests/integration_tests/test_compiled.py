"""Decode steps through torch.compile; one layer, since compiling takes its time."""

import os
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.sampling import Sampling
from langchain_latentmas.engine.tick import Result, Row, Ticker

from ..conftest import load_parts
from ..support import PARITY, relative


def run(model: LanguageModel) -> list[Result]:
    """Three ragged rows at once, then one alone."""
    results: list[Result] = []
    ticker = Ticker(model, max_rows=4, live_bytes=1 << 40)
    with torch.inference_mode():
        for length in (9, 2, 5):
            how = {"sampling": Sampling(max_tokens=6)} if length == 2 else {"steps": length}
            ids = torch.arange(3, 3 + length).tolist()
            ticker.join(Row((), 0, [ids], on_done=results.append, on_error=pytest.fail, **how))
        while ticker.rows:
            ticker.step()
    return results


@pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])), reason="torch.compile takes a C++ compiler"
)
@pytest.mark.timeout(600)
def test_compiled_steps_give_what_computed_ones_give() -> None:
    folder = PARITY / "qwen3-tied" / "model"
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=1, layer_types=["full_attention"])
    assert config.num_attention_heads > config.num_key_value_heads  # heads are packed, not copied
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = load_parts("qwen3-tied", "float32")[1]
    expected = run(LanguageModel(plain, tokenizer))
    compiled = LanguageModel(plain, tokenizer, compile=True)
    assert compiled.compiled
    for ours, theirs in zip(run(compiled), expected, strict=True):
        assert ours.tokens == theirs.tokens
        if len(theirs.thoughts):
            assert relative(ours.thoughts, theirs.thoughts) < 1e-4
