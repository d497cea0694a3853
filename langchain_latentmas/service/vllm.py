"""The model service of a vLLM, on a server or in this process: thoughts are latent tokens.

vLLM keeps nothing but its KV cache. A memory is token ids with placeholders for thoughts, so its recipe is kept here,
and references outlive a restart of the server and can be read on any replica of it.
"""

import asyncio
import hashlib
import json
import logging
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self, TypeVar, cast

import tenacity
import torch
from langchain_core.language_models import LanguageModelInput
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..engine.text import TextStream
from ..engine.tick import Result, Row, Spoken
from ..errors import (
    EngineFailed,
    InvalidRequest,
    LatentMASError,
    ModelNotFound,
    ModelNotSupported,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    WrongModel,
    first_fault,
    first_line,
)
from ..state import LatentRef
from .alteration import unaltered
from .base import LensRow
from .memory import Layout, Memory, Segment
from .patience import Patience
from .recipes import RecipeService, RecipeSettings
from .vllm_in_process import OF_THE_ENGINE, EngineSettings, InProcess
from .vllm_server import OF_THE_SERVER, VLLMServer, VLLMSettings
from .vllm_transport import Transport

logger = logging.getLogger(__name__)

PREFIX = "vllm+"
IN_PROCESS = "vllm:"
TOLD = ("latent_token_id", "architecture", "dtype", "prefix_caching", "block_size", "vllm", "latentmas_vllm")
NOTICED_WITHIN = 0.1  # seconds until a cancelled request is taken back
SURE_SECONDS = 10.0  # after an answer: no vLLM that ended is there again in less
KNOWN_SECONDS = 60.0  # after the facts: behind a balancer, another vLLM may answer next
S = TypeVar("S", bound=RecipeSettings)


@dataclass
class VLLMModel:
    """What is known here of the model over there."""

    name: str
    fingerprint: str
    latent: int
    realign: bool
    max_positions: int
    config: Any
    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    dtype: torch.dtype = torch.float32  # of thoughts, which have no values here


