"""Which bytes of a slab belong to whom: pure arithmetic, no memory is touched here.

An extent is one run of bytes. It is taken from the smallest hole that is large enough; a hole that opens merges with
its neighbours. Where the room is there but in pieces, the extents between a few holes are moved together, so whatever
fits into the free bytes is always placed, unless an extent that must stay where it is stands in between.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

UNIT_BYTES = 1 << 10
"""Extents start at multiples of this many bytes and end at them."""


def unit_bytes(size_bytes: int) -> int:
    """Bytes that an extent for `size_bytes` takes."""
    return max(UNIT_BYTES, -(-size_bytes // UNIT_BYTES) * UNIT_BYTES)


@dataclass(eq=False)
class Extent:
    """A run of bytes that is in use.

    Args:
        start: Its first byte; it changes when extents are moved together.
        size_bytes: Its length.
        keep_bytes: How much of it is still wanted; the rest is given back once nobody holds it.
        holders: Who reads it where it is, so that it can neither move nor shrink.
    """

    start: int
    size_bytes: int
    keep_bytes: int
    holders: int = 0


class Shift(NamedTuple):
    """Bytes to be copied within the slab; where they go may overlap with where they are."""

    source: int
    target: int
    size_bytes: int


class _Window(NamedTuple):
    """A run of holes and of the extents between them; its first and last hole."""

    moved_bytes: int
    first: int
    last: int


class Extents:
    """The extents and holes of a slab.

    Args:
        size_bytes: Bytes of the slab, a multiple of `UNIT_BYTES`.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.free_bytes = 0
        self.moved_bytes = 0
        self._extents: dict[int, Extent] = {}
        self._held: set[Extent] = set()
        self._hole_bytes: dict[int, int] = {}
        self._hole_at_end: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._open(0, size_bytes)

    def take(self, size_bytes: int) -> tuple[Extent, list[Shift]] | None:
        """An extent for so many bytes, and what has to be copied in this order before it is written to.

        Returns:
            None where there is no such room, or extents that are held stand in between.
        """
        size_bytes = unit_bytes(size_bytes)
        shifts: list[Shift] = []
        place = bisect_left(self._by_size, (size_bytes, 0))
        if place < len(self._by_size):
            start = self._by_size[place][1]
        elif window := self._cheapest_window(size_bytes):
            start, shifts = self._close_up(window)
        else:
            return None
        hole_bytes = self._shut(start)
        if hole_bytes > size_bytes:
            self._open(start + size_bytes, hole_bytes - size_bytes)
        extent = Extent(start, size_bytes, size_bytes)
        self._extents[start] = extent
        return extent, shifts

    def keep(self, extent: Extent, size_bytes: int) -> None:
        """Give back all but the first `size_bytes` of an extent, at once or when nobody holds it any more."""
        extent.keep_bytes = unit_bytes(size_bytes) if size_bytes else 0
        if not extent.holders:
            self._settle(extent)

    def hold(self, extent: Extent) -> None:
        """Leave an extent where and as it is until `let_go`."""
        extent.holders += 1
        self._held.add(extent)

    def let_go(self, extent: Extent) -> None:
        """Undo one `hold`."""
        extent.holders -= 1
        if not extent.holders:
            self._held.discard(extent)
            self._settle(extent)

    @property
    def stretch_bytes(self) -> int:
        """The longest run of bytes without an extent that is held: what could be made free."""
        held = sorted((extent.start, extent.size_bytes) for extent in self._held)
        starts = [*(start for start, _ in held), self.size_bytes]
        ends = [0, *(start + size_bytes for start, size_bytes in held)]
        return max(start - end for start, end in zip(starts, ends, strict=True))

    def validate(self) -> None:
        """Check that extents and holes are the slab and nothing else; tests call it after every step."""
        parts = [(start, extent.size_bytes, False) for start, extent in self._extents.items()]
        parts += [(start, size_bytes, True) for start, size_bytes in self._hole_bytes.items()]
        at, was_hole = 0, False
        for start, size_bytes, is_hole in sorted(parts):
            assert start == at, "nothing overlaps and nothing is lost"
            assert size_bytes > 0
            assert size_bytes % UNIT_BYTES == 0
            assert not (is_hole and was_hole), "holes that meet are one"
            at, was_hole = start + size_bytes, is_hole
        assert at == self.size_bytes
        assert self.free_bytes == sum(self._hole_bytes.values())
        assert self._by_size == sorted((size_bytes, start) for start, size_bytes in self._hole_bytes.items())
        assert self._hole_at_end == {start + size_bytes: start for start, size_bytes in self._hole_bytes.items()}
        assert self._held == {extent for extent in self._extents.values() if extent.holders}
        for start, extent in self._extents.items():
            assert extent.start == start
            assert extent.holders or extent.keep_bytes == extent.size_bytes

    def _settle(self, extent: Extent) -> None:
        """Give back what is no longer wanted."""
        if extent.keep_bytes < extent.size_bytes:
            self._open(extent.start + extent.keep_bytes, extent.size_bytes - extent.keep_bytes)
            extent.size_bytes = extent.keep_bytes
        if not extent.size_bytes:
            del self._extents[extent.start]

    def _open(self, start: int, size_bytes: int) -> None:
        """A new hole, one with those it meets."""
        if start + size_bytes in self._hole_bytes:
            size_bytes += self._shut(start + size_bytes)
        if start in self._hole_at_end:
            start = self._hole_at_end[start]
            size_bytes += self._shut(start)
        self._hole_bytes[start] = size_bytes
        self._hole_at_end[start + size_bytes] = start
        insort(self._by_size, (size_bytes, start))
        self.free_bytes += size_bytes

    def _shut(self, start: int) -> int:
        """Take a hole away; returns its length."""
        size_bytes = self._hole_bytes.pop(start)
        del self._hole_at_end[start + size_bytes]
        del self._by_size[bisect_left(self._by_size, (size_bytes, start))]
        self.free_bytes -= size_bytes
        return size_bytes

    def _cheapest_window(self, size_bytes: int) -> _Window | None:
        """The holes that make enough room together with the fewest bytes between them."""
        walls = sorted(extent.start for extent in self._held)
        holes = sorted(self._hole_bytes.items())
        best: _Window | None = None
        first, room_bytes, wall = 0, 0, 0
        for last, (start, hole_bytes) in enumerate(holes):
            if (passed := bisect_right(walls, start)) != wall:
                first, room_bytes, wall = last, 0, passed
            room_bytes += hole_bytes
            while room_bytes - holes[first][1] >= size_bytes:
                room_bytes -= holes[first][1]
                first += 1
            moved_bytes = start + hole_bytes - holes[first][0] - room_bytes
            if room_bytes >= size_bytes and (best is None or moved_bytes < best.moved_bytes):
                best = _Window(moved_bytes, holes[first][0], start)
        return best

    def _close_up(self, window: _Window) -> tuple[int, list[Shift]]:
        """Move what lies between the holes of a window to one side; returns where the one hole begins."""
        first, last = window.first, window.last
        end = last + self._hole_bytes[last]
        # Copies go in steps of the hole that they move into, so the larger of the outer two comes first.
        downwards = self._hole_bytes[first] >= self._hole_bytes[last]
        between = []
        at = first
        while at < end:
            if at in self._hole_bytes:
                at += self._shut(at)
            else:
                between.append(self._extents.pop(at))
                at += between[-1].size_bytes
        shifts = list(_slide(between, first, end, downwards=downwards))
        self._extents |= {extent.start: extent for extent in between}
        self.moved_bytes += window.moved_bytes
        start = first + window.moved_bytes if downwards else first
        self._open(start, end - first - window.moved_bytes)
        return start, shifts


def _slide(extents: list[Extent], first: int, end: int, *, downwards: bool) -> Iterator[Shift]:
    """Move extents to the start or the end of a run of bytes, the outermost first."""
    low, high = first, end
    for extent in extents if downwards else reversed(extents):
        high -= extent.size_bytes
        target = low if downwards else high
        low += extent.size_bytes
        yield Shift(extent.start, target, extent.size_bytes)
        extent.start = target
