"""Models of well-known shapes with random weights: as fast or slow as the real ones, and nothing to download."""

import hashlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .. import bundled
from ..engine.device import free_bytes
from ..engine.model import LanguageModel
from ..engine.quantization import quantization_config
from ..errors import InvalidRequest, first_line
from .memory import in_gb

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool, factor: float) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "max_position_embeddings": 131072,
        "rope_parameters": {**_LLAMA3, "factor": factor},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, tied=True, factor=32.0),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, tied=True, factor=32.0),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, tied=False, factor=8.0),
}
"""What the configurations on the hub say, as far as speed depends on it."""


class RandomModel(LanguageModel):
    """A model whose random weights stay as they are, and follow from how they were made.

    So they need not be hashed, which for some billions of them takes longer than a measurement.
    """

    def __init__(self, *parts: Any, made: str, **how: Any) -> None:
        """Takes the arguments of `LanguageModel`, and in `made` all that the weights follow from."""
        self._made = made
        super().__init__(*parts, **how)

    def _fingerprint(self) -> str:
        return hashlib.sha256(self._made.encode()).hexdigest()[:32]


def parameters(shape: str) -> int:
    """Number of weights of a shape, tied ones counted once; allocates nothing.

    Raises:
        InvalidRequest: If there is no such shape.
    """
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(_config(shape)).num_parameters())


def build(shape: str, device: str, dtype: torch.dtype, quantization: str | None = None, **how: bool) -> LanguageModel:
    """A model of a shape, its weights random, the tokenizer and its chat template the bundled model's.

    Args:
        shape: One of `SHAPES`.
        device: Where it is made, at once in its dtype.
        dtype: Of the weights.
        quantization: See `LanguageModel.load`.
        **how: `compile` and `pack`, see `LanguageModel`.

    Raises:
        InvalidRequest: If there is no such shape or device, or the one does not fit the other.
        ModelNotSupported: If there is no such quantization.
        MissingExtra: If torchao is needed and not installed.
    """
    quantized = None if quantization is None else quantization_config(quantization, dtype)
    try:
        free = free_bytes(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # no such device; or torch was built without CUDA
        raise InvalidRequest(f"There is no device {device!r} here ({first_line(error)}).") from error
    needed = parameters(shape) * dtype.itemsize
    if needed > free:
        raise InvalidRequest(
            f"{shape} takes {in_gb(needed)} in {str(dtype).removeprefix('torch.')}, and {device} has {in_gb(free)} "
            "free; take a smaller shape or dtype."
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=dtype)
    if quantized is not None:
        from torchao.quantization import quantize_

        quantize_(model.get_decoder(), quantized.quant_type)
    made, tokenizer = f"{shape}, {device}, {dtype}, {quantization}", AutoTokenizer.from_pretrained(bundled.MODEL)
    loaded = RandomModel(model, tokenizer, made=made, name=f"random {shape}", **how)
    loaded.quantization = quantization
    return loaded


def _config(shape: str) -> Any:
    if shape not in SHAPES:
        raise InvalidRequest(f"There is no shape {shape!r}; take one of {', '.join(SHAPES)}.")
    return AutoConfig.for_model(**SHAPES[shape])