class VLLMService(RecipeService):
    """`LatentService` over a vLLM server that runs the plugin `latentmas-vllm`.

    Several tips are read as one chain, each later one seeing the earlier ones (`usage["merge"]` is then "chained"):
    moved positions have no place in a prefix cache. Thoughts, keys and values stay on the server.
    """

    def __init__(self, transport: Transport, settings: RecipeSettings) -> None:
        """Takes a vLLM; `load` is the way in.

        Args:
            transport: The way to it.
            settings: Prompts, store.

        Raises:
            ServiceUnreachable: If nobody answers there.
            AccessDenied: If the server wants another key.
            ModelNotFound: If the tokenizer cannot be loaded.
            ModelNotSupported: If the server runs without the plugin, or without a latent token.
            WrongModel: If the tokenizer is not the server's.
        """
        try:
            self.facts = transport.call(transport.facts())
            model = _model(transport.name, self.facts, settings)
            super().__init__(model, settings, moved="chained")
        except BaseException:
            transport.close()
            raise
        self._transport, self._engine = transport, Engine(transport, model)
        weakref.finalize(self, transport.close)
        if not self.facts["prefix_caching"]:
            logger.warning(
                "%s has no prefix caching, so every agent computes all memories anew; drop "
                "--no-enable-prefix-caching there",
                transport.name,
            )
        self._collect_regularly()

    @classmethod
    def load(cls, model: str = "vllm+http://127.0.0.1:8000", **settings: Any) -> Self:
        """Connects to a server, or starts vLLM in this process.

        Args:
            model: A server's address with `vllm+` before it, or a model with `vllm:` before it.
            **settings: Fields of `VLLMSettings` for a server, of `EngineSettings` in this process.

        Raises:
            InvalidRequest: If a setting is unknown, out of range, or the server's to say.
        """
        if model.startswith(IN_PROCESS):
            for name in sorted(settings.keys() & OF_THE_ENGINE):
                raise InvalidRequest(f"{name} is not for vLLM; engine=... takes what vllm.AsyncEngineArgs has instead.")
            own = checked_settings(EngineSettings, settings)
            return cls(InProcess(model.removeprefix(IN_PROCESS), own), own)
        over = settings.pop("transport", None)
        for name in settings:
            if name in OF_THE_SERVER:
                raise InvalidRequest(f"{name} is not for a client to say; start the server with {OF_THE_SERVER[name]}.")
        checked = checked_settings(VLLMSettings, settings)
        return cls(VLLMServer(model.removeprefix(PREFIX).rstrip("/"), checked, over), checked)

    def encode(
        self, messages: LanguageModelInput, tag: str, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """See `RecipeService.encode`.

        Raises:
            InvalidRequest: Also if the text of a message makes a latent token.
        """
        ids = super().encode(messages, tag, tools)
        latent = self._engine.model.latent
        if latent in ids:
            text = self._engine.model.tokenizer.convert_ids_to_tokens(latent)
            raise InvalidRequest(f"A message holds {text!r}, which stands for a thought on this server; take it out.")
        return ids

    def memory(self, ref: LatentRef) -> Memory:
        """See `LatentService.memory`; without keys and values, and with thoughts [steps, 0]: they stay there."""
        layout = self._lineage.layout(self.verify([ref]))
        segments = tuple(self._recipe(piece.id).segment for piece in layout)
        return Memory(segments, layout[-1].end, (), (), self._merge_of(layout))

    def lens(self, ref: LatentRef, top_k: int = 5) -> list[LensRow]:
        """See `LatentService.lens`; thinks the segment once more, from the server's cache.

        Raises:
            InvalidRequest: Also if vLLM was started with a `--logprobs-mode` that tells of LATENT alone, or of no
                probabilities.
        """
        if (mode := self.facts["logprobs_mode"]) != "raw_logprobs":
            raise InvalidRequest(f"vLLM runs with --logprobs-mode {mode}, which makes no lens; start it without.")
        most = self.facts["max_logprobs"]
        most = self._engine.model.config.vocab_size if most < 0 else most
        if not 1 <= top_k <= most:
            raise InvalidRequest(f"top_k must lie between 1 and the server's --max-logprobs of {most}, not at {top_k}.")
        recipe = self._recipe(self.verify([ref])[0])
        segment = recipe.segment
        if not len(segment.thoughts):
            return []
        prompt = [*self._ids(self._lineage.layout(recipe.parents)), *segment.prompt_ids]
        rows = self._transport.call(self._engine.read_out(prompt, len(segment.thoughts), top_k))
        return [LensRow(segment.agent, step, tokens) for step, tokens in enumerate(rows, 1)]

    def tenants(self, names: Sequence[str]) -> NoReturn:
        """Not here: load one client per tenant, each with a store and key of its own."""
        raise InvalidRequest("A client of vLLM serves one tenant; load one per tenant, with store=... and key=...")

    def export_memory(self, ref: LatentRef, kv: bool = False) -> Iterator[bytes]:
        """Not here: thoughts and KV stay on the server."""
        raise InvalidRequest("A memory on vLLM cannot leave it: its thoughts exist there only.")

    def import_memory(self, file: str | Path) -> LatentRef:
        """Not here: vLLM computes its thoughts itself."""
        raise InvalidRequest("vLLM takes no thoughts from elsewhere; think there.")

    def altered(self, ref: LatentRef, how: Any, seed: int = 0) -> NoReturn:
        """Not here: KV stays on the server as it is."""
        raise InvalidRequest("vLLM alters no memories; take a model service in this process.")

    def info(self) -> dict[str, Any]:
        """See `LatentService.info`."""
        model, engine = self._engine.model, self._engine
        return {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "server": self._transport.name,
            "max_positions": model.max_positions,
            "realign": model.realign,
            **self._prompting,
            "merge": "chained",
            "rows": engine.rows,
            "thoughts": engine.thoughts,
            "tokens": engine.tokens,
            **{name: self.facts[name] for name in TOLD},
        }

    def close(self) -> None:
        """See `LatentService.close`."""
        self._transport.close()
        super().close()

    @property
    def address(self) -> str:
        """See `LatentService.address`."""
        return (IN_PROCESS if isinstance(self._transport, InProcess) else PREFIX) + self._transport.name

    @property
    def closed(self) -> bool:
        """See `LatentService.closed`."""
        return self._transport.closed

    def _start(self, row: Row, layout: Layout, after: Sequence[str]) -> None:
        if altered := [piece.id for piece in layout if unaltered(piece.id)]:
            row.on_error(InvalidRequest(f"vLLM cannot alter memories, and {altered[0]} is an altered one."))
            return
        past = self._ids(layout)  # from the recipes: whoever asked may be gone once they are read
        if not row.cancelled:
            self._engine.start(row, past)

    def _keep(self, key: str, result: Result) -> None:
        """The server has it."""

    def _ids(self, layout: Layout) -> list[int]:
        return [i for piece in layout for i in self._engine.ids_of(self._recipe(piece.id).segment)]


class Engine:
    """Does rows' work on the server.

    Attributes:
        rows: Requests at work.
        thoughts: Latent steps taken so far.
        tokens: Tokens spoken so far.
    """

    def __init__(self, transport: Transport, model: VLLMModel) -> None:
        """Takes a vLLM and what is known of its model."""
        self.transport, self.model = transport, model
        self.rows = self.thoughts = self.tokens = 0
        self._sure_until = self._known_until = -math.inf

    def ids_of(self, segment: Segment) -> list[int]:
        """A segment as token ids, with LATENT where a thought is."""
        return [*segment.prompt_ids, *[self.model.latent] * len(segment.thoughts), *segment.spoken_ids]

    def start(self, row: Row, past: list[int]) -> None:
        """Starts a row on the token ids of what it reads; errors go to it."""
        self.transport.start(self._drive(row, past))

    async def read_out(self, prompt: Sequence[int], steps: int, top_k: int) -> list[list[tuple[str, float]]]:
        """Per latent step, the likeliest tokens and their probabilities."""
        body = self._thinking(prompt, steps) | {"logprobs": top_k}
        read_out: list[dict[int, float]] = await self._retrying()(self._read_out, body)
        rows = []
        for read in read_out:
            tokens = {token: math.exp(share) for token, share in read.items()}
            tokens.pop(self.model.latent, None)
            best = sorted(tokens.items(), key=lambda pair: -pair[1])[:top_k]
            rows.append([(self.model.tokenizer.decode([token]), share) for token, share in best])
        return rows

    async def _read_out(self, body: dict[str, Any]) -> list[dict[int, float]]:
        async with self._same_model():
            return await self.transport.read_out(body)

    def _retrying(self, may_begin_again: Callable[[], bool] = lambda: True) -> tenacity.AsyncRetrying:
        """Asks again where that may help, for as long as the transport's patience lasts."""
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, (ServiceBusy, ServiceUnreachable)) and may_begin_again()
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            stop=Patience(self.transport.patience),
            reraise=True,
        )

    async def _drive(self, row: Row, past: list[int]) -> None:
        work = asyncio.ensure_future(self._work(row, past))
        self.rows += 1
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=NOTICED_WITHIN)
                if row.cancelled:
                    work.cancel()
            if not work.cancelled():
                row.on_done(work.result())
        except Exception as error:
            row.on_error(error)
        except asyncio.CancelledError:
            work.cancel()
            row.on_error(ServiceClosed("The service is closed; load another one."))
        finally:
            self.rows -= 1

    async def _work(self, row: Row, past: list[int]) -> Result:
        begun, told = False, 0
        retrying = self._retrying(lambda: row.thinking or not begun)  # thinking again gives the same
        prompt = [*past, *cast(Sequence[int], row.inputs[0])]
        body = self._thinking(prompt, row.steps + 1) if row.thinking else self._speaking(prompt, row)
        async for attempt in retrying:
            with attempt:
                row.tokens.clear()
                stop = row.sampling.stop if row.sampling else ()
                text = TextStream(self.model.tokenizer, stop, quiet=row.on_token is None)
                # What is left over when it is closed is aborted on the server.
                async with self._same_model(), aclosing(self.transport.tokens(body)) as tokens:
                    async for token in tokens:
                        begun = True
                        if row.thinking:
                            told = self._thought(row, token, told)
                        elif self._spoke(row, text, token):
                            break
        if (row.thinking and len(row.tokens) <= row.steps) or (not row.thinking and not row.finish):
            raise EngineFailed("vLLM ended the answer early; the same call may succeed later. Its log says why.")
        spoken = [] if row.thinking else row.tokens
        held = "" if row.thinking else text.end()
        return Result(cast(Any, None), torch.empty(row.steps, 0), spoken, held, row.finish, None)

    @asynccontextmanager
    async def _same_model(self) -> AsyncIterator[None]:
        """What asks the server for something: it may have been away meanwhile, and come back as another one.

        Raises:
            WrongModel: If it has.
        """
        if time.monotonic() >= self._sure_until:
            facts = await self.transport.facts()
            known = self.model.fingerprint, self.model.latent, self.model.realign
            if (known_as(facts), facts["latent_token_id"], facts["alignment"] == "realign") != known:
                raise WrongModel(
                    f"{self.transport.name} runs another model, LATENT or alignment by now; load the service anew."
                )
            self._known_until = time.monotonic() + KNOWN_SECONDS
        try:
            yield
        except LatentMASError:
            self._sure_until = -math.inf
            raise
        self._sure_until = min(time.monotonic() + SURE_SECONDS, self._known_until)

    def _thought(self, row: Row, token: int, told: int) -> int:
        """Takes a thought; of one that is thought again, the steps that were told are not told again."""
        if token != self.model.latent:
            raise EngineFailed(f"vLLM answered with token {token} where only {self.model.latent} was allowed.")
        row.tokens.append(token)
        if told < (step := len(row.tokens)) <= row.steps:
            self.thoughts += 1
            if row.on_step:
                row.on_step(step)
        return max(told, step)

    def _spoke(self, row: Row, text: TextStream, token: int) -> bool:
        assert row.sampling is not None
        if token == self.model.latent:  # it would be a word that the text lacks, and nobody would know
            raise EngineFailed(
                f"vLLM answered with the latent token {token} where words were asked for; see `latentmas doctor` for "
                "its version."
            )
        row.tokens.append(token)
        self.tokens += 1
        certain = text.push(token)
        if token in self.model.eos or text.stopped:
            row.finish = "stop"
        elif len(row.tokens) == row.sampling.max_tokens:
            row.finish = "length"
        if row.on_token:
            row.on_token(Spoken(token, certain))
        return bool(row.finish)

    def _thinking(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        # The last token that is sampled is never fed, so a think asks for one more than it takes steps.
        asked = {"max_tokens": tokens, "temperature": 0, "allowed_token_ids": [self.model.latent], "ignore_eos": True}
        return {"prompt": list(prompt), **asked}

    def _speaking(self, prompt: Sequence[int], row: Row) -> dict[str, Any]:
        sampling = row.sampling
        assert sampling is not None
        plain = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
        return {
            "prompt": list(prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "seed": sampling.seed,
            "stop_token_ids": sorted(self.model.eos),
            **plain,  # else vLLM takes the model's generation_config.json
        }


def known_as(facts: dict[str, Any]) -> str:
    """The fingerprint that references carry.

    Not that of the weights alone: where thoughts are placeholders, references are others than where they are vectors.
    """
    return hashlib.sha256(f"vllm {facts['fingerprint']}".encode()).hexdigest()[:32]


def _model(where: str, facts: dict[str, Any], settings: RecipeSettings) -> VLLMModel:
    if facts["fingerprint"] is None:
        raise ModelNotSupported(f"{where}: its weights are in no safetensors files, so nobody knows which they are.")
    source, revision = facts["root"], facts.get("revision")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        config = AutoConfig.from_pretrained(source, revision=revision).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(
            f"The tokenizer of the server's model cannot be loaded here from {source!r} "
            f"({first_line(error)}); give its folder or hub id as tokenizer=..."
        ) from error
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    if hashlib.sha256(vocabulary.encode()).hexdigest()[:32] != facts["vocabulary"]:
        raise WrongModel(f"The tokenizer in {source!r} is not that of the model at {where}; give it as tokenizer=...")
    ends = [config.eos_token_id, tokenizer.eos_token_id]
    with suppress(OSError):  # many models have none
        ends.append(GenerationConfig.from_pretrained(source, revision=revision).eos_token_id)
    # vLLM samples one token more than it feeds.
    positions = min(facts["max_model_len"] - 1, settings.max_positions or facts["max_model_len"])
    return VLLMModel(
        name=facts["model"],
        fingerprint=known_as(facts),
        latent=facts["latent_token_id"],
        realign=facts["alignment"] == "realign",
        max_positions=positions,
        config=SimpleNamespace(
            hidden_size=0, vocab_size=config.vocab_size, think_tag=getattr(config, "think_tag", None)
        ),
        tokenizer=tokenizer,
        eos=frozenset(i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None),
    )


def checked_settings(kind: type[S], settings: dict[str, Any]) -> S:
    """The settings of a client.

    Raises:
        InvalidRequest: If one is unknown or out of range.
    """
    if settings.pop("merge", "auto") != "auto":
        raise InvalidRequest("vLLM reads several memories as one chain; leave merge=... out.")
    try:
        return kind(**settings)
    except ValidationError as error:
        raise InvalidRequest(f"Setting {first_fault(error)}. Settings: {', '.join(kind.model_fields)}.") from error
