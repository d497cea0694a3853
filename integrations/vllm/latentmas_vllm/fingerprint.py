"""Which weights and which vocabulary a server runs, so that a client can tell one model from another."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

ELEMENTS_AT_ONCE = 1 << 24


def vocabulary_digest(tokenizer: Any) -> str:
    """32 hex digits over the tokens and their ids."""
    return hashlib.sha256(_vocabulary(tokenizer)).hexdigest()[:32]


def fingerprint(
    model: str, revision: str | None, tokenizer: Any, tied: bool, download_dir: str | None = None
) -> str | None:
    """32 hex digits over weights and vocabulary: those of `langchain_latentmas` for a model in its own process.

    Values count, not representations: the same weights in another dtype that holds them, or in other files, are the
    same model.

    Args:
        model: Folder or hub id that vLLM has loaded.
        revision: On the hub.
        tokenizer: A transformers tokenizer.
        tied: Whether input and output embeddings are one matrix.
        download_dir: Where vLLM puts what it takes from the hub, if not into the hub's own cache.

    Returns:
        The fingerprint, or None if the weights are not in safetensors files.
    """

    def find(name: str) -> Path | None:
        if (folder := Path(model)).is_dir():
            return folder / name if (folder / name).exists() else None
        # One by one: vLLM takes only some of a repository's files, and the hub's client calls the rest missing.
        found = try_to_load_from_cache(model, name, cache_dir=download_dir, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if index := find("model.safetensors.index.json"):
        files = json.loads(index.read_text())["weight_map"]
    elif single := find("model.safetensors"):
        with safe_open(single, "pt") as weights:
            files = dict.fromkeys(weights.keys(), single.name)
    else:
        return None
    names = {name: name for name in files}
    if tied:
        names["lm_head.weight"] = "model.embed_tokens.weight"
    digest = hashlib.sha256()
    for name in sorted(names):
        with safe_open(find(files[names[name]]), "pt") as weights:
            tensor = weights.get_tensor(names[name])
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for values in _values(tensor):
            digest.update(values)
    digest.update(_vocabulary(tokenizer))
    return digest.hexdigest()[:32]


def _values(tensor: torch.Tensor) -> Iterator[bytes]:
    for part in tensor.flatten().split(ELEMENTS_AT_ONCE):
        narrow = part.float()
        exact = part.dtype != torch.float64 or torch.equal(narrow.double(), part)
        yield (narrow if exact else part).numpy().tobytes()


def _vocabulary(tokenizer: Any) -> bytes:
    return json.dumps(sorted(tokenizer.get_vocab().items())).encode()
