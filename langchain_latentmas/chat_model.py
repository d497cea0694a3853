"""ChatLatentMAS, the LangChain chat model over a latent service; all speaking goes through it."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field

from .service import Chunk, LatentService
from .service.shared import shared_service
from .state import LatentRef


class ChatLatentMAS(BaseChatModel):
    """A chat model that can read memories before it speaks.

    Example:
        ```python
        llm = ChatLatentMAS(service=service, max_tokens=256)
        llm.invoke("What is the answer?", latents=[ref])
        ```

    The message it returns has `usage_metadata` with the thoughts it read in `output_token_details["latent_steps"]`, and
    in `response_metadata` the model's name, the finish reason, and as `latent_ref` the reference of what it said.

    Attributes:
        service: The model service; None takes the shared one of `model`.
        model: What `LatentService.load` takes, where `service` is None; None takes `LATENTMAS_SERVICE`, else "bundled".
        max_tokens: Most tokens to decode.
        temperature: 0 means greedy.
        top_p: Nucleus sampling.
        top_k: Only so many most likely tokens.
        seed: For the same sample again.
        stop: Strings that end the text, where a call names none.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    service: LatentService | None = Field(default=None, exclude=True, repr=False)
    model: str | None = Field(default=None, alias="model_name")
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")

    @property
    def _service(self) -> LatentService:
        if self.service is None:
            self.service = shared_service(self.model)
        return self.service

    @property
    def _llm_type(self) -> str:
        return "latentmas"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "max_tokens", "temperature", "top_p", "top_k", "seed")}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="latentmas",
            ls_model_name=self.model or "bundled",
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if named := stop or self.stop:
            params["ls_stop"] = named
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        latents: Sequence[LatentRef] = (),
        agent: str | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        sampling = self._sampling(stop, kwargs)
        for chunk in self._service.speak(messages, latents, agent=agent or "agent", **sampling):
            generation = self._generation(chunk, agent)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=generation)
            yield generation

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        *,
        latents: Sequence[LatentRef] = (),
        agent: str | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        sampling = self._sampling(stop, kwargs)
        async for chunk in self._service.aspeak(messages, latents, agent=agent or "agent", **sampling):
            generation = self._generation(chunk, agent)
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=generation)
            yield generation

    def _sampling(self, stop: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}
        return {**own, **given, "stop": stop or self.stop}

    def _generation(self, chunk: Chunk, agent: str | None) -> ChatGenerationChunk:
        message = AIMessageChunk(content=chunk.text, name=agent)
        if chunk.usage is not None:
            read, spoken = chunk.usage["input_tokens"], chunk.usage["output_tokens"]
            message.usage_metadata = UsageMetadata(
                input_tokens=read,
                output_tokens=spoken,
                total_tokens=read + spoken,
                output_token_details={"latent_steps": chunk.usage["latent_steps"]},  # type: ignore[typeddict-unknown-key]
            )
            message.response_metadata = {
                "model_provider": "latentmas",
                "model_name": self._service.info()["model"],
                "finish_reason": chunk.finish_reason,
                "agent": agent,
                "latent_ref": chunk.ref,
                "merge": chunk.usage["merge"],
            }
            message.chunk_position = "last"
        return ChatGenerationChunk(message=message)
