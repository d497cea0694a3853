"""LatentMAS for vLLM: a latent token, whose embedding is the aligned last hidden state of the position before it."""

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures that can think, and the module of `vllm.model_executor.models` that holds each."""


def register() -> None:
    """Entry point of `vllm.general_plugins`: `--hf-overrides '{"architectures": ["LatentQwen3ForCausalLM"]}'` works."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        ModelRegistry.register_model(f"Latent{family}", f"latentmas_vllm.model:Latent{family}")
