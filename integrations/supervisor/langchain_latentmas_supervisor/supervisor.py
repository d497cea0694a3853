"""create_latent_supervisor: a supervisor whose workers report in memories."""

from collections.abc import Sequence
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph_supervisor import create_supervisor

from langchain_latentmas import ChatLatentMAS, switch_edges
from langchain_latentmas.errors import InvalidRequest


def create_latent_supervisor(
    agents: list[Pregel[Any]],
    *,
    model: ChatLatentMAS,
    steps: int = 20,
    latent: Sequence[str] | None = None,
    supervisor_name: str = "supervisor",
    **options: Any,
) -> StateGraph[Any]:
    """Like `langgraph_supervisor.create_supervisor`, with workers that think their report instead of writing it.

    The supervisor calls its handoff tools in text, as before. A worker's report is a marker, which the supervisor, and
    the workers after it, read as the memory it stands for. Workers with tools or another model go on reporting in text.
    Run with `{"configurable": {"edges": "text"}}`, all do.

    Args:
        agents: The workers, compiled and named graphs.
        model: The supervisor's model, on the service of the workers' models.
        steps: Latent steps of a report.
        latent: Names of the workers that report latently; None takes all that can.
        supervisor_name: Name of the supervisor's node.
        **options: What else `create_supervisor` takes.

    Returns:
        A builder; compile it, with a checkpointer if you like.

    Raises:
        InvalidRequest: If there is a tool that forwards reports as they stand.
        InvalidEdge: If a worker named in `latent` is none, or cannot report latently; says why.
    """
    if latent != [] and any(getattr(tool, "name", "") == "forward_message" for tool in options.get("tools") or ()):
        raise InvalidRequest(
            "The tool forward_message hands a worker's report to the user as it stands, and a latent one is a marker: "
            "leave the tool out, or take latent=[] and text reports."
        )
    builder = create_supervisor(agents, model=model, supervisor_name=supervisor_name, **options)
    if latent is None:
        return switch_edges(builder, "*", steps=steps)
    return switch_edges(builder, [(worker, supervisor_name) for worker in latent], steps=steps)
