"""The layers of Llama and its kin, in a third of the calls that transformers makes of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from . import attention
from .linear import Linear
from .ragged import Cuts, Ragged, power_of_two, taken
from .slots import SlotCache

KIN = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Decoders of transformers that compute what `LlamaDecoder` does; Qwen3 normalises queries and keys besides."""

PARTS = {nn.Linear, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"])}
"""Classes of their modules, besides those that are defined beside the decoder."""


FEW = 64  # rows


class LlamaDecoder:
    """Computes what a decoder of transformers does, from the same weights and on the same slots.

    What it leaves out is not arithmetic but calls: a norm is four calls instead of eight, queries and keys are rotated
    together, angles are looked up, no module is called. For small models, and for few rows, that is most of the time.
    """

    def __init__(self, decoder: nn.Module, positions: int, packed: bool = False) -> None:
        """Takes the weights of a decoder, and computes all angles.

        Args:
            decoder: One that `obstacle` finds nothing against.
            positions: How many there can be.
            packed: See `Linear`.
        """
        source: Any = decoder
        self.layers = [Layer(layer, packed) for layer in source.layers]
        self.norm = Norm(source.norm)
        self.groups: int = source.config.num_attention_heads // source.config.num_key_value_heads
        weight: Tensor = source.norm.weight
        cos, sin = source.rotary_emb(weight, torch.arange(positions, device=weight.device)[None])
        self.cos, self.sin = cos[0], sin[0, :, : sin.shape[-1] // 2].contiguous()  # both halves of a head are alike

    @staticmethod
    def obstacle(decoder: nn.Module) -> str:
        """Why a decoder cannot be computed this way; "" if it can."""
        kind, source = type(decoder), cast(Any, decoder)
        if kind.__name__ not in KIN or not kind.__module__.startswith("transformers.models."):
            return f"{kind.__name__} may have layers of another kind"
        if source.config.hidden_act != "silu":
            return f"its activation is {source.config.hidden_act}"
        if any(is_altered(module) for module in decoder.modules()):
            return "a module has a hook, or a forward of its own"
        kinds = {type(module) for module in decoder.modules()} - PARTS
        if other := sorted(each.__name__ for each in kinds if each.__module__ != kind.__module__):
            return f"a {other[0]} was put in"
        if len({weight.device for weight in decoder.parameters()}) > 1:
            return "its layers lie on several devices"
        return ""

    def __call__(
        self, embeds: Tensor, positions: Tensor, masks: Sequence[Tensor], cache: SlotCache, last_only: bool = False
    ) -> Tensor:
        """Last hidden states after the final norm; arguments and result as for `LanguageModel.hidden`."""
        ragged = cache.window.ragged
        cos, sin = (F.embedding(positions, angles)[:, None] for angles in (self.cos, self.sin))
        repeated = masks
        if attention.copies(embeds.device):  # for all layers at once
            repeated = [attention.repeated(mask, self.groups) for mask in masks]
        x, queries = _padded(embeds), Queries(repeated, ragged.cuts, ragged.spread, ragged.back)
        for layer, slots in zip(self.layers, cache.layers, strict=True):
            if last_only and layer is self.layers[-1]:
                # Keys and values are needed of all positions; what the last layer makes of the others nobody reads.
                queries = Queries.of_last(ragged, masks)
            x = layer(x, cos, sin, queries, slots)
        return self.norm(x)[: len(ragged.lasts) if last_only else len(positions)]


class Queries(NamedTuple):
    """Which positions attend, and how they lie in runs; see `Ragged`."""

    masks: Sequence[Tensor]
    """For each run [rows, 1, new, length], maybe `repeated`."""
    cuts: Cuts | None
    spread: Tensor | None
    back: Tensor | None
    alone: bool = False
    """Whether they are not all of the new positions, and the layer's result is wanted of `spread` alone."""

    @classmethod
    def of_last(cls, ragged: Ragged, masks: Sequence[Tensor]) -> "Queries":
        """Of the last new position of each row."""
        at = ragged.lasts - ragged.firsts
        rows = torch.arange(len(at), device=at.device)
        pairs = zip(ragged.runs, masks, strict=True)
        masks = [mask[rows[: len(mask)], :, at[run.rows]][:, :, None] for run, mask in pairs]
        cuts = ragged.cuts and ragged.cuts._replace(places=ragged.cuts.rows)
        return cls(masks, cuts, ragged.lasts, None, alone=True)


class Layer:
    """One decoder layer, as the tensors of its modules."""

    def __init__(self, layer: Any, packed: bool) -> None:
        """Takes the weights of a layer of transformers.

        Args:
            layer: The layer.
            packed: See `Linear`.
        """
        attention = layer.self_attn
        self.head_dim: int = attention.head_dim
        self.before_attention, self.before_mlp = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        linears = (Linear(module, packed) for module in _linears(layer))
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = linears
        self.q_norm, self.k_norm = None, None
        if hasattr(attention, "q_norm"):
            self.q_norm, self.k_norm = Norm(attention.q_norm), Norm(attention.k_norm)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, queries: Queries, slots: Any) -> Tensor:
        """What the layer makes of hidden states.

        Args:
            x: [total or more, hidden].
            cos: Of the angles [total, 1, head_dim].
            sin: Likewise, [total, 1, head_dim / 2].
            queries: The positions that attend.
            slots: Keys and values of this layer, a `SlotLayer`.

        Returns:
            The same shape, or where the queries stand alone [queries or more, hidden].
        """
        seen = self._attention(self.before_attention(x), cos, sin, queries, slots)
        if queries.alone:
            x = _padded(taken(x, queries.spread))
        x = x + seen
        h = self.before_mlp(x)
        x += self.down(F.silu(self.gate(h), inplace=True).mul_(self.up(h)))
        return x

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, queries: Queries, slots: Any) -> Tensor:
        total = len(cos)
        q, k, v = (each(x)[:total].view(total, -1, self.head_dim) for each in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = _turned(torch.cat([q, k], dim=1), cos, sin)
        q, k = turned.split((q.shape[1], k.shape[1]), dim=1)
        keys, values = slots.put(k, v)
        parts = [(taken(q, queries.spread), keys, values)]
        if queries.cuts is not None:
            rows, places = queries.cuts
            parts = list(zip(parts[0][0].split(places), keys.split(rows), values.split(rows), strict=True))
        seen = [self._seen(*part, mask) for part, mask in zip(parts, queries.masks, strict=True)]
        return self.o(_padded(taken(torch.cat(seen) if len(seen) > 1 else seen[0], queries.back)))

    def _seen(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[rows * new, heads * head_dim] of queries [rows * new, heads, head_dim] of one run."""
        q = q.unflatten(0, (len(keys), -1)).transpose(1, 2)
        keys, values = (side[:, :, : mask.shape[3]] for side in (keys, values))
        seen, _ = attention.attend(self, q, keys, values, mask)
        return seen.flatten(0, 1).flatten(1)


class Norm:
    """A root-mean-square norm over the last dimension."""

    def __init__(self, module: nn.Module) -> None:
        """Takes the weight of a module."""
        source: Any = module
        self.module, self.weight, self.eps = module, cast(Tensor, source.weight), cast(float, source.variance_epsilon)
        n = len(self.weight)
        # As tensors: for a number of Python's, torch makes one at each call, and two more calls of a division.
        self._least, self._root = self.weight.new_tensor(n * self.eps).sqrt(), self.weight.new_tensor(n).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] of the same shape."""
        if x.dtype is torch.float64:  # the module rounds to float32 on the way, so no other way gives the same
            return self.module(x)
        if x.device.type != "cpu" or x.dtype is not torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # There it is one call that makes eight. This is the same in four: x / sqrt(|x|² + n·eps) · sqrt(n) · weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._least)
        return (x * (self._root / length)).mul_(self.weight)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What is called before and after a module, and would not be where its weights are used without it."""
    return module._forward_hooks, module._forward_pre_hooks


def is_idle(hook: Any) -> bool:
    """Whether a hook is one by which transformers collects what layers put out; else it does nothing.

    Transformers leaves such hooks in a model that was asked for its hidden states once.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def is_altered(module: nn.Module) -> bool:
    """Whether calling a module does something else than its class says."""
    hooks = [hook for each in hooks_of(module) for hook in each.values()]
    return "forward" in module.__dict__ or not all(map(is_idle, hooks))


def _linears(layer: Any) -> tuple[nn.Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _padded(x: Tensor) -> Tensor:
    """`x` with rows of zeros behind it, so that there are few numbers of rows.

    oneDNN makes code for each that it meets, which takes as long as a small product, and hundreds of megabytes for all.
    """
    if x.device.type != "cpu" or len(x) <= FEW:
        return x
    step = power_of_two(len(x)) // 16
    return F.pad(x, (0, 0, 0, -len(x) % step))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin)
    return turned
