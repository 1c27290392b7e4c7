"""How warm the chunks of a tier are: what decides which of them goes first.

In units of `History.time`, a chunk is as warm as

    time of its last read + reads * bonus * sqrt(worth)

`bonus` is a few times the gap after which chunks are typically asked for again, times the share of them that is gone by
then. Where recency keeps too little, frequency decides; where all that is asked for again is still held, frequency has
nothing to add. `worth` is what a chunk costs to compute again for each byte that it takes, relative to the mean of the
tier. Its root is taken because how dear a chunk is does not say how soon it is asked for.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvstore.backends.history import History
from kvstore.backends.policies import Origin
from kvstore.keys import ChunkKey

ATTENTION_TOKENS = 30_000
"""Position at which a token's attention costs as much as all else about it, for a model of 8 billion parameters.

With 32 layers of 4,096 channels, attention to `n` positions takes `4 * 32 * 4096 * n` operations, and the matrices take
`2 * 8e9`.
"""

_BONUS_GAPS = 4.0
_MISSED_WEIGHT = 1 / 1024
_QUEUE_SLACK = 64

Rank = tuple[float, int]
"""How warm a chunk is, and the order in which equally warm ones came."""


@dataclass(slots=True)
class Chunk:
    """What an index knows of a chunk beside what is held of it.

    Args:
        size_bytes: Bytes that it takes.
        origin: Where it stands in its prompt.
        excess_bytes: Bytes of these that it would lose under pressure.
        rank: How warm it was when that was last found out.
        asked_at: When it had last been asked for by then.
    """

    size_bytes: int
    origin: Origin
    excess_bytes: int = 0
    rank: Rank = (0.0, 0)
    asked_at: int = 0

    @property
    def lasting_bytes(self) -> int:
        """Bytes that it takes under pressure."""
        return max(1, self.size_bytes - self.excess_bytes)

    @property
    def cost(self) -> int:
        """What it takes to compute it again, in operations per token and `ATTENTION_TOKENS`; 0 for an opaque blob."""
        return self.origin.tokens * (ATTENTION_TOKENS + self.origin.first_position)


class Warmth:
    """Ranks the chunks of one tier.

    Args:
        history: What was asked for.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._missed_share = 0.5
        self._ranked = 0
        # Of all chunks whose cost is known, for the mean.
        self._cost = 0
        self._costed_bytes = 0

    def note(self, *, missed: bool) -> None:
        """Note that a chunk was asked for again, and whether it had been evicted by then."""
        self._missed_share += _MISSED_WEIGHT * (missed - self._missed_share)

    def count(self, chunk: Chunk, sign: int) -> None:
        """Count a chunk in (1) or out (-1)."""
        if chunk.origin.tokens:
            self._cost += sign * chunk.cost
            self._costed_bytes += sign * chunk.lasting_bytes

    def rank(self, key: ChunkKey, chunk: Chunk) -> None:
        """Find out how warm a chunk is now."""
        past = self._history.past(key)
        bonus = _BONUS_GAPS * self._missed_share * self._history.gap
        self._ranked += 1
        chunk.rank = (past.time + past.reads * bonus * math.sqrt(self._worth(chunk)), self._ranked)
        chunk.asked_at = past.time

    def is_outdated(self, key: ChunkKey, chunk: Chunk) -> bool:
        """Whether a chunk was asked for since it was ranked, in this tier or another."""
        return self._history.past(key).time != chunk.asked_at

    def validate(self, chunks: Mapping[ChunkKey, Chunk]) -> None:
        """Check that the sums are those of the chunks that are counted."""
        costed = [chunk for chunk in chunks.values() if chunk.origin.tokens]
        assert self._cost == sum(chunk.cost for chunk in costed)
        assert self._costed_bytes == sum(chunk.lasting_bytes for chunk in costed)
        assert 0 <= self._missed_share <= 1

    def _worth(self, chunk: Chunk) -> float:
        """Cost for each byte in units of the mean; 1 where it is not known.

        Bytes under pressure count, so that a chunk is not worth more than its like for having been shrunk already.
        """
        if not chunk.origin.tokens:
            return 1.0
        return chunk.cost * self._costed_bytes / (chunk.lasting_bytes * self._cost)


class Queue:
    """Chunks by rank, the coldest first. Items that are out of date stay until they come up or are too many.

    Args:
        chunks: What is held; tells which ranks are up to date.
    """

    def __init__(self, chunks: Mapping[ChunkKey, Chunk]) -> None:
        self._chunks = chunks
        self._heap: list[tuple[Rank, ChunkKey]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[ChunkKey]:
        """Chunks in no order; some more than once."""
        return (key for rank, key in self._heap if self._is_current(rank, key))

    def push(self, key: ChunkKey) -> None:
        """Queue a chunk by its rank."""
        heapq.heappush(self._heap, (self._chunks[key].rank, key))
        if len(self._heap) > 2 * len(self._chunks) + _QUEUE_SLACK:
            self._heap = [item for item in set(self._heap) if self._is_current(*item)]
            heapq.heapify(self._heap)

    def pop(self) -> ChunkKey | None:
        """Take out the coldest chunk; None where there is none."""
        while self._heap:
            rank, key = heapq.heappop(self._heap)
            if self._is_current(rank, key):
                return key
        return None

    def _is_current(self, rank: Rank, key: ChunkKey) -> bool:
        chunk = self._chunks.get(key)
        return chunk is not None and chunk.rank == rank
