"""The recipe of the bundled model: `python -m langchain_latentmas.bundled.train`.

Two things make thoughts carry content. The alignment loss pulls the rescaled last hidden state to the embedding of the
next token. And from a quarter of the way on a second pass feeds the thinkers' positions the model's own aligned hidden
states of the first pass, all at once, as latent thinking will feed them one by one.
"""

import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

# Threads that spin while they wait make training several times slower as soon as anything else uses a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from langchain_latentmas.bundled import MODEL
from langchain_latentmas.bundled.patterns import Part, latent_pattern, text_pattern
from langchain_latentmas.bundled.tasks import (
    EXPERTS,
    ROLES,
    SEQUENTIAL,
    Problem,
    answer_text,
    notes,
    operation,
    problem,
    prompt,
)

END = 2
TOKENS = 2048  # of a latent batch, padding included; a text batch has half as many
RATE = 2e-3
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
]
PROMPT, SPOKEN, THOUGHT, TAIL = range(4)  # kinds of tokens; TAIL: end tokens after the first two of a thinker
WEIGHT = torch.tensor([0.0, 1.0, 1.0, 0.1])


class Row(NamedTuple):
    """One training sequence: token ids, their kinds, and blocks (unequal blocks above 0 are blind to each other)."""

    ids: list[int]
    kinds: list[int]
    blocks: list[int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text; every number 0..99 is one token."""
    rng = random.Random(0)
    texts = [f"{i} {i} {i} {i}" for i in range(100)] * 40 + [text for pair in CHAT for text in pair] * 20
    texts += [prompt(role, notes(dict.fromkeys(ROLES, ""))) for role in ROLES] * 100
    for _ in range(6000):
        p = problem(rng)
        texts += [p.question, p.sentences, f"The plan is right. {p.sentences} {answer_text(p.answer)}"]
    bpe = Tokenizer(models.BPE())
    split = Regex(r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    assert all(len(bpe.encode(str(i)).ids) == 1 for i in range(100))
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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.rng = random.Random(seed)
        self._encode = tokenizer.backend_tokenizer.encode

    def batches(self, kind: str, tokens: int) -> Iterator[list[Row]]:
        """Endless batches of a kind, at most `tokens` padded tokens each."""
        make = {
            "alone": lambda: self.latent_row(alone=True),
            "latent": self.latent_row,
            "text": self.text_row,
            "latent patterns": lambda: self.pattern_row(latent_pattern),
            "text patterns": lambda: self.pattern_row(text_pattern),
        }[kind]
        while True:
            pool = sorted((make() for _ in range(1000)), key=lambda row: len(row.ids))
            batches: list[list[Row]] = [[]]
            for row in pool:
                if len(row.ids) * (len(batches[-1]) + 1) > tokens:
                    batches.append([])
                batches[-1].append(row)
            self.rng.shuffle(batches)
            yield from batches

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text count."""
        return self._encode(text).ids

    def length(self) -> int:
        """How long a thinker thinks: mostly 12 to 32 steps, at times up to 80."""
        low, high = self.rng.choices([(12, 32), (32, 48), (48, 80)], [0.7, 0.22, 0.08])[0]
        return self.rng.randint(low, high)

    def latent_row(self, alone: bool = False) -> Row:
        """Thinkers in a chain or blind to each other, then a judger, mostly without the question."""
        rng, p, row = self.rng, problem(self.rng), Row([], [], [])
        arrangement = rng.choices(["one", "two", "three", "parallel"], [0.6, 0.1, 0.12, 0.18])[0]
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
            self._add(row, self.encode(prompt(role, p.question if shown else None, think=True)), PROMPT, block)
            chain = self.encode(p.chain)
            self._add(row, [*chain, END, END], THOUGHT, block)
            if rng.random() < 0.2:
                steps = self.length()
            self._add(row, [END] * (steps - len(chain) - 2), TAIL, block)
        self._add(row, self.encode(prompt("judger", p.question if rng.random() < 0.2 else None)), PROMPT)
        self._add(row, [*self.encode(answer_text(p.answer)), END], SPOKEN)
        return row

    def text_row(self) -> Row:
        """One plain turn: a solver, an agent that reads others as text or none, a judger, a greeting."""
        rng, p = self.rng, problem(self.rng)
        kinds = ["solver", "first", "later", "judger", "chat", "drill"]
        kind = rng.choices(kinds, [0.2, 0.15, 0.17, 0.2, 0.03, 0.25])[0]
        if kind == "drill":
            return self.drill_row()
        if kind == "chat":
            user, said = rng.choice(CHAT)
            return self._turn(prompt(rng.choice([None, "solver"]), user), said)
        if kind == "solver":
            role = "solver" if rng.random() < 0.9 else None
            return self._turn(prompt(role, p.question), f"{p.sentences} {answer_text(p.answer)}")
        if kind == "first":
            return self._turn(prompt(rng.choice([*SEQUENTIAL, *EXPERTS]), p.question), p.sentences)
        checked = f"The plan is right. {p.sentences}"
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
        shown = p.question if rng.random() < 0.2 else None
        return self._turn(prompt("judger", notes(read, shown)), answer_text(p.answer))

    def drill_row(self) -> Row:
        """Sixteen operations without a story: many more results a token than a problem has; only they are targets."""
        rng, row = self.rng, Row([], [], [])
        think = rng.random() < 0.6
        v = rng.randint(0, 99)
        self._add(row, self.encode(prompt(None, None, think)), PROMPT)
        if think:
            self._add(row, self.encode(str(v)), PROMPT)
        for _ in range(16):
            op, a, w = operation(rng, v)
            self._add(row, self.encode(f"{op[0]}{a}=" if think else f" so {v} {op[0]} {a} = "), PROMPT)
            self._add(row, self.encode(str(w)), SPOKEN)
            v = w
        return row

    def pattern_row(self, pattern: Callable[[random.Random, Problem], list[Part]]) -> Row:
        """A row in the shape of a usual agent graph."""
        row, steps = Row([], [], []), self.length()
        for part in pattern(self.rng, problem(self.rng)):
            ids = self.encode(part.text)
            if part.kind == "prompt":
                self._add(row, ids, PROMPT, part.block)
            elif part.kind == "spoken":
                self._add(row, [*ids, END], SPOKEN, part.block)
            else:
                self._add(row, [*ids, END, END], THOUGHT, part.block)
                self._add(row, [END] * (steps - len(ids) - 2), TAIL, part.block)
        return row

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
        self.embeddings = model.get_input_embeddings().weight

    def losses(self, rows: list[Row], second_pass: bool) -> list[torch.Tensor]:
        """[cross-entropy + alignment] of the first pass, and of the second one if asked."""
        width = max(len(row.ids) for row in rows)
        ids, kinds, blocks = (
            torch.tensor([list(part) + [0] * (width - len(part)) for part in parts])
            for parts in zip(*rows, strict=True)
        )
        # Padding needs no mask: it comes last and is never a target.
        mask = None
        if blocks.any():
            one, other = blocks[:, :, None], blocks[:, None, :]
            mask = ((one == 0) | (other == 0) | (one == other)).tril()[:, None]
        targets, weight = ids[:, 1:], WEIGHT[kinds[:, 1:]]
        norm, embeds = self.embeddings.norm(dim=1).mean().detach(), self.embeddings[ids]
        h = self._hidden(embeds, mask)
        losses = [self._loss(h, targets, weight, norm)]
        if second_pass:  # the thought at a position is the hidden state one position before it
            z = _align(h.detach(), norm).roll(1, dims=1)
            thinking = (kinds >= THOUGHT)[..., None]
            losses.append(self._loss(self._hidden(torch.where(thinking, z, embeds), mask), targets, weight, norm))
        return losses

    def _hidden(self, embeds: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return out.last_hidden_state.float()

    def _loss(self, h: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        at = weight > 0
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
    return Qwen3ForCausalLM(config)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer as a folder that `from_pretrained` loads."""
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def optimize(
    trainer: Trainer, steps: int, rate: float, losses: Callable[[float], list[torch.Tensor]], name: str
) -> None:
    """Takes optimizer steps under a cosine schedule that knows steps, never the clock.

    Args:
        trainer: Whose model.
        steps: How many.
        rate: Highest learning rate.
        losses: Gets how much is done, from 0 to 1; returns the losses to add up.
        name: What the progress bar says.
    """
    parameters = list(trainer.model.named_parameters())
    matrices = [p for name, p in parameters if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    spent = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *spent) as progress:
        bar = progress.add_task(name, total=steps)
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
                progress.console.print(f"{name}: {step} of {steps} steps, loss {shown}")


def train(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the tokenizer.")] = MODEL,
    seed: int = 0,
    steps: Annotated[int, typer.Option(help="Steps of the first stage: roles, chains and merges.")] = 3600,
    pattern_steps: Annotated[int, typer.Option(help="Steps of the second stage: shapes of usual graphs.")] = 2600,
    alignment: Annotated[float, typer.Option(help="Weight of the alignment loss.")] = 0.5,
    second_pass: Annotated[bool, typer.Option(help="Feed thinkers their own thoughts.")] = True,
    start: Annotated[Path | None, typer.Option(help="Weights of a first stage to go on from.")] = None,
    evaluate: Annotated[bool, typer.Option(help="Print the table of accuracies at the end.")] = True,
) -> None:
    """Train the bundled model from scratch."""
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    if start is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen3ForCausalLM.from_pretrained(start).train()
    else:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
    trainer = Trainer(model, alignment)

    if start is None:
        data = Data(tokenizer, seed)
        alone, latent = data.batches("alone", TOKENS), data.batches("latent", TOKENS)
        text = data.batches("text", TOKENS // 2)

        def roles(done: float) -> list[torch.Tensor]:
            # Short rows first: arithmetic comes before arrangements.
            thinking = trainer.losses(next(latent if done > 0.25 else alone), second_pass and done > 0.25)
            return [*thinking, 0.7 * trainer.losses(next(text), False)[0]]

        optimize(trainer, steps, RATE, roles, "roles")
        save(model, tokenizer, out)

    data = Data(tokenizer, seed + 1)
    mixed = [
        (data.batches(f"latent{kind}", TOKENS), data.batches(f"text{kind}", TOKENS // 2)) for kind in ("", " patterns")
    ]

    def patterns(done: float) -> list[torch.Tensor]:
        thinkers, speakers = data.rng.choices(mixed, [0.6, 0.4])[0]
        return [*trainer.losses(next(thinkers), second_pass), 0.7 * trainer.losses(next(speakers), False)[0]]

    optimize(trainer, pattern_steps, RATE, patterns, "patterns")
    model.eval()
    save(model, tokenizer, out)
    if evaluate:
        from langchain_latentmas.bundled.evaluate import report

        report(out)


if __name__ == "__main__":
    typer.run(train)
