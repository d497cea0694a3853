"""LatentMAS for vLLM: a latent token, whose embedding is the aligned last hidden state of the position before it."""

from contextlib import suppress

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that can think."""


SUPPORTED = SpecifierSet(">=0.31.0,<0.33")
"""Versions of vLLM: the plugin uses parts of it that may change with any minor one. The tests ran on both ends.

Before 0.31, the V1 runner lets `allowed_token_ids` of one request act on another (vLLM's issue 43894).
"""


def unsupported(version: str) -> str | None:
    """Why a version of vLLM is refused; None if it is not."""
    with suppress(InvalidVersion):  # "dev", of a vLLM that was built outside of its repository
        if SUPPORTED.contains(version, prereleases=True):
            return None
    return f"latentmas-vllm runs with vLLM {SUPPORTED}, not with {version}; install one of these."


def register() -> None:
    """Entry point of `vllm.general_plugins`: `--hf-overrides '{"architectures": ["LatentQwen3ForCausalLM"]}'` works.

    With a vLLM that is not supported, only those who ask for such a model meet the error.
    """
    import vllm

    module = "model" if unsupported(vllm.__version__) is None else "unsupported"
    for family in FAMILIES:
        vllm.ModelRegistry.register_model(f"Latent{family}", f"latentmas_vllm.{module}:Latent{family}")
