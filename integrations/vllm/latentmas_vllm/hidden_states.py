"""The last hidden state of every position, kept where its KV is: a layer of vLLM's own paged cache.

As a layer of the cache it is allocated with the KV blocks and counted in their memory, and it is there whenever a block
is: after a hit in the prefix cache, after preemption, for every reader of a shared block. vLLM hands its backend what a
latent token needs: slots, block table, where requests start.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, HiddenStateCacheSpec

from .positions import passes_needed, slots_before


@dataclass(frozen=True)
class Slots:
    """Where the tokens of one forward pass stand; all tensors are the runner's own, so that CUDA graphs may hold them.

    Attributes:
        tokens: How many there are; the runner may pad its inputs beyond.
        decoding: Whether every request has one token, which goes on from an earlier step; known on the host.
        starts: First token of each request, and the end [requests + 1].
        table: KV blocks of each request [requests, blocks].
        mapping: KV slot of each token [tokens]; -1 for padding.
        block_size: Positions per block.
    """

    tokens: int
    decoding: bool
    starts: Tensor
    table: Tensor
    mapping: Tensor
    block_size: int

    @property
    def requests(self) -> Tensor:
        """Row of `table` of each token [tokens]."""
        tokens = torch.arange(self.tokens, device=self.starts.device)
        return tokens if self.decoding else torch.bucketize(tokens, self.starts[1:].long(), right=True)

    def before(self, positions: Tensor) -> Tensor:
        """KV slot of the position before each token [tokens]."""
        return slots_before(positions[: self.tokens], self.requests, self.table, self.block_size)

    def passes(self, latent: Tensor, positions: Tensor) -> int:
        """How often the model must run; synchronises with the device, but never in decoding."""
        if self.decoding:
            return 1
        positions, starts = positions[: self.tokens], self.starts.long()
        return passes_needed(latent, positions, self.requests, starts, self.table, self.block_size)


class SlotsBuilder(AttentionMetadataBuilder[Slots]):
    """Makes `Slots` of what vLLM tells every attention backend; nothing is copied or computed."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """See `AttentionMetadataBuilder`."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Slots:
        """See `AttentionMetadataBuilder.build`."""
        common = common_attn_metadata
        begins = common.is_prefilling is not None and bool(common.is_prefilling.any())  # on the host
        return Slots(
            tokens=common.num_actual_tokens,
            decoding=common.max_query_len == 1 and not begins,
            starts=common.query_start_loc,
            table=common.block_table_tensor,
            mapping=common.slot_mapping,
            block_size=self.kv_cache_spec.block_size,
        )


class HiddenStateBackend(AttentionBackend):
    """Computes no attention: it is there for its metadata and its place in the cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """See `AttentionBackend`."""
        return "LATENT_HIDDEN_STATES"

    @staticmethod
    def get_impl_cls() -> Any:
        """See `AttentionBackend`; there is none, because nothing is attended to."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[SlotsBuilder]:
        """See `AttentionBackend`."""
        return SlotsBuilder


class HiddenStates(nn.Module, AttentionLayerBase):
    """A cache layer of one vector per position: the last hidden state after the final norm."""

    def __init__(self, vllm_config: VllmConfig, name: str) -> None:
        """Registers the layer with vLLM.

        Args:
            vllm_config: Of the engine.
            name: Name of the layer; has a number that no other layer has.
        """
        super().__init__()
        self.layer_name = name
        self.size, self.dtype = vllm_config.model_config.get_hidden_size(), vllm_config.model_config.dtype
        self.kv_cache = torch.empty(0)  # until vLLM binds [blocks, 1, block_size, hidden]
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See `AttentionLayerBase`."""
        return HiddenStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> HiddenStateCacheSpec:
        """One vector of the model's own dtype per position, whatever the dtype of the KV."""
        return HiddenStateCacheSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.size, dtype=self.dtype
        )

    def slots(self) -> Slots | None:
        """Where the tokens of this forward pass stand; None in a dummy run."""
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.layer_name) if isinstance(metadata, dict) else None

    def read(self, slots: Tensor) -> Tensor:
        """Hidden states [tokens, hidden] at KV slots [tokens]."""
        block_size = self.kv_cache.shape[2]
        return self.kv_cache[slots // block_size, 0, slots % block_size]

    def write(self, slots: Tensor, hidden: Tensor) -> None:
        """Keeps hidden states [tokens, hidden] at KV slots [tokens]; padding (-1) goes to the null block 0."""
        block_size = self.kv_cache.shape[2]
        slots = slots.long().clamp_min(0)
        self.kv_cache[slots // block_size, 0, slots % block_size] = hidden
