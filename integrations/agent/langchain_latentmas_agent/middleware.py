"""LatentMiddleware: gives the memories in an agent's state to its model, and records what the model left."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState, ExtendedModelResponse, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langgraph.types import Command

from langchain_latentmas import ChatLatentMAS, LatentRef, merge_latents
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.modes import agent_leaves_text, runs_as_text
from langchain_latentmas.service.identity import checked_on_failure
from langchain_latentmas.state import ancestry, tips
from langchain_latentmas.unread import held, key_of, mark, not_yet_read, thoughts, warn_of_thoughts


class LatentAgentState(AgentState[Any]):
    """State of an agent, with the references that stand for what was thought and said."""

    latents: NotRequired[Annotated[list[LatentRef], merge_latents]]


class LatentMiddleware(AgentMiddleware[LatentAgentState, Any, Any]):
    """Lets an agent of `create_agent` take part in a latent graph.

    The agent's `ChatLatentMAS` reads the memories that other agents left in the state's `latents`, and every message
    it makes, but for calls of tools that it goes on from, leaves its own there. What stands in a memory that is read is
    not read a second time from the messages. It comes last in `middleware`: what others behind it change in the
    messages (trim, edit, summarize) it does not see, and would take for read as it was.

    Run with `{"configurable": {"edges": "text"}}`, the agent reads messages alone, speaks, and leaves nothing (thoughts
    of earlier that stand in no message are lost to it, which is logged as a warning). With
    `{"planner->judger": "text"}` there, the agent or node called planner speaks and leaves nothing.

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
            reads: Agents whose memories it reads, in the order in which they are merged: those it has not read yet, or
                if there are none, those it read last. All of them have to have run: the agent does not see the graph
                around it, in which one may be yet to come. None reads every tip by agent name, and so all of a
                conversation.
        """
        super().__init__()
        self.agent, self.steps, self.reads = agent, steps, reads

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ExtendedModelResponse[Any]:
        """Adds the memories to the call, and the reference of what came of it to the state.

        Raises:
            InvalidRequest: If the agent's model is no `ChatLatentMAS`, or `reads` names somebody who left nothing.
            TamperedReference: If a reference in the state is malformed.
        """
        return self._recorded(handler(self._reading(request)), request)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ExtendedModelResponse[Any]:
        """Like `wrap_model_call`, for async runs."""
        return self._recorded(await handler(self._reading(request)), request)

    def _reading(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if not isinstance(request.model, ChatLatentMAS):
            raise InvalidRequest(
                f"Agent {self.agent!r} runs {type(request.model).__name__}, which reads no memories; "
                "give it a ChatLatentMAS, or take its LatentMiddleware out."
            )
        config = ensure_config()
        steps = None if agent_leaves_text(config, self.agent) else self.steps
        settings = {**request.model_settings, "agent": self.agent, "steps": steps}
        known: list[LatentRef] = list(request.state.get("latents") or [])  # type: ignore[call-overload]
        with checked_on_failure(known):
            if runs_as_text(config):
                if not any(isinstance(last, ToolMessage) for last in request.messages[-1:]):  # not after each call
                    warn_of_thoughts(self.agent, self.reads, known, request.messages)
                return request.override(model_settings=settings)
            said = {message.response_metadata.get("agent") for message in request.messages}
            latents = self._chosen(known, said)
            there = held(request.messages, ancestry(latents, known)) | thoughts(request.messages, known)
        messages = [message for message in request.messages if key_of(message) not in there]
        return request.override(messages=messages, model_settings={**settings, "latents": latents})

    def _chosen(self, known: list[LatentRef], said: set[str | None]) -> list[LatentRef]:
        if self.reads is None:
            return sorted(tips(known), key=lambda ref: ref["agent"])
        others = [ref for ref in known if ref["agent"] != self.agent]
        left = {agent: [ref for ref in others if ref["agent"] == agent] for agent in self.reads}
        if own := [ref for ref in known if ref["agent"] == self.agent]:
            left = not_yet_read(left, own, known)
        chosen = []
        for agent, theirs in left.items():
            if not theirs and agent not in said:
                there = ", ".join(sorted({ref["agent"] for ref in others})) or "nobody yet"
                raise InvalidRequest(
                    f"Agent {self.agent!r} reads {agent!r}, who left nothing in the state (there: {there}). "
                    "Correct reads=..., let it run first, or leave reads out to read whoever has run."
                )
            chosen += tips(theirs)
        return chosen

    def _recorded(self, response: ModelResponse[Any], request: ModelRequest[Any]) -> ExtendedModelResponse[Any]:
        said = [
            message
            for message in response.result
            if isinstance(message, AIMessage) and "latent_ref" in message.response_metadata
        ]
        if not said or agent_leaves_text(ensure_config(), self.agent):
            return ExtendedModelResponse(response)
        for message in said:
            mark(message, request.messages)
        # A call of tools is not for others to read: the memory of what is said after all calls holds it, and them.
        ended = response.structured_response is not None
        last = [message for message in said if ended or not _goes_on(message, request.tools)]
        refs = [message.response_metadata["latent_ref"] for message in last]
        return ExtendedModelResponse(response, Command(update={"latents": refs}) if refs else None)


def _goes_on(message: AIMessage, tools: Sequence[Any]) -> bool:
    """Whether an agent goes on after a message: not if the tools that it calls answer for the agent."""
    direct = {tool.name for tool in tools if isinstance(tool, BaseTool) and tool.return_direct}
    return not all(call["name"] in direct for call in message.tool_calls)
