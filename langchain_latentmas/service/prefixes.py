"""What prompts begin with: the longest beginning that a new prompt shares with one whose KV is kept."""

from bisect import bisect_left, insort
from collections.abc import Sequence

Ids = tuple[int, ...]


class Prefixes:
    """Kept prompts in the order of their token ids, apart for each model and memory that they were read after.

    Neighbours in that order share the longest beginnings, so one binary search finds the best of all. It holds no KV,
    and nothing here is safe to share between threads; `KVPool` sees to both.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._prompts: dict[tuple[str, ...], list[tuple[Ids, str]]] = {}
        self._entries: dict[str, tuple[tuple[str, ...], Ids]] = {}

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self._entries)

    def add(self, key: str, after: Sequence[str], prompt_ids: Ids) -> None:
        """Adds the prompt of memory `key`, if it is not there; `after` is what its KV depends on besides."""
        if key not in self._entries:
            self._entries[key] = tuple(after), prompt_ids
            insort(self._prompts.setdefault(tuple(after), []), (prompt_ids, key))

    def remove(self, key: str) -> None:
        """Removes the prompt of a memory, if it is there."""
        if key in self._entries:
            after, prompt_ids = self._entries.pop(key)
            prompts = self._prompts[after]
            del prompts[bisect_left(prompts, (prompt_ids, key))]
            if not prompts:
                del self._prompts[after]

    def longest(self, after: Sequence[str], prompt_ids: Ids) -> tuple[str, int]:
        """The memory whose prompt begins most like this one.

        Args:
            after: What it is read after; only prompts after the same are alike.
            prompt_ids: Token ids.

        Returns:
            Its id, and how many tokens both begin with; "" and 0 if there is none.
        """
        prompts = self._prompts.get(tuple(after), [])
        at = bisect_left(prompts, (prompt_ids, ""))
        neighbours = prompts[max(0, at - 1) : at + 1]
        length, key = max(((_alike(prompt_ids, other), key) for other, key in neighbours), default=(0, ""))
        return (key, length) if length else ("", 0)


def _alike(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
