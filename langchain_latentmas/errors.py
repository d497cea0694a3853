"""Every error a user can meet.

All derive from `LatentMASError`, itself a plain `Exception`, because LangGraph's default retry policy skips
`ValueError`, `RuntimeError`, `OSError` and `LookupError`: an error that the same call would meet again derives from
`ValueError` too and is not retried, an error that a retry can mend does not.
"""


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


class StoreCorrupted(LatentMASError, ValueError):
    """A stored recipe fails its checksum, its signature, or its own bounds."""


class MissingExtra(LatentMASError, ImportError):
    """An optional part of the package is not installed; the message names the extra."""


class ServiceClosed(LatentMASError):
    """The service was closed before or while it worked on the request."""


class EngineFailed(LatentMASError):
    """The engine met an error of the device or of the model's code; a retry may mend it."""


class InvalidEdge(InvalidRequest):
    """An edge does not exist, or cannot be latent; the message names the edge and the way out."""


class SandboxUnavailable(LatentMASError):
    """Untrusted code cannot be run here; the message says why."""


class EdgeNotCrossed(InvalidEdge):
    """No memory crossed this edge on any of the questions, so there is nothing to audit."""


class NoPartner(InvalidRequest):
    """A memory has no partner of its length class among the other questions to be swapped with."""


class GraderFailed(LatentMASError, ValueError):
    """The grader raises, does not come to an end, or has broken tests; the message names what it raised."""
