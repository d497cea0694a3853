"""The way to a vLLM that thinks, wherever it runs."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from ..errors import ContextTooLong, InvalidRequest, ServiceClosed

CLOSED_WITHIN = 30.0  # seconds
A = TypeVar("A")


class Transport(ABC):
    """Completions of a vLLM with the plugin `latentmas-vllm`, from an event loop in a thread of its own.

    A completion is described in the words of the completions API, which are those of `vllm.SamplingParams` too:
    `prompt` (token ids), `max_tokens`, `temperature`, `allowed_token_ids`, ...

    Attributes:
        name: Address or model, for messages.
        patience: Seconds for which a completion is asked for again that has not begun.
        closed: Whether `close` was called.
    """

    def __init__(self, name: str, patience: float) -> None:
        """Starts the loop."""
        self.name, self.patience, self.closed = name, patience, False
        self._lock = threading.RLock()  # so that nothing is begun behind the back of `close`, and then never ends
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="latentmas-vllm", daemon=True)
        self._thread.start()

    @abstractmethod
    async def facts(self) -> dict[str, Any]:
        """What the plugin states (`latentmas_vllm.facts`), `model`, its name, and `root`, where its tokenizer is.

        Raises:
            ModelNotSupported: If the plugin is not there, or the model has no latent token.
        """

    @abstractmethod
    def tokens(self, body: dict[str, Any]) -> AsyncGenerator[int]:
        """Tokens of a completion as they come; closing it early aborts the completion."""

    @abstractmethod
    async def read_out(self, body: dict[str, Any]) -> list[dict[int, float]]:
        """Per token of a completion with `logprobs`, the likeliest tokens and their log-probabilities."""

    @abstractmethod
    async def aclose(self) -> None:
        """Frees what it holds, once all work has ended."""

    def call(self, work: Coroutine[Any, Any, A]) -> A:
        """Does something on the loop, and waits for it.

        Raises:
            ServiceClosed: If `close` ended it.
        """
        try:
            return self._schedule(work).result()
        except CancelledError:
            raise _closed() from None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something on the loop."""
        self._schedule(work)

    def close(self) -> None:
        """Ends all work. Idempotent."""

        async def end() -> None:
            own = asyncio.current_task()
            others = [task for task in asyncio.all_tasks() if task is not own]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self.aclose()
            await self._loop.shutdown_asyncgens()

        with self._lock:
            if self.closed:
                return
            self.closed = True
            ended = asyncio.run_coroutine_threadsafe(end(), self._loop)
        ended.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        if threading.current_thread() is not self._thread:  # a service may be forgotten anywhere
            self._thread.join(CLOSED_WITHIN)

    def _schedule(self, work: Coroutine[Any, Any, A]) -> "Future[A]":
        with self._lock:
            if not self.closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _closed()


def refused(said: str) -> InvalidRequest:
    """The error for a completion that vLLM does not take."""
    if "context length" in said or "max_model_len" in said:
        return ContextTooLong(f"vLLM: {said}")
    return InvalidRequest(f"vLLM refuses the request: {said}")


def _closed() -> ServiceClosed:
    return ServiceClosed("The service is closed; load another one.")


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
