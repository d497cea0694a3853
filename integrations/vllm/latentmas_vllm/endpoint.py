"""`GET /latentmas`: what a client has to know before it thinks here."""

import asyncio
from argparse import Namespace
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from starlette.datastructures import State

from .facts import facts


class Endpoint:
    """Entry point of `vllm.endpoint_plugins`; vLLM loads it where `VLLM_PLUGINS` names it."""

    name: ClassVar[str] = "latentmas"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the route."""

        @app.get("/latentmas")
        async def latentmas(request: Request) -> dict[str, Any]:
            return dict(await asyncio.shield(request.app.state.latentmas))

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Collects the facts, once: weights stay as they are (`LatentToken.load_weights`).

        Hashing them takes seconds per gigabyte and does not hold up the start.
        """
        state.latentmas = asyncio.create_task(asyncio.to_thread(facts, engine_client.vllm_config))
