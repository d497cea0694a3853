"""What one tick for all rows is worth: `python -m benchmarks.tick`."""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache

from benchmarks.report import Spread, machine, prepare, ratios, show
from langchain_latentmas.bundled.tasks import ROLES
from langchain_latentmas.demo import held_out
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.sampling import Sampling
from langchain_latentmas.engine.tick import Result, Row, Ticker
from langchain_latentmas.service.local import LocalService, LocalSettings

PARITY = Path(__file__).parent.parent / "tests/data/parity/qwen3-tied/model"
LIVE_BYTES = 1 << 40  # as many slots as there are rows
REQUESTS = 24


class Work(NamedTuple):
    """One way of doing the rows' work: what each row produced, the seconds, and the seconds of each tick alone."""

    produced: list[Any]
    seconds: float
    ticks: list[float]


class Batched:
    """The engine's tick, all rows side by side."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def think(self, prompts: Sequence[Sequence[int]], steps: int) -> Work:
        return self._run(prompts, lambda result: result.thoughts, steps=steps)

    def speak(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Work:
        return self._run(prompts, lambda result: result.tokens, sampling=Sampling(max_tokens=max_tokens))

    def _run(self, prompts: Sequence[Sequence[int]], product: Callable[[Result], Any], **work: Any) -> Work:
        ticker = Ticker(self.model, max_rows=len(prompts), live_bytes=LIVE_BYTES)
        produced: dict[int, Any] = {}
        ticks: dict[int, list[float]] = {}  # of ticks that prefill nothing, by rows
        with torch.inference_mode():
            begun = _now(self.model)
            for i, prompt in enumerate(prompts):
                done = lambda result, i=i: produced.__setitem__(i, product(result))  # noqa: E731
                ticker.join(Row(past=(), start=0, inputs=[prompt], on_done=done, on_error=_raise, **work))
            while ticker.rows:
                decoding = len(ticker.rows) if ticker.decoding == len(ticker.rows) else 0
                at = time.perf_counter()
                ticker.step()
                ticks.setdefault(decoding, []).append(time.perf_counter() - at)
            # Short texts may end before the last prompt is prefilled: the fullest tick there was stands for all rows.
            return Work([produced[i] for i in range(len(prompts))], _now(self.model) - begun, ticks[max(ticks)])


class Plain:
    """Row after row, as one would write it over transformers: a `DynamicCache`, one forward pass a step."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.eos = model, model.eos
        self.causal, self.decoder, self.alignment = model.model, model.model.get_decoder(), model.alignment

    def think(self, prompts: Sequence[Sequence[int]], steps: int) -> Work:
        return self._run(prompts, lambda prompt: self._think(prompt, steps))

    def speak(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Work:
        return self._run(prompts, lambda prompt: self._speak(prompt, max_tokens))

    def _run(self, prompts: Sequence[Sequence[int]], work: Callable[[torch.Tensor], Any]) -> Work:
        with torch.inference_mode():
            begun = _now(self.model)
            produced = [work(torch.tensor([list(prompt)], device=self.model.device)) for prompt in prompts]
            return Work(produced, _now(self.model) - begun, [])

    def _think(self, prompt: torch.Tensor, steps: int) -> torch.Tensor:
        cache, thoughts = DynamicCache(config=self.causal.config), []
        given = {"input_ids": prompt}
        for _ in range(steps + 1):  # the last one leaves the KV of the last thought
            hidden = self.decoder(**given, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            thoughts.append(self.alignment(hidden))
            given = {"inputs_embeds": thoughts[-1][:, None]}
        return torch.cat(thoughts[:-1])

    def _speak(self, prompt: torch.Tensor, max_tokens: int) -> list[int]:
        cache, tokens = DynamicCache(config=self.causal.config), []
        ids = prompt
        while not tokens or (len(tokens) < max_tokens and tokens[-1] not in self.eos):
            logits = self.causal(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids.item())
        self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)  # so that a reader finds the memory whole
        return tokens


def main(
    model: Annotated[str, typer.Option(help="'bundled', a hub id, or a folder.")] = "bundled",
    rows: Annotated[str, typer.Option(help="How many rows side by side.")] = "1 2 4 8 16 32",
    repeats: int = 5,
    steps: Annotated[int, typer.Option(help="Latent steps of a thinker, and most tokens of a speaker.")] = 32,
    seed: int = 0,
    device: str | None = None,
    threads: Annotated[int | None, typer.Option(help="Of torch; the bundled model gets one.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """The batched tick against a plain unbatched loop, and many requests at once against one after another."""
    prepare(model, threads)
    sizes = [int(size) for size in rows.replace(",", " ").split()]
    problems = held_out(max(*sizes, REQUESTS), seed)
    with LocalService.load(model, device=device) as service:
        loaded, settings = service.model, service.settings
        prompts = {
            kind: [list(service.encode([("system", ROLES[role]), ("human", p.question)], tag)) for p in problems]
            for kind, role, tag in (("think", "planner", service.think_tag), ("speak", "solver", ""))
        }
    with LocalService.load(str(PARITY), device=device, dtype="float64") as service:
        parity, parity_settings = service.model, service.settings
    about = machine(loaded.device)
    with Progress(transient=True, disable=as_json) as progress:
        bar = progress.add_task("measuring", total=repeats * (2 * len(sizes) + 2))
        ticks = {
            (kind, size): side_by_side(
                loaded, kind, prompts[kind][:size], steps, repeats, lambda: progress.advance(bar)
            )
            for kind in ("think", "speak")
            for size in sizes
        }
        requests = {
            name: at_once(one, how, questions, repeats, lambda: progress.advance(bar))
            for name, one, how, questions in (
                (f"{model}, {_name(loaded.dtype)}", loaded, settings, [p.question for p in problems[:REQUESTS]]),
                (f"{PARITY.parent.name}, {_name(parity.dtype)}", parity, parity_settings, sums(REQUESTS, seed)),
            )
        }
    show(
        {
            "machine": about,
            "model": f"{model} ({loaded.fingerprint}), {_name(loaded.dtype)}",
            "rows": f"prompts of {_range(prompts['think'])} tokens and {steps} latent steps; "
            f"prompts of {_range(prompts['speak'])} tokens and at most {steps} tokens, greedy; prefill included",
            "repeats": f"{repeats}, seed {seed}",
        },
        table("think", ticks),
        table("speak", ticks),
        requests_table(requests),
        as_json=as_json,
        results={
            "rows": [{"kind": kind, "rows": size, **measured} for (kind, size), measured in ticks.items()],
            "requests": [{"model": name, "requests": REQUESTS, **measured} for name, measured in requests.items()],
        },
    )


def side_by_side(
    model: LanguageModel,
    kind: str,
    prompts: Sequence[Sequence[int]],
    length: int,
    repeats: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Tick and plain loop on the same prompts, in turn."""
    ways = Batched(model), Plain(model)
    for way in ways:  # the first pass of a shape allocates
        getattr(way, kind)(prompts[:2], 2)
    batched, plain = [], []
    for _ in range(repeats):
        batched.append(getattr(ways[0], kind)(prompts, length))
        plain.append(getattr(ways[1], kind)(prompts, length))
        done()
    made = [sum(len(row) for row in way[0].produced) for way in (batched, plain)]
    return {
        "per_second": Spread.of(made[0] / work.seconds for work in batched),
        "plain_per_second": Spread.of(made[1] / work.seconds for work in plain),
        "ratio": ratios([w.seconds / made[1] for w in plain], [w.seconds / made[0] for w in batched]),
        "ms_per_tick": Spread.of(1000 * Spread.of(work.ticks).median for work in batched),
        # Of float32 thoughts one can ask no more than closeness, of greedy tokens identity.
        "difference": max(_difference(a, b) for a, b in zip(batched[0].produced, plain[0].produced, strict=True))
        if kind == "think"
        else sum(a != b for a, b in zip(batched[0].produced, plain[0].produced, strict=True)),
    }


def at_once(
    model: LanguageModel, settings: LocalSettings, questions: Sequence[str], repeats: int, done: Callable[[], None]
) -> dict[str, Any]:
    """Ragged requests, each a think on a memory of its own and a speak on that, from as many threads or from one."""
    together, alone, same = [], [], True
    requests(model, settings, questions[:2], threads=2)
    for _ in range(repeats):
        ones, seconds = requests(model, settings, questions, threads=len(questions))
        others, more_seconds = requests(model, settings, questions, threads=1)
        together.append(seconds)
        alone.append(more_seconds)
        same = same and ones == others
        done()
    return {
        "at_once": Spread.of(together),
        "one_by_one": Spread.of(alone),
        "share": ratios(together, alone),
        "same": same,
        "tokens": [len(model.tokenizer(question)["input_ids"]) for question in questions],
    }


def sums(n: int, seed: int) -> list[str]:
    """Questions like those of the parity data, whose tokenizer cuts the words of other ones into letters."""
    rng = random.Random(seed)
    asked = []
    for i in range(n):
        terms = "".join(f" {rng.choice(('plus', 'minus'))} {rng.randint(1, 99)}" for _ in range(1 + i % 6))
        asked.append(f"What is {rng.randint(1, 99)}{terms}?")
    return asked


def requests(
    model: LanguageModel, settings: LocalSettings, questions: Sequence[str], threads: int
) -> tuple[list[str], float]:
    """The ids of what was spoken, which say every token of it, and the seconds."""
    # A service of its own, since one that has thought a thought before returns it without work.
    with LocalService(model, settings) as service, ThreadPoolExecutor(len(questions)) as pool:

        def remember(i: int) -> Any:
            said = [("system", ROLES["planner"]), ("human", questions[i])]
            return service.think(said, steps=4 + i, agent="planner")

        memories = list(pool.map(remember, range(len(questions))))

        def request(i: int) -> str:
            said = [("system", ROLES["critic"]), ("human", questions[i])]
            ref = service.think(said, [memories[i]], steps=16 + i % 9, agent="critic")
            said = [("system", ROLES["judger"])]
            *_, last = service.speak(said, [ref], max_tokens=16 + i % 7, agent="judger")
            assert last.ref is not None
            return last.ref["id"]

        begun = time.perf_counter()
        if threads == 1:
            ids = [request(i) for i in range(len(questions))]
        else:
            ids = list(pool.map(request, range(len(questions))))
        return ids, time.perf_counter() - begun


def table(kind: str, measured: dict[tuple[str, int], dict[str, Any]]) -> Table:
    title, what = ("Thinkers", "thoughts / s") if kind == "think" else ("Speakers", "tokens / s")
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2), header_style="dim")
    against = "difference" if kind == "think" else "other tokens"
    for name in ("rows", "ms per tick", what, f"{what}, plain loop", "ratio", against):
        shown.add_column(name, justify="right")
    for (of, size), one in measured.items():
        if of == kind:
            shown.add_row(
                str(size),
                one["ms_per_tick"].show(1),
                one["per_second"].show(0),
                one["plain_per_second"].show(0),
                one["ratio"].show(1, "×"),
                f"{one['difference']:.0e}" if kind == "think" else f"{one['difference']} of {size}",
            )
    return shown


def requests_table(measured: dict[str, dict[str, Any]]) -> Table:
    shown = Table(
        title=f"{REQUESTS} ragged requests on memories of their own",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2),
        header_style="dim",
    )
    for name in (
        "model",
        "question tokens",
        "seconds at once",
        "seconds one by one",
        "share of the time",
        "same tokens",
    ):
        shown.add_column(name, justify="left" if name == "model" else "right")
    for model, one in measured.items():
        share = Spread(*(100 * value for value in one["share"])).show(0, " %")
        tokens = f"{min(one['tokens'])} to {max(one['tokens'])}"
        same = "yes" if one["same"] else "NO"
        shown.add_row(model, tokens, one["at_once"].show(), one["one_by_one"].show(), share, same)
    return shown


def _now(model: LanguageModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _raise(error: BaseException) -> None:
    raise error


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _range(prompts: Sequence[Sequence[int]]) -> str:
    return f"{min(map(len, prompts))} to {max(map(len, prompts))}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    typer.run(main)
