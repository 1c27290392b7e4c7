"""What a tier holds and what it gives up first: pure state that touches neither memory nor disk.

A backend asks the index which chunks must go (`make_room`), does so, and tells it what it holds now (`add`). Eviction
is S3-FIFO (Yang et al., SOSP 2023), counted in bytes: new chunks enter a small queue of a tenth of the budget and move
to the main queue only if they were read again, so one pass over cold data cannot flush the hot chunks. Keys that left
the small queue are remembered in a ghost list and enter the main queue when they come back.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from kvstore.backend import Copy, Held, Match, Miss, Reason
from kvstore.backends.policies import Load, Origin, Policies
from kvstore.errors import BackendFullError
from kvstore.frame import Frame
from kvstore.keys import NAMESPACE_BYTES, ChunkKey

_SMALL_SHARE = 0.1
_READS_MAX = 3
_GHOSTS_MAX = 1 << 16

shared_copy = lru_cache(maxsize=4096)(Copy)
"""A `Copy`; chunks of one shape get the same object, so runs of them are found by identity."""


def held_from(tier: str, frame: Frame) -> Held:
    """What a tier holds once it has stored `frame`."""
    header = frame.head.header
    level_bytes = frame.head.level_bytes[: frame.levels]
    inexact = header.behind is not None
    return Held(frame.id, shared_copy(tier, len(frame.head.raw), level_bytes, header.levels, inexact))


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


def copy_bytes(copy: Copy) -> int:
    """Bytes of a frame as it is sent."""
    return copy.head_bytes + sum(copy.level_bytes)


def shortened(held: Held, levels: int) -> Held:
    """What is held once only so many levels are left."""
    tier, head_bytes, level_bytes, whole_levels, inexact = held.copy
    return Held(held.frame_id, shared_copy(tier, head_bytes, level_bytes[:levels], whole_levels, inexact))


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
        self.used_bytes = 0
        self._held: dict[ChunkKey, Held] = {}
        self._size_bytes: dict[ChunkKey, int] = {}
        self._origins: dict[ChunkKey, Origin] = {}
        self._reads: dict[ChunkKey, int] = {}
        self._small: OrderedDict[ChunkKey, None] = OrderedDict()
        self._main: OrderedDict[ChunkKey, None] = OrderedDict()
        self._small_bytes = 0
        self._ghosts: OrderedDict[ChunkKey, Reason] = OrderedDict()
        self._returning: set[ChunkKey] = set()

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
        return Miss(self._ghosts.get(key, Reason.ABSENT))

    def read(self, key: ChunkKey) -> None:
        """Note that a chunk was read."""
        if (reads := self._reads.get(key)) is not None and reads < _READS_MAX:
            self._reads[key] = reads + 1

    def placed(self, held: Held, size_bytes: int) -> int:
        """Number of levels of a chunk that is about to come in which this tier will keep, at least one."""
        load = Load((self.used_bytes + size_bytes) / max(1, self.budget_bytes), 0)
        return self._levels_kept(held, load)

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
        grown_bytes = total_bytes - sum(self._size_bytes.get(key, 0) for key in sizes_bytes)
        return self.release(self.used_bytes + grown_bytes - self.budget_bytes, keep=sizes_bytes)

    def release(self, size_bytes: int, *, keep: Collection[ChunkKey] = ()) -> list[Move]:
        """Shrink and take out chunks until `size_bytes` are freed or only those to keep are left."""
        moves: list[Move] = []
        goal_bytes = self.used_bytes - size_bytes
        load = Load((self.used_bytes + size_bytes) / max(1, self.budget_bytes), 0)
        while self.used_bytes > goal_bytes and (victim := self._next_victim(keep)) is not None:
            held = self._held[victim]
            if (levels := self._levels_kept(held, load)) < len(held.copy.level_bytes):
                after = shortened(held, levels)
                saved_bytes = self._measure(held.copy) - self._measure(after.copy)
                moves.append(Move(victim, held, self._size_bytes[victim], after, self._origins[victim]))
                self.add(victim, after, self._size_bytes[victim] - saved_bytes, self._origins[victim])
                continue
            moves.append(Move(victim, held, self._size_bytes[victim], None, self._origins[victim]))
            self.drop(victim, Reason.EVICTED)
        return moves

    def undo(self, moves: Sequence[Move]) -> None:
        """Take moves back that could not be made."""
        for move in reversed(moves):
            self.add(move.key, move.before, move.before_bytes, move.origin)

    def origin(self, key: ChunkKey) -> Origin:
        """Where a chunk that is held stands in its prompt."""
        return self._origins[key]

    def add(self, key: ChunkKey, held: Held, size_bytes: int, origin: Origin) -> None:
        """Note that a chunk is held, or held with more or fewer levels than before."""
        self._origins[key] = origin
        if key in self._held:
            self._resize(key, size_bytes)
        else:
            self._enter(key, size_bytes)
        self._held[key] = held

    def drop(self, key: ChunkKey, reason: Reason) -> bool:
        """Note that a chunk is gone, and why; False where it was not held."""
        if self._held.pop(key, None) is None:
            if reason is Reason.ABSENT:
                self._forget(key)
            return False
        size_bytes = self._size_bytes.pop(key)
        del self._reads[key], self._origins[key]
        self.used_bytes -= size_bytes
        if key in self._small:
            del self._small[key]
            self._small_bytes -= size_bytes
            if reason is Reason.EVICTED:
                self._returning.add(key)
        else:
            del self._main[key]
        self._remember(key, reason)
        return True

    def scan(self, namespace: bytes | None) -> Iterator[tuple[ChunkKey, Held]]:
        """A snapshot of what is held (in one namespace)."""
        for key, held in list(self._held.items()):
            if namespace is None or key[:NAMESPACE_BYTES] == namespace:
                yield key, held

    def validate(self) -> None:
        """Check that the parts agree; tests call it after every step."""
        assert self._held.keys() == self._size_bytes.keys() == self._reads.keys() == self._origins.keys()
        assert self._small.keys() | self._main.keys() == self._held.keys()
        assert not self._small.keys() & self._main.keys()
        assert self.used_bytes == sum(self._size_bytes.values()) <= self.budget_bytes
        assert self._small_bytes == sum(self._size_bytes[key] for key in self._small)
        assert not self._ghosts.keys() & self._held.keys()
        assert self._returning <= self._ghosts.keys()
        assert len(self._ghosts) <= _GHOSTS_MAX

    def _levels_kept(self, held: Held, load: Load) -> int:
        return max(1, min(len(held.copy.level_bytes), self._policies.placement(held, self.tier, load) + 1))

    def _enter(self, key: ChunkKey, size_bytes: int) -> None:
        if key in self._returning:
            self._main[key] = None
        else:
            self._small[key] = None
            self._small_bytes += size_bytes
        self._forget(key)
        self._size_bytes[key] = size_bytes
        self._reads[key] = 0
        self.used_bytes += size_bytes

    def _resize(self, key: ChunkKey, size_bytes: int) -> None:
        grown_bytes = size_bytes - self._size_bytes[key]
        self._size_bytes[key] = size_bytes
        self.used_bytes += grown_bytes
        if key in self._small:
            self._small_bytes += grown_bytes

    def _next_victim(self, keep: Collection[ChunkKey]) -> ChunkKey | None:
        """The next chunk in S3-FIFO order; chunks that were read or must stay are moved on instead."""
        for _ in range((_READS_MAX + 2) * len(self._held)):
            from_small = self._small_bytes > _SMALL_SHARE * self.budget_bytes or not self._main
            queue = self._small if from_small and self._small else self._main
            key = next(iter(queue))
            if key not in keep and self._reads[key] == 0:
                return key
            if queue is self._main:
                self._reads[key] = max(0, self._reads[key] - 1)
            else:
                self._reads[key] = 0
            self._promote(key)
        # One queue holds nothing but chunks that must stay, and the turn never came to the other.
        return next((key for key in chain(self._small, self._main) if key not in keep), None)

    def _promote(self, key: ChunkKey) -> None:
        """Move a chunk to the young end of the main queue."""
        if key in self._small:
            del self._small[key]
            self._small_bytes -= self._size_bytes[key]
        self._main[key] = None
        self._main.move_to_end(key)

    def _remember(self, key: ChunkKey, reason: Reason) -> None:
        if reason is Reason.ABSENT:
            self._forget(key)
            return
        self._ghosts[key] = reason
        if len(self._ghosts) > _GHOSTS_MAX:
            self._returning.discard(self._ghosts.popitem(last=False)[0])

    def _forget(self, key: ChunkKey) -> None:
        self._ghosts.pop(key, None)
        self._returning.discard(key)
