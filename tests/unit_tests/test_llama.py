"""Our own forward pass computes what the decoder of transformers does, and is given up where it would not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from langchain_latentmas.engine import attention, llama
from langchain_latentmas.engine import linear as linear_module
from langchain_latentmas.engine.linear import LARGE, Linear, linear, packable
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.ragged import Ragged
from langchain_latentmas.engine.slots import Window
from langchain_latentmas.errors import ModelNotSupported
from langchain_latentmas.service.local import LocalService, LocalSettings

from ..conftest import load_parts
from ..support import kv_difference, messages, relative, say
from .test_model import GPT2, random_model

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KIN = [
    ("llama", GROUPED),
    ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
    ("mistral", {**GROUPED, "head_dim": 16, "sliding_window": None}),
    ("qwen2", {**GROUPED, "rope_parameters": YARN}),
    ("qwen3", {**GROUPED, "head_dim": 32, "tie_word_embeddings": True}),
]


def wrapped(kind: str, dtype: torch.dtype, **config: Any) -> LanguageModel:
    return LanguageModel(random_model(kind, **config).to(dtype), load_parts("qwen3-tied", "float64")[1])


def both(model: LanguageModel, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states of ragged rows and one step more, from our own forward pass and from the decoder as it is."""
    torch.manual_seed(1)
    found, total, rows = [], sum(lengths), len(lengths)
    embeds = torch.randn(total + rows, model.config.hidden_size).to(model.dtype)
    for forward in (model._forward, model._as_it_is):
        cache, model._forward, model.decode = model.new_cache(), forward, forward
        with torch.inference_mode():
            first = model._on_slots(embeds[:total], lengths, [0] * rows, cache)
            last = model._on_slots(embeds[total:], [1] * rows, lengths, cache)
        found.append(torch.cat([first, last]))
    return found[0], found[1]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(("kind", "config"), KIN)
def test_our_own_forward_pass_is_the_decoder(
    kind: str, config: dict[str, Any], dtype: torch.dtype, most: float
) -> None:
    model = wrapped(kind, dtype, **config)
    assert model.decoder_fault == ""
    assert isinstance(model._forward, llama.LlamaDecoder)
    ours, theirs = both(model, [1, 2, 3, 4, 5])
    assert relative(ours.double(), theirs.double()) < most


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 1, 4], [140, 3, 150]])
def test_the_last_position_of_each_row_can_be_asked_for(kind: str, lengths: list[int]) -> None:
    model = wrapped(kind, torch.float64, **dict(KIN).get(kind, {}), max_position_embeddings=256)
    embeds, ragged = torch.randn(sum(lengths), 64).double(), Ragged(lengths, [0, 0, 0], model.device)
    found, caches = [], []
    for last_only in (False, True):
        cache = model.new_cache()
        cache.reserve(3, 256)
        cache.window = Window(slice(0, 3), cache.capacity, ragged)
        with torch.inference_mode():
            found.append(model.hidden(embeds, ragged.cells, model.masks(ragged), cache, last_only))
        caches.append(cache)
    assert found[1].shape == (3, 64)
    assert relative(found[1], found[0][torch.tensor(lengths).cumsum(0) - 1]) < 1e-12
    for row, length in enumerate(lengths):
        assert kv_difference(caches[0].read(row, 0, length), caches[1].read(row, 0, length)) < 1e-12


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 1, 4], [140, 3, 150]])
def test_where_heads_become_positions_masks_are_repeated_once_a_pass(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    model = wrapped("qwen3", torch.float64, **dict(KIN)["qwen3"])
    monkeypatch.setattr(attention, "copies", lambda device: True)  # as on a GPU
    made, repeat = list[Tensor](), Tensor.repeat
    monkeypatch.setattr(Tensor, "repeat", lambda tensor, *times: made.append(tensor) or repeat(tensor, *times))
    ours, theirs = both(model, lengths)
    assert relative(ours, theirs) < 1e-12
    runs = [run for run in Ragged(lengths, [0, 0, 0], model.device).runs if run.new > 1]
    assert len(made) == len(runs)  # whatever the number of layers; none where rows decode


@pytest.mark.parametrize(("kind", "config"), [("gemma", {"head_dim": 32}), ("phi3", {}), ("gpt2", GPT2)])
def test_other_decoders_are_used_as_they_are(kind: str, config: dict[str, Any]) -> None:
    with LocalService(wrapped(kind, torch.float64, **config), LocalSettings()) as service:
        assert "may have layers of another kind" in service.info()["decoder"]


def test_another_activation_is_not_ours() -> None:
    assert "its activation is gelu" in wrapped("llama", torch.float64, hidden_act="gelu").decoder_fault


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_result_that_differs_is_given_up_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    plain = wrapped("qwen3", dtype, **dict(KIN)["qwen3"])
    with monkeypatch.context() as patch:
        patch.setattr(llama, "_turned", lambda x, cos, sin: x * cos)
        model = wrapped("qwen3", dtype, **dict(KIN)["qwen3"])
    assert "decoded by transformers" in caplog.text
    with LocalService(model, LocalSettings()) as service, LocalService(plain, LocalSettings()) as other:
        assert "logits are off by" in service.info()["decoder"]
        assert other.info()["decoder"] == "own"
        asked = messages("What is 1 + 1?")
        assert say(service, asked, temperature=0).token_ids == say(other, asked, temperature=0).token_ids


def test_a_hook_is_called_as_soon_as_it_is_there() -> None:
    model, seen = wrapped("llama", torch.float64), []
    with LocalService(model, LocalSettings()) as service:
        service.think(messages("one"), steps=2)
        mlp = model.decoder.get_submodule("layers.1.mlp")
        hook = mlp.register_forward_hook(lambda *_: seen.append(1))
        service.think(messages("two"), steps=2)
        assert len(seen) == 3  # a prefill and two steps
        assert "hook" in service.info()["decoder"]
        hook.remove()
        service.think(messages("three"), steps=2)
        assert len(seen) == 3
        assert service.info()["decoder"] == "own"


def test_an_adapter_in_place_of_a_linear_layer_is_used() -> None:
    model = wrapped("llama", torch.float64)
    with LocalService(model, LocalSettings()) as service:
        before = say(service, messages("one"), temperature=0).token_ids
        mlp = model.decoder.get_submodule("layers.0.mlp")
        mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Tanh())
        assert say(service, messages("one"), temperature=0).token_ids != before
        assert "a Sequential was put in" in service.info()["decoder"]


