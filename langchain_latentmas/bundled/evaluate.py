"""What the bundled model can do: `python -m langchain_latentmas.bundled.evaluate`.

A plain loop over transformers' `DynamicCache`, all problems side by side, so that the recipe needs nothing but itself.
"""

import random
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase, Qwen3ForCausalLM

from langchain_latentmas.bundled import MODEL
from langchain_latentmas.bundled.tasks import EXPERTS, SEQUENTIAL, Problem, grade, notes, problem, prompt

END = 2


class Result(NamedTuple):
    """One line of the table: `right` in %, `tokens` decoded and latent `steps` by all agents, each per question."""

    name: str
    right: float
    tokens: float
    steps: int


class Memories:
    """One memory per problem, padded on the left of every turn; padding is masked and takes no position."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, n: int):
        self.model, self.tokenizer = model, tokenizer
        self.cache = DynamicCache(config=model.config)
        self.visible = torch.zeros(n, 0, dtype=torch.bool)
        self.positions = torch.zeros(n, dtype=torch.long)
        self.hidden = torch.zeros(n, model.config.hidden_size)
        self.embeddings = model.get_input_embeddings().weight
        self.norm = self.embeddings.norm(dim=1).mean()

    def read(self, prompts: list[str]) -> None:
        """Prefill one prompt per problem."""
        rows = self.tokenizer(prompts, add_special_tokens=False).input_ids
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        self._feed(self.embeddings[ids], real)

    def think(self, steps: int) -> None:
        """Feed each memory its own aligned hidden state, `steps` times."""
        for _ in range(steps):
            z = self.hidden * (self.norm / self.hidden.norm(dim=-1, keepdim=True).clamp_min(1e-6))
            self._feed(z[:, None], torch.ones(len(z), 1, dtype=torch.bool))

    def speak(self, max_tokens: int = 128) -> list[list[int]]:
        """Decode greedily until every row has ended."""
        said: list[list[int]] = [[] for _ in self.hidden]
        live = torch.ones(len(said), 1, dtype=torch.bool)
        for _ in range(max_tokens):
            ids = (self.hidden @ self.embeddings.T).argmax(-1)
            live = live & (ids != END)[:, None]
            if not live.any():
                break
            for row, i, on in zip(said, ids.tolist(), live[:, 0].tolist(), strict=True):
                row.extend([i] * on)
            self._feed(self.embeddings[ids][:, None], live)
        return said

    def _feed(self, embeds: torch.Tensor, real: torch.Tensor) -> None:
        """Run `embeds` [n, t, hidden] on the memories; `real` [n, t] is False for padding."""
        n, t, _ = embeds.shape
        positions = (self.positions[:, None] + real.cumsum(1) - 1).clamp_min(0)
        new = real[:, None] & torch.ones(t, t, dtype=torch.bool).tril() | torch.eye(t, dtype=torch.bool)
        mask = torch.cat([self.visible[:, None].expand(n, t, -1), new], dim=2)[:, None]
        h = self.model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=self.cache
        ).last_hidden_state
        self.hidden = torch.where(real[:, -1:], h[:, -1], self.hidden)
        self.visible = torch.cat([self.visible, real], dim=1)
        self.positions = self.positions + real.sum(1)


class Evaluation:
    """The same problems through every arrangement."""

    def __init__(self, folder: Path, n: int, seed: int = 1):
        self.model = Qwen3ForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        rng = random.Random(seed)
        self.problems: list[Problem] = [problem(rng, "test") for _ in range(n)]

    def latent(
        self, name: str, roles: tuple[str, ...], steps: int, parallel: bool = False, cut: bool = False
    ) -> Result:
        """Thinkers, then a judger that never sees the question; `parallel` thinkers are blind to each other."""
        memory = Memories(self.model, self.tokenizer, len(self.problems))
        if not cut:
            for role in roles:
                seen = memory.visible
                if parallel:
                    memory.visible = torch.zeros_like(seen)
                memory.read([prompt(role, p.question, think=True) for p in self.problems])
                memory.think(steps)
                memory.visible = torch.cat([seen, memory.visible[:, seen.shape[1] :]], dim=1)
        memory.read([prompt("judger")] * len(self.problems))
        return self._grade(name, memory.speak(), 0, steps * len(roles))

    def text(self, name: str, roles: tuple[str, ...], parallel: bool = False, judged: bool = True) -> Result:
        """The same agents passing text; without a judger the last one answers."""
        said: list[dict[str, str]] = [{} for _ in self.problems]
        tokens, spoken = 0, []
        for role in roles:
            memory = Memories(self.model, self.tokenizer, len(self.problems))
            heard = [{} if parallel else texts for texts in said]
            pairs = zip(heard, self.problems, strict=True)
            memory.read([prompt(role, notes(texts, p.question)) for texts, p in pairs])
            spoken = memory.speak()
            tokens += sum(len(ids) + 1 for ids in spoken)
            for texts, ids in zip(said, spoken, strict=True):
                texts[role] = self.tokenizer.decode(ids)
        if judged:
            memory = Memories(self.model, self.tokenizer, len(self.problems))
            memory.read([prompt("judger", notes(texts)) for texts in said])
            return self._grade(name, memory.speak(), tokens, 0)
        return self._grade(name, spoken, 0, 0)

    def _grade(self, name: str, said: list[list[int]], tokens: int, steps: int) -> Result:
        n = len(self.problems)
        answers = [self.tokenizer.decode(ids) for ids in said]
        right = sum(grade(text, p.answer) for text, p in zip(answers, self.problems, strict=True))
        return Result(name, 100 * right / n, (tokens + sum(len(ids) + 1 for ids in said)) / n, steps)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with weights and tokenizer.")] = MODEL,
    n: Annotated[int, typer.Option(help="Held-out problems.")] = 100,
    seed: int = 1,
) -> None:
    """Print accuracy, output tokens and latent steps of every arrangement."""
    ask = Evaluation(folder, n, seed)
    table = Table("arrangement", "right %", "output tokens", "latent steps", title=f"{n} held-out problems, greedy")
    with torch.inference_mode():
        results = [ask.latent(f"relay, {k} steps", ("planner",), k) for k in (0, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80)]
        results += [ask.latent(f"sequential, 3 x {k} steps", SEQUENTIAL, k) for k in (24, 32, 48)]
        results += [ask.latent(f"hierarchical, 3 x {k} steps", EXPERTS, k, parallel=True) for k in (24, 32, 48)]
        results += [ask.latent("edge cut", (), 0, cut=True)]
        results += [ask.text("text, one planner", ("planner",)), ask.text("text, sequential", SEQUENTIAL)]
        results += [
            ask.text("text, hierarchical", EXPERTS, parallel=True),
            ask.text("solver", ("solver",), judged=False),
        ]
    for r in results:
        table.add_row(r.name, f"{r.right:.1f}", f"{r.tokens:.1f}", str(r.steps))
    Console().print(table)


if __name__ == "__main__":
    typer.run(report)
