import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from langchain_latentmas.engine.kv import KV
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.rotary import Rotary, _halves, _pairs

from ..conftest import load_parts
from ..support import kv_difference, kv_equal

SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
FREQUENCIES = 10000 ** -(torch.arange(0, 16, 2).double() / 16)
STYLES = [_halves, _pairs]


def some_kv(width: int = 16) -> KV:
    generator = torch.Generator().manual_seed(1)
    return KV(
        [torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for _ in range(3)],
        [torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for _ in range(3)],
    )


@pytest.mark.parametrize("style", STYLES)
@given(st.integers(-3000, 3000), st.integers(-3000, 3000))
def test_turns_compose(style, a: int, b: int) -> None:
    rotary, kv = Rotary(FREQUENCIES, style), some_kv()
    assert kv_difference(rotary.turn(rotary.turn(kv, a), b), rotary.turn(kv, a + b)) < 1e-9


@pytest.mark.parametrize("style", STYLES)
@given(st.integers(-3000, 3000))
def test_a_turn_keeps_lengths_and_values(style, offset: int) -> None:
    kv = some_kv()
    turned = Rotary(FREQUENCIES, style).turn(kv, offset)
    assert turned.values is kv.values
    for before, after in zip(kv.keys, turned.keys, strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))


def test_no_offset_is_no_work() -> None:
    kv = some_kv()
    assert Rotary(FREQUENCIES, _halves).turn(kv, 0) is kv


def test_dimensions_beyond_the_rotary_ones_stay() -> None:
    kv = some_kv(24)
    turned = Rotary(FREQUENCIES, _halves).turn(kv, 9)
    assert torch.equal(turned.keys[0][..., 16:], kv.keys[0][..., 16:])
    assert not torch.equal(turned.keys[0][..., :16], kv.keys[0][..., :16])


def test_half_precision_keys_are_turned_in_float32() -> None:
    kv = some_kv()
    half = KV([keys.bfloat16() for keys in kv.keys], [values.bfloat16() for values in kv.values])
    rotary = Rotary(FREQUENCIES, _halves)
    exact = rotary.turn(KV([keys.double() for keys in half.keys], half.values), 1234)
    turned = rotary.turn(half, 1234)
    assert turned.keys[0].dtype == torch.bfloat16
    assert torch.equal(turned.keys[0], exact.keys[0].bfloat16())


def random_model(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config).double().eval()


@pytest.mark.parametrize(
    ("model", "style"),
    [
        (random_model(LlamaForCausalLM, LlamaConfig(**SMALL)), _halves),
        (random_model(Qwen2ForCausalLM, Qwen2Config(**SMALL)), _halves),
        (random_model(CohereForCausalLM, CohereConfig(**SMALL, logit_scale=1.0)), _pairs),
        (
            random_model(
                LlamaForCausalLM,
                LlamaConfig(
                    **SMALL,
                    rope_parameters={
                        "rope_type": "yarn",
                        "rope_theta": 1e4,
                        "factor": 2.0,
                        "original_max_position_embeddings": 256,
                    },
                ),
            ),
            _halves,
        ),
    ],
    ids=["llama", "qwen2 with biases", "cohere turns pairs", "yarn"],
)
def test_the_convention_of_a_model_is_found_by_trial(model: PreTrainedModel, style) -> None:
    language_model = LanguageModel(model, load_parts("qwen3-tied", "float64")[1])
    assert language_model.rotary is not None
    assert language_model.rotary.style is style


def test_frequencies_that_do_not_fit_the_keys_are_noticed() -> None:
    language_model = LanguageModel(*load_parts("qwen3-tied", "float64"))
    model = torch.nn.Module()
    model.register_buffer("inv_freq", language_model.rotary.frequencies * 1.01)  # type: ignore[union-attr]
    with torch.inference_mode():
        assert Rotary.probe(model, language_model._probe_keys, 64, 1e-3) is None
        assert Rotary.probe(torch.nn.Module(), language_model._probe_keys, 64, 1e-3) is None


@pytest.mark.parametrize("kv", [some_kv(), some_kv().stacked()], ids=["layers apart", "stacked"])
def test_what_is_split_is_joined_again_in_storage_of_its_own(kv: KV) -> None:
    parts = kv.split([2, 3])
    assert [part.positions for part in parts] == [2, 3]
    assert kv_equal(KV.join(parts), kv)
    tensors = [t for part in parts for side in part for t in ([side] if isinstance(side, torch.Tensor) else side)]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    assert sum(part.nbytes for part in parts) == kv.nbytes
    with pytest.raises(ValueError, match="5 positions cannot be cut"):
        kv.split([2, 9])
