"""Single ticks: thinking and speaking rows, beside a plain transformers loop and `generate`, all in turns."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from ..engine import attention
from ..engine.device import free_bytes_for
from ..engine.graphs import Graphs
from ..engine.kv import KV, Placed, Side
from ..engine.model import LanguageModel
from ..engine.quantization import plain_tensors
from ..engine.ragged import power_of_two
from ..engine.sampling import Sampling
from ..engine.tick import Result, Row, Ticker
from ..errors import EngineFailed
from .memory import Copy, clock, in_gb
from .spread import Spread, ratios

What = Literal["think", "speak"]

WARM_UP = 4  # ticks: the first ones allocate, capture and compile
TURN_SECONDS = 0.1
FEWEST, MOST = 3, 16  # ticks of a turn
SPARE = 0.9  # of the free memory may be used; allocators do not use all of it


class Work(NamedTuple):
    """What a tick does: so many rows think or speak, each at a position."""

    what: What
    rows: int
    positions: int

    def ticks(self, floor: float) -> int:
        """Ticks of a turn: enough to be timed, where one takes about three times its floor in seconds."""
        return min(MOST, max(FEWEST, round(TURN_SECONDS / (3 * floor))))


def weight_bytes(model: LanguageModel, what: What) -> int:
    """Bytes of weights that a tick must read, whatever the number of rows.

    Thinking needs neither the output matrix nor the input embeddings, but the alignment; speaking needs the output
    matrix. Of the input embeddings, a speaking row reads one line, which is not counted. Of a mixture of experts as
    many are counted as one row takes: rows that are alike, as those that are measured, take the same.
    """
    inputs, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight
    taken: int = getattr(model.config, "num_experts_per_tok", None) or 0
    body = 0
    for name, weight in model.model.get_decoder().named_parameters():
        if weight is not inputs:
            size = sum(part.nbytes for _, part in plain_tensors("", weight))
            of_all_experts = taken and ".experts." in name and weight.dim() > 2
            body += size * taken // len(weight) if of_all_experts else size
    if what == "speak":
        return body + head.nbytes
    return body + (0 if model.alignment.weight is None else model.alignment.weight.nbytes)


def floor_bytes(model: LanguageModel, work: Work) -> int:
    """Bytes that a tick must read: the weights once, and the live KV of all rows."""
    return weight_bytes(model, work.what) + work.rows * work.positions * model.bytes_per_position


def memory_needed(model: LanguageModel, work: Work) -> int:
    """Bytes that measuring takes at most: slots, and as much again for each loop beside them.

    The slots grow in powers of two. A `DynamicCache` copies a layer at each step.
    """
    loops = 1 if work.what == "think" else 2
    kv, layers = model.bytes_per_position, model.config.num_hidden_layers
    slots = kv * power_of_two(work.rows) * power_of_two(work.positions)
    plain = kv * work.rows * work.positions
    logits = 4 * 4 * work.rows * model.config.vocab_size
    return slots + loops * plain + plain // layers + kv * work.positions + logits


def obstacle(model: LanguageModel, work: Work, repeats: int) -> str:
    """Why a size cannot be measured here; "" if it can."""
    shortest = WARM_UP + repeats * FEWEST + 4
    if work.positions < shortest:
        return f"rows that are measured so often need {shortest} positions"
    if work.positions > model.max_positions:
        return f"the model has {model.max_positions} positions"
    needed, free = memory_needed(model, work), int(free_bytes_for(model.kv_devices) * SPARE)
    return f"it takes {in_gb(needed)}, and {in_gb(free)} can be used" if needed > free else ""


class Loop(Protocol):
    """One way of doing a `Work`, which goes on where it stopped."""

    def run(self, ticks: int) -> None:
        """Takes so many steps with every row."""


class Engine:
    """This package's ticks."""

    def __init__(self, model: LanguageModel, work: Work, past: KV) -> None:
        self.rows = work.rows
        self._ended: list[Result] = []
        self.ticker = Ticker(model, max_rows=work.rows, live_bytes=1 << 62, graphs=Graphs.of(model))
        to_come = work.positions - past.positions - 2
        how: dict[str, Any] = {"steps": to_come}
        if work.what == "speak":
            how = {"sampling": Sampling(max_tokens=to_come)}
        for _ in range(work.rows):
            placed = [Placed(past, 0)]
            self.ticker.join(Row(placed, past.positions, [[1]], on_done=self._ended.append, on_error=_raise, **how))

    def run(self, ticks: int) -> None:
        """See `Loop.run`."""
        goal = self._made + ticks * self.rows
        while self._made < goal:
            self.ticker.step()
            if self._ended:
                raise EngineFailed("A row ended before its time; model.eos must be empty.")

    @property
    def _made(self) -> int:
        return self.ticker.thoughts + self.ticker.spoken


