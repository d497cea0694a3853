"""What a latent token would be silently wrong with: refused when the server starts."""

from typing import Any

MOVING_ROPES = ("dynamic", "longrope")


def refusals(config: Any) -> list[str]:
    """Why a vLLM configuration cannot think exactly.

    Args:
        config: A `vllm.config.VllmConfig`.

    Returns:
        Sentences that name the setting to change; empty if all is well.
    """
    parallel, model, text = config.parallel_config, config.model_config, config.model_config.hf_text_config
    reasons = []
    if parallel.pipeline_parallel_size > 1:
        reasons.append(
            "--pipeline-parallel-size: the last stage's hidden state is the first stage's input; set it to 1"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        reasons.append("--decode-context-parallel-size, --prefill-context-parallel-size: set them to 1")
    if parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1:
        reasons.append("--enable-dbo and micro-batches: leave them out")
    if config.speculative_config is not None:
        reasons.append("--speculative-config: drafted tokens have no hidden states; leave it out")
    if config.lora_config is not None:
        reasons.append("--enable-lora: the alignment is that of the base model; leave it out")
    if model.enable_prompt_embeds:
        reasons.append("--enable-prompt-embeds: token ids do not reach the model with it; leave it out")
    if config.kv_transfer_config is not None and not getattr(text, "latent_kv_transfer", False):
        reasons.append(
            "--kv-transfer-config: not known to carry the hidden states; leave it out, or, where your connector was "
            """tested with this plugin, add "latent_kv_transfer": true to --hf-overrides"""
        )
    window = getattr(text, "sliding_window", None)
    slides = getattr(text, "use_sliding_window", True) and "sliding_attention" in (
        getattr(text, "layer_types", None) or ["sliding_attention"]
    )
    if window and slides and window < model.max_model_len:
        reasons.append(f"the attention slides over {window} positions; set --max-model-len {window}")
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        trained = part.get("original_max_position_embeddings", text.max_position_embeddings)
        if part.get("rope_type") in MOVING_ROPES and trained < model.max_model_len:
            reasons.append(f"{part['rope_type']} rotary scaling moves earlier positions; set --max-model-len {trained}")
    return reasons
