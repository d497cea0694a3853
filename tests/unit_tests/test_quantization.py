"""Weights in 8 bits: exact in themselves, and never mistaken for the model that they were made of."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_latentmas import LatentService
from langchain_latentmas.bundled import MODEL
from langchain_latentmas.engine import quantization as module
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.errors import InvalidRequest, MissingExtra, ModelNotSupported, WrongModel
from langchain_latentmas.service.local import LocalService

from ..support import MODELS, PARITY, at_once, kv_copy, kv_difference, messages, say

EXACT = 1e-8  # relative, in float64
QUESTION = messages("What is 12 plus 30 minus 5?", "You are a judger.")


def load(model: str = "qwen3-tied", **settings: Any) -> LatentService:
    return LatentService.load(str(PARITY / model / "model"), device="cpu", **{"dtype": "float32", **settings})


@pytest.fixture
def int8() -> Iterator[Callable[[], LocalService]]:
    """Services with int8 weights that compute in float64, where exactness can be seen."""
    made: list[LocalService] = []

    def make() -> LocalService:
        folder = str(PARITY / "qwen3-tied" / "model")
        loaded = LanguageModel.load(folder, device="cpu", dtype="float32", quantization="int8")
        made.append(LocalService.from_model(loaded.model.double(), loaded.tokenizer))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_requests_at_once_are_the_requests_one_by_one(int8: Callable[[], LocalService]) -> None:
    prompts = [messages(f"What is {'1 plus ' * i}2?") for i in range(4)]
    one, other = int8(), int8()
    together = at_once([lambda p=p, i=i: one.think(p, steps=3 + i) for i, p in enumerate(prompts)])
    alone = [other.think(p, steps=3 + i) for i, p in enumerate(prompts)]
    assert [ref["id"] for ref in together] == [ref["id"] for ref in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert kv_difference(one.memory(ours), other.memory(theirs)) < EXACT
        assert say(one, QUESTION, [ours]).token_ids == say(other, QUESTION, [theirs]).token_ids


def test_a_memory_is_rebuilt(int8: Callable[[], LocalService]) -> None:
    service = int8()
    ref = service.think(QUESTION, [service.think(messages("Plan."), steps=4)], steps=4)
    before = kv_copy(service.memory(ref))
    service._pool.kept.clear()
    assert kv_difference(service.memory(ref), before) < EXACT


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_bundled_model_still_answers_in_batches_as_alone(kind: str) -> None:
    def ask(service: LatentService, n: int) -> tuple[int, ...]:
        told = messages(f"Tom has {n} apples and buys 30 more. How many apples does he have?")
        return say(
            service, messages("Give the answer.", "You are a judger."), [service.think(told, steps=10)]
        ).token_ids

    with LatentService.load("bundled", device="cpu", quantization=kind) as service:
        together = at_once([lambda n=n: ask(service, n) for n in (3, 12, 41)])
    with LatentService.load("bundled", device="cpu", quantization=kind) as service:
        assert [ask(service, n) for n in (3, 12, 41)] == together


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_linear_layers_shrink_and_the_alignment_stays(model: str, kind: str) -> None:
    with load(model) as plain, load(model, quantization=kind) as service:
        assert isinstance(plain, LocalService)
        assert isinstance(service, LocalService)
        assert torch.equal(service.model.alignment.weight, plain.model.alignment.weight)  # type: ignore[arg-type]
        assert torch.equal(service.model.alignment.norm, plain.model.alignment.norm)
        info, whole = service.info(), plain.info()
        linear = sum(p.numel() for name, p in plain.model.model.named_parameters() if name.endswith("proj.weight"))
        assert (info["quantization"], whole["quantization"]) == (kind, "none")
        assert info["parameters"] == whole["parameters"]
        assert whole["weight_bytes"] == 4 * whole["parameters"]
        assert whole["weight_bytes"] - 3 * linear < info["weight_bytes"] < whole["weight_bytes"] - 2.5 * linear


def test_neither_model_reads_the_memories_of_the_other() -> None:
    with load() as plain, load(quantization="int8") as int8, load(quantization="fp8") as fp8:
        services = [plain, int8, fp8]
        for owner in services:
            ref = owner.think(QUESTION, steps=1)
            for other in services:
                if other is not owner:
                    with pytest.raises(WrongModel):
                        say(other, QUESTION, [ref])


def test_the_same_weights_have_the_same_fingerprint() -> None:
    with load(quantization="int8") as one, load(quantization="int8") as other:
        assert one.info()["fingerprint"] == other.info()["fingerprint"]


def test_quantized_weights_that_were_written_change_the_fingerprint() -> None:
    with load(quantization="int8") as service:
        assert isinstance(service, LocalService)
        ref = service.think(QUESTION, steps=1)
        layers = service.model.model.model.layers
        with torch.no_grad():
            layers[0].self_attn.q_proj.weight.copy_(layers[1].self_attn.q_proj.weight)
        with pytest.raises(WrongModel):
            say(service, QUESTION, [ref])


def test_without_torchao_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_torchao_available", lambda: False)
    with pytest.raises(MissingExtra, match=r"pip install -e .*quant"):
        load(quantization="int8")


def test_float64_cannot_be_quantized() -> None:
    with pytest.raises(ModelNotSupported, match="float64"):
        load(dtype="float64", quantization="int8")


@pytest.mark.parametrize("kind", ["int4", "", 8])
def test_other_kinds_are_refused(kind: Any) -> None:
    with pytest.raises(ModelNotSupported, match="'int8' or 'fp8'"):
        load(quantization=kind)


def test_weights_that_are_quantized_already_are_not_quantized_again(tmp_path: Path) -> None:
    folder = shutil.copytree(PARITY / "qwen3-tied" / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelNotSupported, match=r"quantized already; leave quantization=\.\.\. out"):
        LatentService.load(str(folder), device="cpu", dtype="float32", quantization="int8")


def test_a_loaded_model_is_not_quantized_by_a_setting() -> None:
    with load() as service:
        assert isinstance(service, LocalService)
        with pytest.raises(InvalidRequest, match="quantization"):
            LocalService.from_model(service.model.model, service.model.tokenizer, quantization="int8")


@pytest.mark.parametrize("named", [True, False])
def test_int8_weights_are_refused_in_float16_where_they_overflow(named: bool, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    with pytest.raises(ModelNotSupported, match="codes up before it scales"):
        LatentService.load(str(tmp_path), device="cpu", dtype="float16" if named else "auto", quantization="int8")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(None, "bfloat16"), (None, "float16"), ("int8", "bfloat16"), ("fp8", "bfloat16"), ("fp8", "float16")],
)
def test_16_bits_load_and_are_aligned_in_float32(kind: str | None, dtype: str) -> None:
    with LatentService.load("bundled", device="cpu", dtype=dtype, quantization=kind) as service:
        assert isinstance(service, LocalService)
        assert service.info()["dtype"] == dtype
        assert service.model.alignment.weight is not None
        assert service.model.alignment.weight.dtype == service.model.alignment.norm.dtype == torch.float32
        memory = service.memory(service.think(QUESTION, steps=2))
        assert memory.segments[0].thoughts.dtype == memory.keys[0].dtype == getattr(torch, dtype)
        assert service.info()["kv_bytes_per_position"] == 4 * 2 * 2 * 32 * 2  # layers, sides, heads, their width, bytes
