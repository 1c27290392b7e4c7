"""The stack of four tiers against a dictionary, through pressure, faults, crashes and restarts.

The dictionary remembers of every key which frames might be answered and what must be answered. Whatever happens, a
get never answers anything else than what was put and not deleted since, whole levels of one frame; and what was
acknowledged as `remote` is there whenever S3 can be reached.
"""

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.backend import Ack, Backend, Held, Miss, Outcome, Stored
from kvstore.backends.gpu import GpuBackend
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Pins, Policies
from kvstore.backends.s3 import S3Backend
from kvstore.errors import BackendBusyError, BackendError, BackendUnavailableError, KVStoreError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.testing import FaultyBackend, make_frame, make_key
from kvstore.testing.frames import NAMESPACE
from kvstore.tiers import Scrubber, TieredBackend, WriteBehind
from tests.s3_servers import running_moto

LEVELS = 3
KEYS = [make_key(number) for number in range(5)]
GPU_BYTES, HOST_BYTES, DISK_BYTES = 64 << 10, 24 << 10, 1 << 20
EXAMPLES = int(os.environ.get("KVSTORE_EXAMPLES", "40"))
_MEMORY = "/dev/shm"
PINS_BYTES_MAX = 8 << 10

keys = st.sampled_from(KEYS)
levels = st.integers(0, LEVELS - 1)

T = TypeVar("T")


@dataclass
class Entry:
    """What the model knows of a key.

    Args:
        candidates: Frames that may be answered, by id: what was put and not deleted since.
        levels_max: Most levels that may be answered.
        remote: The frame that S3 must have, with the levels that it must have.
        pinned: Whether nothing may take it away.
    """

    candidates: dict[bytes, Frame] = field(default_factory=dict)
    levels_max: int = 0
    remote: Frame | None = None
    pinned: bool = False


