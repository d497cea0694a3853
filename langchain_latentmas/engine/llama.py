"""The layers of Llama and its kin, in a third of the calls that transformers makes of them."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .attention import attend
from .linear import Linear
from .ragged import Run, taken
from .slots import SlotCache, power_of_two

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
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache, only: Tensor | None = None
    ) -> Tensor:
        """Last hidden states after the final norm; arguments and result as for `LanguageModel.hidden`."""
        rows, new, hidden = embeds.shape
        ragged = cache.window.ragged
        real = None if ragged is None else ragged.real
        at = taken(positions.flatten(), real)
        cos, sin = (F.embedding(at, angles)[:, None] for angles in (self.cos, self.sin))
        x = _padded(taken(embeds.reshape(rows * new, hidden), real))
        last = None
        if only is not None:
            starts = torch.arange(0, rows * new, new, device=only.device) if ragged is None else ragged.starts
            last = starts + only
            mask_of_last = mask[torch.arange(rows, device=only.device), :, only][:, :, None]
        for layer, slots in zip(self.layers, cache.layers, strict=True):
            # Keys and values are needed of all positions; what the last layer makes of the others nobody reads.
            if last is not None and layer is self.layers[-1]:
                x = layer(x, cos, sin, mask_of_last, slots, last)
            else:
                x = layer(x, cos, sin, mask, slots)
        x = self.norm(x)
        if last is not None:
            return x[:rows, None]
        if real is None:
            return x[: rows * new].view(rows, new, hidden)
        return x.new_zeros(rows * new, hidden).index_copy_(0, real, x[: len(real)]).view(rows, new, hidden)


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

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, slots: Any, last: Tensor | None = None
    ) -> Tensor:
        """What the layer makes of hidden states.

        Args:
            x: [total or more, hidden], the real new positions of all rows.
            cos: Of the angles [total, 1, head_dim].
            sin: Likewise, [total, 1, head_dim / 2].
            mask: See `LanguageModel.hidden`; with `last` for one new position of each row.
            slots: Keys and values of this layer, a `SlotLayer`.
            last: [rows]: which of the positions the result is wanted of, one of each row; None for all of them.

        Returns:
            The same shape, or with `last` [rows or more, hidden].
        """
        seen = self._attention(self.before_attention(x), cos, sin, mask, slots, last)
        if last is not None:
            x = _padded(x[last])
        x = x + seen
        h = self.before_mlp(x)
        x += self.down(F.silu(self.gate(h), inplace=True).mul_(self.up(h)))
        return x

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, slots: Any, last: Tensor | None) -> Tensor:
        total = len(cos)
        q, k, v = (each(x)[:total].view(total, -1, self.head_dim) for each in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = _turned(torch.cat([q, k], dim=1), cos, sin)
        q, k = turned.split((q.shape[1], k.shape[1]), dim=1)
        keys, values = slots.put(k, v)
        rows, ragged = len(keys), slots.cache.window.ragged
        runs = [Run(slice(0, rows), total // rows, keys.shape[2])] if ragged is None else ragged.runs
        spread, back = (None, None) if ragged is None or last is not None else (ragged.spread, ragged.back)
        q, parts, place = taken(q, spread if last is None else last), [], 0
        for run in runs:
            rows = run.rows.stop - run.rows.start
            new = run.new if last is None else 1
            part = q[place : (place := place + rows * new)].view(rows, new, *q.shape[1:]).transpose(1, 2)
            among = part, keys[run.rows, :, : run.length], values[run.rows, :, : run.length]
            seen = self._seen(*among, mask[run.rows, :, :new, : run.length])
            parts.append(seen.reshape(rows * new, -1))
        return self.o(_padded(taken(torch.cat(parts) if len(parts) > 1 else parts[0], back)))

    def _seen(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[rows, new, heads, head_dim] of queries [rows, heads, new, head_dim]."""
        if q.shape[2] > 1 and q.device.type == "cpu":  # copies nothing for a group there, not even the mask
            return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True).transpose(1, 2)
        return attend(self, q, keys, values, mask)[0]


class Norm:
    """A root-mean-square norm over the last dimension."""

    def __init__(self, module: nn.Module) -> None:
        """Takes the weight of a module."""
        source: Any = module
        self.module, self.weight, self.eps = module, cast(Tensor, source.weight), cast(float, source.variance_epsilon)
        n = len(self.weight)
        self._least, self._root = self.weight.new_tensor(n * self.eps).sqrt(), math.sqrt(n)

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


def is_altered(module: nn.Module) -> bool:
    """Whether calling a module does something else than its class says."""
    return "forward" in module.__dict__ or any(hooks_of(module))


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
