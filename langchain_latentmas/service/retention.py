"""What stays in a store: pins, drops and age."""

import logging
import threading
import time
from collections.abc import Callable, Container, Sequence, Set
from datetime import timedelta
from graphlib import TopologicalSorter

from ..errors import InvalidRequest, StoreCorrupted, UnknownReference
from .alteration import original
from .store import DROPPED, PINNED, RECIPE, Header, RecipeStore

logger = logging.getLogger(__name__)

PORTION = 1 << 10  # recipes that are removed while others wait for the store
PAUSE = 0.05  # seconds between two portions: a lock that is free for no time goes back to who had it

Gone = Callable[[Sequence[str]], object]
"""Called with the ids of what was removed, a portion at a time and not under a lock; also where the rest fails."""


def _nobody(removed: Sequence[str]) -> None:
    """Nobody keeps anything of it."""


class Retention:
    """Knows what every recipe of a store descends from, and removes what nobody can use any more.

    A recipe is removed when it was dropped or grew too old, and no recipe that stays descends from it; children before
    their parents, so that a crash leaves no child without, and a portion at a time, so that nobody waits long for the
    store.
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

    def drop(self, key: str, gone: Gone = _nobody) -> list[str]:
        """Drops a recipe.

        Args:
            key: Its id.
            gone: Who keeps something of what is removed.

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
        return self._remove(None, gone)

    def collect(self, gone: Gone = _nobody) -> list[str]:
        """Removes what grew too old.

        Args:
            gone: See `drop`.

        Returns:
            The ids of what was removed.
        """
        if self.keep_for is None:
            return []
        return self._remove(time.time() - self.keep_for.total_seconds(), gone)

    def _may_go(self, key: str, names: Container[str], since: float | None) -> bool:
        """Whether a recipe was dropped or, unless it is pinned, not used since."""
        if since is None or key + DROPPED in names or key + PINNED in names:
            return key + DROPPED in names
        try:
            return self.used(self._headers[key]) < since
        except UnknownReference:  # another process has just removed it
            return True

    def _remove(self, since: float | None, gone: Gone) -> list[str]:
        """Removes what was dropped or not used since, if there is such a time; others write between two portions of it.

        Returns:
            The ids of what was removed.
        """
        with self._reading:
            names = self._read_new()
            going = {key for key in self._headers if self._may_go(key, names, since)}  # nobody waits for the store yet
            order = [key for keys in self._unneeded(going) for key in keys]
        removed: list[str] = []
        for start in range(0, len(order), PORTION):
            if start:
                time.sleep(PAUSE)
            portion: list[str] = []
            try:
                with self._reading, self.store.locked():
                    names = self._read_new()
                    there = self._headers.keys() & order[start : start + PORTION]
                    # Others may have used one, or thought on it.
                    for keys in self._unneeded({key for key in there if self._may_go(key, names, since)}):
                        # A generation at a time: each call waits for the disk.
                        self.store.store.mdelete([key + kind for key in keys for kind in (RECIPE, DROPPED, PINNED)])
                        for key in keys:
                            del self._headers[key]
                        portion += keys
            finally:
                gone(portion)
            removed += portion
        return removed[::-1]

    def _unneeded(self, going: Set[str]) -> list[list[str]]:
        """Those of them that no other recipe descends from, and none that cannot be verified may.

        Returns:
            Their generations, children before their parents.
        """
        needed, stack = set[str](), [*(self._headers.keys() - going), *self._spared]
        while stack:
            key = stack.pop()
            if key not in needed and key in self._headers:
                needed.add(key)
                stack += map(original, self._headers[key].parents)
        parents = {key: map(original, self._headers[key].parents) for key in going - needed}
        order = TopologicalSorter(parents)
        order.prepare()
        generations = []
        while ready := order.get_ready():
            generations.append([key for key in ready if key in parents])
            order.done(*ready)
        return generations[::-1]

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
