"""Pinned chunks whose turn to go came: out of the question until their pins end. Steps take O(log n), amortised."""

import heapq
from collections.abc import Iterator

from kvstore.backends.policies import Pins
from kvstore.keys import ChunkKey

_SLACK = 64


class Parking:
    """Chunks by when their pins end.

    Args:
        pins: What is pinned, and until when.
    """

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._unpins = pins.unpins
        self._parked: dict[ChunkKey, float] = {}
        # Items stay when chunks leave or pins are prolonged, until they come up or are too many.
        self._heap: list[tuple[float, int, ChunkKey]] = []
        self._parkings = 0

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._parked)

    def __contains__(self, key: object) -> bool:
        return key in self._parked

    def park(self, key: ChunkKey) -> None:
        """Put a pinned chunk here."""
        until_s = self._pins.until_s(key)
        if self._parked.get(key) == until_s:
            return
        self._parked[key] = until_s
        self._parkings += 1
        heapq.heappush(self._heap, (until_s, self._parkings, key))
        if len(self._heap) > 2 * len(self._parked) + _SLACK:
            self._heap = [item for item in self._heap if self._parked.get(item[2]) == item[0]]
            heapq.heapify(self._heap)

    def leave(self, key: ChunkKey) -> None:
        """Take a chunk away, if it is here."""
        self._parked.pop(key, None)

    def first(self) -> ChunkKey | None:
        """The chunk whose pin ends first; None where nothing is parked."""
        while self._heap:
            until_s, _, key = self._heap[0]
            if self._parked.get(key) == until_s == self._pins.until_s(key):
                return key
            heapq.heappop(self._heap)
            if self._parked.get(key) == until_s:
                self.park(key)
        return None

    def take_unpinned(self) -> list[ChunkKey]:
        """Take away all chunks whose pins have ended."""
        over = []
        if self._unpins != self._pins.unpins:
            self._unpins = self._pins.unpins
            over = [key for key in self._parked if key not in self._pins]
        for key in over:
            del self._parked[key]
        while (first := self.first()) is not None and first not in self._pins:
            del self._parked[first]
            over.append(first)
        return over

    def validate(self) -> None:
        """Check that the parts agree."""
        assert self._parked.items() <= {(key, until_s) for until_s, _, key in self._heap}
