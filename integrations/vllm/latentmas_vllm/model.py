"""vLLM's own model classes, with a latent token."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from .alignment import Alignment
from .checks import refusals
from .facts import tokenizer_of
from .hidden_states import HiddenStates
from .latent_token import latent_token_id

logger = init_logger(f"vllm.{__name__}")  # vLLM prints what is logged below its own name

NEVER = -3e4  # finite, so that `allowed_token_ids` can still choose it, and within float16


if TYPE_CHECKING:  # it is mixed into such a class
    from vllm.model_executor.models.llama import LlamaForCausalLM as Base
else:
    from torch.nn import Module as Base


class LatentToken(Base):
    """Mixin for a causal language model of vLLM: the embedding of a LATENT is the aligned hidden state before it.

    So a memory is an ordinary token sequence with placeholders, and everything vLLM does with token ids stays right.
    """

    embeds: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Builds the model and its layer of hidden states.

        Raises:
            ValueError: If a setting would make thoughts silently wrong; the message names it.
        """
        if reasons := refusals(vllm_config):
            raise ValueError("LatentMAS cannot think with these settings. " + ". ".join(reasons) + ".")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
        self.latent = latent_token_id(text, tokenizer_of(vllm_config))
        self.realign = bool(getattr(text, "latent_realign", True))
        self.hidden_states = HiddenStates(vllm_config, f"latent_hidden_states.{text.num_hidden_layers}")
        # CUDA graphs read their inputs from where they were captured.
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("embeds", torch.zeros(rows, self.hidden_states.size, dtype=model.dtype), persistent=False)
        self._alignment: Alignment | None = None
        logger.info("LATENT is token %d; realign=%s", self.latent, self.realign)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """One forward pass; several over chunks whose LATENTs depend on each other (decoding takes one).

        Raises:
            ValueError: If embeddings come instead of token ids.
        """
        if input_ids is None:
            raise ValueError("A model with a latent token takes token ids, no embeddings.")
        align = self.alignment
        embeds = self.embeds[: len(input_ids)]
        embeds.copy_(self.embed_input_ids(input_ids))
        slots = self.hidden_states.slots()
        if slots is None:
            return super().forward(None, positions, intermediate_tensors, embeds, **extra)
        # With nothing before it, it is a token like any other: its slot may hold what somebody else has left.
        latent = (input_ids[: slots.tokens] == self.latent) & (positions[: slots.tokens] > 0)
        before = slots.before(positions)
        for _ in range(slots.passes(latent, positions)):
            thoughts = align(self.hidden_states.read(before))
            embeds[: slots.tokens] = torch.where(latent[:, None], thoughts, embeds[: slots.tokens])
            hidden = super().forward(None, positions, intermediate_tensors, embeds, **extra)
            self.hidden_states.write(slots.mapping[: slots.tokens], hidden[: slots.tokens])
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [rows, vocab] with which nobody speaks a LATENT by chance."""
        logits = super().compute_logits(hidden_states)
        if logits is not None:
            logits[:, self.latent] = NEVER
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads weights, until the first forward pass.

        Raises:
            ValueError: After it.
        """
        if self._alignment is not None:  # clients and CUDA graphs keep to the fingerprint and the matrix of the first
            raise ValueError("A model with a latent token keeps its weights; for others, start the server anew.")
        return super().load_weights(weights)

    @property
    def alignment(self) -> Alignment:
        """From this rank's rows of the embeddings; first computed in vLLM's profiling run, which counts its memory."""
        if self._alignment is None:
            table = self.model.embed_tokens
            rows = table.shard_indices.num_org_elements
            self._alignment = Alignment(
                table.weight[:rows],
                self.lm_head.weight[:rows],
                vocab_size=table.org_vocab_size,
                realign=self.realign,
                all_reduce=tensor_model_parallel_all_reduce,
            )
        return self._alignment


class LatentLlamaForCausalLM(LatentToken, LlamaForCausalLM):
    """Llama with a latent token."""


class LatentMistralForCausalLM(LatentToken, MistralForCausalLM):
    """Mistral with a latent token."""


class LatentQwen2ForCausalLM(LatentToken, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with a latent token."""


class LatentQwen3ForCausalLM(LatentToken, Qwen3ForCausalLM):
    """Qwen3 with a latent token."""
