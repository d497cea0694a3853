"""Loading a causal language model, and making sure that it can think exactly here."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, contains, ne
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelNotFound, ModelNotSupported, first_line
from . import attention
from .alignment import Alignment
from .device import device_at_hand, memory_for, prepare
from .kv import KV, of_each
from .linear import Linear, packable
from .llama import LlamaDecoder, hooks_of, is_altered
from .quantization import plain_tensors, quantization_config
from .ragged import Ragged
from .rotary import Rotary
from .slots import SlotCache, Window
from .threads import Threads

logger = logging.getLogger(__name__)

MOVING_ROPES = ("dynamic", "longrope")  # their frequencies change as a sequence grows, and cached keys do not
NARROW = 0.1  # see `LanguageModel.tolerance`
HASHED_AT_ONCE = 1 << 24  # elements
VERSION = attrgetter("_version")

Embeddable = Sequence[int] | Tensor
"""Token ids, or thoughts [n, hidden] that are fed as they are."""


class LanguageModel:
    """A decoder, seen as what thinking needs: embeddings in, last hidden states out, logits only on demand.

    Attributes:
        model: The transformers model, in eval mode.
        tokenizer: Its tokenizer.
        name: What it was loaded from.
        quantization: How `load` quantized its weights, or None.
        alignment: Map from hidden states to input embeddings.
        eos: Token ids that end a text.
        rotary: How keys are moved, or None where they cannot be.
        fingerprint: 32 hex digits over weights and vocabulary.
        max_positions: Positions a memory can have.
        bytes_per_position: Bytes of KV per position.
        kv_devices: Device of each layer's KV.
        compiled: Whether decode steps go through `torch.compile`.
        threads: How many of torch's a pass takes on a CPU.
        packed: Whether large matrices are kept a second time, for oneDNN.
        decode: What takes a step of one position a row; another object once modules or hooks have changed.
        decoder_fault: Why the decoder of transformers computes the layers and not `LlamaDecoder`; "" if that does.
    """

    _own_fault = ""
    _factor = 1.0  # of logits, and what bounds them; see `_probe_logits`
    _cap: float | None = None
    _a_position: KV | None = None  # what the KV of one looks like, once that is known

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        realign: bool = True,
        max_positions: int | None = None,
        compile: bool = False,
        pack: bool = False,
    ) -> None:
        """Wraps a loaded model, checks it, and computes alignment and fingerprint.

        Args:
            model: Any decoder-only causal language model with full attention.
            tokenizer: Its tokenizer.
            name: What to call it.
            realign: Whether the alignment uses `W`.
            max_positions: A lower limit than the model's own; needed for models that are exact only up to a length.
            compile: Whether decode steps go through `torch.compile`: faster, after seconds to minutes of compiling. If
                the model attends by "sdpa", it then attends by "latentmas" for good, see `attention.attend`.
            pack: Whether to keep large matrices a second time, in the layout that oneDNN reads fastest on a CPU.

        Raises:
            ModelNotSupported: If a latent step would not be exact; says why.
            EngineFailed: If the device has too little memory.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or model.config._name_or_path
        self.quantization: str | None = None
        self.realign = realign
        self.config = model.config.get_text_config(decoder=True)
        self.max_positions = _checked_positions(self.config, self.name, max_positions)
        self.decoder = model.get_decoder()
        self.compiled, self._pack = compile, pack
        if compile and self.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)  # compiled, "sdpa" copies keys and values for each query head
        self.threads = Threads(self.decoder, model.get_input_embeddings().weight)
        self.eos = _end_tokens(model, tokenizer)
        self.device, self.dtype = model.get_input_embeddings().weight.device, model.dtype
        prepare(self.device)
        if any(p.is_meta for p in model.parameters()):
            raise ModelNotSupported(
                f"{self.name}: the weights do not fit the devices given, and offloaded ones are too slow."
            )
        if pack and (fault := LlamaDecoder.obstacle(self.decoder) or self._unpackable()):
            raise ModelNotSupported(f"{self.name}: pack=True has no use here, since {fault}; leave it out.")
        with torch.inference_mode(), memory_for(self.name, self.device):
            if (width := self.embed(self._probe_ids()).shape[-1]) != self.config.hidden_size:
                raise ModelNotSupported(
                    f"{self.name}: its embeddings are {width} wide and its layers {self.config.hidden_size}; to be fed "
                    "back, a hidden state must be as wide as an embedding."
                )
            self._choose_forward()
            cache = self.new_cache()
            self._check_against_plain_forward(cache)
            self._a_position = cache.read(0, 0, 1).stacked()
            self.bytes_per_position = cache.bytes_per_position
            self.kv_devices = [layer.keys.device for layer in cache.layers]
            # transformers computes the angles in float32 whatever the model's dtype.
            tolerance = max(self._tolerance, float(torch.finfo(torch.float32).eps) ** 0.5)
            self.rotary = Rotary.probe(model, self._probe_keys, min(64, self.max_positions - 3), tolerance)
        if self.rotary is None:
            logger.warning("%s: keys cannot be moved by a rotation; merged memories are rebuilt instead", self.name)
        self._changing = threading.RLock()
        with memory_for(self.name, self.device):
            self._stock: list[list[int]] = []
            self._take_stock()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        realign: bool = True,
        max_positions: int | None = None,
        compile: bool = False,
        pack: bool = False,
        quantization: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "LanguageModel":
        """Loads from a hub id or a folder.

        Args:
            name: Hub id or folder.
            device: "cuda", "cuda:1", "cpu", ..., or "auto" to let accelerate spread the layers; None takes CUDA if
                there.
            dtype: A torch dtype or its name; "auto" takes the checkpoint's.
            realign: See `LanguageModel`.
            max_positions: See `LanguageModel`.
            compile: See `LanguageModel`.
            pack: See `LanguageModel`.
            quantization: "int8" or "fp8": linear layers keep their weights in 8 bits, through torchao; embeddings stay.
                Another fingerprint comes of it, so no memory is read by the model as it was, nor the other way round.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Passed to transformers; runs code of the model's author.

        Raises:
            ModelNotFound: If there is no such model, or it cannot be read.
            ModelNotSupported: See `LanguageModel`.
            EngineFailed: Likewise.
            MissingExtra: If `quantization` is asked for and torchao is not installed.
        """
        device = device or device_at_hand()
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ModelNotSupported(f"{dtype!r} is no dtype of torch; take 'auto', 'bfloat16', 'float16' or 'float32'.")
        quantized = None if quantization is None else quantization_config(quantization, dtype)
        try:
            # The configuration first: a model that is refused costs no download of weights.
            config = AutoConfig.from_pretrained(name, **source)
            if quantization is not None and dtype == "auto":  # now it is known
                quantization_config(quantization, getattr(config, "dtype", None) or "auto")
            if quantized and getattr(config, "quantization_config", None):
                raise ModelNotSupported(f"{name}: its weights are quantized already; leave quantization=... out.")
            _checked_positions(config.get_text_config(decoder=True), name, max_positions)
            tokenizer = AutoTokenizer.from_pretrained(name, **source)
            with memory_for(name, device):
                model, loading = AutoModelForCausalLM.from_pretrained(
                    name,
                    dtype=dtype,
                    device_map=device,
                    quantization_config=quantized,
                    output_loading_info=True,
                    **source,
                )
        except ModelNotSupported:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
            raise ModelNotFound(
                f"Cannot load {name!r}: {first_line(error)} Give a hub id, a folder with config.json, or 'bundled'."
            ) from error
        if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers
            raise ModelNotFound(
                f"{name!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}."
            )
        how: dict[str, Any] = {"realign": realign, "max_positions": max_positions, "compile": compile, "pack": pack}
        loaded = cls(model, tokenizer, name=name, **how)
        loaded.quantization = quantization
        return loaded

    def new_cache(self) -> SlotCache:
        """An empty slot cache of this model's layers."""
        # What is compiled copies whole tensors of which it gets several parts, and writes them.
        return SlotCache(self.config.num_hidden_layers, None if self.compiled else self._a_position)

    def blank_kv(self, positions: int) -> KV:
        """A KV of so many positions without its numbers, on the meta device."""
        assert self._a_position is not None

        def blank(t: Tensor) -> Tensor:
            return t.new_empty(*t.shape[:-2], positions, t.shape[-1], device="meta")

        return KV(*(of_each(side, blank) for side in self._a_position))

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of token ids [...]."""
        return self.model.get_input_embeddings()(ids)

    def embedded(self, part: Embeddable) -> Tensor:
        """Input embeddings [n, hidden] of token ids, or of thoughts."""
        if isinstance(part, Tensor):
            return part.to(self.device, self.dtype)
        return self.embed(torch.tensor(list(part), dtype=torch.long, device=self.device))

    @property
    def unseen(self) -> float:
        """What is added to the attention score of a cell that a position does not see."""
        return torch.finfo(self.dtype).min / 2  # some kernels multiply it by log2(e), and must not make it infinite

    def masks(self, ragged: Ragged, holes: Sequence[Sequence[tuple[int, int]]] | None = None) -> list[Tensor]:
        """What is added to attention scores in a pass in which every position sees the cells before it, and its own.

        Args:
            ragged: How the rows lie.
            holes: Of each row, ranges of cells that it must not see.

        Returns:
            For each run [rows, 1, new, length].
        """
        masks = []
        for run in ragged.runs:
            cells = ragged.cells[ragged.firsts[run.rows, None]] + torch.arange(run.new, device=self.device)
            seen = torch.arange(run.length, device=self.device) <= cells[:, None, :, None]
            for row, ranges in enumerate(holes[run.rows] if holes else ()):
                for start, end in ranges:
                    seen[row, :, :, start:end] = False
            blank = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            masks.append(blank.masked_fill_(~seen, self.unseen))
        return masks

    def hidden(
        self, embeds: Tensor, positions: Tensor, masks: Sequence[Tensor], cache: SlotCache, last_only: bool = False
    ) -> Tensor:
        """One forward pass without logits, over the new positions of some rows, one row behind the other.

        Args:
            embeds: Input embeddings [total, hidden].
            positions: [total].
            masks: For each run of the rows [rows, 1, new, length], in the model's dtype: what is added to attention
                scores, 0 for cells that a position sees and `unseen` for others.
            cache: Its window says how the rows lie, and where the new keys go.
            last_only: Whether the hidden state is wanted of the last new position of each row alone.

        Returns:
            Last hidden states after the final norm, [total, hidden], or with `last_only` [rows, hidden].
        """
        if cache.window.ragged.new == 1:
            return self.decode(embeds, positions, masks, cache)
        return self._forward(embeds, positions, masks, cache, last_only)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        return self._scaled(self._head(hidden.to(self._head.weight.device)))

    def refresh(self) -> None:
        """Computes alignment and fingerprint anew, for weights that were changed in place.

        Raises:
            EngineFailed: If the device has too little memory; the next call of `refresh_if_changed` tries again.
        """
        with self._changing, memory_for(self.name, self.device):
            self._stock = []  # until all is computed, whatever was changed
            self._choose_forward()
            self._take_stock()

    def _take_stock(self) -> None:
        modules = list(self.model.modules())
        # Lists side by side, to be compared without Python for each: a request must not pay for the number of layers.
        self._owners, self._names = [], []
        for module in modules:
            self._owners += [module._parameters] * len(module._parameters)
            self._names += module._parameters
        self._weights = [weight for weight in map(dict.get, self._owners, self._names) if weight is not None]
        self._tracked = [weight for weight in self._weights if not weight.is_inference()]
        self._children, self._then = [m._modules for m in modules], [dict(m._modules) for m in modules]
        self._hooks, self._dicts = [hooks for m in modules for hooks in hooks_of(m)], [vars(m) for m in modules]
        stock, self._alterations = self._look(), self._look_for_alterations()
        self._altered = list(map(is_altered, modules))
        self.alignment = Alignment.of(self.model, self.realign)
        self.fingerprint = self._fingerprint()
        self._stock = stock  # last: weights whose fingerprint could not be computed are still changed ones

    def refresh_if_changed(self) -> None:
        """Calls `refresh` if modules were put in, or out, or a weight was written (writes through `.data` hide).

        A hook or a `forward` of a module's own changes what is computed, but not what the model is.
        """
        with self._changing:  # whoever comes while another one hashes new weights waits for their fingerprint
            if self._look() != self._stock or any(map(ne, self._children, self._then)):
                logger.warning(
                    "%s: the weights or modules changed; alignment and fingerprint are computed anew", self.name
                )
                self.refresh()
            elif self._alterations != (found := self._look_for_alterations()):
                if self._altered != (altered := list(map(is_altered, self.model.modules()))) or any(altered):
                    self._choose_forward()
                    self._altered = altered
                self._alterations = found

    def _look_for_alterations(self) -> list[list[Any]]:
        """Which hooks there are, and who has a `forward` of its own."""
        return [list(map(tuple, self._hooks)), list(map(contains, self._dicts, repeat("forward")))]

    def _look(self) -> list[list[int]]:
        """Where each weight is, and how often it was written."""
        return [
            list(map(id, map(dict.get, self._owners, self._names))),
            list(map(Tensor.data_ptr, self._weights)),
            list(map(VERSION, self._tracked)),
        ]

    def _fingerprint(self) -> str:
        """Hashes values, not representations: the same weights in another dtype that holds them hash the same."""
        digest = hashlib.sha256()
        with torch.no_grad():
            whole = sorted(self.model.state_dict().items())
            for name, weight in (plain for each in whole for plain in plain_tensors(*each)):
                digest.update(f"{name}{tuple(weight.shape)}".encode())
                for part in weight.detach().flatten().split(HASHED_AT_ONCE):
                    part = part.cpu()  # before it is widened: half as much to send, and no room for it on the device
                    narrow = part.float()
                    exact = part.dtype.itemsize <= 2 or torch.equal(narrow.to(part.dtype), part)
                    digest.update((narrow if exact else part).contiguous().numpy())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()[:32]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(t.nbytes for p in self.model.parameters() for _, t in plain_tensors("", p))

    @property
    def tolerance(self) -> float:
        """What two ways of computing the same may differ by, relative, root mean square.

        In 16 bits, rounding makes 1 to 2 % of logits (bfloat16), and something else that is computed far more than 10.
        """
        return min(NARROW, 10 * self._tolerance)

    @property
    def _tolerance(self) -> float:
        return float(torch.finfo(self.dtype).eps) ** 0.5

    def _choose_forward(self) -> None:
        """Takes our own forward pass where it computes what this decoder does, and the decoder itself elsewhere."""
        self.decoder_fault = LlamaDecoder.obstacle(self.decoder) or self._own_fault
        self._forward: Callable[..., Tensor] = self._as_it_is
        if not self.decoder_fault:
            self._forward = LlamaDecoder(self.decoder, self.max_positions, self._pack)
        self.packed = self._pack and not self.decoder_fault
        self.decode = torch.compile(self._forward) if self.compiled else self._forward
        head = self.model.get_output_embeddings()
        plain = type(head) is nn.Linear and not is_altered(head) and not self._own_fault
        self._head = Linear(head, self.packed) if plain else head

    def _scaled(self, logits: Tensor) -> Tensor:
        if self._factor != 1:
            logits = logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _unpackable(self) -> str:
        if all(packable(weight) for weight in self.decoder.parameters()):
            return ""
        return f"oneDNN takes no {self.dtype} weights on {self.device.type} here, or these are quantized"

    def _as_it_is(
        self, embeds: Tensor, positions: Tensor, masks: Sequence[Tensor], cache: SlotCache, last_only: bool = False
    ) -> Tensor:
        window = cache.window
        hidden = window.real(
            self.decoder(
                inputs_embeds=window.padded(embeds),
                position_ids=window.padded(positions),
                attention_mask=self._joined(masks, window.ragged),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        )
        return hidden[window.ragged.lasts.to(hidden.device)] if last_only else hidden

    def _joined(self, masks: Sequence[Tensor], ragged: Ragged) -> Tensor:
        """The masks of all runs in one, [rows, 1, new, length]."""
        if len(masks) == 1:
            return masks[0]
        shape = len(ragged.counts), 1, ragged.new, ragged.length
        whole = masks[0].new_full(shape, self.unseen)
        for run, mask in zip(ragged.runs, masks, strict=True):
            whole[run.rows, :, : run.new, : run.length] = mask
        whole[..., 0].masked_fill_((whole == self.unseen).all(-1), 0)  # some kernels make NaN of attention to nothing
        return whole

    def _on_slots(
        self, embeds: Tensor, counts: Sequence[int], starts: Sequence[int], cache: SlotCache, shift: int = 0
    ) -> Tensor:
        """Last hidden states [total, hidden] of a pass of rows in the first slots.

        Args:
            embeds: [total, hidden].
            counts: New positions of each row.
            starts: Cell of each row's first one.
            cache: The slots.
            shift: How far behind its cell a position is.
        """
        ragged = Ragged(counts, starts, self.device)
        cache.reserve(len(counts), ragged.length)
        cache.window = Window(slice(0, len(counts)), cache.capacity, ragged)
        return self.hidden(embeds, ragged.cells + shift, self.masks(ragged), cache)

    def _probe_ids(self) -> Tensor:
        return torch.arange(5, 5 + 12, device=self.device) % self.config.vocab_size

    def _probe_keys(self, start: int) -> KV:
        cache = self.new_cache()
        self._on_slots(self.embed(self._probe_ids()[:3]), [3], [0], cache, shift=start)
        return cache.read(0, 0, 3)

    def _check_against_plain_forward(self, cache: SlotCache) -> None:
        """Compares with the model as it is; gives our own forward pass up where that differs.

        Raises:
            ModelNotSupported: If the decoder itself differs too: what a model does with positions, masks, caches or
                logits outside of what this package knows shows up here, whatever its name.
        """
        try:
            self._probe_logits()
            difference = self._difference_to_plain_forward(cache)
            if not self.decoder_fault and not difference <= self.tolerance:
                self._own_fault = f"logits are off by {difference:.1e} of their size"
                self._choose_forward()
                logger.warning("%s: decoded by transformers, since here %s", self.name, self._own_fault)
                difference = self._difference_to_plain_forward(cache)
        except (ModelNotSupported, torch.OutOfMemoryError):
            raise
        except (
            AttributeError,
            TypeError,
            ValueError,
            NotImplementedError,
            RuntimeError,
            IndexError,
            KeyError,
        ) as error:
            how = " when compiled, which takes a C++ compiler on a CPU and can be left out" if self.compiled else ""
            raise ModelNotSupported(
                f"{self.name}: {type(self.model).__name__} does not run on the slot cache{how} ({first_line(error)})."
            ) from error
        if not difference <= self.tolerance:
            raise ModelNotSupported(
                f"{self.name}: {type(self.model).__name__} computes something else in a ragged batch on the slot "
                f"cache than alone (logits off by {difference:.1e} of their size), so it is refused."
            )

    def _probe_logits(self) -> None:
        """Finds out by trial what the model makes of what its head gives: some multiply it, some bound it by a tanh.

        A configuration cannot tell, since what it calls a scale divides in one model and multiplies in another.

        Raises:
            ModelNotSupported: If it is something else, or overflows in this dtype.
        """
        ids, head = self._probe_ids()[None], self.model.get_output_embeddings()
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        if not hidden.isfinite().all():
            raise ModelNotSupported(
                f"{self.name}: {type(self.model).__name__} makes infinite numbers or NaN of a few tokens in "
                f"{self.dtype}, so it is refused; take dtype='bfloat16' or 'float32'."
            )
        given = head(hidden.to(head.weight.device))
        wanted = self.model(input_ids=ids, use_cache=False).logits.to(given.device)
        self._cap = getattr(self.config, "final_logit_softcapping", None)
        factor = _factor_between(given, wanted, self._cap)
        self._factor = 1.0 if abs(factor - 1) <= torch.finfo(self.dtype).eps else factor
        difference = float(relative_difference(self._scaled(given), wanted))
        if not difference <= self.tolerance:
            raise ModelNotSupported(
                f"{self.name}: {type(self.model).__name__} makes something else of its hidden states than its output "
                f"matrix, a factor and a cap do (logits off by {difference:.1e} of their size), so it is refused."
            )

    def _difference_to_plain_forward(self, cache: SlotCache) -> float:
        """Runs two ragged rows through the slots as ticks do, and each alone through the model as it is.

        They go on from different cells, of which not all are the last in sight: a model that makes its masks of shapes
        sees other cells there.

        Returns:
            The difference of logits, root mean square, relative to their size; the largest of any pass and row.
        """
        ids = self._probe_ids()
        rows = ids[:7], ids[6:12]
        plain = [self.model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
        differences, starts = list[Tensor](), [0, 0]
        for counts in ([2, 4], [4, 1], [1, 1]):
            ends = [start + count for start, count in zip(starts, counts, strict=True)]
            new = torch.cat([row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)])
            lasts = self._on_slots(self.embed(new), counts, starts, cache)[[counts[0] - 1, -1]]
            for mine, theirs, end in zip(self.logits(lasts), plain, ends, strict=True):
                differences.append(relative_difference(mine, theirs[end - 1].to(mine.device)))
            starts = ends
        return float(torch.stack(differences).max())  # of these, max() would pass over NaN


def relative_difference(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square of `a - b` relative to that of `b`, []; in float32 at least, so that nothing overflows."""
    wide = torch.promote_types(b.dtype, torch.float32)
    return torch.linalg.vector_norm(a - b, dtype=wide) / torch.linalg.vector_norm(b, dtype=wide)


