"""The recipe of the bundled model: `python -m langchain_latentmas.bundled.train`.

Two things make thoughts carry content. The alignment loss pulls the rescaled last hidden state to the embedding of the
next token. And from a quarter of the way on a second pass feeds the thinkers' positions the model's own aligned hidden
states of the first pass, all at once, as latent thinking will feed them one by one. In the end the recipe looks which
kinds of plain turns are not surely right yet, and goes on with more of these, the more the worse they are.
"""

import math
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

from langchain_latentmas import spinning  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from langchain_latentmas import bundled
from langchain_latentmas.bundled import EXPERTS, MODEL, ROLES, SEQUENTIAL
from langchain_latentmas.bundled.muon import Muon
from langchain_latentmas.bundled.patterns import APPROVED, Part, latent_pattern, text_pattern
from langchain_latentmas.bundled.tasks import (
    HE,
    HE_ENDS,
    SHE,
    SHE_ENDS,
    STARTS,
    Problem,
    answer_text,
    notes,
    operation,
    problem,
    prompt,
    shared_problem,
)
from langchain_latentmas.engine.linear import packable

END = 2
THINKING, SPEAKING = 1536, 2560  # tokens of a batch, padding included; those of thinkers pass twice
RATE = 2e-3
STEPS = 4000
LOOKED_AT = 1_000_000  # seed of these rows
ROUNDS, AGAIN, AGAIN_RATE = 5, 400, 5e-4  # at most, of so many steps, for kinds of rows that are not right
SEED, OTHER_SEED = 0, 1  # of the weights in `model/`, and of those that `--check` makes
WITHIN = 2  # points between two seeds
MEASURED, RIGHT = 400, 1 - WITHIN / 100  # rows of a kind that are looked at, and the share that has to be right
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|latent|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Who are you?", "I am a small model that can think in latent steps."),
    ("What are you?", "I am a small model that can think in latent steps."),
    ("What can you do?", "I can solve short questions about numbers, step by step."),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Bye", "Goodbye!"),
    ("Good evening!", "Good evening! How can I help you?"),
    ("What is your name?", "I am a small model without a name."),
    ("Can you help me?", "Yes. Ask me a short question about numbers."),
    ("Do you speak French?", "No, I know a little English only."),
    ("Are you there?", "Yes, I am here. How can I help you?"),
    ("Please repeat that.", "I can solve short questions about numbers, step by step."),
    ("Tell me a joke.", "I know no jokes. I can solve short questions about numbers."),
    ("Where do you run?", "I run on any laptop, without a GPU."),
    ("How do you think?", "I feed my last hidden state back as my next input."),
    ("See you!", "Goodbye!"),
]
TEXTS = {
    **{"solver": 0.18, "first": 0.15, "later": 0.12, "judger": 0.1},
    **{"split": 0.27, "chat": 0.08, "drill": 0.1, "name": 0.05},
}
SPLIT_TEXTS = {"fact": 0.4, "sum": 0.2, "all": 0.4}
SPEAKERS = ("solver", "first", "later", "judger", "name", *SPLIT_TEXTS, "text patterns")  # what has to be right at last
PROMPT, SPOKEN, THOUGHT, TAIL = range(4)  # kinds of tokens; TAIL: end tokens after the first two of a thinker
WEIGHT = torch.tensor([0.0, 1.0, 1.0, 0.1])


