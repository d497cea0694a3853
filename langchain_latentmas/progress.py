"""Progress: what the custom stream of a graph is told while an agent thinks."""

from collections.abc import Callable

from langgraph.runtime import Runtime, get_runtime


def reporter(agent: str, steps: int) -> Callable[[int], None] | None:
    """Tells the custom stream of the running graph how far an agent is, as `{"agent", "step", "steps"}`.

    Args:
        agent: Who thinks.
        steps: Latent steps that it will take.

    Returns:
        What is to be called with each step taken. None where nobody would hear it: outside of a graph, or in one that
        does not stream "custom". Each call wakes an event loop, and over HTTP it is an event on the wire.
    """
    try:
        runtime: Runtime | None = get_runtime()
    except (RuntimeError, KeyError):  # called outside of a graph
        return None
    # A runnable that is no node has a config without a runtime.
    if runtime is None or _does_nothing(writer := runtime.stream_writer):
        return None
    return lambda step: writer({"agent": agent, "step": step, "steps": steps})


def _nothing(_: object) -> None:
    pass


def _does_nothing(function: Callable[..., object]) -> bool:
    # LangGraph gives a run that is not streamed an empty function, which has no name to know it by.
    code = getattr(function, "__code__", None)
    return code is not None and code.co_code == _nothing.__code__.co_code