class Published:
    """A loop over the whole causal model, as the published code has it.

    Each step computes the logits too, and where it thinks the hidden states of all layers. Rows are equally long and
    share a `DynamicCache`. No attention mask is passed, which spares it the work of looking whether there is padding.
    """

    def __init__(self, model: LanguageModel, work: Work, past: KV) -> None:
        self.causal, self.alignment, self.thinks = model.model, model.alignment, work.what == "think"
        self.cache = _dynamic_cache(model, work.rows, past)
        first = _random((1, model.config.hidden_size), model.device).to(model.dtype)
        self.hidden = first.repeat(work.rows, 1)  # alike, as the rows of the engine are
        self.ids = torch.ones(work.rows, 1, dtype=torch.long, device=model.device)

    def run(self, ticks: int) -> None:
        """See `Loop.run`."""
        for _ in range(ticks):
            if self.thinks:
                thoughts = self.alignment(self.hidden)[:, None]
                out = self.causal(
                    inputs_embeds=thoughts, past_key_values=self.cache, use_cache=True, output_hidden_states=True
                )
                self.hidden = out.hidden_states[-1][:, -1]
            else:
                out = self.causal(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
                self.ids = out.logits[:, -1].argmax(-1, keepdim=True)
                self.ids.tolist()  # whoever speaks has to look at a token to know whether it ends the text


class Generate:
    """`model.generate`, greedy, in calls of a turn's length."""

    def __init__(self, model: LanguageModel, work: Work, past: KV) -> None:
        self.causal, self.rows = model.model, work.rows
        self.cache = _dynamic_cache(model, work.rows, past)
        self.never = model.config.vocab_size  # no token, so it ends no text

    def run(self, ticks: int) -> None:
        """See `Loop.run`."""
        length = self.cache.get_seq_length() + 1  # the first ones stand for what is in the cache
        ids = torch.ones(self.rows, length, dtype=torch.long, device=self.causal.device)
        config = GenerationConfig(max_new_tokens=ticks, do_sample=False, eos_token_id=self.never, pad_token_id=0)
        mask = torch.ones_like(ids)
        out = self.causal.generate(ids, attention_mask=mask, past_key_values=self.cache, generation_config=config)
        if out.shape[1] != length + ticks:
            raise EngineFailed(f"generate made {out.shape[1] - length} tokens instead of {ticks}.")


@dataclass
class Measured:
    """What came of one `Work`: a value per turn of each loop."""

    work: Work
    bytes: int
    """That a tick must read, at the mean position of the timed ticks."""
    engine: list[float] = field(default_factory=list)
    """Seconds a tick."""
    published: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    cuda_graphs: str = "off"
    """See `Ticker.cuda_graphs`, after the last turn."""

    def row(self, bandwidth: float) -> dict[str, Any]:
        """As plain JSON.

        Args:
            bandwidth: Of the memory, in bytes per second.
        """
        tick = Spread.of(self.engine)
        beside = ratios(self.engine, self.published)
        generated = Spread.of(1000 * seconds for seconds in self.generate) if self.generate else None
        return {
            **self.work._asdict(),
            "ms": 1000 * tick.median,
            "gb_s": self.bytes / tick.median / 1e9,
            "floor_ratio": tick.median * bandwidth / self.bytes,
            "full_lm_ratio": beside.median,
            "per_second": self.work.rows / tick.median,
            "floor_ms": 1000 * self.bytes / bandwidth,
            "ms_spread": [1000 * tick.min, 1000 * tick.max],
            "full_lm_ratio_spread": [beside.min, beside.max],
            "full_lm_ms": 1000 * Spread.of(self.published).median,
            "generate_ms": generated and generated.median,
            "cuda_graphs": self.cuda_graphs,
        }


def measure(model: LanguageModel, work: Work, repeats: int, copy: Copy, copied: list[float]) -> Measured:
    """Lets every loop take its turns, one after the other.

    Rows start on random KV, not on a prefill, since what is in it does not matter for speed. They start so far before
    `work.positions` that they are there at the end.

    Args:
        model: The model; its `eos` must be empty, or texts may end on the way.
        work: What to do.
        repeats: Turns of each loop.
        copy: Copied in turns too.
        copied: Gets the bandwidths, in bytes per second.
    """
    ticks = work.ticks(floor_bytes(model, work) / copy.run())
    ticks = min(ticks, (work.positions - WARM_UP - 4) // repeats)
    start = work.positions - WARM_UP - repeats * ticks - 3
    with torch.inference_mode():
        past = _random_kv(model, start)
        engine = Engine(model, work, past)
        loops: list[Loop] = [engine, Published(model, work, past)]
        if work.what == "speak":
            loops.append(Generate(model, work, past))
        middle = work._replace(positions=work.positions - repeats * ticks // 2)
        measured = Measured(work, floor_bytes(model, middle))
        for loop in loops:
            with _attention_for(loop, model), model.threads.taken(work.rows):
                loop.run(WARM_UP)
        for _ in range(repeats):
            copied.append(copy.run())
            for loop, into in zip(loops, (measured.engine, measured.published, measured.generate), strict=False):
                # Others with as many threads as the tick takes: of all, small models' would wait for each other.
                with _attention_for(loop, model), model.threads.taken(work.rows):
                    begun = clock(model.device)
                    loop.run(ticks)
                    into.append((clock(model.device) - begun) / ticks)
        measured.cuda_graphs = engine.ticker.cuda_graphs
        del loops, loop, engine, past
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


@contextmanager
def _attention_for(loop: Loop, model: LanguageModel) -> Iterator[None]:
    """What a model attends with when it is compiled is ours, so the others get transformers' own meanwhile."""
    ours = model.config._attn_implementation
    if ours == attention.NAME and not isinstance(loop, Engine):
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = ours


def _random_kv(model: LanguageModel, positions: int) -> KV:
    def filled(side: Side) -> Sequence[Tensor]:
        pairs = zip(side, model.kv_devices, strict=True)
        return [_random(layer.shape, device).to(layer.dtype) for layer, device in pairs]

    return KV(*map(filled, model.blank_kv(positions)))


def _random(shape: Sequence[int], device: torch.device) -> Tensor:
    """Not from torch's own generator, which older versions leave half in a recording of a CUDA graph that failed."""
    return torch.randn(shape, device=device, generator=torch.Generator(device))


def _dynamic_cache(model: LanguageModel, rows: int, past: KV) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(past.keys, past.values, strict=True)):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


def _raise(error: BaseException) -> None:
    raise error
