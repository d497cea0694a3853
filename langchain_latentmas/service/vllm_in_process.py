"""vLLM's engine, started from this process."""

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from pydantic import Field, field_validator
from transformers import AutoConfig

from .. import bundled
from ..errors import EngineFailed, InvalidRequest, MissingExtra, ModelNotFound, ModelNotSupported, first_line
from .recipes import RecipeSettings
from .units import Bytes
from .vllm_transport import Transport, refused

OF_THE_ENGINE = (
    "device",
    "kv_dtype",
    "live_budget",
    "kv_cpu_budget",
    "kv_disk_budget",
    "kv_folder",
    "compile",
    "pack",
    "cuda_graphs",
    "prefill_chunk",
)
OURS = ("model", "tokenizer", "revision", "tokenizer_revision", "served_model_name")


class EngineSettings(RecipeSettings):
    """Settings of vLLM in this process, besides those of `RecipeSettings`.

    Attributes:
        realign: Whether the alignment uses `W`, or only rescales.
        kv_budget: Bytes of KV, `kv_cache_memory_bytes` in vLLM's words; None leaves it to vLLM.
        max_rows: Most requests in a batch, `max_num_seqs` in vLLM's words; None leaves it to vLLM.
        dtype: Of weights and KV, in vLLM's words.
        revision: Of the model on the hub.
        engine: Further fields of `vllm.AsyncEngineArgs`, such as `{"tensor_parallel_size": 2, "max_model_len": 32768}`.
    """

    realign: bool = True
    kv_budget: Bytes | None = None
    max_rows: int | None = Field(None, ge=1)
    dtype: str = "auto"
    revision: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engine")
    @classmethod
    def _not_ours(cls, engine: dict[str, Any]) -> dict[str, Any]:
        if named := sorted(engine.keys() & set(OURS)):
            raise ValueError(f"{named[0]} follows from vllm:<model> and revision=...; leave it out")
        return engine

    def arguments(self) -> dict[str, Any]:
        """Fields of `vllm.AsyncEngineArgs`; what was not asked for is vLLM's to choose."""
        named = {"kv_budget": "kv_cache_memory_bytes", "max_rows": "max_num_seqs"}
        asked = {vllm: value for ours, vllm in named.items() if (value := getattr(self, ours)) is not None}
        return {"enable_prefix_caching": True, "dtype": self.dtype, **asked, **self.engine}


