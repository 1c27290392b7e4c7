"""What was asked for: which chunks were read, how often and when, and which follows which. Bounded, pure, and shared.

Time is counted in chunks that were asked for again. It needs no clock, and it stands still while cold data passes, so
that cannot make the other chunks look old.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, TypeVar

from kvstore.keys import ChunkKey

HISTORY_MAX = 1 << 18

T = TypeVar("T")

# The first guess of a gap, and the weight of each gap that is measured in the running mean.
_GAP_READS = 1024.0
_GAP_WEIGHT = 1 / 1024

_COUNTED_READS = 8
_COUNT_KEPT = 1 - 1 / 4096
_PRIOR_EVENTS = 256.0
"""What comes of the first events is not seen at once, and until then they would look as if nothing did."""


class Past(NamedTuple):
    """What is remembered of a chunk.

    Args:
        reads: How often it was read, or would have been had it been there.
        time: When it was last asked for, as `History.time` counts.
    """

    reads: int
    time: int


_UNKNOWN = Past(0, 0)


class Share:
    """A running share of events that something came of, older ones counting less. Starts at a half.

    Args:
        kept: What an event counts after the next one.
    """

    def __init__(self, kept: float) -> None:
        self._kept = kept
        self._events = _PRIOR_EVENTS
        self._hits = self._events / 2

    def one(self) -> None:
        """One more event."""
        self._events = self._kept * self._events + 1
        self._hits *= self._kept

    def hit(self) -> None:
        """Something came of one of them."""
        self._hits += 1

    @property
    def value(self) -> float:
        """The share."""
        return min(1.0, self._hits / self._events)


class History:
    """Reads and parents of the chunks that were last dealt with.

    Args:
        chunks_max: Chunks that are remembered.
    """

    def __init__(self, chunks_max: int = HISTORY_MAX) -> None:
        self._chunks_max = chunks_max
        self._time = 0
        self._unnoticed: ChunkKey | None = None
        self._log_gap = math.log(_GAP_READS)
        self._past: OrderedDict[ChunkKey, Past] = OrderedDict()
        self._parents: OrderedDict[ChunkKey, ChunkKey] = OrderedDict()
        self._asked: OrderedDict[ChunkKey, int] = OrderedDict()
        self._again = [Share(_COUNT_KEPT) for _ in range(_COUNTED_READS)]

    @property
    def time(self) -> int:
        """Number of times that any chunk was asked for again."""
        return self._time

    @property
    def gap(self) -> float:
        """How long it typically takes until a chunk is asked for again: a running geometric mean, as `time`."""
        return math.exp(self._log_gap)

    def enter(self, key: ChunkKey, gone_at: int | None = None) -> None:
        """Note that a chunk comes into a tier.

        A chunk that comes back was asked for while it was gone. That counts as a read, unless another tier noted it.

        Args:
            key: The chunk.
            gone_at: When the tier let go of it; None where it never had it.
        """
        past = self._past.get(key)
        if past is None:
            self._again[0].one()
            self._note(key, Past(0, self._time))
        elif gone_at is not None and past.time <= gone_at:
            self.read(key)

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
        self._time += 1
        past = self._past.get(key)
        if past is not None:
            self._log_gap += _GAP_WEIGHT * (math.log(self._time - past.time) - self._log_gap)
            self._again[min(past.reads, _COUNTED_READS - 1)].hit()
            self._again[min(past.reads + 1, _COUNTED_READS - 1)].one()
        self._note(key, Past((past or _UNKNOWN).reads + 1, self._time))

    def past(self, key: ChunkKey) -> Past:
        """What is remembered of a chunk; as if it had been put first and never read where nothing is."""
        return self._past.get(key, _UNKNOWN)

    def reads(self, key: ChunkKey) -> int:
        """How often a chunk was read."""
        return self.past(key).reads

    def again(self, reads: int) -> float:
        """Share of the chunks read so often that are read once more."""
        return self._again[min(reads, _COUNTED_READS - 1)].value

    def ask(self, key: ChunkKey, level: int) -> None:
        """Note up to which level a chunk was asked for."""
        _renew(self._asked, key, level, self._chunks_max)

    def asked(self, key: ChunkKey) -> int | None:
        """Up to which level a chunk was last asked for; as the chunk before it where nobody asked for it yet."""
        return self._asked.get(key)

    def follow(self, keys: Sequence[ChunkKey]) -> None:
        """Note that these chunks follow each other in a prompt."""
        for parent, key in pairwise(keys):
            _renew(self._parents, key, parent, self._chunks_max)
            if key not in self._asked and (level := self._asked.get(parent)) is not None:
                self.ask(key, level)

    def parent(self, key: ChunkKey) -> ChunkKey | None:
        """The chunk before this one, where known."""
        return self._parents.get(key)

    def _note(self, key: ChunkKey, past: Past) -> None:
        _renew(self._past, key, past, self._chunks_max)


def _renew(table: OrderedDict[ChunkKey, T], key: ChunkKey, value: T, most: int) -> None:
    """Set what a table knows of a chunk, as its newest; the oldest goes where there are too many."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)
