"""A memory as one safetensors file: out of one service, into another one (docs/serving.md has the format)."""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ContextTooLong, InvalidRequest, WrongModel, first_fault
from .identity import MAX_AGENT, MAX_PARENTS, Id, memory_id
from .memory import Alignment, Memory, Merge, Recipe, Segment

CHUNK = 1 << 20
MAX_HEADER = 1 << 22  # bytes: half a million token ids; as Python objects they take ten times as much
MAX_SEGMENTS = 1 << 12  # where each reads several memories, they are laid out in their number squared

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Segment(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    id: Id
    agent: Annotated[str, Field(min_length=1, max_length=MAX_AGENT)]
    alignment: Alignment
    parents: Annotated[list[Id], Field(max_length=MAX_PARENTS)]
    prompt_ids: list[_Token]
    steps: Annotated[int, Field(ge=0)]
    spoken_ids: list[_Token]

    @property
    def positions(self) -> int:
        """Those that it says it takes in a memory."""
        return len(self.prompt_ids) + self.steps + len(self.spoken_ids)


class _Header(BaseModel):
    """What the file says of itself, as JSON under "memory" in its metadata."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["latentmas-memory"] = "latentmas-memory"
    version: Literal[1] = 1
    model: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    hidden_size: Annotated[int, Field(ge=1, lt=2**20)]
    merge: Merge = "none"
    segments: Annotated[list[_Segment], Field(min_length=1, max_length=MAX_SEGMENTS)]


def write_memory(recipes: Sequence[Recipe], memory: Memory | None) -> Iterator[bytes]:
    """A safetensors file, piece by piece.

    Args:
        recipes: Of the memory's segments, in order.
        memory: Its KV, to go along; None for recipes alone.

    Yields:
        At most a mebibyte at a time.

    Raises:
        InvalidRequest: If it has more segments, or a larger header, than `read_memory` takes.
    """
    if len(recipes) > MAX_SEGMENTS:
        raise InvalidRequest(f"The memory is too long to be exported: it has {len(recipes)} segments.")
    tensors: dict[str, Tensor] = {}
    for i, recipe in enumerate(recipes):
        if len(recipe.segment.thoughts):
            tensors[f"thoughts.{i}"] = recipe.segment.thoughts
    if memory is not None:
        tensors |= {f"keys.{i}": layer for i, layer in enumerate(memory.keys)}
        tensors |= {f"values.{i}": layer for i, layer in enumerate(memory.values)}
    about = _Header(
        model=recipes[0].model,
        hidden_size=recipes[0].segment.thoughts.shape[1],
        merge=memory.merge if memory else "none",
        segments=[
            _Segment(
                id=recipe.id,
                agent=recipe.segment.agent,
                alignment=recipe.alignment,
                parents=list(recipe.parents),
                prompt_ids=list(recipe.segment.prompt_ids),
                steps=len(recipe.segment.thoughts),
                spoken_ids=list(recipe.segment.spoken_ids),
            )
            for recipe in recipes
        ],
    )
    header: dict[str, Any] = {"__metadata__": {"memory": about.model_dump_json()}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InvalidRequest(f"The memory is too long to be exported: its header has {len(text)} bytes.")
    yield from _chunks(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        # One tensor at a time leaves the device.
        yield from _chunks(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def read_memory(path: Path, model: str, hidden_size: int, dtype: torch.dtype, most_positions: int) -> list[Recipe]:
    """The recipes in a file; a KV in it is not looked at, since nobody could tell whether it is theirs.

    Args:
        path: A file that `write_memory` wrote, or somebody else.
        model: Fingerprint of the model.
        hidden_size: Width of its thoughts.
        dtype: Likewise; thoughts are converted to it.
        most_positions: That it can see; of a memory that says it has more, no thoughts are read.

    Returns:
        Of all segments, every one after those it was made on. `check_recipes` has to follow.

    Raises:
        InvalidRequest: If it is no such file, or does not fit together.
        WrongModel: If it is of another model.
        ContextTooLong: If it is too long.
    """
    about = _about(path)
    if about.model != model:
        raise WrongModel(f"This memory belongs to model {about.model}, but this service runs {model}; load that model.")
    if sum(segment.positions for segment in about.segments) > most_positions:
        raise ContextTooLong(f"The memory is longer than the model's {most_positions} positions.")
    recipes = []
    seen: set[str] = set()
    with _opened(path) as file:
        for i, segment in enumerate(about.segments):
            thoughts = torch.empty(0, hidden_size, dtype=dtype)
            if segment.steps:
                if file.get_slice(f"thoughts.{i}").get_shape() != [segment.steps, hidden_size]:
                    raise InvalidRequest(f"The thoughts of segment {i} do not have its steps, or not this width.")
                thoughts = file.get_tensor(f"thoughts.{i}").to(dtype, copy=True)  # of its own: the file may change
            if not thoughts.isfinite().all():
                raise InvalidRequest(f"The thoughts of segment {i} are not finite.")
            if unknown := [parent for parent in segment.parents if parent not in seen]:
                raise InvalidRequest(f"Segment {i} was made on {unknown[0]}, which is not among those before it.")
            seen.add(segment.id)
            made = Segment(segment.agent, tuple(segment.prompt_ids), thoughts, tuple(segment.spoken_ids))
            recipes.append(Recipe(segment.id, about.model, segment.alignment, tuple(segment.parents), made))
    return recipes


def check_recipes(recipes: Sequence[Recipe], vocabulary: int) -> None:
    """Checks what came out of a file against a model.

    Args:
        recipes: Those of one memory.
        vocabulary: Tokens that the model knows.

    Raises:
        InvalidRequest: If an id is not the digest of its recipe, or a token is not in the vocabulary.
    """
    for recipe in recipes:
        own = recipe.segment
        made = memory_id(
            model=recipe.model,
            alignment=recipe.alignment,
            parents=recipe.parents,
            prompt_ids=own.prompt_ids,
            steps=len(own.thoughts),
            spoken_ids=own.spoken_ids,
        )
        if made != recipe.id:
            raise InvalidRequest(f"The segment {recipe.id} is not what its id says; export the memory again.")
        if not own.prompt_ids or max((*own.prompt_ids, *own.spoken_ids)) >= vocabulary:
            raise InvalidRequest(f"The segment {recipe.id} has no prompt, or a token beyond the vocabulary.")


def read_kv(path: Path) -> Memory:
    """The memory in a file that was exported with its KV.

    Raises:
        InvalidRequest: If it is no such file.
    """
    about = _about(path)
    segments = []
    with _opened(path) as file:
        layers = sum(name.startswith("keys.") for name in file.keys())  # noqa: SIM118 (it is no mapping)
        keys = [file.get_tensor(f"keys.{i}") for i in range(layers)]
        values = [file.get_tensor(f"values.{i}") for i in range(layers)]
        for i, each in enumerate(about.segments):
            none = torch.empty(0, about.hidden_size, dtype=keys[0].dtype if keys else None)
            thoughts = file.get_tensor(f"thoughts.{i}") if each.steps else none
            segments.append(Segment(each.agent, tuple(each.prompt_ids), thoughts, tuple(each.spoken_ids)))
    return Memory(tuple(segments), keys[0].shape[1] if keys else 0, keys, values, about.merge)


def _about(path: Path) -> _Header:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    if not 2 <= length <= MAX_HEADER:
        raise InvalidRequest(f"This is no memory that was exported: its header has {length} bytes.")
    with _opened(path) as file:
        written = (file.metadata() or {}).get("memory", "")
    try:
        return _Header.model_validate_json(written)
    except ValidationError as error:
        raise InvalidRequest(f"This is no memory that was exported ({first_fault(error)}).") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise InvalidRequest(f"This is no memory that was exported: {error}") from error


def _chunks(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(data), CHUNK):
        yield bytes(view[start : start + CHUNK])
