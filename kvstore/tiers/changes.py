"""Which chunks are put, trimmed or deleted while others read them.

What a read brings may be gone by the time it comes, so it must not be copied to another tier then: it would come back.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvstore.keys import ChunkKey


class Changes:
    """Changes of chunks that are under way, and the readers who must know of them."""

    def __init__(self) -> None:
        self._under_way: list[frozenset[ChunkKey]] = []
        self._watches: list[_Watch] = []

    @contextmanager
    def making(self, keys: Iterable[ChunkKey]) -> Iterator[None]:
        """Chunks change in this block."""
        changing = frozenset(keys)
        self._under_way.append(changing)
        for watch in self._watches:
            watch.changed |= changing & watch.keys
        try:
            yield
        finally:
            self._under_way.remove(changing)

    @contextmanager
    def watching(self, keys: Iterable[ChunkKey]) -> Iterator[set[ChunkKey]]:
        """A set of those of some chunks that have changed since the block began, or were changing then; it grows."""
        watch = _Watch(frozenset(keys))
        for changing in self._under_way:
            watch.changed |= changing & watch.keys
        self._watches.append(watch)
        try:
            yield watch.changed
        finally:
            self._watches.remove(watch)


@dataclass(eq=False, slots=True)
class _Watch:
    """What one reader wants to know of."""

    keys: frozenset[ChunkKey]
    changed: set[ChunkKey] = field(default_factory=set)
