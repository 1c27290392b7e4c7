"""Caches of chunks that are replayed against each other: ours, with the tiers' own index, and published policies."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from benchmarks.traces import CHUNK_TOKENS
from kvstore.backend import Copy, Held
from kvstore.backends.index import Index, copy_bytes, shortened
from kvstore.backends.policies import Origin, Policies, StaticPlacement
from kvstore.keys import ChunkKey

_SMALL_SHARE = 0.1
_READS_MAX = 3
_GHOSTS_MAX = 1 << 16


class Cache(Protocol):
    """Holds chunks of one shape, in a number of levels."""

    evictions: int

    @property
    def used_bytes(self) -> int:
        """Bytes that its chunks take."""

    def read(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Read the longest leading run that is held: the number of levels of each of its chunks."""

    def put(self, keys: Sequence[ChunkKey], first: int) -> None:
        """Put those of a prompt's chunks from number `first` on that are not held."""


class Ours:
    """`Index` as a tier drives it.

    Args:
        budget_bytes: Bytes that all chunks may take.
        level_bytes: Bytes of every level of a chunk.
        kept: Levels that a chunk keeps under pressure; all of them where it never shrinks.
    """

    def __init__(self, budget_bytes: int, level_bytes: Sequence[int], kept: int) -> None:
        self._policies = Policies(placement=StaticPlacement(kept - 1))
        self._index = Index("replay", budget_bytes, policies=self._policies)
        self._whole = Held(None, Copy("replay", 0, tuple(level_bytes), len(level_bytes)))
        self._held = [shortened(self._whole, levels) for levels in range(1, len(level_bytes) + 1)]
        self.evictions = 0

    @property
    def used_bytes(self) -> int:
        return self._index.used_bytes

    def read(self, keys: Sequence[ChunkKey]) -> list[int]:
        run = self._index.match(keys).held
        for key in keys[: len(run)]:
            self._index.read(key)
        return [len(held.copy.level_bytes) for held in run]

    def put(self, keys: Sequence[ChunkKey], first: int) -> None:
        self._policies.history.follow(keys[max(0, first - 1) :])
        for number in range(first, len(keys)):
            if self._index.get(keys[number]) is None:
                self._put(keys[number], number)

    def validate(self) -> None:
        """Check the index."""
        self._index.validate()

    def _put(self, key: ChunkKey, number: int) -> None:
        held = self._held[self._index.placed(key, self._whole, copy_bytes(self._whole.copy)) - 1]
        size_bytes = copy_bytes(held.copy)
        self.evictions += sum(move.after is None for move in self._index.make_room({key: size_bytes}))
        origin = Origin(CHUNK_TOKENS, CHUNK_TOKENS * number, self._policies.history.parent(key))
        self._index.add(key, held, size_bytes, origin)


class Lru:
    """The chunk that was used least recently goes first; under pressure it is shrunk before any goes.

    Args:
        budget_bytes: Bytes that all chunks may take.
        level_bytes: Bytes of every level of a chunk.
        kept: Levels that a chunk keeps under pressure.
    """

    def __init__(self, budget_bytes: int, level_bytes: Sequence[int], kept: int) -> None:
        self._budget_bytes = budget_bytes
        self._whole_bytes, self._kept_bytes = sum(level_bytes), sum(level_bytes[:kept])
        self._whole_levels, self._kept = len(level_bytes), kept
        self._levels: OrderedDict[ChunkKey, int] = OrderedDict()
        # Chunks with more levels than they keep under pressure, in the order in which they are shrunk.
        self._rich: OrderedDict[ChunkKey, None] = OrderedDict()
        self.used_bytes = 0
        self.evictions = 0

    def read(self, keys: Sequence[ChunkKey]) -> list[int]:
        run = []
        for key in keys:
            if (levels := self._levels.get(key)) is None:
                break
            run.append(levels)
            self._touch(key)
        return run

    def put(self, keys: Sequence[ChunkKey], first: int) -> None:
        for key in keys[first:]:
            if key in self._levels:
                self._touch(key)
            else:
                self._put(key)

    def _touch(self, key: ChunkKey) -> None:
        self._levels.move_to_end(key)
        if key in self._rich:
            self._rich.move_to_end(key)

    def _put(self, key: ChunkKey) -> None:
        fits = self.used_bytes + self._whole_bytes <= self._budget_bytes
        levels, size_bytes = (self._whole_levels, self._whole_bytes) if fits else (self._kept, self._kept_bytes)
        while self.used_bytes + size_bytes > self._budget_bytes:
            if self._rich:
                self._levels[self._rich.popitem(last=False)[0]] = self._kept
                self.used_bytes -= self._whole_bytes - self._kept_bytes
            else:
                self._evict()
                self.used_bytes -= self._kept_bytes
                self.evictions += 1
        self._levels[key] = levels
        if levels > self._kept:
            self._rich[key] = None
        self.used_bytes += size_bytes
        self._enter(key)

    def _enter(self, key: ChunkKey) -> None:
        """Note that a chunk was put."""

    def _evict(self) -> None:
        """Take out a chunk; none has more levels than it keeps under pressure."""
        self._levels.popitem(last=False)


class S3Fifo(Lru):
    """S3-FIFO as published (Yang et al., SOSP 2023): a small queue, a main queue, ghosts, and counters up to 3.

    Its ghosts are as many as our index keeps, more than the paper's, which are as many as the main queue's chunks.
    """

    def __init__(self, budget_bytes: int, level_bytes: Sequence[int], kept: int) -> None:
        super().__init__(budget_bytes, level_bytes, kept)
        self._reads: dict[ChunkKey, int] = {}
        self._small: OrderedDict[ChunkKey, None] = OrderedDict()
        self._main: OrderedDict[ChunkKey, None] = OrderedDict()
        self._ghosts: OrderedDict[ChunkKey, None] = OrderedDict()

    def _touch(self, key: ChunkKey) -> None:
        self._reads[key] = min(_READS_MAX, self._reads[key] + 1)

    def put(self, keys: Sequence[ChunkKey], first: int) -> None:
        for key in keys[first:]:
            if key not in self._levels:
                self._put(key)

    def _enter(self, key: ChunkKey) -> None:
        self._reads[key] = 0
        (self._main if key in self._ghosts else self._small)[key] = None
        self._ghosts.pop(key, None)

    def _evict(self) -> None:
        while not (self._evicted_from_small() if self._is_small_full() else self._evicted_from_main()):
            pass

    def _is_small_full(self) -> bool:
        return len(self._small) * self._kept_bytes > _SMALL_SHARE * self._budget_bytes or not self._main

    def _evicted_from_small(self) -> bool:
        key, _ = self._small.popitem(last=False)
        if self._reads[key]:
            self._reads[key] = 0
            self._main[key] = None
            return False
        self._ghosts[key] = None
        if len(self._ghosts) > _GHOSTS_MAX:
            self._ghosts.popitem(last=False)
        self._forget(key)
        return True

    def _evicted_from_main(self) -> bool:
        key, _ = self._main.popitem(last=False)
        if self._reads[key]:
            self._reads[key] -= 1
            self._main[key] = None
            return False
        self._forget(key)
        return True

    def _forget(self, key: ChunkKey) -> None:
        del self._levels[key], self._reads[key]
