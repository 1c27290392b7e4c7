"""Frames in host memory under a byte budget; a process that ends takes them along."""

from collections.abc import AsyncIterator, Sequence

from kvstore.backend import Ack, Held, Match, Miss, Outcome, Reason, Stored, check_copy, put_outcome
from kvstore.backends.index import Index, Move, held_from
from kvstore.backends.policies import Policies
from kvstore.errors import BackendFullError, FrameError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics


class HostBackend:
    """A dictionary of frames with an index that keeps it within its budget.

    No method awaits anything, so each is atomic on its event loop. Readers keep the buffers of what they got alive,
    whatever is deleted meanwhile.

    Args:
        budget_bytes: Bytes that frames may take, as `Frame.memory_bytes` counts them.
        metrics: Where to count; its own by default.
        policies: What the tiers of the stack share; its own by default.
        name: Name of the tier.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        metrics: Metrics | None = None,
        policies: Policies | None = None,
        name: str = "host",
    ) -> None:
        self.name = name
        self._metrics = metrics or Metrics()
        self._policies = policies or Policies()
        self._index = Index(name, budget_bytes, policies=self._policies)
        self._frames: dict[ChunkKey, Frame] = {}
        self._metrics.budget_bytes.labels(name).set(budget_bytes)

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        return self._index.match(keys)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        return [self._get(key, level) for key in keys]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        stored = [self._put(key, frame) for key, frame in items]
        self._gauge()
        return stored

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        for key in keys:
            if (frame := self._frames.get(key)) is not None and frame.levels > level + 1:
                self._keep(key, frame.truncated(level))
        self._gauge()

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self._frames.pop(key, None)
            self._index.drop(key, Reason.ABSENT)
        self._gauge()

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        for key, held in self._index.scan(namespace):
            yield key, held

    async def aclose(self) -> None:
        self._frames.clear()
        self._index = Index(self.name, self._index.budget_bytes, policies=self._policies)

    def _get(self, key: ChunkKey, level: int | None) -> Frame | Miss:
        if (frame := self._frames.get(key)) is None:
            return self._index.miss(key)
        frame = frame.truncated(level)
        try:
            check_copy(key, frame)
        except FrameError:
            del self._frames[key]
            self._index.drop(key, Reason.CORRUPT)
            self._metrics.corrupt.labels(self.name).inc()
            return Miss(Reason.CORRUPT)
        self._index.read(key)
        return frame

    def _put(self, key: ChunkKey, frame: Frame) -> Stored:
        held = self._index.get(key)
        outcome = put_outcome(held, frame)
        if outcome in (Outcome.WRITTEN, Outcome.EXTENDED):
            placed = frame.truncated(self._index.placed(key, held_from(self.name, frame), frame.memory_bytes) - 1)
            if outcome is Outcome.EXTENDED and placed.levels <= len(held.copy.level_bytes if held else ()):
                # There is no room for what it would add.
                return Stored(outcome, Ack.MEMORY)
            frame = placed
        else:
            return Stored(outcome, Ack.MEMORY)
        try:
            self._keep(key, frame)
        except BackendFullError as exc:
            return Stored(Outcome.FAILED, None, exc)
        return Stored(outcome, Ack.MEMORY)

    def _keep(self, key: ChunkKey, frame: Frame) -> None:
        """Hold a frame in place of whatever is held under its key."""
        size_bytes = frame.memory_bytes
        for move in self._index.make_room({key: size_bytes}):
            self._make(move)
        self._index.add(key, held_from(self.name, frame), size_bytes, self._policies.origin(key, frame))
        self._frames[key] = frame

    def _make(self, move: Move) -> None:
        if move.after is None:
            del self._frames[move.key]
            self._metrics.evictions.labels(self.name).inc()
        else:
            self._frames[move.key] = self._frames[move.key].truncated(len(move.after.copy.level_bytes) - 1)
            self._metrics.shrinks.labels(self.name).inc()

    def _gauge(self) -> None:
        self._metrics.chunks.labels(self.name).set(len(self._index))
        self._metrics.used_bytes.labels(self.name).set(self._index.used_bytes)