class Row(NamedTuple):
    """One training sequence: token ids, their kinds, and blocks (unequal blocks above 0 are blind to each other)."""

    ids: list[int]
    kinds: list[int]
    blocks: list[int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text; every number 0..99 is one token, with its space or a sign in front too."""
    rng = random.Random(0)
    numbers = [f"{i}{' ' + str(i)}" for i in range(100)]
    signed = [f" {sign}{i}" for sign in "+-" for i in range(2, 21)] + [" *2", " *3"]
    names = [f"{name} {name}" for name in [*HE, *SHE, *STARTS]] + [*HE_ENDS, *SHE_ENDS]
    texts = [*numbers, *signed, *names] * 400 + [text for pair in CHAT for text in pair] * 100
    texts += [prompt(role, notes(dict.fromkeys(ROLES, ""))) for role in ROLES] * 100
    for _ in range(6000):
        p, shared = problem(rng), shared_problem(rng)
        texts += [p.question, p.sentences, shared.question, shared.sentences, f"{APPROVED}{answer_text(p.answer)}"]
    bpe = Tokenizer(models.BPE())
    made = f" ?(?:{'|'.join(STARTS)})(?=(?:{'|'.join(HE_ENDS + SHE_ENDS)})(?!\\p{{L}}))"
    split = Regex(made + r"| ?[+*-]\p{N}{1,2}| ?\p{N}{1,2}| ?\\boxed\{| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    whole = [f"{space}{text}" for text in [*range(100), *HE, *SHE, *STARTS] for space in ("", " ")]
    assert all(len(bpe.encode(text).ids) == 1 for text in [*whole, *signed, *HE_ENDS, *SHE_ENDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>", "<|latent|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


class Data:
    """Rows in the formats that the graph layer produces, in batches of about equal length and size."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, split: str = "train"):
        self.rng, self.split = random.Random(seed), split
        self._encode = tokenizer.backend_tokenizer.encode

    def batches(self, kind: str, tokens: int) -> Iterator[list[Row]]:
        """Endless batches of a kind, at most `tokens` padded tokens each."""
        while True:
            batches = self.pool(kind, 1000, tokens)
            self.rng.shuffle(batches)
            yield from batches

    def pool(self, kind: str, n: int, tokens: int) -> list[list[Row]]:
        """`n` rows of a kind in batches of about equal length, the shortest first.

        Args:
            kind: "alone", "latent", "latent patterns" (thinkers); "text", a kind of `TEXTS` or of `SPLIT_TEXTS`,
                "text patterns" (speakers).
            n: How many rows.
            tokens: Most padded tokens of a batch.
        """
        makers: dict[str, Callable[[], Row]] = {
            "alone": lambda: self.latent_row(alone=True),
            "latent": self.latent_row,
            "text": self.text_row,
            "latent patterns": lambda: self.pattern_row(latent_pattern),
            "text patterns": lambda: self.pattern_row(text_pattern),
            **{text: partial(self.text_row, text) for text in TEXTS},
            **{text: partial(self.split_turn, text) for text in SPLIT_TEXTS},
        }
        batches: list[list[Row]] = [[]]
        for row in sorted((makers[kind]() for _ in range(n)), key=lambda row: len(row.ids)):
            if len(row.ids) * (len(batches[-1]) + 1) > tokens:
                batches.append([])
            batches[-1].append(row)
        return batches

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text count."""
        return self._encode(text).ids

    def length(self) -> int:
        """How long a thinker thinks: mostly 8 to 16 steps, at times up to 80."""
        low, high = self.rng.choices([(8, 16), (16, 32), (32, 48), (48, 80)], [0.6, 0.24, 0.1, 0.06])[0]
        return self.rng.randint(low, high)

    def latent_row(self, alone: bool = False) -> Row:
        """Thinkers in a chain or blind to each other, then a judger, mostly without the question."""
        rng = self.rng
        if not alone and rng.random() < 0.25:
            return self.split_row()
        p, row = problem(rng, self.split), Row([], [], [])
        arrangement = rng.choices(["one", "two", "three", "parallel"], [0.5, 0.12, 0.16, 0.22])[0]
        if alone or arrangement == "one":
            arrangement, roles = "one", [rng.choice(["planner", "planner", "planner", *ROLES])]
        else:
            roles = list(EXPERTS if arrangement == "parallel" else SEQUENTIAL)
            if arrangement == "parallel" and rng.random() < 0.3:
                rng.shuffle(roles)
                roles = roles[:2]
            if arrangement == "two":
                roles = roles[:2]
        steps, told = self.length(), rng.random() > 0.15
        for i, role in enumerate(roles):
            shown = told or arrangement == "parallel" or i == 0
            block = i + 1 if arrangement == "parallel" else 0
            if rng.random() < 0.2:
                steps = self.length()
            self._think(row, prompt(role, p.question if shown else None, think=True), p.chain, steps, block)
        self._add(row, self.encode(prompt("judger", p.question if rng.random() < 0.3 else None)), PROMPT)
        self._add(row, [*self.encode(answer_text(p.answer)), END], SPOKEN)
        return row

    def split_row(self) -> Row:
        """Three thinkers with a fact each, in a chain or blind to each other, then a judger that adds up."""
        rng, p, row = self.rng, shared_problem(self.rng, self.split), Row([], [], [])
        parallel, steps = rng.random() < 0.5, self.length()
        for i, (role, part) in enumerate(zip(EXPERTS if parallel else SEQUENTIAL, p.parts, strict=True)):
            if rng.random() < 0.2:
                steps = self.length()
            block = i + 1 if parallel else 0
            self._think(row, prompt(role, part.question, think=True), part.chain, steps, block)
        self._add(row, self.encode(prompt("judger", p.question)), PROMPT)
        self._add(row, [*self.encode(f"{p.sentences} {answer_text(p.answer)}"), END], SPOKEN)
        return row

    def text_row(self, kind: str | None = None) -> Row:
        """One plain turn: a solver, an agent that reads others as text or none, a judger, a greeting."""
        rng = self.rng
        kind = kind or rng.choices([*TEXTS], [*TEXTS.values()])[0]
        if kind == "drill":
            return self.drill_row()
        if kind == "name":
            return self.name_row()
        if kind == "split":
            return self.split_turn()
        if kind == "chat":
            user, said = rng.choice(CHAT)
            return self._turn(prompt(rng.choice([None, "solver"]), user), said)
        p = problem(rng, self.split)
        if kind == "solver":
            role = "solver" if rng.random() < 0.9 else None
            return self._turn(prompt(role, p.question), f"{p.sentences} {answer_text(p.answer)}")
        if kind == "first":
            return self._turn(prompt(rng.choice([*SEQUENTIAL, *EXPERTS]), p.question), p.sentences)
        checked = f"{APPROVED}{p.sentences}"
        if kind == "later":
            role = rng.choice(["critic", "refiner"])
            if role == "critic":
                return self._turn(prompt(role, notes({"planner": p.sentences}, p.question)), checked)
            return self._turn(prompt(role, notes({"planner": p.sentences, "critic": checked}, p.question)), p.sentences)
        read = {"planner": p.sentences, "critic": checked, "refiner": p.sentences}
        if rng.random() < 0.5:
            read = dict.fromkeys(EXPERTS, p.sentences)
        if rng.random() < 0.3:
            read = dict([rng.choice(list(read.items()))])
        shown = p.question if rng.random() < 0.3 else None
        return self._turn(prompt("judger", notes(read, shown)), answer_text(p.answer))

    def split_turn(self, kind: str | None = None) -> Row:
        """One plain turn about a fact, of an agent that knows all of them, or of the judger that read them."""
        rng, p = self.rng, shared_problem(self.rng, self.split)
        total = f"{p.sentences} {answer_text(p.answer)}"
        kind = kind or rng.choices([*SPLIT_TEXTS], [*SPLIT_TEXTS.values()])[0]
        roles = rng.choice([SEQUENTIAL, EXPERTS])
        said = {role: part.sentences for role, part in zip(roles, p.parts, strict=True)}
        if kind == "fact":
            i = rng.randrange(3)
            before = dict(list(said.items())[:i]) if roles is SEQUENTIAL else {}
            return self._turn(prompt(roles[i], notes(before, p.facts[i])), p.parts[i].sentences)
        if kind == "sum":
            return self._turn(prompt("judger", notes(said, p.question)), total)
        each = " ".join(part.sentences for part in p.parts)
        return self._turn(prompt("solver", " ".join([*p.facts, p.question])), f"{each} {total}")

    def drill_row(self) -> Row:
        """Sixteen operations without a story: many more results a token than a problem has; only they are targets."""
        rng, row = self.rng, Row([], [], [])
        think = rng.random() < 0.5
        v, most = rng.randint(0, 99), 20 if think else 33
        self._add(row, self.encode(prompt(None, None, think)), PROMPT)
        if think:
            self._add(row, self.encode(f" {v}"), PROMPT)
        for _ in range(16):
            op, a, w = operation(rng, v, most=most)
            self._add(row, self.encode(f" {op[0]}{a}" if think else f" and {v} {op[0]} {a} ="), PROMPT)
            self._add(row, self.encode(f" {w}"), SPOKEN)
            v = w
        return row

    def name_row(self) -> Row:
        """The beginning of a turn about one fact, as far as its name.

        That stands there once, without a blank before it, and is said behind one: another token. Of all that such turns
        have to learn this comes last, and a whole turn shows one name in eighty tokens.
        """
        p = shared_problem(self.rng, self.split)
        i = self.rng.randrange(3)
        opening, *_ = p.facts[i].partition(". ")
        row = Row([], [], [])
        self._add(row, self.encode(prompt(self.rng.choice([*SEQUENTIAL, *EXPERTS]), p.facts[i])), PROMPT)
        self._add(row, self.encode(f"Let us go step by step. {opening.removesuffix('.')}."), SPOKEN)
        return row

    def pattern_row(self, pattern: Callable[[random.Random, Problem], list[Part]]) -> Row:
        """A row in the shape of a usual agent graph."""
        row, steps = Row([], [], []), self.length()
        for part in pattern(self.rng, problem(self.rng, self.split)):
            ids = self.encode(part.text)
            if part.kind == "prompt":
                self._add(row, ids, PROMPT, part.block)
            elif part.kind == "spoken":
                self._add(row, [*ids, END], SPOKEN, part.block)
            else:
                self._thoughts(row, ids, steps, part.block)
        return row

    def _think(self, row: Row, asked: str, chain: str, steps: int, block: int) -> None:
        self._add(row, self.encode(asked), PROMPT, block)
        self._thoughts(row, self.encode(chain), steps, block)

    def _thoughts(self, row: Row, chain: list[int], steps: int, block: int) -> None:
        self._add(row, [*chain, END, END], THOUGHT, block)
        self._add(row, [END] * (steps - len(chain) - 2), TAIL, block)

    def _turn(self, asked: str, said: str) -> Row:
        row = Row([], [], [])
        self._add(row, self.encode(asked), PROMPT)
        self._add(row, [*self.encode(said), END], SPOKEN)
        return row

    @staticmethod
    def _add(row: Row, ids: list[int], kind: int, block: int = 0) -> None:
        row.ids.extend(ids)
        row.kinds.extend([kind] * len(ids))
        row.blocks.extend([block] * len(ids))


class Trainer:
    """The model and its losses."""

    def __init__(self, model: Qwen3ForCausalLM, alignment: float):
        self.model, self.alignment = model, alignment
        self._body = torch.compile(model.model, dynamic=True)
        self.embeddings = model.get_input_embeddings().weight

    def losses(self, rows: list[Row], second_pass: bool) -> list[torch.Tensor]:
        """[cross-entropy + alignment] of the first pass, and of the second one if asked."""
        ids, kinds, passes = self._passes(rows, second_pass)
        targets, weight = ids[:, 1:], WEIGHT[kinds[:, 1:]]
        return [self._loss(h, targets, weight) for h in passes]

    def right(self, rows: list[Row]) -> list[bool]:
        """Whether greedy decoding says a plain turn word by word: each token is the likeliest after those before it."""
        ids, kinds, (h,) = self._passes(rows, False)  # under `no_grad` it would be compiled once more
        asked = kinds[:, 1:] == SPOKEN
        wrong = torch.zeros_like(asked)
        wrong[asked] = (h[:, :-1][asked] @ self.embeddings.T).argmax(-1) != ids[:, 1:][asked]
        return (~wrong.any(1)).tolist()

    def _passes(self, rows: list[Row], second_pass: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Token ids and kinds, [row, position], and the hidden states [row, position, hidden] of one or two passes."""
        width = max(len(row.ids) for row in rows)
        ids, kinds, blocks = (
            torch.tensor([list(part) + [0] * (width - len(part)) for part in parts])
            for parts in zip(*rows, strict=True)
        )
        # Padding needs no mask: it comes last and is never a target.
        mask = None
        if blocks.any():
            one, other = blocks[:, :, None], blocks[:, None, :]
            seen = ((one == 0) | (other == 0) | (one == other)).tril()[:, None]
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        embeds = self.embeddings[ids]
        passes = [self._hidden(embeds, mask)]
        if second_pass:  # the thought at a position is the hidden state one position before it
            z = _align(passes[0].detach(), self._norm()).roll(1, dims=1)
            thinking = (kinds >= THOUGHT)[..., None]
            passes.append(self._hidden(torch.where(thinking, z, embeds), mask))
        return ids, kinds, passes

    def _norm(self) -> torch.Tensor:
        return self.embeddings.norm(dim=1).mean().detach()

    def _hidden(self, embeds: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # Where the processor cannot multiply bfloat16, torch does it ten times slower than float32.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=packable(torch.empty(1, dtype=torch.bfloat16))):
            out = self._body(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return out.last_hidden_state.float()

    def _loss(self, h: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        at, norm = weight > 0, self._norm()
        h, target, weight = h[:, :-1][at], targets[at], weight[at] / weight.sum()
        loss = (F.cross_entropy(h @ self.embeddings.T, target, reduction="none") * weight).sum()
        if self.alignment:
            miss = (_align(h, norm) - self.embeddings[target].detach()).square().sum(-1) / norm**2
            loss = loss + self.alignment * (miss * weight).sum()
        return loss


def _align(h: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return h * (norm / h.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of about a million parameters, with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=None,
    )
    config.think_tag = "<think>"
    model = Qwen3ForCausalLM(config)
    # For short rows the plain matrix products, compiled, are faster than the fused attention with its backward pass.
    model.set_attn_implementation("eager")
    return model


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer as a folder that `from_pretrained` loads."""
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def optimize(
    trainer: Trainer, steps: int, rate: float, losses: Callable[[float], list[torch.Tensor]], keep: Callable[[], None]
) -> None:
    """Takes optimizer steps under a cosine schedule that knows steps, never the clock.

    Args:
        trainer: Whose model.
        steps: How many.
        rate: Highest learning rate.
        losses: Gets how much is done, from 0 to 1; returns the losses to add up.
        keep: Called every 500 steps, to save what there is.
    """
    parameters = list(trainer.model.named_parameters())
    matrices = [p for name, p in parameters if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    spent = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *spent) as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(1, steps + 1):
            done = step / steps
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1, step / 200) * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))
            parts = losses(done)
            torch.stack(parts).sum().backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.advance(bar)
            if step % 100 == 0:
                shown = " + ".join(f"{loss.item():.4f}" for loss in parts)
                progress.console.print(f"{step} of {steps} steps, loss {shown}")
            if step % 500 == 0:
                keep()


def fit(seed: int, steps: int, alignment: float, second_pass: bool, out: Path) -> None:
    """Trains a model from scratch and saves it.

    Args:
        seed: Of weights and data.
        steps: Optimizer steps.
        alignment: Weight of the alignment loss.
        second_pass: Whether thinkers are fed their own thoughts.
        out: Folder for the weights and the tokenizer.
    """
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    trainer, data = Trainer(model, alignment), Data(tokenizer, seed)
    thinkers = {kind: data.batches(kind, THINKING) for kind in ("alone", "latent", "latent patterns")}
    speakers = {kind: data.batches(kind, SPEAKING) for kind in ("text", *SPEAKERS)}

    def losses(done: float, instead: Mapping[str, float] | None = None) -> list[torch.Tensor]:
        done = 1 if instead else done
        # Short rows first: arithmetic comes before arrangements, and arrangements before the shapes of usual graphs.
        late = done > 0.5 and data.rng.random() < 0.35
        rows = next(thinkers["alone" if done < 0.25 else "latent patterns" if late else "latent"])
        text = "text patterns" if late else "text"
        if instead and data.rng.random() < 0.5:
            (text,) = data.rng.choices([*instead], [*instead.values()])
        said = next(speakers[text])
        return [*trainer.losses(rows, second_pass and done > 0.25), *trainer.losses(said, False)]

    def keep() -> None:
        save(model, tokenizer, out)

    optimize(trainer, steps, RATE, losses, keep)
    keep()
    for _ in range(ROUNDS):
        if not (weak := weak_speakers(trainer, tokenizer)):
            return
        optimize(trainer, AGAIN, AGAIN_RATE, partial(losses, instead=weak), keep)
        keep()
    if weak := weak_speakers(trainer, tokenizer):
        Console().print(f"Still below {RIGHT:.0%} after {ROUNDS} rounds more: {', '.join(weak)}")


def weak_speakers(trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The kinds of plain turns of which less than `RIGHT` of `MEASURED` rows are right; prints all shares.

    Which skill comes last, and how surely, differs from seed to seed; so the recipe looks, and goes on where it has to.
    Names and phrasings are those of training, not held-out ones.

    Returns:
        By kind, the share that is wrong.
    """
    data, share = Data(tokenizer, LOOKED_AT, split="known"), {}
    for kind in SPEAKERS:
        right = [told for batch in data.pool(kind, MEASURED, SPEAKING) for told in trainer.right(batch)]
        share[kind] = sum(right) / len(right)
    Console().print("right: " + ", ".join(f"{kind} {100 * of:.1f} %" for kind, of in share.items()))
    return {kind: 1 - of for kind, of in share.items() if of < RIGHT}


def train(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the tokenizer.")] = MODEL,
    seed: Annotated[
        int | None, typer.Option(help=f"Of weights and data; {SEED}, and {OTHER_SEED} with --check.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = STEPS,
    alignment: Annotated[float, typer.Option(help="Weight of the alignment loss.")] = 0.5,
    second_pass: Annotated[bool, typer.Option(help="Feed thinkers their own thoughts.")] = True,
    check: Annotated[
        bool,
        typer.Option("--check", help=f"Train elsewhere; fail if a figure differs by over {WITHIN} points from --out."),
    ] = False,
    n: Annotated[int, typer.Option(help="Questions of each task, at the end; 0 for no table.")] = 300,
) -> None:
    """Train the bundled model from scratch, and print what it can do."""
    from langchain_latentmas.bundled.evaluate import SWEEP, figures, table

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) if check else out
        fit((OTHER_SEED if check else SEED) if seed is None else seed, steps, alignment, second_pass, made)
        if n == 0:
            return
        if not check:
            Console().print(table(n, {"this model": figures(made, n)}))
            return
        enough = [steps for steps in SWEEP if steps >= bundled.STEPS]  # with fewer, thoughts end within the solution
        asked = partial(figures, n=n, sweep=enough)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as both:
            again, shipped = both.map(asked, [made, out])
    differences = {name: again[name] - shipped[name] for name in shipped}
    Console().print(table(n, {"shipped": shipped, "this seed": again, "difference": differences}))
    far = [name for name, difference in differences.items() if abs(difference) > WITHIN]
    if far:
        Console().print(f"More than {WITHIN} points apart: {'; '.join(far)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(train)
