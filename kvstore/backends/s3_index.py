"""What a bucket is known to hold: pure state without a budget, in memory, on the event loop."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.backend import Held, Match, Miss, Reason
from kvstore.backends.index import copy_bytes
from kvstore.keys import NAMESPACE_BYTES, ChunkKey

_GHOSTS_MAX = 1 << 16


class S3Index:
    """Chunks that are known to be in the bucket, and why some others no longer are.

    Attributes:
        used_bytes: Bytes of all objects that are known.
    """

    def __init__(self) -> None:
        self.used_bytes = 0
        self._held: dict[ChunkKey, Held] = {}
        self._ghosts: OrderedDict[ChunkKey, Reason] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._held

    def get(self, key: ChunkKey) -> Held | None:
        """What is held of a chunk."""
        return self._held.get(key)

    def match(self, keys: Sequence[ChunkKey]) -> Match:
        """The longest leading run of `keys` that is held."""
        try:
            # All present is the common case, and then no Python code runs for each key.
            return Match(list(map(self._held.__getitem__, keys)), None)
        except KeyError:
            run = next(position for position, key in enumerate(keys) if key not in self._held)
            return Match([self._held[key] for key in keys[:run]], self.miss(keys[run]))

    def miss(self, key: ChunkKey) -> Miss:
        """Why a chunk is not held."""
        return Miss(self._ghosts.get(key, Reason.ABSENT))

    def add(self, key: ChunkKey, held: Held) -> None:
        """Note that a chunk is held, or held with more or fewer levels than before."""
        self.used_bytes += _size_bytes(held) - _size_bytes(self._held.get(key))
        self._held[key] = held
        self._ghosts.pop(key, None)

    def drop(self, key: ChunkKey, reason: Reason) -> None:
        """Note that a chunk is gone, and why."""
        self.used_bytes -= _size_bytes(self._held.pop(key, None))
        self._ghosts.pop(key, None)
        if reason is not Reason.ABSENT:
            self._ghosts[key] = reason
            if len(self._ghosts) > _GHOSTS_MAX:
                self._ghosts.popitem(last=False)

    def scan(self, namespace: bytes | None) -> Iterator[tuple[ChunkKey, Held]]:
        """A snapshot of what is held (in one namespace)."""
        for key, held in list(self._held.items()):
            if namespace is None or key[:NAMESPACE_BYTES] == namespace:
                yield key, held


def _size_bytes(held: Held | None) -> int:
    return 0 if held is None else copy_bytes(held.copy)
