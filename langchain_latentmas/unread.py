"""What an agent has not read yet: of the memories of others, and of a conversation that such memories hold."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from .service.marker import OPENING
from .state import LatentRef, ancestry

logger = logging.getLogger(__name__)

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
    return None if said is not None and said != _digest(message) else ref.get("id")


def key_of(message: BaseMessage) -> str | int:
    """What tells a message from others; the reducer of LangGraph gives each an id."""
    return message.id or id(message)


def mark(message: AIMessage, before: Sequence[BaseMessage]) -> None:
    """Notes in a message that was spoken what its memory holds.

    Args:
        message: What was said.
        before: All messages of the conversation before it, if each was in its prompt or in a memory that was read.
    """
    message.response_metadata[SAID] = _digest(message)
    if before:
        digests = [_digest(earlier) for earlier in before]
        message.response_metadata[READ] = _heads(digests)[-1]
        turn = digests[1 + last_human(before) :]
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
    found: set[str | int] = set()
    whole = 0  # so many of the first messages are held
    digests = [_digest(message) for message in messages]
    earlier: defaultdict[str, list[str | int]] = defaultdict(list)
    for i, (message, digest, head) in enumerate(zip(messages, digests, _heads(digests), strict=False)):
        if memory_of(message) in read:
            found.add(key_of(message))
            # What is said in the same words later on was not there to be read.
            for known, times in Counter(message.response_metadata.get(TURN, ())).items():
                found.update(earlier[known][-times:])
            # Not always the last one: of agents side by side, one never saw what the other said before it.
            if message.response_metadata.get(READ) == head:
                whole = i
        earlier[digest].append(key_of(message))
    found |= {key_of(message) for message in messages[:whole]}
    answered = {m.tool_call_id for m in messages if isinstance(m, ToolMessage) and key_of(m) not in found}
    asked = last_human(messages)
    stay: list[BaseMessage] = [] if asked < 0 else [messages[asked]]
    stay += [m for m in messages if isinstance(m, AIMessage) and any(call["id"] in answered for call in m.tool_calls)]
    return found - {key_of(message) for message in stay}


def not_yet_read(
    left: Mapping[str, list[LatentRef]], own: Sequence[LatentRef], known: Sequence[LatentRef]
) -> dict[str, list[LatentRef]]:
    """Those of each agent's memories that a reader has not read yet; if there are none, those that it read last.

    So on a thread with several turns it reads what was thought in this one, be it the same again as in an earlier one.
    All that some workers of one name thought side by side is new together.

    Args:
        left: The memories by agent.
        own: The reader's own, in order.
        known: All of the state.
    """
    before = ancestry(own, known)
    # A thought that comes again has the id that it had, but stands behind what the reader has left since.
    since = {(ref["id"], ref["agent"]) for ref in known[known.index(own[-1]) + 1 :]}
    new = {
        agent: [ref for ref in refs if ref["id"] not in before or (ref["id"], agent) in since]
        for agent, refs in left.items()
    }
    if all(new.values()):
        return new
    last = ancestry(own[-1:], known)
    return {agent: new[agent] or [ref for ref in refs if ref["id"] in last] or refs for agent, refs in left.items()}


def thoughts(messages: Sequence[BaseMessage], known: Sequence[LatentRef]) -> set[str | int]:
    """Keys of markers whose references are in the state: what a reader leaves out is not read from the messages."""
    marked = [m for m in messages if m.response_metadata.get("thought") and m.text.startswith(OPENING)]
    ids = {ref["id"] for ref in known} if marked else set()  # there may be thousands, and none is a message
    return {key_of(message) for message in marked if memory_of(message) in ids}


def warn_of_thoughts(
    agent: str, reads: Collection[str] | None, known: Sequence[LatentRef], messages: Sequence[BaseMessage]
) -> None:
    """Says whose thoughts a run as text loses: those that nobody has read who spoke.

    Args:
        agent: Who runs so.
        reads: Whose memories it would read otherwise; None for all.
        known: All of the state.
        messages: The conversation.
    """
    refs = [message.response_metadata.get("latent_ref") or {} for message in messages]
    spoken = {key for ref in refs for key in (ref.get("id"), *ref.get("parents", ()))}
    read = ancestry([ref for ref in known if ref["id"] in spoken], known)
    left = {ref["agent"] for ref in known if ref["id"] not in read}
    if unread := sorted(left if reads is None else left & set(reads)):
        logger.warning(
            "Agent %r runs as text and reads nothing of what was thought before in this thread, by: %s. Go on as "
            "latent, or run these again as text.",
            *(agent, ", ".join(unread)),
        )


def last_human(messages: Sequence[BaseMessage]) -> int:
    """Where the last question stands, -1 for nowhere."""
    return max((i for i, message in enumerate(messages) if isinstance(message, HumanMessage)), default=-1)


def _digest(message: BaseMessage) -> str:
    parts = [
        message.type,
        message.content,
        getattr(message, "tool_calls", None),
        getattr(message, "tool_call_id", None),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _heads(digests: Iterable[str]) -> list[str]:
    """Digests of the conversation before each message, and of all of it."""
    so_far = hashlib.sha256()
    heads = [so_far.hexdigest()[:32]]
    for digest in digests:
        so_far.update(digest.encode())
        heads.append(so_far.hexdigest()[:32])
    return heads