class StackMachine(RuleBasedStateMachine):
    """The stack, the model, and what can happen to both."""

    async def open_remote(self) -> Backend:
        """The tier at the bottom, with what it held when it was closed; empty the first time."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        # In memory, where there is such a place: waiting for a disk finds no mistakes here.
        self.directory = tempfile.TemporaryDirectory(dir=_MEMORY if Path(_MEMORY).is_dir() else None)
        self.path = Path(self.directory.name)
        self.model = {key: Entry() for key in KEYS}
        self.fillers = 0

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(_bounded(work))

    @initialize()
    def start(self) -> None:
        self.run(self._open())

    async def _open(self) -> None:
        self.now_s = 0.0
        policies = Policies(pins=Pins(lambda: self.now_s))
        self.gpu = FaultyBackend(await GpuBackend.open(GPU_BYTES, device="cpu", policies=policies))
        self.host = HostBackend(HOST_BYTES, policies=policies)
        self.disk = FaultyBackend(await LmdbBackend.open(self.path / "lmdb", DISK_BYTES, policies=policies))
        self.remote = FaultyBackend(await self.open_remote())
        tiers: list[Backend] = [
            self.gpu,
            self.host,
            # Batches of one chunk, so that there is something in the queues.
            WriteBehind(self.disk, inner_ack=Ack.DISK, queue_bytes_max=256 << 10, batch_bytes=1, flush_timeout_s=0.2),
            WriteBehind(self.remote, inner_ack=Ack.REMOTE, queue_bytes_max=1 << 20, batch_bytes=1, flush_timeout_s=0.2),
        ]
        self.stack = TieredBackend(tiers, promoted=["gpu"], policies=policies, pins_bytes_max=PINS_BYTES_MAX)

    @rule(key=keys, seed=st.integers(0, 1), held=st.integers(1, LEVELS), ack=st.sampled_from(Ack))
    def put(self, key: ChunkKey, seed: int, held: int, ack: Ack) -> None:
        frame = make_frame(key, seed=seed).truncated(held - 1)
        try:
            [stored] = self.run(self.stack.put([(key, frame)], ack=ack))
        except BackendBusyError:
            return
        entry = self.model[key]
        if stored.outcome in (Outcome.WRITTEN, Outcome.EXTENDED):
            entry.candidates[frame.id] = make_frame(key, seed=seed)
            entry.levels_max = max(entry.levels_max, held)
        if stored.outcome is Outcome.FAILED:
            assert stored.error is not None
            entry.candidates[frame.id] = make_frame(key, seed=seed)
            entry.levels_max = max(entry.levels_max, held)
        if stored.outcome is Outcome.EXISTS:
            assert frame.id in entry.candidates
        if stored.outcome is Outcome.OTHER:
            assert set(entry.candidates) - {frame.id}
        if stored.error is None and stored.outcome is not Outcome.OTHER:
            assert stored.ack is not None
            assert stored.ack >= ack
        if stored.ack is Ack.REMOTE and stored.error is None and stored.outcome is not Outcome.OTHER:
            before = entry.remote
            if before is None or before.id == frame.id:
                entry.remote = frame if before is None or before.levels < held else before

    @rule(key=keys, level=st.none() | levels)
    def get(self, key: ChunkKey, level: int | None) -> None:
        [found] = self.run(self.stack.get([key], level=level))
        self._check(key, level, found)

    @rule(level=st.none() | levels)
    def get_all_at_once(self, level: int | None) -> None:
        async def storm() -> list[list[Frame | Miss]]:
            return await asyncio.gather(*(self.stack.get(KEYS, level=level) for _ in range(3)))

        for found in self.run(storm()):
            for key, answer in zip(KEYS, found, strict=True):
                self._check(key, level, answer)

    @rule()
    def match(self) -> None:
        held, miss = self.run(self.stack.match(KEYS))
        assert (miss is None) == (len(held) == len(KEYS))
        for key, one in zip(KEYS, held, strict=False):
            entry = self.model[key]
            assert one.frame_id in entry.candidates
            assert 1 <= len(one.copy.level_bytes) <= entry.levels_max

    @precondition(lambda self: not self._faulty())
    @rule()
    def get_serves_what_match_says(self) -> None:
        async def both() -> tuple[list[Held], list[Frame | Miss]]:
            for tier in self.stack.tiers[2:]:
                # What is written behind may push others out in between.
                assert isinstance(tier, WriteBehind)
                await tier.flush()
            return (await self.stack.match(KEYS)).held, await self.stack.get(KEYS)

        held, found = self.run(both())
        for one, answer in zip(held, found, strict=False):
            assert isinstance(answer, Frame), answer
            assert (answer.id, answer.levels) == (one.frame_id, len(one.copy.level_bytes))

    @rule(key=keys, level=levels)
    def trim(self, key: ChunkKey, level: int) -> None:
        entry = self.model[key]
        try:
            self.run(self.stack.trim([key], level=level))
        except BackendError:
            assert self._faulty()
            # It may have reached some tiers.
            entry.remote = None if entry.remote is None else entry.remote.truncated(level)
            return
        entry.levels_max = min(entry.levels_max, level + 1)
        entry.remote = None if entry.remote is None else entry.remote.truncated(level)

    @rule(key=keys)
    def delete(self, key: ChunkKey) -> None:
        entry = self.model[key]
        entry.remote, entry.pinned = None, False
        try:
            self.run(self.stack.delete([key]))
        except BackendError:
            assert self._faulty()
            return
        entry.candidates, entry.levels_max = {}, 0

    @rule(key=keys)
    def read_while_it_is_deleted(self, key: ChunkKey) -> None:
        async def both() -> tuple[list[Frame | Miss], BaseException | None]:
            found, deleted = await asyncio.gather(
                self.stack.get([key]), self.stack.delete([key]), return_exceptions=True
            )
            assert not isinstance(found, BaseException)
            return found, deleted

        entry = self.model[key]
        entry.remote, entry.pinned = None, False
        [found], failed = self.run(both())
        self._check(key, None, found)
        if failed is None:
            entry.candidates, entry.levels_max = {}, 0

    @precondition(lambda self: not self._faulty())
    @rule(key=keys, level=levels, scrubbed=st.booleans())
    def read_while_it_is_trimmed(self, key: ChunkKey, level: int, scrubbed: bool) -> None:
        async def all_at_once() -> None:
            reads = [self._scrubber().scrub()] if scrubbed else []
            await asyncio.gather(self.stack.get([key]), self.stack.trim([key], level=level), self._get(key), *reads)

        self.run(all_at_once())
        entry = self.model[key]
        entry.levels_max = min(entry.levels_max, level + 1)
        entry.remote = None if entry.remote is None else entry.remote.truncated(level)

    @precondition(lambda self: not self._faulty())
    @rule(key=keys, reads=st.integers(0, 3))
    def scrub_while_it_is_deleted(self, key: ChunkKey, reads: int) -> None:
        async def all_at_once() -> None:
            later = [self._get(key) for _ in range(reads)]
            await asyncio.gather(self._scrubber().scrub(), self.stack.delete([key]), *later)

        self.run(all_at_once())
        self.model[key] = Entry()

    async def _get(self, key: ChunkKey) -> None:
        """A get that begins a little later."""
        await asyncio.sleep(0)
        await self.stack.get([key])

    @precondition(lambda self: not self._faulty())
    @rule()
    def purge(self) -> None:
        self.run(self.stack.purge(NAMESPACE))
        self.model = {key: Entry() for key in KEYS}

    @rule(key=keys)
    def pin(self, key: ChunkKey) -> None:
        try:
            [pinned] = self.run(self.stack.pin([key], ttl_s=100.0))
        except KVStoreError:
            return
        self.model[key].pinned = pinned

    @rule()
    def let_pins_end(self) -> None:
        self.now_s += 101.0
        for entry in self.model.values():
            entry.pinned = False

    @rule(count=st.integers(1, 12), each_bytes=st.sampled_from([500, 5_000, 20_000]), ack=st.sampled_from(Ack))
    def press(self, count: int, each_bytes: int, ack: Ack) -> None:
        """Fill the tiers with other chunks, so that these are shrunk and evicted."""
        for _ in range(count):
            self.fillers += 1
            key = make_key(1000 + self.fillers, namespace=b"\xf1" * 16)
            frame = make_frame(key, (each_bytes, each_bytes // 2, each_bytes // 2))
            if ack is Ack.REMOTE:
                # S3 has no room to run out of.
                ack = Ack.DISK
            # Where the queue is full nothing has changed, and whoever asked tries again.
            with suppress(BackendBusyError):
                self.run(self.stack.put([(key, frame)], ack=ack))

    @rule(tier=st.sampled_from(["gpu", "lmdb", "s3"]))
    def break_a_tier(self, tier: str) -> None:
        self._tier(tier).error = BackendUnavailableError(tier, "out of order on purpose", retry_after_s=0.0)

    @rule()
    def mend_all_tiers(self) -> None:
        for tier in ("gpu", "lmdb", "s3"):
            self._tier(tier).error = None

    @rule()
    def scrub(self) -> None:
        scrubbed = self.run(self._scrubber().scrub())
        assert scrubbed.damaged == 0
        assert scrubbed.failed == 0 or self._faulty()

    def _scrubber(self) -> Scrubber:
        return Scrubber(
            self.stack.tiers,
            local=["host", "lmdb"],
            durable=["s3"],
            bytes_per_s=1e12,
            history=self.stack.policies.history,
            changes=self.stack.changes,
        )

    @rule()
    def crash_and_restart(self) -> None:
        """All that was not written is lost, as a kill would lose it."""
        for tier in ("gpu", "lmdb", "s3"):
            self._tier(tier).error = BackendUnavailableError(tier, "the process is gone", retry_after_s=0.0)
        self.run(self.stack.aclose())
        for entry in self.model.values():
            entry.pinned = False
        self.run(self._open())

    @invariant()
    def indexes_are_sound(self) -> None:
        if hasattr(self, "host"):
            self.host._index.validate()

    def teardown(self) -> None:
        try:
            if hasattr(self, "stack"):
                self.mend_all_tiers()
                self._check_remote()
        finally:
            if hasattr(self, "stack"):
                self.run(self.stack.aclose())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            self.directory.cleanup()

    def _check_remote(self) -> None:
        """With every tier mended, what S3 acknowledged is there."""
        found = self.run(self.stack.get(KEYS))
        for key, answer in zip(KEYS, found, strict=True):
            self._check(key, None, answer)

    def _check(self, key: ChunkKey, level: int | None, answer: Frame | Miss) -> None:
        entry = self.model[key]
        must = entry.remote if not self._faulty() else None
        if isinstance(answer, Miss):
            assert must is None, (answer, "was acknowledged as remote")
            assert not entry.pinned or self._faulty(), (answer, "is pinned")
            return
        expected = entry.candidates[answer.id].truncated(answer.levels - 1)
        assert b"".join(map(bytes, answer.buffers())) == b"".join(map(bytes, expected.buffers()))
        assert answer.levels <= min(entry.levels_max, LEVELS if level is None else level + 1)
        if must is not None and answer.id == must.id:
            assert answer.levels >= must.truncated(level).levels

    def _faulty(self) -> bool:
        return any(tier.error is not None for tier in (self.gpu, self.disk, self.remote))

    def _tier(self, name: str) -> FaultyBackend:
        return {"gpu": self.gpu, "lmdb": self.disk, "s3": self.remote}[name]


async def _bounded(work: Awaitable[T]) -> T:
    async with asyncio.timeout(60):
        return await work


class RemoteDisk(FaultyBackend):
    """A large disk that answers as S3 does."""

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        stored = await super().put(items, ack=ack)
        return [result._replace(ack=result.ack and Ack.REMOTE) for result in stored]


class OverDiskMachine(StackMachine):
    """With a large disk in the place of S3: fast, so many histories are tried."""

    async def open_remote(self) -> Backend:
        return RemoteDisk(await LmdbBackend.open(self.path / "remote", 64 << 20, name="s3"))


def test_the_stack_is_a_dictionary_whatever_happens() -> None:
    run_state_machine_as_test(OverDiskMachine, settings=_settings(EXAMPLES))


@pytest.mark.long
def test_the_stack_over_s3_is_a_dictionary_whatever_happens() -> None:
    with running_moto() as moto:

        class OverS3Machine(StackMachine):
            """With a server of S3 at the bottom."""

            def __init__(self) -> None:
                super().__init__()
                self.settings = moto.settings()

            async def open_remote(self) -> Backend:
                return await S3Backend.open(self.settings)

        run_state_machine_as_test(OverS3Machine, settings=_settings(EXAMPLES // 10))


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )
