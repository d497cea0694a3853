"""Recipes on a shelf: any LangChain byte store, a manifest in JSON and the thoughts in safetensors."""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from langchain_core.stores import BaseStore
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors import torch as safetensors

from ..errors import InvalidRequest, StoreCorrupted, UnknownReference
from .identity import MAX_AGENT, MAX_PARENTS, Signer, memory_id
from .memory import Recipe, Segment

MAX_VALUE = 1 << 26  # bytes: 80 thoughts of a 14B model in float32 are a fortieth of it
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class FolderStore(BaseStore[str, bytes]):
    """A folder with one file per key; a file is there whole or not at all, also after a crash."""

    def __init__(self, folder: str | Path) -> None:
        """Opens the folder, making it if need be.

        Args:
            folder: Where the files lie.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Reads files; None for a key that is not there.

        Raises:
            StoreCorrupted: If a file is larger than any recipe can be.
        """
        return [self._read(self._path(key)) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Writes files, one after the other, each flushed to the disk before the next begins."""
        for key, value in key_value_pairs:
            path = self._path(key)
            fresh = path.with_name(f".{secrets.token_hex(8)}")
            try:
                with fresh.open("xb") as file:
                    file.write(value)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Removes files; a key that is not there is no error."""
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """All keys, or those that begin with `prefix`."""
        for path in sorted(self.folder.iterdir()):
            if _KEY.fullmatch(path.name) and path.name.startswith(prefix or ""):
                yield path.name

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"{key!r} cannot be a key of a store: letters, digits, '_', '-' and '.' only.")
        return self.folder / key

    @staticmethod
    def _read(path: Path) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > MAX_VALUE:
                raise StoreCorrupted(f"{path} has {path.stat().st_size} bytes, more than any recipe; remove it.")
            return path.read_bytes()
        return None


class _Manifest(BaseModel):
    """The JSON part of a stored recipe."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["latentmas-recipe"] = "latentmas-recipe"
    version: Literal[1] = 1
    id: str
    agent: str = Field(max_length=MAX_AGENT)
    model: str
    alignment: Literal["realign", "rescale"]
    parents: list[str] = Field(max_length=MAX_PARENTS)
    prompt_ids: list[Annotated[int, Field(ge=0)]]
    steps: int = Field(ge=0)
    spoken_ids: list[Annotated[int, Field(ge=0)]]
    thoughts_sha256: str | None
    mac: str = ""


class RecipeStore:
    """Puts recipes into a byte store and takes them out again, trusting nothing that it reads.

    A recipe is two values: `<id>.safetensors` with the thoughts, if there are any, and `<id>.json`, written last.
    """

    def __init__(self, store: BaseStore[str, bytes], signer: Signer, hidden_size: int, dtype: torch.dtype) -> None:
        """Wraps a store.

        Args:
            store: Where the bytes go.
            signer: Signs the manifests.
            hidden_size: Width of a thought.
            dtype: Dtype of a thought.
        """
        self.store, self.signer, self.hidden_size, self.dtype = store, signer, hidden_size, dtype

    def put(self, recipe: Recipe) -> None:
        """Writes a recipe; when this returns, a durable store has it.

        Raises:
            InvalidRequest: If it is larger than `get` would read.
        """
        segment = recipe.segment
        values: list[tuple[str, bytes]] = []
        if len(segment.thoughts):
            values.append((f"{recipe.id}.safetensors", safetensors.save({"thoughts": segment.thoughts.contiguous()})))
        manifest = _Manifest(
            id=recipe.id,
            agent=segment.agent,
            model=recipe.model,
            alignment="realign" if recipe.alignment == "realign" else "rescale",
            parents=list(recipe.parents),
            prompt_ids=list(segment.prompt_ids),
            steps=len(segment.thoughts),
            spoken_ids=list(segment.spoken_ids),
            thoughts_sha256=hashlib.sha256(values[0][1]).hexdigest() if values else None,
        )
        manifest.mac = self.signer.sign(manifest.model_dump())
        values.append((f"{recipe.id}.json", manifest.model_dump_json().encode()))
        if any(len(value) > MAX_VALUE for _, value in values):
            raise InvalidRequest(
                f"The recipe of {recipe.id} takes more than {MAX_VALUE} bytes; take fewer latent steps."
            )
        self.store.mset(values)

    def get(self, key: str) -> Recipe:
        """Reads and verifies a recipe.

        Raises:
            UnknownReference: If it is not there.
            StoreCorrupted: If it is not what was put in.
        """
        written = self._value(f"{key}.json")
        if written is None:
            raise UnknownReference(
                f"The memory {key} is not in this service's store. Load the service with the store it was made in "
                "(store=...), or run the graph again."
            )
        try:
            manifest = _Manifest.model_validate_json(written)
        except ValidationError as error:
            raise self._corrupted(key, str(error.errors()[0]["msg"])) from error
        made = memory_id(
            model=manifest.model,
            alignment=manifest.alignment,
            parents=manifest.parents,
            prompt_ids=manifest.prompt_ids,
            steps=manifest.steps,
            spoken_ids=manifest.spoken_ids,
        )
        if made != key or manifest.id != key or not self.signer.matches(manifest.model_dump()):
            raise self._corrupted(key, "its content does not match its id and signature")
        thoughts = torch.empty(0, self.hidden_size, dtype=self.dtype)
        if manifest.steps:
            thoughts = self._thoughts(key, manifest)
        segment = Segment(manifest.agent, tuple(manifest.prompt_ids), thoughts, tuple(manifest.spoken_ids))
        return Recipe(key, manifest.model, manifest.alignment, tuple(manifest.parents), segment)

    def _thoughts(self, key: str, manifest: _Manifest) -> torch.Tensor:
        value = self._value(f"{key}.safetensors")
        if value is None or hashlib.sha256(value).hexdigest() != manifest.thoughts_sha256:
            raise self._corrupted(key, "its thoughts are missing or fail their checksum")
        try:
            thoughts = safetensors.load(value)["thoughts"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise self._corrupted(key, "its thoughts cannot be read") from error
        if thoughts.shape != (manifest.steps, self.hidden_size):
            raise self._corrupted(key, f"its thoughts have the shape {tuple(thoughts.shape)}")
        return thoughts

    def _value(self, name: str) -> bytes | None:
        value = self.store.mget([name])[0]
        if value is not None and len(value) > MAX_VALUE:
            raise StoreCorrupted(f"The stored value {name} has {len(value)} bytes, more than any recipe; remove it.")
        return value

    @staticmethod
    def _corrupted(key: str, why: str) -> StoreCorrupted:
        return StoreCorrupted(f"The stored recipe {key} is damaged: {why}. Remove it and run the graph again.")
