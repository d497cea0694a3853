"""What a client has to know before it thinks with a vLLM."""

from importlib.metadata import version
from typing import Any

from transformers import AutoTokenizer
from vllm import __version__ as vllm_version

from . import SUPPORTED
from .fingerprint import fingerprint, vocabulary_digest
from .latent_token import latent_token_id


def tokenizer_of(config: Any) -> Any:
    """The transformers tokenizer of a `vllm.config.VllmConfig`."""
    model = config.model_config
    return AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )


def facts(config: Any) -> dict[str, Any]:
    """What a vLLM says of itself, once it has loaded its weights.

    Args:
        config: A `vllm.config.VllmConfig`.

    Returns:
        Plain JSON; `latent_token_id` is None if the model was started without a latent token, `fingerprint` if its
        weights are in no safetensors files.

    Raises:
        ValueError: If no row of the vocabulary can be LATENT.
    """
    model, text = config.model_config, config.model_config.hf_text_config
    thinks = model.architecture.startswith("Latent")
    tokenizer = tokenizer_of(config)
    tied = bool(getattr(text, "tie_word_embeddings", False))
    return {
        "fingerprint": fingerprint(model.model, model.revision, tokenizer, tied, config.load_config.download_dir),
        "vocabulary": vocabulary_digest(tokenizer),
        "latent_token_id": latent_token_id(text, tokenizer) if thinks else None,
        "alignment": "realign" if getattr(text, "latent_realign", True) else "rescale",
        "architecture": model.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "max_logprobs": model.max_logprobs,
        "logprobs_mode": model.logprobs_mode,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "block_size": config.cache_config.block_size,
        "revision": model.revision,
        "vllm": vllm_version,
        "vllm_supported": str(SUPPORTED),
        "latentmas_vllm": version("latentmas-vllm"),
    }
