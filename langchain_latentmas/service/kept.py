"""Recipes of a service without a store: they end with its process."""

import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import torch
from langchain_core.stores import InMemoryStore
from torch import Tensor

from .envelope import OVERHEAD
from .identity import Signer
from .memory import Alignment, Recipe, Segment
from .store import DROPPED, RECIPE, Header, RecipeStore

A = TypeVar("A")


class _Kept(NamedTuple):
    """A recipe whose token ids take 4 bytes each."""

    agent: str
    model: str
    alignment: Alignment
    parents: tuple[str, ...]
    prompt_ids: "array[int]"
    thoughts: Tensor
    spoken_ids: "array[int]"
    made: float

    def recipe(self, key: str) -> Recipe:
        segment = Segment(self.agent, tuple(self.prompt_ids), self.thoughts, tuple(self.spoken_ids))
        return Recipe(key, self.model, self.alignment, self.parents, segment)


class KeptRecipes(RecipeStore):
    """Keeps recipes as they are: nobody else could write here, so there is nothing to seal and nothing to verify.

    Every node stores one before its reference leaves. To seal it would take longer than all else that a node does then.
    """

    def __init__(self, signer: Signer, hidden_size: int, dtype: torch.dtype, budget: int | None = None) -> None:
        """Starts empty; see `RecipeStore`."""
        super().__init__(InMemoryStore(), signer, hidden_size, dtype, budget)
        self.in_memory = True

    def put_soon(self, made: Callable[[], Recipe], then: Callable[[Recipe, bool], A]) -> "Future[A]":
        """See `RecipeStore.put_soon`; done when this returns."""
        done = Future[A]()
        try:
            done.set_result(then(*self._put(made())))
        except Exception as error:
            done.set_exception(error)
        return done

    def _put(self, recipe: Recipe) -> tuple[Recipe, bool]:
        own = recipe.segment
        with self.locked():
            if self._has(recipe.id + RECIPE):
                self.renew(recipe.id)
                return self.get(recipe.id), False
            self._check_parents(recipe)
            prompt_ids, spoken_ids = array("i", own.prompt_ids), array("i", own.spoken_ids)
            how = recipe.model, recipe.alignment, recipe.parents
            kept = _Kept(own.agent, *how, prompt_ids, own.thoughts, spoken_ids, time.time())
            self.store.mset([(recipe.id + RECIPE, kept)])  # type: ignore[list-item]
            self.store.mdelete([recipe.id + DROPPED])
        return recipe, True

    def get(self, key: str) -> Recipe:
        """See `RecipeStore.get`."""
        return self._kept(key).recipe(key)

    def header(self, key: str) -> Header:
        """See `RecipeStore.header`."""
        kept = self._kept(key)
        return Header(
            id=key,
            agent=kept.agent,
            model=kept.model,
            alignment=kept.alignment,
            parents=list(kept.parents),
            prompt=len(kept.prompt_ids),
            steps=len(kept.thoughts),
            spoken=len(kept.spoken_ids),
            made=kept.made,
        )

    def size_of(self, key: str) -> int:
        """See `RecipeStore.size_of`; about."""
        kept = self._kept(key)
        return OVERHEAD + kept.thoughts.nbytes + 4 * (len(kept.prompt_ids) + len(kept.spoken_ids))

    def _kept(self, key: str) -> _Kept:
        kept = self.store.mget([key + RECIPE])[0]
        if kept is None:
            raise self._unknown(key)
        assert isinstance(kept, _Kept)
        return kept
