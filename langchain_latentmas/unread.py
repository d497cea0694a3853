"""What an agent has not read yet: of the memories of others, and of a conversation that such memories hold."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from .service.marker import OPENING
from .state import LatentRef, ancestry

READ = "latent_read"
"""In `response_metadata` of what an agent said: a digest of all messages before it, where its memory holds them."""
TURN = "latent_turn"
"""Likewise, digests of those messages since the last human one: agents side by side see only their own."""
SAID = "latent_said"
"""Likewise, a digest of what it said: where somebody has edited that since, its memory does not hold it."""


def memory_of(message: BaseMessage) -> str | None:
    """Id of the memory in which the text of a message stands."""
    ref: Mapping[str, Any] = message.response_metadata.get("latent_ref") or {}
    said = message.response_metadata.get(SAID)
    return None if said is not None and said != _digest([message]) else ref.get("id")


def key_of(message: BaseMessage) -> str | int:
    """What tells a message from others; the reducer of LangGraph gives each an id."""
    return message.id or id(message)


def mark(message: AIMessage, before: Sequence[BaseMessage]) -> None:
    """Notes in a message that was spoken what its memory holds.

    Args:
        message: What was said.
        before: All messages of the conversation before it, if each was in its prompt or in a memory that was read.
    """
    message.response_metadata[SAID] = _digest([message])
    if before:
        message.response_metadata[READ] = _digest(before)
        turn = [_digest([earlier]) for earlier in before[1 + last_human(before) :]]
        message.response_metadata |= {TURN: turn} if turn else {}


def held(messages: Sequence[BaseMessage], read: Collection[str]) -> set[str | int]:
    """Keys of messages that memories hold; but for the last question, which every agent is asked itself.

    What calls tools stays beside the answers of these: templates want both or none.

    A conversation that was cut, or edited, since then is another one: of that, only what agents said is held, as they
    said it.

    Args:
        messages: The conversation.
        read: Ids of the memories that are read, and of all that they descend from.
    """
    if not read:
        return set()
    remembered = [message for message in messages if memory_of(message) in read]
    found = {key_of(message) for message in remembered}
    if turn := {digest for message in remembered for digest in message.response_metadata.get(TURN, ())}:
        found |= {key_of(message) for message in messages if _digest([message]) in turn}
    said = (i for i in reversed(range(len(messages))) if READ in messages[i].response_metadata)
    # Not always the last one: before what one of several agents said side by side, others stand that it never saw.
    whole = (
        i
        for i in said
        if memory_of(messages[i]) in read and messages[i].response_metadata[READ] == _digest(messages[:i])
    )
    if (last := next(whole, None)) is not None:
        found |= {key_of(message) for message in messages[:last]}
    answered = {m.tool_call_id for m in messages if isinstance(m, ToolMessage) and key_of(m) not in found}
    asked = last_human(messages)
    stay: list[BaseMessage] = [] if asked < 0 else [messages[asked]]
    stay += [m for m in messages if isinstance(m, AIMessage) and any(call["id"] in answered for call in m.tool_calls)]
    return found - {key_of(message) for message in stay}


def not_yet_read(
    left: Mapping[str, list[LatentRef]], own: Sequence[LatentRef], known: Sequence[LatentRef]
) -> dict[str, list[LatentRef]]:
    """Those of each agent's memories that a reader has not read yet; if there are none, those that it read last.

    So on a thread with several turns it reads what was thought in this one. All that some workers of one name thought
    side by side is new together.

    Args:
        left: The memories by agent.
        own: The reader's own, in order.
        known: All of the state.
    """
    before = ancestry(own, known)
    new = {agent: [ref for ref in refs if ref["id"] not in before] for agent, refs in left.items()}
    if all(new.values()):
        return new
    last = ancestry(own[-1:], known)
    return {agent: new[agent] or [ref for ref in refs if ref["id"] in last] or refs for agent, refs in left.items()}


def thoughts(messages: Sequence[BaseMessage], known: Sequence[LatentRef]) -> set[str | int]:
    """Keys of markers whose references are in the state: what a reader leaves out is not read from the messages."""
    marked = [m for m in messages if m.response_metadata.get("thought") and m.text.startswith(OPENING)]
    ids = {ref["id"] for ref in known} if marked else set()  # there may be thousands, and none is a message
    return {key_of(message) for message in marked if memory_of(message) in ids}


def last_human(messages: Sequence[BaseMessage]) -> int:
    """Where the last question stands, -1 for nowhere."""
    return max((i for i, message in enumerate(messages) if isinstance(message, HumanMessage)), default=-1)


def _digest(messages: Sequence[BaseMessage]) -> str:
    parts = [
        [message.type, message.content, getattr(message, "tool_calls", None), getattr(message, "tool_call_id", None)]
        for message in messages
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