def _factor_between(given: Tensor, wanted: Tensor, cap: float | None) -> float:
    """By what `given` is multiplied to become `wanted`, before a cap if there is one; least squares."""
    given, wanted = given.double(), wanted.double()
    if cap is not None:
        little = wanted.abs() < cap / 2  # what is bent further has lost its digits
        given, wanted = given[little], torch.atanh(wanted[little] / cap) * cap
    return float((given * wanted).sum() / (given * given).sum())


def _checked_positions(config: Any, name: str, wanted: int | None) -> int:
    """How many positions a memory may have.

    Raises:
        ModelNotSupported: If the architecture is not exact here, or only up to fewer positions than wanted.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelNotSupported(f"{name}: encoder-decoder models are not supported; take a decoder-only model.")
    other = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if other:
        raise ModelNotSupported(f"{name}: layers of type {', '.join(other)} are not supported; full attention only.")
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        raise ModelNotSupported(f"{name}: the configuration names no max_position_embeddings.")
    exact, why = limit, ""
    window = getattr(config, "sliding_window", None)
    if (
        window
        and window < limit
        and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    ):
        exact, why = window, f"its attention slides over {window} positions"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        trained = part.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", limit
        )
        if part.get("rope_type") in MOVING_ROPES and trained < exact:
            exact, why = trained, f"its {part['rope_type']} rotary scaling changes earlier positions beyond {trained}"
    if wanted is not None and not 8 <= wanted <= limit:
        raise ModelNotSupported(f"{name}: max_positions must lie between 8 and the model's {limit}, not at {wanted}.")
    if (wanted or limit) > exact:
        raise ModelNotSupported(f"{name}: {why}; pass max_positions={exact} to use it as far as it is exact.")
    return wanted or limit


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named = [model.config.eos_token_id, tokenizer.eos_token_id]
    if model.generation_config is not None:
        named.append(model.generation_config.eos_token_id)
    return frozenset(i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None)
