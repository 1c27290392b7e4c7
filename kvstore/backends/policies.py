"""What the tiers of one stack know together, and the rules by which they keep chunks: pure state, no clock of its own.

A tier's `Index` decides what goes; it asks here. One `Policies` is shared by all tiers of a stack, so that a chunk
which is hot in memory does not look cold on disk.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.backend import Held
from kvstore.backends.history import History
from kvstore.frame import Frame
from kvstore.keys import ChunkKey

PINS_MAX = 1 << 16


class Load(NamedTuple):
    """What a placement may know beside the chunk.

    Args:
        used_share: Bytes that the tier holds, with those that want in, as a share of its budget; may be above 1.
        reads: How often the chunk was read, as far as anybody remembers.
        asked: Highest level that the last fetch of it asked for, or of the chunk before it; None where nobody knows.
        again: Share of the chunks read so often that are read once more.
        lost: Share of the chunks given up by the tier that were asked for again.
    """

    used_share: float
    reads: int
    asked: int | None = None
    again: float = 1.0
    lost: float = 1.0


class FetchedChunk(NamedTuple):
    """A chunk that was asked for.

    Args:
        profile: `Copy.profile` of its frame.
        level: Highest level asked for.
        asked: `Load.asked` before that.
        tier: Which tier had all that was asked for; empty where none had.
        reads: `Load.reads` before that.
    """

    profile: bytes
    level: int
    asked: int | None
    tier: str
    reads: int


class TierRead(NamedTuple):
    """What one fetch read from one tier.

    Args:
        tier: The tier.
        size_bytes: Bytes of frames.
        took_s: Seconds that it took.
    """

    tier: str
    size_bytes: int
    took_s: float


class Fetched(NamedTuple):
    """What became of a fetch, for a placement that learns.

    Args:
        chunks: The chunks asked for that any tier had.
        reads: What was read of each tier.
    """

    chunks: Sequence[FetchedChunk]
    reads: Sequence[TierRead]


Placement = Callable[[Held, str, Load], int]
"""The highest level that a chunk keeps in a tier: `placement(held, tier, load) -> level`.

It is asked when a chunk comes in and again when room is needed; a level that is not held is not brought back.
"""


@dataclass(frozen=True)
class StaticPlacement:
    """Every level while there is room, and levels 0 to `level` when there is not.

    Args:
        level: What chunks are shrunk to.
        full_share: Share of the budget from which on there is no room.
    """

    level: int = 1
    full_share: float = 1.0

    def __call__(self, held: Held, tier: str, load: Load) -> int:
        return held.copy.levels - 1 if load.used_share <= self.full_share else self.level


class Pins:
    """Chunks that must stay until a time.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: dict[ChunkKey, float] = {}
        self.unpins = 0
        """Number of calls of `unpin`: tells those who have put pinned chunks aside when to look again."""

    def __len__(self) -> int:
        return len(self._until_s)

    def __contains__(self, key: object) -> bool:
        # Asked for every victim, and there are hardly ever pins.
        return bool(self._until_s) and self._until_s.get(key, 0.0) > self._clock()  # type: ignore[call-overload]

    def pin(self, keys: Iterable[ChunkKey], ttl_s: float) -> None:
        """Let chunks stay for `ttl_s` seconds from now, or as long as an earlier pin says."""
        until_s = self._clock() + ttl_s
        for key in keys:
            self._until_s[key] = max(until_s, self._until_s.get(key, 0.0))

    def unpin(self, keys: Iterable[ChunkKey]) -> None:
        """Let go of chunks; those that are not pinned are ignored."""
        self.unpins += 1
        for key in keys:
            self._until_s.pop(key, None)

    def until_s(self, key: ChunkKey) -> float:
        """When a chunk's pin ends or ended, as the clock counts; 0 for one that has none."""
        return self._until_s.get(key, 0.0)

    def current(self) -> list[ChunkKey]:
        """Every chunk that is pinned now."""
        now_s = self._clock()
        self._until_s = {key: until_s for key, until_s in self._until_s.items() if until_s > now_s}
        return list(self._until_s)


class Origin(NamedTuple):
    """Where a chunk stands in its prompt: what it would cost to compute it again.

    Args:
        tokens: Tokens of the chunk; 0 for an opaque blob.
        first_position: Position of its first token.
        parent: Key of the chunk before it, where known.
    """

    tokens: int = 0
    first_position: int = 0
    parent: ChunkKey | None = None


@dataclass(frozen=True)
class Policies:
    """What every tier of a stack is given.

    Args:
        placement: How many levels a chunk keeps in a tier.
        history: What was read, and which chunk follows which.
        pins: What must stay.
        learners: Told of every fetch.
    """

    placement: Placement = field(default_factory=StaticPlacement)
    history: History = field(default_factory=History)
    pins: Pins = field(default_factory=Pins)
    learners: list[Callable[[Fetched], None]] = field(default_factory=list)

    def origin(self, key: ChunkKey, frame: Frame) -> Origin:
        """Where a frame's chunk stands in its prompt."""
        header = frame.head.header
        return Origin(header.tokens, header.first_position, self.history.parent(key))
