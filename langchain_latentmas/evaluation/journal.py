"""A file that gets every answer as a line of JSON, so that a run of hours is never lost. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import (
    DeadlineExceeded,
    EngineFailed,
    GraderFailed,
    InvalidRequest,
    SandboxUnavailable,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    StoreBusy,
)

if TYPE_CHECKING:
    from ..service import LatentService

MENDED = (
    DeadlineExceeded,
    EngineFailed,
    GraderFailed,
    SandboxUnavailable,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    StoreBusy,
)
"""What says nothing about a question: a retry may mend it, or whoever mends the grader."""
GRADER = "the grader raised "
"""What the journaled error of an answer begins with that was there, and not graded."""

PINNED = (
    *("fingerprint", "architecture", "quantization", "dtype", "device", "realign", "merge", "kv_dtype"),
    *("think_tag", "speak_tag", "template_args", "latent_token_id"),
)


def pinned(service: "LatentService") -> dict[str, Any]:
    """What of a service its answers and seconds depend on."""
    info = service.info()
    return {name: info[name] for name in PINNED if name in info} | {"chat_template": digest(service.chat_template)}


def is_mended(error: str) -> bool:
    """Whether a question with this journaled error (`Type: message`, maybe behind `GRADER`) should be asked again."""
    return error.startswith(GRADER) or error.split(":")[0] in {kind.__name__ for kind in MENDED}


def digest(value: Any) -> str:
    """What stands in a head for a value too long for it: 16 hex digits. What is no JSON counts as it prints."""
    plain = json.dumps(value, sort_keys=True, default=_plain, ensure_ascii=False)
    return hashlib.sha256(plain.encode(errors="replace")).hexdigest()[:16]


class Journal:
    """The answers of a run, of this process and of those before it that were cut short.

    Attributes:
        lines: What was there when it was opened.
    """

    def __init__(self, path: str | Path, head: Mapping[str, Any]) -> None:
        """Opens the file, or makes it.

        Args:
            path: Of the file.
            head: Everything that the answers depend on, in plain JSON.

        Raises:
            InvalidRequest: If it was begun with another head.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""  # cut inside of a letter
        # At newlines alone: `str.splitlines` knows more of them, and `add` leaves some in the strings of a line.
        known = [line for line in map(_read, written.split("\n")) if line is not None]
        head = json.loads(json.dumps(head))
        if not known and "\n" not in written and written.startswith("{"):  # cut off inside of its head
            path.write_text("")
            written = ""
        if written and not known:
            raise InvalidRequest(f"{path} is there already and no journal of answers; take another file.")
        if known and known[0] != head:
            other = [f"{k} was {known[0].get(k)!r}, is {head.get(k)!r}" for k in head if known[0].get(k) != head[k]]
            raise InvalidRequest(
                f"{path} holds the answers of another run ({'; '.join(other)[:500]}); take another file, or remove it."
            )
        self.lines = known[1:]
        self._file = path.open("a", encoding="utf-8")
        if written and not written.endswith("\n"):  # cut off inside of a line
            self._file.write("\n")
        if not known:
            self.add(head)

    def add(self, line: Mapping[str, Any]) -> None:
        """Writes a line; when this returns, the operating system has it."""
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _read(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None
