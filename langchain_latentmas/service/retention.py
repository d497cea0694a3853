"""What stays in a store: pins, drops and age."""

import logging
import threading
import time
from collections.abc import Container, Iterable
from datetime import timedelta
from graphlib import TopologicalSorter

from ..errors import InvalidRequest, StoreCorrupted, UnknownReference
from .alteration import original
from .store import DROPPED, PINNED, RECIPE, Header, RecipeStore

logger = logging.getLogger(__name__)


class Retention:
    """Knows what every recipe of a store descends from, and removes what nobody can use any more.

    A recipe is removed when it was dropped or grew too old, and no recipe that stays descends from it; children before
    their parents, so that a crash leaves no child without.
    """

    def __init__(self, store: RecipeStore, keep_for: timedelta | None = None) -> None:
        """Takes a store.

        Args:
            store: What is looked after.
            keep_for: How long after its last use a reference may be removed; None removes none for its age.

        Raises:
            InvalidRequest: If an age is asked of a store that is no folder.
        """
        if keep_for is not None and store.folder is None:
            raise InvalidRequest("keep_for needs a folder as store; other stores know no age.")
        self.store, self.keep_for = store, keep_for
        self._headers: dict[str, Header] = {}
        self._spared: set[str] = set()  # ids that recipes which cannot be verified may descend from
        # Of whoever reads the store or looks at `_headers`, so that nothing is read twice; taken before the store's.
        self._reading = threading.RLock()

    def headers(self) -> list[Header]:
        """All recipes that can be read and were not dropped, of whichever model, the latest made first.

        Those seen before are not read again.
        """
        with self._reading:
            names = self._read_new()
            there = [header for key, header in self._headers.items() if key + DROPPED not in names]
        return sorted(there, key=Header.place)

    def used(self, header: Header) -> float:
        """Unix time of a recipe's last use; for a store that is no folder, of when it was made.

        Raises:
            UnknownReference: If it is gone.
        """
        return self.store.folder.touched(header.id + RECIPE) if self.store.folder else header.made

    def pin(self, key: str, pinned: bool) -> None:
        """Sets or takes away the mark that spares a recipe from age.

        Raises:
            UnknownReference: If it is to be set, and the recipe is not there.
            DroppedReference: Likewise, if it was dropped.
        """
        with self.store.locked():
            if pinned:
                self.store.size_of(key)  # raises where another process has removed it since it was verified
                self.store.check_not_dropped(key)
                self.store.store.mset([(key + PINNED, b"")])
            else:
                self.store.store.mdelete([key + PINNED])

    def drop(self, key: str) -> list[str]:
        """Drops a recipe.

        Returns:
            Ids of all recipes that were removed because of it.

        Raises:
            InvalidRequest: If it is pinned.
        """
        self._read_new()  # what takes long is done before anybody has to wait for the store
        with self._reading, self.store.locked():
            names = self._read_new()
            if key + PINNED in names:
                raise InvalidRequest(f"The memory {key} is pinned; pin(ref, False) first.")
            if key not in self._headers:
                return []
            self.store.store.mset([(key + DROPPED, b"")])
            return self._remove(other for other in self._headers if other != key and other + DROPPED not in names)

    def collect(self) -> list[str]:
        """Removes what grew too old.

        Returns:
            The ids of what was removed.
        """
        if self.keep_for is None:
            return []
        since = time.time() - self.keep_for.total_seconds()
        with self._reading:
            names = self._read_new()
            going = {key for key in self._headers if self._may_go(key, names, since)}  # nobody waits for the store yet
            if not going:
                return []
            with self.store.locked():
                names = self._read_new()
                return self._remove(
                    key for key in self._headers if key not in going or not self._may_go(key, names, since)
                )

    def _may_go(self, key: str, names: Container[str], since: float) -> bool:
        """Whether a recipe was dropped or, unless it is pinned, not used since."""
        if key + DROPPED in names or key + PINNED in names:
            return key + DROPPED in names
        try:
            return self.used(self._headers[key]) < since
        except UnknownReference:  # another process has just removed it
            return True

    def _remove(self, staying: Iterable[str]) -> list[str]:
        """Removes all but these, what they descend from, and what recipes that cannot be verified may."""
        needed, stack = set[str](), [*staying, *self._spared]
        while stack:
            key = stack.pop()
            if key not in needed and key in self._headers:
                needed.add(key)
                stack += map(original, self._headers[key].parents)
        parents = {key: map(original, self._headers[key].parents) for key in self._headers.keys() - needed}
        order = TopologicalSorter(parents)
        order.prepare()
        generations = []
        while ready := order.get_ready():
            generations.append([key for key in ready if key in parents])
            order.done(*ready)
        # A generation at a time: each call waits for the disk.
        for keys in reversed(generations):
            self.store.store.mdelete([key + kind for key in keys for kind in (RECIPE, DROPPED, PINNED)])
            for key in keys:
                del self._headers[key]
        return [key for keys in generations for key in keys]

    def _read_new(self) -> set[str]:
        """Takes note of recipes that came and of those that went; returns the names of all that is there."""
        with self._reading:
            with self.store.locked():
                names = set(self.store.store.yield_keys())
            found = {name.removesuffix(RECIPE) for name in names if name.endswith(RECIPE)}
            for key in self._headers.keys() - found:
                del self._headers[key]
            self._spared = set()
            for key in found - self._headers.keys():
                try:
                    self._headers[key] = self.store.header(key)  # what goes meanwhile is forgotten the next time
                except UnknownReference:
                    pass
                except StoreCorrupted as error:  # whoever asks for it by its id finds out
                    logger.warning("the recipe of %s is passed over: %s", key, error)
                    self._spared |= self._named(key, found)
            return names

    def _named(self, key: str, found: set[str]) -> set[str]:
        """What a recipe that fails its checks may descend from; another process may have the key or the version for it.

        Nothing else in it is believed, so that a forged one keeps a few files at most.
        """
        try:
            return self.store.named(key)
        except StoreCorrupted:
            logger.warning("nothing is removed while the recipe of %s cannot be opened", key)
            return found