class InProcess(Transport):
    """vLLM's `AsyncLLM`: vLLM runs the model in processes of its own, which end with this one."""

    def __init__(self, name: str, settings: EngineSettings) -> None:
        """Starts the engine, which takes most of a minute.

        Args:
            name: "bundled", a hub id, or a folder.
            settings: How to run it.

        Raises:
            MissingExtra: If vLLM or its plugin is not installed.
            ModelNotFound: If there is no such model.
            ModelNotSupported: If vLLM or its plugin does not think with this model, these settings or this version.
            InvalidRequest: If vLLM refuses a setting.
            EngineFailed: If the engine does not start.
        """
        try:
            import latentmas_vllm as plugin
            from vllm.version import __version__ as version
        except ModuleNotFoundError as error:
            raise MissingExtra.of("vllm", f"{error.name} is not installed") from error
        if (reason := plugin.unsupported(version)) is not None:
            raise ModelNotSupported(reason)
        if "latentmas" not in os.environ.get("VLLM_PLUGINS", "latentmas").split(","):
            raise ModelNotSupported("VLLM_PLUGINS leaves the plugin out; add latentmas to it.")
        source, revision = str(bundled.MODEL) if name == "bundled" else name, settings.revision
        architecture = _architecture(source, revision)
        if architecture not in plugin.FAMILIES:
            raise ModelNotSupported(
                f"{name} is a {architecture}; on vLLM, these can think: {', '.join(plugin.FAMILIES)}."
            )
        overrides = {"architectures": [f"Latent{architecture}"], "latent_realign": settings.realign}
        asked = settings.arguments()
        asked |= {
            "model": source,
            "revision": revision,
            "tokenizer_revision": revision,
            "served_model_name": name,
            "hf_overrides": {**asked.get("hf_overrides", {}), **overrides},
        }
        super().__init__(name, patience=0)
        self._llm: Any = None
        try:
            config = self.call(_configured(asked))
            self._llm = self.call(_engine(config))
            self._facts = {**_facts(config), "model": name, "root": source}
        except BaseException:
            self.close()
            raise

    async def facts(self) -> dict[str, Any]:
        """See `Transport.facts`."""
        return self._facts

    async def tokens(self, body: dict[str, Any]) -> AsyncGenerator[int]:
        """See `Transport.tokens`."""
        async with aclosing(self._complete(body)) as pieces:
            async for piece in pieces:
                for token in piece.token_ids:
                    yield token

    async def read_out(self, body: dict[str, Any]) -> list[dict[int, float]]:
        """See `Transport.read_out`."""
        return [
            {token: share.logprob for token, share in read.items()}
            async for piece in self._complete(body)
            for read in piece.logprobs
        ]

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()  # here, since no thread starts any more where the interpreter is about to end

    async def _complete(self, body: dict[str, Any]) -> AsyncGenerator[Any]:
        """Pieces of a completion as they come."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMClientError, VLLMServerError
        from vllm.sampling_params import RequestOutputKind

        settings = {name: value for name, value in body.items() if name != "prompt"}
        prompt = TokensPrompt(prompt_token_ids=body["prompt"])
        try:
            sampling = SamplingParams(**settings, output_kind=RequestOutputKind.DELTA, detokenize=False)
            async with aclosing(self._llm.generate(prompt, sampling, uuid4().hex)) as outputs:  # aborts what is left
                async for output in outputs:
                    yield output.outputs[0]
        except (VLLMClientError, ValueError) as error:
            raise refused(str(error)) from error
        except VLLMServerError as error:
            dead = " The engine has ended; load the service anew." if self._llm.errored else ""
            raise EngineFailed(f"vLLM failed: {error}{dead}") from error


def _architecture(source: str, revision: str | None) -> str:
    try:
        return str((AutoConfig.from_pretrained(source, revision=revision).architectures or ["model without a name"])[0])
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(
            f"Cannot load {source!r}: {first_line(error)} Give vllm: and a hub id, a folder, or 'bundled'."
        ) from error


async def _configured(asked: dict[str, Any]) -> Any:
    """The configuration of an engine; what can be known to be wrong is known before it is made."""
    from latentmas_vllm.checks import refusals
    from latentmas_vllm.facts import tokenizer_of
    from latentmas_vllm.latent_token import latent_token_id
    from vllm import AsyncEngineArgs

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would take locks of our threads along
    try:
        config = AsyncEngineArgs(**asked).create_engine_config()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"vLLM refuses these settings: {error}") from error
    if reasons := refusals(config):
        raise ModelNotSupported(f"vLLM cannot think exactly with these settings. {'. '.join(reasons)}.")
    try:
        latent_token_id(config.model_config.hf_text_config, tokenizer_of(config))
    except ValueError as error:
        raise ModelNotSupported(f"{asked['served_model_name']}: {error}") from error
    return config


async def _engine(config: Any) -> Any:
    """The engine, on whose loop it must be made."""
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        # In no variable: an error that vLLM keeps from its imports holds this frame, and an engine left over fails at
        # exit.
        return AsyncLLM.from_vllm_config(config)
    except Exception as error:  # vLLM's own, of any kind, once a process of it has said why
        raise EngineFailed(f"vLLM's engine did not start, its log says why: {error}") from error


def _facts(config: Any) -> dict[str, Any]:
    """What the plugin states, once the engine has the weights: those of a hub model are not here before."""
    from latentmas_vllm.facts import facts

    return facts(config)
