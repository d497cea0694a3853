from types import SimpleNamespace
from typing import Any

import pytest
from latentmas_vllm.checks import refusals


def config(**changes: Any) -> SimpleNamespace:
    """A configuration of vLLM as far as it is looked at; `a__b=1` sets `config.a.b`."""
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        model_config=SimpleNamespace(
            enable_prompt_embeds=False,
            max_model_len=4096,
            hf_text_config=SimpleNamespace(sliding_window=None, rope_parameters={}, max_position_embeddings=4096),
        ),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        *parts, last = path.split("__")
        place: Any = made
        for part in parts:
            place = getattr(place, part)
        setattr(place, last, value)
    return made


def test_an_ordinary_server_thinks() -> None:
    assert refusals(config()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"model_config__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"model_config__hf_text_config__sliding_window": 1024}, "--max-model-len 1024"),
        (
            {
                "model_config__hf_text_config__rope_parameters": {
                    "rope_type": "dynamic",
                    "original_max_position_embeddings": 2048,
                }
            },
            "--max-model-len 2048",
        ),
    ],
)
def test_what_would_be_silently_wrong_is_refused_and_the_flag_is_named(change: dict[str, Any], named: str) -> None:
    reasons = refusals(config(**change))
    assert len(reasons) == 1
    assert named in reasons[0]


@pytest.mark.parametrize(
    "change",
    [
        {"model_config__hf_text_config__sliding_window": 4096},  # no wider than the context
        {
            "model_config__hf_text_config__sliding_window": 1024,
            "model_config__hf_text_config__use_sliding_window": False,
        },
        {
            "model_config__hf_text_config__sliding_window": 1024,
            "model_config__hf_text_config__layer_types": ["full_attention"],
        },
        {"model_config__hf_text_config__rope_parameters": {"rope_type": "yarn"}},
        {"kv_transfer_config": object(), "model_config__hf_text_config__latent_kv_transfer": True},
    ],
)
def test_what_is_exact_is_not_refused(change: dict[str, Any]) -> None:
    assert refusals(config(**change)) == []
