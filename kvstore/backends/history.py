"""What was asked for: how often chunks were read, and which chunk follows which. Bounded, pure, shared by tiers."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from kvstore.keys import ChunkKey

HISTORY_MAX = 1 << 18


class History:
    """Reads and parents of the chunks that were last dealt with.

    Args:
        chunks_max: Chunks that are remembered.
    """

    def __init__(self, chunks_max: int = HISTORY_MAX) -> None:
        self._chunks_max = chunks_max
        self._reads: OrderedDict[ChunkKey, int] = OrderedDict()
        self._unnoticed: ChunkKey | None = None
        self._parents: OrderedDict[ChunkKey, ChunkKey] = OrderedDict()

    @contextmanager
    def unnoticed(self, key: ChunkKey) -> Iterator[None]:
        """Reads of a chunk in this block are not noted: the scrubber's say nothing about who wants it."""
        before = self._unnoticed
        self._unnoticed = key
        try:
            yield
        finally:
            self._unnoticed = before

    def read(self, key: ChunkKey) -> None:
        """Note that a chunk was read."""
        if key == self._unnoticed:
            return
        self._reads[key] = self._reads.get(key, 0) + 1
        self._reads.move_to_end(key)
        if len(self._reads) > self._chunks_max:
            self._reads.popitem(last=False)

    def reads(self, key: ChunkKey) -> int:
        """How often a chunk was read."""
        return self._reads.get(key, 0)

    def follow(self, keys: Sequence[ChunkKey]) -> None:
        """Note that these chunks follow each other in a prompt."""
        for parent, key in pairwise(keys):
            self._parents[key] = parent
            self._parents.move_to_end(key)
            if len(self._parents) > self._chunks_max:
                self._parents.popitem(last=False)

    def parent(self, key: ChunkKey) -> ChunkKey | None:
        """The chunk before this one, where known."""
        return self._parents.get(key)
