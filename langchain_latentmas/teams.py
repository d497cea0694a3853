"""The arrangements of the paper as ready graphs: experts one after the other, in parallel before a judger, or alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.messages import SystemMessage
from langgraph.graph import END, START, StateGraph

from .bundled import EXPERTS, ROLES, SEQUENTIAL
from .node import LatentAgentNode, Prompt
from .service import LatentService
from .state import LatentState


def sequential(service: LatentService | None = None, **options: Any) -> "StateGraph[LatentState]":
    """Planner, critic and refiner think one after the other, then a judger speaks (paper, section 3.4).

    Args:
        service: The model service; None as for `LatentAgentNode`.
        **options: `agents` (prompt by name), `judger` (its prompt), `relay` (whether the judger is kept from the
            question, so that it can know it from the others alone), `reads` (whom the judger reads; [] reads nobody),
            `state` (a schema that extends `LatentState`), and what `LatentAgentNode` takes: `steps`, `max_tokens`,
            `speak` (whether those before the judger speak too), ...

    Returns:
        A builder; compile it, with a checkpointer if you like.
    """
    agents, builder = _team(service, SEQUENTIAL, options)
    for one, next_one in zip([START, *agents], [*agents, "judger"], strict=True):
        builder.add_edge(one, next_one)
    builder.add_edge("judger", END)
    return builder


def hierarchical(service: LatentService | None = None, **options: Any) -> "StateGraph[LatentState]":
    """Experts think in parallel and blind to each other, then a judger reads them all and speaks (paper, section 3.4).

    Args:
        service: The model service; None as for `LatentAgentNode`.
        **options: As for `sequential`.

    Returns:
        A builder.
    """
    agents, builder = _team(service, EXPERTS, options)
    for agent in agents:
        builder.add_edge(START, agent)
    builder.add_edge(list(agents), "judger")
    builder.add_edge("judger", END)
    return builder


def single(service: LatentService | None = None, **options: Any) -> "StateGraph[LatentState]":
    """One agent that speaks alone: what a team is compared with.

    Args:
        service: The model service; None as for `LatentAgentNode`.
        **options: `solver` (its prompt), `state`, and what `LatentAgentNode` takes.

    Returns:
        A builder.
    """
    prompt, builder = options.pop("solver", ROLES["solver"]), StateGraph(options.pop("state", LatentState))
    builder.add_node("solver", LatentAgentNode("solver", prompt, service=service, **{**options, "speak": True}))
    builder.add_edge(START, "solver")
    builder.add_edge("solver", END)
    return builder


ARRANGEMENTS: "Mapping[str, Callable[..., StateGraph[LatentState]]]" = {
    "single": single,
    "sequential": sequential,
    "hierarchical": hierarchical,
}
"""By name; "single" is what the others are compared with."""


def _team(
    service: LatentService | None, names: Sequence[str], options: dict[str, Any]
) -> "tuple[list[str], StateGraph[LatentState]]":
    agents: Mapping[str, Prompt] = options.pop("agents", {name: ROLES[name] for name in names})
    prompt, reads = options.pop("judger", ROLES["judger"]), options.pop("reads", None)
    judger: Prompt = (lambda state: [SystemMessage(prompt)]) if options.pop("relay", False) else prompt
    builder = StateGraph(options.pop("state", LatentState))
    for name, role in agents.items():
        builder.add_node(name, LatentAgentNode(name, role, service=service, **options))
    options.pop("steps", None)
    options |= {"speak": True, "reads": reads}
    builder.add_node("judger", LatentAgentNode("judger", judger, service=service, **options))
    return list(agents), builder
