"""Which weights and which vocabulary a server runs, so that a client can tell one model from another."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

ELEMENTS_AT_ONCE = 1 << 24


def vocabulary_digest(tokenizer: Any) -> str:
    """32 hex digits over the tokens and their ids."""
    return hashlib.sha256(_vocabulary(tokenizer)).hexdigest()[:32]


def fingerprint(model: str, revision: str | None, tokenizer: Any, tied: bool) -> str | None:
    """32 hex digits over weights and vocabulary: those of `langchain_latentmas` for a model in its own process.

    Values count, not representations: the same weights in another dtype that holds them, or in other files, are the
    same model.

    Args:
        model: Folder or hub id that vLLM has loaded.
        revision: On the hub.
        tokenizer: A transformers tokenizer.
        tied: Whether input and output embeddings are one matrix.

    Returns:
        The fingerprint, or None if the weights are not in safetensors files.
    """
    folder = Path(model)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    elif (single := folder / "model.safetensors").exists():
        with safe_open(single, "pt") as weights:
            files = dict.fromkeys(weights.keys(), single.name)
    else:
        return None
    names = {name: name for name in files}
    if tied:
        names["lm_head.weight"] = "model.embed_tokens.weight"
    digest = hashlib.sha256()
    for name in sorted(names):
        with safe_open(folder / files[names[name]], "pt") as weights:
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
