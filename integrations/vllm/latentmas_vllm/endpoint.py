"""`GET /latentmas`: what a client has to know before it thinks here."""

import asyncio
from argparse import Namespace
from importlib.metadata import version
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from starlette.datastructures import State
from transformers import AutoTokenizer
from vllm import __version__ as vllm_version

from .fingerprint import fingerprint, vocabulary_digest
from .latent_token import latent_token_id


def facts(config: Any) -> dict[str, Any]:
    """What the server says of itself.

    Args:
        config: A `vllm.config.VllmConfig`.

    Returns:
        Plain JSON; `latent_token_id` is None if the model was started without a latent token, `fingerprint` if its
        weights are in no safetensors files.
    """
    model, text = config.model_config, config.model_config.hf_text_config
    thinks = model.architecture.startswith("Latent")
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    tied = bool(getattr(text, "tie_word_embeddings", False))
    return {
        "fingerprint": fingerprint(model.model, model.revision, tokenizer, tied),
        "vocabulary": vocabulary_digest(tokenizer),
        "latent_token_id": latent_token_id(text, tokenizer) if thinks else None,
        "alignment": "realign" if getattr(text, "latent_realign", True) else "rescale",
        "architecture": model.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "max_logprobs": model.max_logprobs,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "block_size": config.cache_config.block_size,
        "vllm": vllm_version,
        "latentmas_vllm": version("latentmas-vllm"),
    }


class Endpoint:
    """Entry point of `vllm.endpoint_plugins`; vLLM loads it where `VLLM_PLUGINS` names it."""

    name: ClassVar[str] = "latentmas"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the route."""

        @app.get("/latentmas")
        async def latentmas(request: Request) -> dict[str, Any]:
            return dict(await asyncio.shield(request.app.state.latentmas))

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Collects the facts, once; hashing the weights takes seconds per gigabyte and does not hold up the start."""
        state.latentmas = asyncio.create_task(asyncio.to_thread(facts, engine_client.vllm_config))
