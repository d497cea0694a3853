"""A double of a vLLM server with the plugin: its completions API, computed by a transformers model token by token."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from langchain_latentmas.engine.alignment import Alignment


class VLLMDouble:
    """Answers what a client of vLLM asks.

    Attributes:
        requests: Bodies of the completions that were asked for.
        open: Streams that somebody still reads.
        hold: Cleared, it holds every stream before its next token.
        answers: Responses that the next completions get instead, one each.
        facts: What `GET /latentmas` says; None for a server without the plugin.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str, latent: int = 0
    ) -> None:
        self.model, self.latent, self.align = model, latent, Alignment.of(model, realign=True)
        self.requests: list[dict[str, Any]] = []
        self.answers: list[httpx.Response | Exception] = []
        self.open = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.key = ""
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        self.model_card = {"id": "served", "root": folder, "max_model_len": 512}
        self.facts: dict[str, Any] | None = {
            "fingerprint": "ab" * 16,
            "vocabulary": hashlib.sha256(vocabulary).hexdigest()[:32],
            "latent_token_id": self.latent,
            "alignment": "realign",
            "architecture": "LatentQwen3ForCausalLM",
            "dtype": "float64",
            "max_model_len": 512,
            "max_logprobs": 20,
            "logprobs_mode": "raw_logprobs",
            "prefix_caching": True,
            "block_size": 16,
            "vllm": "0.32.0",
            "vllm_supported": ">=0.31.0,<0.33",
            "latentmas_vllm": "0.1.0",
        }

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.answer)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return problem(401, "Unauthorized")
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [self.model_card]})
        if request.url.path == "/latentmas":
            return problem(404, "Not Found") if self.facts is None else httpx.Response(200, json=self.facts)
        assert request.url.path == "/v1/completions"
        body = json.loads(request.content)
        self.requests.append(body)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if len(body["prompt"]) + body["max_tokens"] > self.model_card["max_model_len"]:  # type: ignore[operator]
            return problem(400, "This model's maximum context length is 512 tokens.")
        if body.get("stream"):
            return httpx.Response(200, stream=Stream(self, body))
        top = [{f"token_id:{i}": share for i, share in shares} for _, shares in self.complete(body)]
        return httpx.Response(200, json={"choices": [{"logprobs": {"top_logprobs": top}}]})

    def complete(self, body: dict[str, Any]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
        """Token after token, each with the log-probabilities of the likeliest ones and its own."""
        assert body["model"] == "served"
        assert body["temperature"] == 0
        allowed, stop = body.get("allowed_token_ids"), body.get("stop_token_ids", ())
        cache = DynamicCache()
        hidden = torch.empty(0)
        for token in body["prompt"]:
            hidden = self.step(token, hidden, cache)
        for _ in range(body["max_tokens"]):
            shares = self.shares(hidden)
            token = int(shares.argmax()) if allowed is None else allowed[0]
            best = [*shares.topk(body.get("logprobs") or 1).indices.tolist(), token]
            yield token, [(i, float(shares[i])) for i in best]
            if token in stop and not body.get("ignore_eos"):
                return
            hidden = self.step(token, hidden, cache)

    @torch.no_grad()
    def shares(self, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        logits[self.latent] = -3e4
        return logits.log_softmax(-1)

    @torch.no_grad()
    def step(self, token: int, hidden: Tensor, cache: DynamicCache) -> Tensor:
        thought = token == self.latent
        embeds = self.align(hidden) if thought else self.model.get_input_embeddings()(torch.tensor(token))
        out = self.model.model(inputs_embeds=embeds[None, None], past_key_values=cache, use_cache=True)
        return out.last_hidden_state[0, -1]


class Stream(httpx.AsyncByteStream):
    """Server-sent events, two tokens in one now and then, as from a server that is busy."""

    def __init__(self, server: VLLMDouble, body: dict[str, Any]) -> None:
        self.server, self.body = server, body
        server.open += 1

    async def __aiter__(self) -> AsyncIterator[bytes]:
        waiting: list[int] = []
        for n, (token, _) in enumerate(self.server.complete(self.body)):
            await self.server.hold.wait()
            waiting.append(token)
            if n % 3 != 1:
                yield event({"choices": [{"token_ids": waiting, "finish_reason": None}]})
                waiting = []
        yield event({"choices": [{"token_ids": waiting, "finish_reason": "length"}]})
        yield b"data: [DONE]\n\n"

    async def aclose(self) -> None:
        self.server.open -= 1


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def events(*data: dict[str, Any], done: bool = False) -> httpx.Response:
    """A stream of these events; without [DONE] it ends as when the connection breaks."""
    return httpx.Response(200, content=b"".join([*map(event, data), b"data: [DONE]\n\n" * done]))


def problem(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": "", "code": status}})


def latents(prompt: Sequence[int], latent: int = 0) -> int:
    return list(prompt).count(latent)