class Doubled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_module_of_another_class_is_called() -> None:
    model = wrapped("llama", torch.float64)
    with LocalService(model, LocalSettings()) as service:
        before = say(service, messages("one"), temperature=0).token_ids
        layer: Any = model.decoder.get_submodule("layers.0")
        other = Doubled(model.decoder.config).double()
        other.load_state_dict(layer.mlp.state_dict())
        layer.mlp = other
        assert say(service, messages("one"), temperature=0).token_ids != before
        assert "a Doubled was put in" in service.info()["decoder"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp", "lm_head"])
def test_a_forward_put_over_that_of_a_module_is_called(name: str) -> None:
    model = wrapped("llama", torch.float64)
    with LocalService(model, LocalSettings()) as service:
        module, fingerprint = model.model.get_submodule(name), model.fingerprint
        before = say(service, messages("one"), temperature=0).token_ids
        plain = module.forward
        module.forward = lambda x: -plain(x)
        assert say(service, messages("two"), temperature=0).token_ids != before
        other = say(service, messages("one"), temperature=0).token_ids
        assert other != before
        del module.forward
        assert say(service, messages("one"), temperature=0).token_ids == before
        assert model.fingerprint == fingerprint


def test_a_wrapped_norm_is_no_obstacle_to_loading() -> None:
    parts = random_model("llama"), load_parts("qwen3-tied", "float64")[1]
    layer: Any = parts[0].get_decoder().get_submodule("layers.0")
    layer.input_layernorm = nn.Sequential(layer.input_layernorm)
    assert "was put in" in LanguageModel(*parts).decoder_fault


def test_a_hook_makes_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = wrapped("llama", torch.float64), []
    monkeypatch.setattr(model, "refresh", lambda: taken.append(1))
    hook = model.decoder.get_submodule("layers.1.mlp").register_forward_hook(lambda *_: None)
    model.refresh_if_changed()
    assert "hook" in model.decoder_fault
    hook.remove()
    model.refresh_if_changed()
    assert model.decoder_fault == ""
    assert not taken


def test_to_ask_for_hidden_states_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = wrapped("llama", torch.float64), []
    monkeypatch.setattr(model, "_choose_forward", lambda: chosen.append(1))
    model.model(torch.tensor([[5, 6]]), output_hidden_states=True)
    hooks = [hook for module in model.decoder.modules() for hook in module._forward_hooks.values()]
    assert hooks  # transformers leaves them there
    model.refresh_if_changed()
    assert not chosen
    assert LanguageModel(model.model, model.tokenizer).decoder_fault == ""


def test_a_parameter_put_in_is_the_one_that_is_used() -> None:
    model = wrapped("llama", torch.float64)
    with LocalService(model, LocalSettings()) as service:
        before = say(service, messages("one"), temperature=0).token_ids
        norm = model.decoder.get_submodule("layers.0.input_layernorm")
        norm.weight = nn.Parameter(-3 * norm.weight)
        assert say(service, messages("one"), temperature=0).token_ids != before
        ours, theirs = both(model, [1, 2, 4])
        assert relative(ours, theirs) < 1e-12


def test_prefills_of_any_size_come_in_few_sizes() -> None:
    sizes = {n: len(llama._padded(torch.zeros(n, 1))) for n in range(1, 2049)}
    assert all(n <= size < 1.125 * n for n, size in sizes.items())
    assert len({size for n, size in sizes.items() if n > llama.FEW}) == 5 * 8


@pytest.mark.parametrize(
    "lengths",
    [[11], [1, 11, 3, 11, 5, 6, 7, 8, 9], [11] * 13, [230], [5, 140, 130, 3, 200, 200, 7], [150, 150, 20, 20, 20]],
    ids=["one row", "ragged", "even", "one long row", "ragged, in several runs", "even in each run"],
)
def test_rows_of_any_lengths_are_computed_as_with_padding(lengths: list[int]) -> None:
    model = wrapped("qwen3", torch.float64, **dict(KIN)["qwen3"])
    ours, theirs = both(model, lengths)
    assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, LARGE // 64 // 32, 64), (40, LARGE // 64 // 32, 64), (2, 3, 96), (64,)])
def test_a_matrix_product_is_the_same_wherever_it_is_computed(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(32, shape[-1])
    offset = torch.randn(32) if bias else None
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert relative(linear(x, weight, offset).double(), exact) < 1e-5
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize(("intel", "lags"), [(False, True), (False, False), (True, False)])
def test_large_products_of_single_precision_go_to_onednn(
    monkeypatch: pytest.MonkeyPatch, intel: bool, lags: bool
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    called = []
    monkeypatch.setattr(linear_module.F, "linear", lambda *_: called.append(1))
    monkeypatch.setattr(linear_module, "MKL_LAGS", lags)
    monkeypatch.setattr(linear_module, "INTEL", intel)
    module = nn.Linear(1024, LARGE // 1024, bias=False)
    for product in (Linear(module), Linear(module, packed=True)):
        product(torch.randn(3, 1024))
        assert not called
        product(torch.randn(2, 1024))
        assert len(called) == intel
        called.clear()
    many, few, weight = torch.randn(LARGE // 64 // 32, 64), torch.randn(1, 64), torch.randn(32, 64)
    linear(many, weight)
    assert len(called) == (not lags)  # a small matrix
    linear(few, weight)
    linear(many.double(), weight.double())
    linear(many.bfloat16(), weight.bfloat16())
    assert len(called) == 3 + (not lags)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_packed_layer_computes_the_same(dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    module = nn.Linear(1024, LARGE // 1024).to(dtype)
    if not packable(module.weight):
        pytest.skip("this processor takes no weights of that dtype in oneDNN")
    packed, plain = Linear(module, packed=True), Linear(module)
    assert packed._packed is not None
    with torch.inference_mode():
        for x in (torch.randn(1, 1024), torch.randn(3, 40, 1024)):
            assert relative(packed(x.to(dtype)).double(), plain(x.to(dtype)).double()) < most


def test_small_layers_are_not_packed() -> None:
    assert Linear(nn.Linear(64, 64), packed=True)._packed is None


def test_a_packed_model_says_the_same_and_notices_changed_weights() -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    parts = random_model("llama", **wide).float(), load_parts("qwen3-tied", "float64")[1]
    if not packable(parts[0].get_decoder().norm.weight):
        pytest.skip("this torch has no oneDNN")
    plain, packed = LanguageModel(*parts), LanguageModel(*parts, pack=True)
    with LocalService(plain, LocalSettings()) as one, LocalService(packed, LocalSettings()) as other:
        assert other.info()["packed"]
        before = say(other, messages("one"), temperature=0).token_ids
        assert say(one, messages("one"), temperature=0).token_ids == before
        with torch.no_grad():
            parts[0].get_decoder().get_submodule("layers.0.mlp.down_proj").weight.mul_(-1)
        after = say(other, messages("one"), temperature=0).token_ids
        assert after != before
        assert say(one, messages("one"), temperature=0).token_ids == after


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float64), ("phi3", torch.float32)])
def test_packing_what_cannot_be_packed_is_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelNotSupported, match=r"pack=True has no use here, since .*; leave it out"):
        LanguageModel(random_model(kind).to(dtype), load_parts("qwen3-tied", "float64")[1], pack=True)
