"""Which row of the vocabulary is the latent token: one that no text is ever made of."""

import re
from typing import Any

RESERVED = re.compile(r"<\|?(reserved|unused|extra)|\[control_|\[unused", re.IGNORECASE)


def latent_token_id(config: Any, tokenizer: Any) -> int:
    """Chooses the latent token of a model.

    In this order: what the configuration says (`--hf-overrides '{"latent_token_id": 5}'`), a token named `<|latent|>`,
    the last row of a vocabulary that is larger than the tokenizer's (Qwen2, Qwen3), the last special token that was
    reserved for later (Llama 3, Mistral), and a padding token that has no other use.

    Args:
        config: The model's text configuration.
        tokenizer: A transformers tokenizer.

    Returns:
        A token id; speaking never samples it.

    Raises:
        ValueError: If there is none; the message says how to name one.
    """
    size = config.vocab_size
    named = getattr(config, "latent_token_id", None)
    if named is not None:
        if isinstance(named, bool) or not isinstance(named, int) or not 0 <= named < size:
            raise ValueError(f"latent_token_id must be a token id below {size}, not {named!r}.")
        return named
    vocabulary = tokenizer.get_vocab()
    if "<|latent|>" in vocabulary:
        return int(vocabulary["<|latent|>"])
    if size > max(vocabulary.values()) + 1:
        return int(size - 1)
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if reserved := [i for text, i in special.items() if RESERVED.search(text)]:
        return max(reserved)
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    pad = config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad in special.values() and pad not in used:
        return int(pad)
    raise ValueError(
        "no row of this model's vocabulary is known to be unused; name one that no text is made of: "
        """--hf-overrides '{"latent_token_id": <id>, ...}'"""
    )
