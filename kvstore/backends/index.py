"""What a tier holds and what it gives up first: pure state that touches neither memory nor disk.

A backend asks the index which chunks must shrink or go (`make_room`), does so, and tells it what it holds now (`add`).

Under pressure the coldest chunks (`warmth`) first lose the levels that the placement does not grant them; the warmest
keep theirs as long as that costs no more than half a percent of the room. Only then do chunks go: first those whose
parent is gone, which are of no use until it is back, then the coldest of those without held children, so that a prompt
is given up from its end. Pinned chunks are left alone while there is anything else.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from kvstore.backend import Copy, Held, Match, Miss, Reason
from kvstore.backends.forest import Forest
from kvstore.backends.history import Share
from kvstore.backends.parking import Parking
from kvstore.backends.policies import Load, Origin, Policies
from kvstore.backends.warmth import Chunk, Queue, Warmth
from kvstore.errors import BackendFullError
from kvstore.frame import Frame, Head
from kvstore.keys import NAMESPACE_BYTES, ChunkKey

_WHOLE_SHARE = 0.005
_GHOSTS_MAX = 1 << 16
_LOST_KEPT = 1 - 1 / 4096
_PRESSED_SHARE = math.nextafter(1.0, 2.0)

shared_copy = lru_cache(maxsize=4096)(Copy)
"""A `Copy`; chunks of one shape get the same object, so runs of them are found by identity."""


def held_from(tier: str, frame: Frame) -> Held:
    """What a tier holds once it has stored `frame`."""
    return held_of(tier, frame.head, frame.levels)


def held_of(tier: str, head: Head, levels: int) -> Held:
    """What a tier holds of the frame with this head."""
    header = head.header
    inexact = header.behind is not None
    level_bytes = head.level_bytes[:levels]
    return Held(
        head.id,
        shared_copy(tier, len(head.raw), level_bytes, header.levels, inexact, header.lossless, header.profile),
    )


class Move(NamedTuple):
    """What a tier must do with a chunk to make room.

    Args:
        key: The chunk.
        before: What is held of it.
        before_bytes: Bytes that it takes now.
        after: What is to be held of it, fewer levels of the same frame; None where it must go.
        origin: Where it stands in its prompt.
    """

    key: ChunkKey
    before: Held
    before_bytes: int
    after: Held | None
    origin: Origin


class _Ghost(NamedTuple):
    """Why and when a chunk went."""

    reason: Reason
    time: int


def copy_bytes(copy: Copy) -> int:
    """Bytes of a frame as it is sent."""
    return copy.head_bytes + sum(copy.level_bytes)


def shortened(held: Held, levels: int) -> Held:
    """What is held once only so many levels are left."""
    tier, head_bytes, level_bytes, *rest = held.copy
    return Held(held.frame_id, shared_copy(tier, head_bytes, level_bytes[:levels], *rest))


class Index:
    """Chunks of one tier under a budget of bytes.

    Args:
        tier: Name of the tier, for errors.
        budget_bytes: Bytes that the chunks may take together.
        measure: Bytes that a copy takes in this tier; only differences between copies of one frame are asked for.
        policies: What the tiers of the stack share; its own by default.
    """

    def __init__(
        self,
        tier: str,
        budget_bytes: int,
        *,
        measure: Callable[[Copy], int] = copy_bytes,
        policies: Policies | None = None,
    ) -> None:
        self.tier = tier
        self.budget_bytes = budget_bytes
        self._measure = measure
        self._policies = policies or Policies()
        self._history = self._policies.history
        self.used_bytes = 0
        self._held: dict[ChunkKey, Held] = {}
        self._chunks: dict[ChunkKey, Chunk] = {}
        self._ghosts: OrderedDict[ChunkKey, _Ghost] = OrderedDict()
        self._warmth = Warmth(self._history)
        self._forest = Forest()
        self._leaves = Queue(self._chunks)
        self._whole = Queue(self._chunks)
        self._excess_bytes = 0
        self._parking = Parking(self._policies.pins)
        self._lost = Share(_LOST_KEPT)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: ChunkKey) -> Held | None:
        """What is held of a chunk."""
        return self._held.get(key)

    def match(self, keys: Sequence[ChunkKey]) -> Match:
        """The longest leading run of `keys` that is held."""
        try:
            # All present is the common case, and then no Python code runs for each key.
            return Match(list(map(self._held.__getitem__, keys)), None)
        except KeyError:
            held: list[Held] = []
            for key in keys:
                if (found := self._held.get(key)) is None:
                    return Match(held, self.miss(key))
                held.append(found)
            raise AssertionError("a key was missing and then was not") from None

    def miss(self, key: ChunkKey) -> Miss:
        """Why a chunk is not held."""
        ghost = self._ghosts.get(key)
        return Miss(ghost.reason if ghost else Reason.ABSENT)

    def read(self, key: ChunkKey) -> None:
        """Note that a chunk was read."""
        if key in self._held:
            self._warmth.note(missed=False)
            self._history.read(key)

    def placed(self, key: ChunkKey, held: Held, size_bytes: int) -> int:
        """Number of levels of a chunk that is about to come in which this tier will keep, at least one."""
        return self._levels_kept(key, held, (self.used_bytes + size_bytes) / max(1, self.budget_bytes))

    def make_room(self, sizes_bytes: Mapping[ChunkKey, int]) -> list[Move]:
        """Shrink chunks, and take others out of the index, so that new ones can be added or grow.

        The index counts the moves as made; where they could not be, `undo` them.

        Args:
            sizes_bytes: Bytes that each chunk about to be added will take; these are left alone.

        Raises:
            BackendFullError: They cannot fit even in an empty tier; nothing was moved.
        """
        total_bytes = sum(sizes_bytes.values())
        if total_bytes > self.budget_bytes:
            raise BackendFullError(self.tier, f"{total_bytes} bytes do not fit into a budget of {self.budget_bytes}")
        grown_bytes = total_bytes - sum(self._chunks[key].size_bytes for key in sizes_bytes if key in self._chunks)
        return self.release(self.used_bytes + grown_bytes - self.budget_bytes, keep=sizes_bytes)

    def release(self, size_bytes: int, *, keep: Collection[ChunkKey] = ()) -> list[Move]:
        """Shrink and take out chunks until `size_bytes` are freed or only those to keep are left."""
        moves: list[Move] = []
        goal_bytes = self.used_bytes - size_bytes
        if self.used_bytes <= goal_bytes:
            return moves
        for unpinned in self._parking.take_unpinned():
            self._settle(unpinned)
        used_share = 1 + size_bytes / max(1, self.budget_bytes)
        aside: list[ChunkKey] = []
        while self.used_bytes > goal_bytes and self._excess_bytes > _WHOLE_SHARE * self.budget_bytes:
            if (key := self._next_to_shrink(keep, aside)) is None:
                break
            self._shrink(key, used_share, moves)
        while self.used_bytes > goal_bytes and (key := self._next_victim(keep, aside)) is not None:
            if not self._shrink(key, used_share, moves):
                moves.append(Move(key, self._held[key], self._chunks[key].size_bytes, None, self._chunks[key].origin))
                self._lost.one()
                self.drop(key, Reason.EVICTED)
        for kept in aside:
            self._settle(kept)
        return moves

    def undo(self, moves: Sequence[Move]) -> None:
        """Take moves back that could not be made."""
        for move in reversed(moves):
            self._set(move.key, move.before, move.before_bytes, move.origin)

    def origin(self, key: ChunkKey) -> Origin:
        """Where a chunk that is held stands in its prompt."""
        return self._chunks[key].origin

    def add(self, key: ChunkKey, held: Held, size_bytes: int, origin: Origin) -> None:
        """Note that a chunk is held, or held with more or fewer levels than before."""
        if key not in self._held:
            ghost = self._ghosts.get(key)
            if ghost is not None and ghost.reason is Reason.EVICTED:
                self._warmth.note(missed=True)
                self._lost.hit()
            self._history.enter(key, ghost and ghost.time)
        self._set(key, held, size_bytes, origin)

    def drop(self, key: ChunkKey, reason: Reason) -> bool:
        """Note that a chunk is gone, and why; False where it was not held."""
        if self._held.pop(key, None) is None:
            if reason is Reason.ABSENT:
                self._ghosts.pop(key, None)
            return False
        self._count(self._chunks.pop(key), -1)
        self._parking.leave(key)
        self._freed(self._forest.remove(key))
        if reason is not Reason.ABSENT:
            self._ghosts[key] = _Ghost(reason, self._history.time)
            if len(self._ghosts) > _GHOSTS_MAX:
                self._ghosts.popitem(last=False)
        return True

    def scan(self, namespace: bytes | None) -> Iterator[tuple[ChunkKey, Held]]:
        """A snapshot of what is held (in one namespace)."""
        for key, held in list(self._held.items()):
            if namespace is None or key[:NAMESPACE_BYTES] == namespace:
                yield key, held

    def validate(self) -> None:
        """Check that the parts agree; tests call it after every step."""
        chunks = self._chunks
        assert self._held.keys() == chunks.keys()
        assert self.used_bytes == sum(chunk.size_bytes for chunk in chunks.values()) <= self.budget_bytes
        assert self._excess_bytes == sum(chunk.excess_bytes for chunk in chunks.values())
        assert all(0 <= chunk.excess_bytes < chunk.size_bytes for chunk in chunks.values())
        self._warmth.validate(chunks)
        self._forest.validate()
        self._parking.validate()
        assert len(self._forest) == len(chunks)
        assert all(key in self._forest for key in chunks)
        assert set(self._parking) <= chunks.keys()
        leaves = {key for key in chunks if self._forest.is_leaf(key)}
        whole = {key for key, chunk in chunks.items() if chunk.excess_bytes}
        for queue, wanted in ((self._leaves, leaves), (self._whole, whole)):
            assert wanted - set(self._parking) <= set(queue)
        assert not self._ghosts.keys() & self._held.keys()
        assert len(self._ghosts) <= _GHOSTS_MAX

    def _levels_kept(self, key: ChunkKey, held: Held, used_share: float) -> int:
        history = self._history
        reads = history.reads(key)
        load = Load(used_share, reads, history.asked(key), history.again(reads), self._lost.value)
        return max(1, min(len(held.copy.level_bytes), self._policies.placement(held, self.tier, load) + 1))

    def _set(self, key: ChunkKey, held: Held, size_bytes: int, origin: Origin) -> None:
        if (before := self._chunks.get(key)) is not None:
            self._count(before, -1)
        self._ghosts.pop(key, None)
        self._held[key] = held
        levels = self._levels_kept(key, held, _PRESSED_SHARE)
        self._chunks[key] = chunk = Chunk(size_bytes, origin, self._saved_bytes(held, levels))
        self._count(chunk, 1)
        if key not in self._parking:
            self._settle(key)

    def _count(self, chunk: Chunk, sign: int) -> None:
        """Count a chunk in (1) or out (-1)."""
        self.used_bytes += sign * chunk.size_bytes
        self._excess_bytes += sign * chunk.excess_bytes
        self._warmth.count(chunk, sign)

    def _saved_bytes(self, held: Held, levels: int) -> int:
        if levels >= len(held.copy.level_bytes):
            return 0
        return self._measure(held.copy) - self._measure(shortened(held, levels).copy)

    def _settle(self, key: ChunkKey) -> None:
        """Give a chunk its place among the others."""
        self._freed(self._forest.put(key, _parent(self._chunks[key].origin)))
        self._rank(key)

    def _freed(self, key: ChunkKey | None) -> None:
        """Queue a chunk that has become a leaf."""
        if key is not None:
            self._leaves.push(key)

    def _rank(self, key: ChunkKey) -> None:
        """Queue a chunk by how warm it is now."""
        chunk = self._chunks[key]
        self._warmth.rank(key, chunk)
        if self._forest.is_leaf(key):
            self._leaves.push(key)
        if chunk.excess_bytes:
            self._whole.push(key)

    def _next_to_shrink(self, keep: Collection[ChunkKey], aside: list[ChunkKey]) -> ChunkKey | None:
        while (key := self._whole.pop()) is not None:
            if self._chunks[key].excess_bytes and self._is_up_to_date(key) and not self._put_aside(key, keep, aside):
                return key
        return None

    def _next_victim(self, keep: Collection[ChunkKey], aside: list[ChunkKey]) -> ChunkKey | None:
        while (orphan := self._forest.orphan()) is not None:
            if not self._put_aside(orphan, keep, aside):
                return orphan
            self._forest.put(orphan, None)
        while (leaf := self._leaves.pop()) is not None:
            if self._forest.is_leaf(leaf) and self._is_up_to_date(leaf):
                if not self._put_aside(leaf, keep, aside):
                    return leaf
                # A chunk that is out of the question does not protect those before it.
                self._freed(self._forest.put(leaf, None))
        while (pinned := self._parking.first()) is not None:
            if pinned not in keep:
                return pinned
            self._parking.leave(pinned)
            aside.append(pinned)
        # Parents that go round in a circle, as a client can claim, leave no leaf.
        return next((key for key in self._held if key not in keep), None)

    def _is_up_to_date(self, key: ChunkKey) -> bool:
        """Whether a chunk's rank still holds; it is queued anew where it does not."""
        if self._warmth.is_outdated(key, self._chunks[key]):
            self._rank(key)
            return False
        return True

    def _put_aside(self, key: ChunkKey, keep: Collection[ChunkKey], aside: list[ChunkKey]) -> bool:
        """Put a chunk aside where it must stay: for this time, or until its pin ends."""
        if key in self._policies.pins:
            self._parking.park(key)
            return True
        if key in keep:
            aside.append(key)
            return True
        return key in self._parking

    def _shrink(self, key: ChunkKey, used_share: float, moves: list[Move]) -> bool:
        """Take from a chunk the levels that the placement does not grant it; False where it grants all."""
        held, chunk = self._held[key], self._chunks[key]
        levels = self._levels_kept(key, held, used_share)
        if levels >= len(held.copy.level_bytes):
            self._count(chunk, -1)
            chunk.excess_bytes = 0
            self._count(chunk, 1)
            return False
        after = shortened(held, levels)
        moves.append(Move(key, held, chunk.size_bytes, after, chunk.origin))
        self._set(key, after, chunk.size_bytes - self._saved_bytes(held, levels), chunk.origin)
        return True


def _parent(origin: Origin) -> ChunkKey | None:
    """The chunk without which a chunk is of no use; none for the first of a prompt, or for a blob."""
    return origin.parent if origin.tokens and origin.first_position else None
