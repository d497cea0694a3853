"""What travels between `latentmas serve` and its clients: requests, replies, and errors as problem details."""

import inspect
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from .. import errors
from ..errors import (
    AccessDenied,
    DeadlineExceeded,
    EngineFailed,
    InvalidReference,
    InvalidRequest,
    LatentMASError,
    NotFinite,
    RequestTooLarge,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    StoreBusy,
    StoreCorrupted,
    StoreFull,
    TamperedReference,
    UnknownReference,
    WrongModel,
)
from ..state import LatentRef
from .base import Chunk, LensRow, StoredReference
from .identity import MAX_AGENT, MAX_PARENTS, WireRef
from .marker import MAX_LEFT
from .memory import Merge

PROBLEM = "application/problem+json"
EVENTS = "text/event-stream"
TENSORS = "application/vnd.safetensors"
CLIENT_HEADER = "LatentMAS-Client"
MAX_MESSAGES = 4096
MAX_TEXT = 1 << 24  # characters of one string; the limit on bodies is what counts
MAX_TOOLS = 256
MAX_PAIRS = 1 << 16  # of token and probability, of all states of a lens; as Python objects, one can take 400 bytes
MAX_STOPS = 64

_STATUS: Mapping[type[LatentMASError], int] = {  # the most special first
    RequestTooLarge: 413,
    InvalidRequest: 422,
    NotFinite: 422,
    TamperedReference: 403,
    WrongModel: 409,
    UnknownReference: 404,
    InvalidReference: 400,
    StoreCorrupted: 410,
    StoreFull: 507,
    StoreBusy: 503,
    AccessDenied: 401,
    ServiceBusy: 429,
    DeadlineExceeded: 504,
    ServiceClosed: 503,
    EngineFailed: 503,
}
# Of what this package does not name: proxies, and servers of another version.
_NEAREST: Mapping[int, type[LatentMASError]] = {
    401: AccessDenied,
    413: RequestTooLarge,
    429: ServiceBusy,
    502: ServiceUnreachable,
    503: ServiceClosed,
    504: DeadlineExceeded,
}
_KINDS: Mapping[str, type[LatentMASError]] = {
    name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LatentMASError)
}

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Function(_Wire):
    """The function of a tool call."""

    name: Annotated[str, Field(max_length=1000)]
    arguments: Text
    """A JSON object."""


class ToolCall(_Wire):
    """A call that an assistant's message makes."""

    id: Annotated[str, Field(max_length=1000)] | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(_Wire):
    """A message in OpenAI's form; text only."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | None = None
    name: Annotated[str, Field(max_length=1000)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=1000)] | None = None


class _Request(_Wire):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    latents: Annotated[list[WireRef], Field(max_length=MAX_PARENTS)] = []
    """References of the memories to read, in the order in which they are merged."""
    agent: Annotated[str, Field(min_length=1, max_length=MAX_AGENT)] = "agent"
    stream: bool = False
    """Whether to answer with server-sent events instead of one JSON document."""
    deadline: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the request is given up, its wait in the queue included."""

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages for `LatentService.think` and `LatentService.speak`."""
        return [message.model_dump(exclude_none=True) | {"content": message.content} for message in self.messages]

    @property
    def refs(self) -> list[LatentRef]:
        """The references, their signatures not verified."""
        return [latent.ref for latent in self.latents]


class ThinkRequest(_Request):
    """See `LatentService.think`."""

    steps: Annotated[int, Field(ge=0, lt=2**40)] = 20
    progress: bool = False
    """Whether the stream says now and then how many latent steps were taken."""


class SpeakRequest(_Request):
    """See `LatentService.speak`."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**40)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=2**40)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MAX_STOPS)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    tools: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_TOOLS)] | None = None
    prefix: Text = ""
    progress: bool = True
    """Whether the stream has a chunk for each token; else it has one with everything."""


class RefRequest(_Wire):
    """A request about one reference."""

    ref: WireRef


class LensRequest(RefRequest):
    """See `LatentService.lens`."""

    top_k: Annotated[int, Field(ge=1, le=MAX_PAIRS)] = 5


class PinRequest(RefRequest):
    """See `LatentService.pin`."""

    pinned: bool = True


class ExportRequest(RefRequest):
    """See `LatentService.export_memory`."""

    kv: bool = False


class TextRequest(_Wire):
    """See `LatentService.take_markers`."""

    text: Text
    left: Annotated[str, Field(max_length=MAX_LEFT)] = ""


class Thought(_Wire):
    """What a think comes to."""

    ref: WireRef
    marker: str
    """The reference as a short signed string."""
    taken: int = 0
    """With `progress`, its latent steps, also where they were taken for somebody before."""


