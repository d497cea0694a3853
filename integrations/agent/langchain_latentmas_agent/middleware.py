"""LatentMiddleware: gives the memories in an agent's state to its model, and records what the model left."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState, ExtendedModelResponse, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables.config import ensure_config
from langgraph.types import Command

from langchain_latentmas import ChatLatentMAS, LatentRef, merge_latents
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.modes import runs_as_text
from langchain_latentmas.state import ancestry, tips


class LatentAgentState(AgentState[Any]):
    """State of an agent, with the references that stand for what was thought and said."""

    latents: NotRequired[Annotated[list[LatentRef], merge_latents]]


class LatentMiddleware(AgentMiddleware[LatentAgentState, Any, Any]):
    """Lets an agent of `create_agent` take part in a latent graph.

    The agent's `ChatLatentMAS` reads the memories that other agents left in the state's `latents`, and every message
    it makes leaves its own there. What stands in a memory that is read is not read a second time from the messages.
    Run with `{"configurable": {"edges": "text"}}`, the agent reads messages alone, speaks, and leaves nothing; with
    `{"planner->judger": "text"}` there, the agent called planner speaks and leaves nothing.

    Example:
        ```python
        planner = create_agent(llm, middleware=[LatentMiddleware("planner", steps=20)])
        judger = create_agent(llm, middleware=[LatentMiddleware("judger", reads=["planner"])])
        ```
    """

    state_schema = LatentAgentState

    def __init__(self, agent: str, *, steps: int | None = None, reads: Sequence[str] | None = None) -> None:
        """Describes the agent.

        Args:
            agent: Its name in references, and in `reads` of others.
            steps: Latent steps that it takes instead of speaking, its message is a marker; None lets it speak. An agent
                that thinks can have no tools, since calling one is speaking.
            reads: Agents whose memories it reads, in the order in which they are merged; None reads every tip that
                another agent left, by name.
        """
        super().__init__()
        self.agent, self.steps, self.reads = agent, steps, reads

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ExtendedModelResponse[Any]:
        """Adds the memories to the call, and the reference of what came of it to the state.

        Raises:
            InvalidRequest: If the agent's model is no `ChatLatentMAS`, or `reads` names somebody who left nothing.
        """
        return self._recorded(handler(self._reading(request)))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ExtendedModelResponse[Any]:
        """Like `wrap_model_call`, for async runs."""
        return self._recorded(await handler(self._reading(request)))

    def _reading(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if not isinstance(request.model, ChatLatentMAS):
            raise InvalidRequest(
                f"Agent {self.agent!r} runs {type(request.model).__name__}, which reads no memories; "
                "give it a ChatLatentMAS, or take its LatentMiddleware out."
            )
        settings = {**request.model_settings, "agent": self.agent, "steps": self.steps}
        if runs_as_text(ensure_config()):
            return request.override(model_settings=settings)
        known: list[LatentRef] = list(request.state.get("latents") or [])  # type: ignore[call-overload]
        said = {message.response_metadata.get("agent") for message in request.messages}
        latents = self._chosen([ref for ref in known if ref["agent"] != self.agent], said)
        read = ancestry(latents, known)
        messages = [message for message in request.messages if not _left_out(message, read, known)]
        return request.override(messages=messages, model_settings={**settings, "latents": latents})

    def _chosen(self, others: list[LatentRef], said: set[str | None]) -> list[LatentRef]:
        if self.reads is None:
            return sorted(tips(others), key=lambda ref: ref["agent"])
        chosen = []
        for agent in self.reads:
            theirs = tips(ref for ref in others if ref["agent"] == agent)
            if not theirs and agent not in said:
                there = ", ".join(sorted({ref["agent"] for ref in others})) or "nobody yet"
                raise InvalidRequest(
                    f"Agent {self.agent!r} reads {agent!r}, who left nothing in the state (there: {there}). "
                    "Correct reads=..., or let it run first."
                )
            chosen += theirs
        return chosen

    def _recorded(self, response: ModelResponse[Any]) -> ExtendedModelResponse[Any]:
        made = [message for message in response.result if isinstance(message, AIMessage)]
        refs = [
            message.response_metadata["latent_ref"] for message in made if "latent_ref" in message.response_metadata
        ]
        if not refs or runs_as_text(ensure_config(), self.agent):
            return ExtendedModelResponse(response)
        return ExtendedModelResponse(response, Command(update={"latents": refs}))


def _left_out(message: AnyMessage, read: set[str], known: list[LatentRef]) -> bool:
    """Whether a memory that is read holds this message, or it is the marker of one that `reads` leaves out.

    A message that calls tools stays beside their answers.
    """
    made = (message.response_metadata.get("latent_ref") or {}).get("id")
    thought = message.text.startswith("[latent ") and any(ref["id"] == made for ref in known)
    return (made in read or thought) and not getattr(message, "tool_calls", None)
