"""Compressed frames in the memory of a device under a byte budget, to be read back or decoded where they lie.

Payloads lie in one slab that is allocated once; heads stay in host memory. What is held, and where, is decided on the
event loop without waiting; the copies that follow from it run in one thread in the same order (`gpu_slab`). So a
reader gets what was held when it asked, whatever is evicted, moved or deleted meanwhile. Only those who read the slab
itself hold extents in place, by `lease`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kvstore.backend import Ack, Copy, Held, Match, Miss, Outcome, Reason, State, Stored, check_copy, put_outcome
from kvstore.backends.gpu_extents import UNIT_BYTES, Extent, Extents, Shift, unit_bytes
from kvstore.backends.index import Index, Move, held_from, shortened
from kvstore.backends.policies import Policies
from kvstore.errors import BackendBusyError, BackendError, BackendUnavailableError, ConfigError, FrameError
from kvstore.frame import Frame, Head
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.resident import Resident

if TYPE_CHECKING:
    from kvstore.backends.gpu_slab import Slab

_CHECKERS = 2
# With a thirty-second of the slab free, twice the bytes that are written are moved; with none, seventy times as many.
_SPARE_PARTS = 32

T = TypeVar("T")


@dataclass(eq=False)
class _Placed:
    """A frame in the slab.

    Args:
        head: Its head.
        levels: Number of levels that are held.
        extent: Where they lie, one behind the other.
        host_bytes: What the head takes in host memory.
        failed: Set where copying it into the slab failed.
    """

    head: Head
    levels: int
    extent: Extent
    host_bytes: int
    failed: bool = False

    def level_bytes(self, level: int | None = None) -> tuple[int, ...]:
        """Bytes of every level up to this one that is held."""
        return self.head.level_bytes[: self.levels if level is None else min(self.levels, level + 1)]


class GpuBackend:
    """Frames on a device. Create it with `open`.

    Counted against the budget are whole units of the slab and, beside them, the heads in host memory as
    `Frame.memory_bytes` counts them. Memory on the device never grows beyond the slab.

    Attributes:
        extents: What of the slab is in use.
        state: Down once a copy has failed.
    """

    def __init__(self, slab: "Slab", index: Index, metrics: Metrics, policies: Policies) -> None:
        self.name = index.tier
        self.extents = Extents(slab.size_bytes)
        self.state = State(True)
        self._slab = slab
        self._index = index
        self._metrics = metrics
        self._policies = policies
        self._placed: dict[ChunkKey, _Placed] = {}
        self._checkers = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="kvstore-gpu-check")
        self._closed = False
        metrics.budget_bytes.labels(self.name).set(index.budget_bytes)
        self._gauge()

    @classmethod
    async def open(
        cls,
        budget_bytes: int,
        *,
        device: str = "cuda",
        metrics: Metrics | None = None,
        policies: Policies | None = None,
        name: str = "gpu",
    ) -> "GpuBackend":
        """Allocate the slab.

        Args:
            budget_bytes: Bytes on the device, rounded down to whole units. Frames may take 31 of 32 of them; the rest
                stays free, because moving frames together in a slab that is full to the last byte costs a lot.
            device: As torch calls it; tests use `cpu`.
            metrics: Where to count; its own by default.
            policies: What the tiers of the stack share; its own by default.
            name: Name of the tier.

        Raises:
            ConfigError: torch or the device is missing, or has not so much memory.
        """
        budget_bytes -= budget_bytes % UNIT_BYTES
        if budget_bytes <= 0:
            raise ConfigError(f"the gpu tier needs a budget of at least {UNIT_BYTES} bytes")
        slab = await asyncio.to_thread(_open_slab, budget_bytes, device)
        policies = policies or Policies()
        index = Index(name, budget_bytes - budget_bytes // _SPARE_PARTS, measure=_slab_bytes, policies=policies)
        return cls(slab, index, metrics or Metrics(), policies)

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        return self._index.match(keys)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        return list(await asyncio.gather(*(self._get(key, level) for key in keys)))

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        if self._closed:
            raise BackendUnavailableError(self.name, "is closed")
        begun = [(key, *self._put(key, frame)) for key, frame in items]
        self._gauge()
        return [
            stored if copying is None else await self._copied(key, stored, copying) for key, stored, copying in begun
        ]

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        for key in keys:
            held = self._index.get(key)
            if held is not None and len(held.copy.level_bytes) > level + 1:
                after = shortened(held, level + 1)
                placed = self._shorten(key, after)
                size_bytes = placed.host_bytes + _slab_bytes(after.copy)
                self._index.add(key, after, size_bytes, self._index.origin(key))
        self._gauge()

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self._drop(key, Reason.ABSENT)
        self._gauge()

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        for key, held in self._index.scan(namespace):
            yield key, held

    @asynccontextmanager
    async def lease(
        self, keys: Sequence[ChunkKey], *, level: int | None = None
    ) -> AsyncIterator[list[Resident | Miss]]:
        """Frames where they lie, for kernels that decode them in place; they stay there until the context ends.

        What reads them must have been given to the device's current stream by then, or be finished. Checksums are not
        compared: the device has no kernel for them, and what was put was verified. While a lease is open, room that
        its frames take is not given to others, also after they were evicted or deleted.

        Args:
            keys: Which chunks.
            level: Levels 0 to this one at most; all that are held by default.

        Yields:
            A frame on the device or a miss for each key.
        """
        found = [self._placed.get(key) or self._index.miss(key) for key in keys]
        held = [one for one in found if isinstance(one, _Placed)]
        for placed in held:
            self.extents.hold(placed.extent)
        try:
            if held:
                # What is still being copied or moved is in its place once all that was asked for before is done.
                await self._copy(lambda: None)
            for key, one in zip(keys, found, strict=True):
                if isinstance(one, _Placed):
                    self._index.read(key)
            yield [self._lent(one, level) if isinstance(one, _Placed) else one for one in found]
        finally:
            if held and not self._closed:
                self._slab.fence()
            for placed in held:
                self.extents.let_go(placed.extent)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._placed.clear()
        self._index = Index(self.name, self._index.budget_bytes, measure=_slab_bytes, policies=self._policies)
        await asyncio.to_thread(self._slab.close)
        await asyncio.to_thread(self._checkers.shutdown)

    async def _get(self, key: ChunkKey, level: int | None) -> Frame | Miss:
        if (placed := self._placed.get(key)) is None:
            return self._index.miss(key)
        start, sizes_bytes = placed.extent.start, placed.level_bytes(level)
        payload = await self._copy(lambda: self._slab.read(start, sizes_bytes))
        frame = Frame(placed.head, payload)
        if await self._run(self._checkers, lambda: _is_sound(key, frame)):
            self._index.read(key)
            return frame
        if self._placed.get(key) is not placed:
            # It was replaced, deleted or evicted meanwhile, so nobody needs to hear of the damage.
            return await self._get(key, level)
        self._drop(key, Reason.CORRUPT)
        self._metrics.corrupt.labels(self.name).inc()
        self._gauge()
        return Miss(Reason.CORRUPT)

    def _put(self, key: ChunkKey, frame: Frame) -> "tuple[Stored, Future[None] | None]":
        """What becomes of a put, and the copying that it takes."""
        held = self._index.get(key)
        outcome = put_outcome(held, frame)
        if outcome not in (Outcome.WRITTEN, Outcome.EXTENDED):
            return Stored(outcome, Ack.MEMORY), None
        coming = held_from(self.name, frame)
        size_bytes = _host_bytes(frame) + _slab_bytes(coming.copy)
        placed = frame.truncated(self._index.placed(key, coming, size_bytes) - 1)
        if outcome is Outcome.EXTENDED and placed.levels <= len(held.copy.level_bytes if held else ()):
            # There is no room for what it would add.
            return Stored(outcome, Ack.MEMORY), None
        try:
            return Stored(outcome, Ack.MEMORY), self._place(key, placed)
        except BackendError as exc:
            return Stored(Outcome.FAILED, None, exc), None

    def _place(self, key: ChunkKey, frame: Frame) -> "Future[None]":
        """Make room for a frame, in place of whatever is held under its key, and begin to copy it there.

        Raises:
            BackendFullError: It does not fit into the budget.
            BackendBusyError: The room between frames on lease is too small.
        """
        held = held_from(self.name, frame)
        slab_bytes, host_bytes = _slab_bytes(held.copy), _host_bytes(frame)
        if self.extents.stretch_bytes < slab_bytes <= self._index.budget_bytes:
            raise BackendBusyError(self.name, f"no {slab_bytes} bytes in one piece while frames are on lease")
        moves = self._index.make_room({key: slab_bytes + host_bytes})
        for move in moves:
            self._make(move)
        if (before := self._placed.pop(key, None)) is not None:
            self.extents.keep(before.extent, 0)
        extent, shifts = self._take(key, slab_bytes)
        self._index.add(key, held, slab_bytes + host_bytes, self._policies.origin(key, frame))
        placed = self._placed[key] = _Placed(frame.head, frame.levels, extent, host_bytes)
        start = extent.start

        def copy() -> None:
            try:
                self._slab.shift(shifts)
                self._slab.write(start, frame.payload)
            except RuntimeError:
                placed.failed = True
                raise

        return self._slab.submit(copy)

    def _take(self, key: ChunkKey, slab_bytes: int) -> tuple[Extent, list[Shift]]:
        """Room in the slab for a chunk that the index has made room for.

        Without leases it is always there. With them, chunks that were evicted may still take some, so others go too.
        """
        while (taken := self.extents.take(slab_bytes)) is None:
            moves = self._index.release(slab_bytes, keep={key})
            assert moves, "a stretch without leases is free once everything that lies in it was evicted"
            for move in moves:
                self._make(move)
        return taken

    def _make(self, move: Move) -> None:
        if move.after is None:
            self.extents.keep(self._placed.pop(move.key).extent, 0)
            self._metrics.evictions.labels(self.name).inc()
        else:
            self._shorten(move.key, move.after)
            self._metrics.shrinks.labels(self.name).inc()

    def _shorten(self, key: ChunkKey, after: Held) -> _Placed:
        """Give back what upper levels take in the slab."""
        placed = self._placed[key]
        placed.levels = len(after.copy.level_bytes)
        self.extents.keep(placed.extent, sum(after.copy.level_bytes))
        return placed

    def _drop(self, key: ChunkKey, reason: Reason) -> None:
        if (placed := self._placed.pop(key, None)) is not None:
            self.extents.keep(placed.extent, 0)
        self._index.drop(key, reason)

    def _lent(self, placed: _Placed, level: int | None) -> Resident | Miss:
        if placed.failed:
            return Miss(Reason.CORRUPT)
        return Resident(placed.head, self._slab.view(placed.extent.start, sum(placed.level_bytes(level))))

    async def _copied(self, key: ChunkKey, stored: Stored, copying: "Future[None]") -> Stored:
        """What a put amounts to once its frame was copied."""
        try:
            # A caller that is cancelled leaves the copying alone: the frame is held already.
            await asyncio.shield(asyncio.wrap_future(copying))
        except RuntimeError as exc:
            if (placed := self._placed.get(key)) is not None and placed.failed:
                self._drop(key, Reason.ABSENT)
                self._gauge()
            return Stored(Outcome.FAILED, None, self._failed(exc))
        return stored

    async def _copy(self, copying: Callable[[], T]) -> T:
        try:
            return await asyncio.wrap_future(self._slab.submit(copying))
        except RuntimeError as exc:
            raise self._failed(exc) from exc

    def _failed(self, error: RuntimeError) -> BackendUnavailableError:
        """Say that the device is out of order; a CUDA context does not recover from that."""
        if self._closed:
            return BackendUnavailableError(self.name, "is closed")
        self.state = State(False, f"copying failed: {error}")
        return BackendUnavailableError(self.name, self.state.detail)

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        except RuntimeError as exc:
            raise BackendUnavailableError(self.name, "is closed") from exc

    def _gauge(self) -> None:
        self._metrics.chunks.labels(self.name).set(len(self._index))
        self._metrics.used_bytes.labels(self.name).set(self._index.used_bytes)


def _open_slab(size_bytes: int, device: str) -> "Slab":
    try:
        from kvstore.backends.gpu_slab import Slab
    except ImportError as exc:
        raise ConfigError("the gpu tier needs torch: pip install 'kvstore[gpu]'") from exc
    return Slab(size_bytes, device)


def _slab_bytes(copy: Copy) -> int:
    """Bytes that a copy takes in the slab."""
    return unit_bytes(sum(copy.level_bytes))


def _host_bytes(frame: Frame) -> int:
    """Bytes that a frame takes in host memory while its payload is elsewhere."""
    return frame.memory_bytes - sum(map(len, frame.payload))


def _is_sound(key: ChunkKey, frame: Frame) -> bool:
    try:
        check_copy(key, frame)
    except FrameError:
        return False
    return True