class Step(_Wire):
    """So many latent steps were taken."""

    step: int


class SpokenUsage(_Wire):
    """See `langchain_latentmas.service.Usage`."""

    input_tokens: int
    output_tokens: int
    latent_steps: int
    positions_read: int
    merge: Merge


class SpokenChunk(_Wire):
    """See `langchain_latentmas.service.Chunk`; a reply without progress is one chunk with everything."""

    text: str
    token_ids: list[int] = []
    ref: WireRef | None = None
    marker: str | None = None
    usage: SpokenUsage | None = None
    finish_reason: str | None = None

    @classmethod
    def of(cls, chunk: Chunk, marker: str | None = None) -> Self:
        """The chunk of a service."""
        return cls(
            text=chunk.text,
            token_ids=list(chunk.token_ids),
            ref=chunk.ref and WireRef(**chunk.ref),
            marker=marker,
            usage=chunk.usage and SpokenUsage(**chunk.usage),
            finish_reason=chunk.finish_reason,
        )

    @property
    def chunk(self) -> Chunk:
        """What a client's caller gets."""
        return Chunk(
            self.text,
            tuple(self.token_ids),
            None if self.ref is None else self.ref.ref,
            self.usage and self.usage.model_dump(),  # type: ignore[arg-type]
            self.finish_reason,
        )


class ReadOut(_Wire):
    """See `langchain_latentmas.service.LensRow`."""

    agent: str
    step: int
    tokens: list[tuple[str, float]]


class LensReply(_Wire):
    """What `LatentService.lens` returns."""

    rows: list[ReadOut]

    @classmethod
    def of(cls, rows: Sequence[LensRow]) -> Self:
        """The rows of a service."""
        return cls(rows=[ReadOut(agent=row.agent, step=row.step, tokens=row.tokens) for row in rows])

    @property
    def lens_rows(self) -> list[LensRow]:
        """What a client's caller gets."""
        return [LensRow(row.agent, row.step, row.tokens) for row in self.rows]


class MarkerReply(_Wire):
    """A reference as a short signed string."""

    marker: str


class MarkersReply(_Wire):
    """What `LatentService.take_markers` returns."""

    text: str
    refs: list[WireRef]


class RefReply(_Wire):
    """A reference."""

    ref: WireRef


class Stored(_Wire):
    """See `langchain_latentmas.service.base.StoredReference`."""

    ref: WireRef
    made: Annotated[datetime, Field(strict=False)]
    used: Annotated[datetime, Field(strict=False)]
    nbytes: int
    pinned: bool

    @classmethod
    def of(cls, stored: StoredReference) -> Self:
        """The entry of a service."""
        return cls(**{**stored._asdict(), "ref": WireRef(**stored.ref)})

    @property
    def stored(self) -> StoredReference:
        """What a client's caller gets."""
        return StoredReference(self.ref.ref, self.made, self.used, self.nbytes, self.pinned)


class StoredReply(_Wire):
    """A page of what `LatentService.references` returns."""

    references: list[Stored]
    next: str | None = None
    """`after` of the next page; None on the last one."""


class Done(_Wire):
    """There is nothing more to say about it."""


class Status(_Wire):
    """Of the server: "ok", "ready", "draining" or "failed"."""

    status: Literal["ok", "ready", "draining", "failed"]


class Problem(BaseModel):
    """Problem details (RFC 9457) of an error of this package."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    retry_after: float | None = None
    """Seconds after which the same request may succeed; the header Retry-After rounds them up."""

    @classmethod
    def of(cls, error: LatentMASError, instance: str | None = None) -> Self:
        """The problem details of an error."""
        kind = type(error)
        status = next((status for base, status in _STATUS.items() if issubclass(kind, base)), 500)
        title = (inspect.getdoc(kind) or kind.__name__).partition("\n")[0]
        return cls(
            type=f"urn:latentmas:error:{kind.__name__}",
            title=title,
            status=status,
            detail=str(error),
            instance=instance,
            retry_after=getattr(error, "retry_after", None),
        )

    @property
    def error(self) -> LatentMASError:
        """The error again; of a kind that this version does not know, the nearest one by its status."""
        kind = _KINDS.get(self.type.removeprefix("urn:latentmas:error:"))
        if kind is None:
            kind = _NEAREST.get(self.status, InvalidRequest if self.status < 500 else EngineFailed)
        error = kind(self.detail)
        if isinstance(error, ServiceBusy):
            error.retry_after = self.retry_after
        return error
