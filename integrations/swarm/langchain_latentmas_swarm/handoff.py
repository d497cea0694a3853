"""create_latent_handoff_tool: hands over to another agent of a swarm, memories included."""

from typing import Annotated, Any, NotRequired

from langchain.tools import BaseTool, InjectedToolCallId, tool
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables.config import ensure_config
from langgraph.prebuilt import InjectedState
from langgraph.types import Command
from langgraph_swarm import SwarmState, create_handoff_tool
from langgraph_swarm.handoff import METADATA_KEY_HANDOFF_DESTINATION

from langchain_latentmas import LatentRef, merge_latents
from langchain_latentmas.modes import agent_leaves_text


class LatentSwarmState(SwarmState):
    """State of a swarm, with the references that stand for what was thought and said."""

    latents: NotRequired[Annotated[list[LatentRef], merge_latents]]


def create_latent_handoff_tool(*, agent_name: str, name: str | None = None, description: str | None = None) -> BaseTool:
    """Makes a tool that hands over to another agent, together with `latents`, which the stock tool drops.

    The agents are those of `create_agent` with a `LatentMiddleware`, whose state has `latents`; the swarm is made with
    `create_swarm(..., state_schema=LatentSwarmState)`.

    Args:
        agent_name: Name of the agent to hand over to.
        name: Name of the tool; None makes it `transfer_to_<agent_name>`.
        description: Description of the tool; None makes it "Ask agent '<agent_name>' for help".

    Returns:
        A tool that `create_swarm` and its router know like the stock one.
    """
    stock = create_handoff_tool(agent_name=agent_name, name=name, description=description)

    @tool(stock.name, description=stock.description)
    def handoff(state: Annotated[Any, InjectedState], tool_call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        done = ToolMessage(f"Successfully transferred to {agent_name}", name=stock.name, tool_call_id=tool_call_id)
        *_, calling = (message for message in state["messages"] if isinstance(message, AIMessage))
        said = calling.response_metadata  # a call of other tools leaves no memory, but nothing is said after this one
        ends = "latent_ref" in said and not agent_leaves_text(ensure_config(), said.get("agent") or "")
        update = {
            "messages": [*state["messages"], done],
            "active_agent": agent_name,
            "latents": merge_latents(state.get("latents"), [said["latent_ref"]] if ends else []),
        }
        return Command(goto=agent_name, graph=Command.PARENT, update=update)

    handoff.metadata = {METADATA_KEY_HANDOFF_DESTINATION: agent_name}
    return handoff
