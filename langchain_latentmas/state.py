"""The graph state: references to memories that live in the service. Plain data, imports no torch."""

from collections.abc import Iterable, Sequence
from typing import Annotated

from langchain_core.messages import AnyMessage
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict

from .errors import InvalidRequest


class LatentRef(TypedDict):
    """A handle of a memory, in plain JSON, a few hundred bytes.

    A `TypedDict`, because that is what every LangGraph checkpointer round-trips without a warning. It is signed by the
    service that made it and verified before use, so one may store it, send it and lose it, but not write it.
    """

    id: str
    """`lat_` and 32 hex digits: a digest of what the memory was made from."""
    agent: str
    """Who thought or spoke."""
    model: str
    """Fingerprint of the model's weights and vocabulary."""
    parents: list[str]
    """Ids of the memories that were read, in the order in which they were read."""
    positions: int
    """Positions of the whole memory, its ancestors included."""
    steps: int
    """Latent steps that this agent took."""
    mac: str
    """HMAC-SHA256 over all other fields."""


def merge_latents(left: Sequence[LatentRef] | None, right: Sequence[LatentRef] | None) -> list[LatentRef]:
    """Reducer of `LatentState.latents`: the union, in the order in which it was thought last.

    A reference of the state that comes again stands for the same memory, thought again, and goes to the end: so it
    counts as new to those who read it before. But subgraphs and handoffs emit the whole state again: what they begin
    with in the order of the state stays where it is, unless it is one reference alone, as a node returns it. Merging
    the same again changes nothing. Pure, because LangGraph may call it twice.

    Args:
        left: What the state holds.
        right: What a node returned.

    Returns:
        A new list without repetitions; of the same id and agent, the reference that came first.

    Raises:
        InvalidRequest: If one of them is no list of references.
    """
    refs = [*(left or []), *(right or [])]
    try:
        if len({ref["id"] for ref in refs}) == len(refs):  # the rule, and soon seen: a state may hold thousands
            return refs
    except (TypeError, KeyError):
        raise InvalidRequest(
            f"`latents` takes a list of references, such as [ref] for one; it got {str(right)[:80]!r}."
        ) from None
    merged, emitted = _by_key(left or []), _by_key(right or [])
    standing = iter(list(merged))
    again = len(emitted) == 1
    for key, ref in emitted.items():
        again = again or key not in standing  # which looks on from where it found the one before
        if again:
            merged[key] = merged.pop(key, ref)
    return list(merged.values())


class LatentState(TypedDict):
    """State of a latent graph: the conversation, and the references that stand for what was thought."""

    messages: Annotated[list[AnyMessage], add_messages]
    latents: Annotated[list[LatentRef], merge_latents]


def tips(refs: Iterable[LatentRef]) -> list[LatentRef]:
    """The references that no other one of them descends from, in their order.

    Args:
        refs: Any references, say a state's `latents`.

    Returns:
        Those that nobody among `refs` names as a parent.
    """
    refs = list(refs)
    parents = {parent for ref in refs for parent in ref["parents"]}
    return [ref for ref in refs if ref["id"] not in parents]


def ancestry(refs: Iterable[LatentRef], among: Iterable[LatentRef]) -> set[str]:
    """Ids of `refs` and of everything they descend from, as far as `among` knows it.

    Args:
        refs: Where to start.
        among: The references whose `parents` may be followed.

    Returns:
        A set of ids.
    """
    known = {ref["id"]: ref for ref in among}
    found: set[str] = set()
    queue = [ref["id"] for ref in refs]
    while queue:
        key = queue.pop()
        if key not in found:
            found.add(key)
            queue += known[key]["parents"] if key in known else []
    return found


def _by_key(refs: Iterable[LatentRef]) -> dict[tuple[str, str], LatentRef]:
    """References by id and agent; of several, the first."""
    found: dict[tuple[str, str], LatentRef] = {}
    for ref in refs:
        found.setdefault((ref["id"], ref["agent"]), ref)
    return found
