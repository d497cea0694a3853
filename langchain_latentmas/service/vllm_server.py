"""A vLLM server over HTTP."""

import json
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic import ConfigDict, Field

from ..errors import (
    AccessDenied,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    ModelNotSupported,
    ServiceBusy,
    ServiceUnreachable,
    WrongModel,
)
from .connections import in_time, is_address, reaching, warn_of_plain
from .recipes import RecipeSettings
from .serving import Token
from .vllm_transport import Transport, refused

HOW_TO_START = (
    "On the server: install latentmas-vllm, and start it with VLLM_PLUGINS=latentmas vllm serve <model> "
    """--hf-overrides '{"architectures": ["Latent<architecture>"]}'"""
)
OF_THE_SERVER = {
    "realign": """--hf-overrides '{"latent_realign": false}'""",
    "device": "CUDA_VISIBLE_DEVICES, or a build for the CPU",
    "dtype": "--dtype",
    "kv_dtype": "--kv-cache-dtype",
    "revision": "--revision",
    "kv_budget": "--gpu-memory-utilization",
    "live_budget": "--gpu-memory-utilization",
    "kv_cpu_budget": "--gpu-memory-utilization",
    "kv_disk_budget": "--gpu-memory-utilization",
    "kv_folder": "--gpu-memory-utilization",
    "max_rows": "--max-num-seqs",
    "compile": "--compilation-config",
    "cuda_graphs": "--enforce-eager",
    "prefill_chunk": "--max-num-batched-tokens",
}


class VLLMSettings(RecipeSettings):
    """Settings of a client of vLLM, besides those of `RecipeSettings`.

    Attributes:
        tokenizer: Folder or hub id of the tokenizer; None takes the name under which the server has loaded its model.
        token: The server's `--api-key`; not given, that is `LATENTMAS_TOKEN`, if that is set and not empty.
        patience: Seconds, from its first failure, for which a request is repeated that thinks, or that the server has
            not begun to answer.
        connect_timeout: Seconds for a connection to be made.
        read_timeout: Seconds without a token after which a connection counts as broken.
        max_connections: Most requests at a time.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # a token

    tokenizer: str | None = None
    token: Token | None = Field(
        default_factory=lambda: os.environ.get("LATENTMAS_TOKEN") or None, validate_default=True
    )
    patience: float = Field(30, ge=0)
    connect_timeout: float = Field(5, gt=0)
    read_timeout: float = Field(300, gt=0)
    max_connections: int = Field(1024, ge=1)


class VLLMServer(Transport):
    """A vLLM server over HTTP; connects with the first request.

    Attributes:
        model: Under which name the server offers its model; "" until it was asked.
    """

    def __init__(self, url: str, settings: VLLMSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Takes an address.

        Args:
            url: Where it listens, `http://host:port`.
            settings: Timeouts, patience, key.
            transport: For tests.

        Raises:
            InvalidRequest: If the address is none.
        """
        if not is_address(url):
            raise InvalidRequest(
                f"{url!r} is no address of a server: give vllm+http://host:port, and a key as token=..."
            )
        super().__init__(url, settings.patience)
        self.model, self._tokenizer = "", settings.tokenizer
        key = settings.token
        if key is not None:
            warn_of_plain(url, "key")
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
            timeout=httpx.Timeout(settings.read_timeout, connect=settings.connect_timeout, pool=None),
            limits=httpx.Limits(max_connections=settings.max_connections, max_keepalive_connections=64),
            follow_redirects=False,
            trust_env=False,  # no proxy, and no password from ~/.netrc
            transport=transport,
        )

    async def served(self) -> dict[str, Any]:
        """Which model the server offers.

        Raises:
            ModelNotFound: If what answers is no server of that kind.
        """
        response = await self._request("GET", "/v1/models")
        try:
            served: dict[str, Any] = self._json(response)["data"][0]
            self.model = str(served["id"])
        except (WrongModel, KeyError, IndexError, TypeError):
            raise ModelNotFound(f"What answers at {self.name} is no vLLM server.") from None
        return served

    async def facts(self) -> dict[str, Any]:
        """See `Transport.facts`."""
        served = await self.served()
        response = await self._request("GET", "/latentmas")
        facts = {} if response.status_code == 404 else self._json(response)
        if "latent_token_id" not in facts:
            raise ModelNotSupported(f"{self.name} does not think: the plugin is not there. {HOW_TO_START}")
        if facts["latent_token_id"] is None:
            raise ModelNotSupported(
                f"{self.name} runs {self.model} as {facts['architecture']}, which has no latent token. {HOW_TO_START}"
            )
        facts["model"], facts["root"] = self.model, served.get("root") or self.model
        if self._tokenizer:  # the revision is that of the server's own
            facts["root"], facts["revision"] = self._tokenizer, None
        return facts

    async def tokens(self, body: dict[str, Any]) -> AsyncGenerator[int]:
        """See `Transport.tokens`."""
        asked = {"model": self.model, "stream": True, "return_token_ids": True, **body}
        taken = 0
        with self._reaching():
            async with self._client.stream("POST", "/v1/completions", json=asked) as response:
                if response.is_error:
                    await response.aread()
                    self._json(response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:"):
                        continue
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise EngineFailed(f"vLLM failed: {event['error'].get('message', event['error'])}")
                    for choice in event.get("choices", ()):
                        for token in choice.get("token_ids") or ():
                            taken += 1
                            yield token
                        if choice.get("finish_reason") == "length" and taken < body["max_tokens"]:
                            raise InvalidRequest(
                                f"{self.name} ends answers after {taken} tokens, and {body['max_tokens']} were asked "
                                "for; ask for fewer steps or tokens, or start it without max_new_tokens in "
                                "--override-generation-config or --generation-config."
                            )
        raise ServiceUnreachable(f"The connection to {self.name} ended before vLLM had answered.")

    async def read_out(self, body: dict[str, Any]) -> list[dict[int, float]]:
        """See `Transport.read_out`."""
        asked = {"model": self.model, "return_tokens_as_token_ids": True, **body}
        reply = self._json(await self._request("POST", "/v1/completions", asked))
        top: list[dict[str, float]] = reply["choices"][0]["logprobs"]["top_logprobs"]
        return [{int(name.removeprefix("token_id:")): share for name, share in read.items()} for read in top]

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        await self._client.aclose()

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        with self._reaching():
            return await self._client.request(method, path, json=body)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        silent = f"{self.name} sent nothing for as long as read_timeout says; raise it, or ask less at once."
        with reaching(self.name, "vLLM"), in_time(silent):
            yield

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        """The answer; raises the error that it stands for."""
        try:
            answer = response.json()
        except ValueError:
            answer = {"error": {"message": response.text[:200]}}
        status = response.status_code
        if status < 400:
            return answer if isinstance(answer, dict) else {}
        error = answer.get("error", answer) if isinstance(answer, dict) else {}
        said = error.get("message", error) if isinstance(error, dict) else error
        if status in (401, 403):
            raise AccessDenied(f"{self.name} wants another key; give the server's --api-key as token=...")
        if status == 404:
            raise WrongModel(f"{self.name} no longer serves {self.model!r} ({said}); load the service anew.")
        if status in (429, 503):
            raise ServiceBusy(f"{self.name} takes no more requests now: {said}")
        if status == 502:
            raise ServiceUnreachable(f"Nobody answers behind {self.name}: {said}")
        if status == 504:
            raise DeadlineExceeded(f"What stands before {self.name} waited no longer for vLLM: {said}")
        if status >= 500:
            raise EngineFailed(f"vLLM failed ({status}): {said}")
        raise refused(str(said))
