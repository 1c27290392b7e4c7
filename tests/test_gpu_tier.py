"""The gpu tier on a CPU device: the shipped suite, the arithmetic of its slab, and readers beside writers."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.backend import Ack, Backend, Miss, Outcome, Reason
from kvstore.backends.gpu import GpuBackend
from kvstore.backends.gpu_extents import UNIT_BYTES, Extent, Extents, unit_bytes
from kvstore.errors import BackendBusyError, BackendUnavailableError, ConfigError
from kvstore.frame import Frame
from kvstore.metrics import Metrics
from kvstore.resident import Resident
from kvstore.testing import BackendSuite, make_frame, make_key
from kvstore.testing.backend_suite import contents

KEYS = [make_key(number) for number in range(8)]
FRAMES = [make_frame(key, (5000, 3000)) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))
CHANGES = int(os.environ.get("KVSTORE_GPU_CHANGES", "4000"))
"""Random changes in the longer tests; a quarter of them where bytes are copied."""


@asynccontextmanager
async def opened(budget_bytes: int = 1 << 20, metrics: Metrics | None = None) -> AsyncIterator[GpuBackend]:
    backend = await GpuBackend.open(budget_bytes, device="cpu", metrics=metrics)
    try:
        yield backend
        backend.extents.validate()
    finally:
        await backend.aclose()


class TestGpu(BackendSuite):
    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return opened(self.budget_bytes)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 40 * UNIT_BYTES)),
        st.tuples(st.just("keep"), st.integers(0, 63), st.integers(0, 30 * UNIT_BYTES)),
        st.tuples(st.just("hold"), st.integers(0, 63)),
        st.tuples(st.just("let go"), st.integers(0, 63)),
    ),
    max_size=60,
)


class Memory:
    """Extents, and a slab of one byte for each of their units, so that what was written can be compared."""

    def __init__(self, units: int) -> None:
        self.extents = Extents(units * UNIT_BYTES)
        self.slab = bytearray(units)
        self.mine: dict[Extent, int] = {}
        self.held: list[Extent] = []

    def take(self, size_bytes: int) -> bool:
        taken = self.extents.take(size_bytes)
        if taken is None:
            return False
        extent, shifts = taken
        for source, target, moved_bytes in shifts:
            source, target, moved = source // UNIT_BYTES, target // UNIT_BYTES, moved_bytes // UNIT_BYTES
            self.slab[target : target + moved] = self.slab[source : source + moved]
        self.mine[extent] = fill = (max(self.mine.values(), default=0) + 1) % 256
        start, end = extent.start // UNIT_BYTES, (extent.start + extent.size_bytes) // UNIT_BYTES
        self.slab[start:end] = bytes([fill]) * (end - start)
        return True

    def keep(self, extent: Extent, size_bytes: int) -> None:
        self.extents.keep(extent, min(size_bytes, extent.keep_bytes))
        if not extent.keep_bytes:
            del self.mine[extent]

    def validate(self) -> None:
        self.extents.validate()
        assert (
            self.extents.free_bytes + sum(one.size_bytes for one in {*self.mine, *self.held})
            == len(self.slab) * UNIT_BYTES
        )
        for extent, fill in self.mine.items():
            units = self.slab[extent.start // UNIT_BYTES : (extent.start + extent.size_bytes) // UNIT_BYTES]
            assert set(units) == {fill}, "an extent keeps its bytes when it moves"


@given(OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_extents_are_never_lost_never_overlap_and_always_fit_where_nothing_is_held(
    operations: list[tuple[object, ...]],
) -> None:
    memory = Memory(64)
    for operation in operations:
        mine = list(memory.mine)
        match operation:
            case ("take", int(size_bytes)):
                free_bytes, stretch_bytes = memory.extents.free_bytes, memory.extents.stretch_bytes
                wanted_bytes = unit_bytes(size_bytes)
                taken = memory.take(size_bytes)
                assert taken <= (wanted_bytes <= min(free_bytes, stretch_bytes))
                assert taken or memory.held or wanted_bytes > free_bytes, "room that is there is given"
            case ("keep", int(n), int(size_bytes)) if mine:
                memory.keep(mine[n % len(mine)], size_bytes)
            case ("hold", int(n)) if mine:
                memory.held.append(mine[n % len(mine)])
                memory.extents.hold(memory.held[-1])
            case ("let go", int(n)) if memory.held:
                memory.extents.let_go(memory.held.pop(n % len(memory.held)))
        memory.validate()


def test_the_cheapest_of_several_moves_is_made() -> None:
    extents = Extents(16 * UNIT_BYTES)
    sizes = (2, 3, 2, 1, 2, 3, 3)
    taken = [extents.take(units * UNIT_BYTES) for units in sizes]
    parts = [one[0] for one in taken if one is not None]
    for number in (0, 2, 4):
        extents.keep(parts[number], 0)
    # Holes of two units each, three units between the first two and one between the others.
    found = extents.take(4 * UNIT_BYTES)
    assert found is not None
    assert [shift.size_bytes for shift in found[1]] == [UNIT_BYTES]
    assert extents.moved_bytes == UNIT_BYTES
    extents.validate()


def test_extents_that_are_held_neither_move_nor_shrink() -> None:
    extents = Extents(8 * UNIT_BYTES)
    first, held, last = [taken[0] for _ in range(3) if (taken := extents.take(2 * UNIT_BYTES))]
    extents.hold(held)
    extents.keep(first, 0)
    assert extents.stretch_bytes == 4 * UNIT_BYTES
    assert extents.take(3 * UNIT_BYTES) is None
    extents.keep(held, UNIT_BYTES)
    assert (held.start, held.size_bytes, extents.free_bytes) == (2 * UNIT_BYTES, 2 * UNIT_BYTES, 4 * UNIT_BYTES)
    extents.let_go(held)
    assert (held.size_bytes, extents.free_bytes) == (UNIT_BYTES, 5 * UNIT_BYTES)
    assert extents.take(5 * UNIT_BYTES) is not None
    assert extents.free_bytes == 0
    extents.keep(last, 0)
    extents.validate()


def test_frames_of_real_sizes_always_fit_and_seldom_move() -> None:
    """Levels of 10 KiB to 32 MiB come, shrink and go in a slab of 4 GiB: arithmetic alone, no memory."""
    rng = random.Random(0)
    extents = Extents(4 << 30)
    budget_bytes = extents.size_bytes * 31 // 32
    live: list[Extent] = []
    used_bytes = written_bytes = 0

    def lose(extent: Extent, keep_bytes: int = 0) -> None:
        nonlocal used_bytes
        used_bytes -= extent.size_bytes
        extents.keep(extent, keep_bytes)
        used_bytes += extent.size_bytes

    for _ in range(CHANGES):
        match rng.random():
            case chance if chance < 0.7 or not live:
                size_bytes = unit_bytes(int(10_240 * 3277 ** rng.random()))
                while used_bytes + size_bytes > budget_bytes:
                    lose(live.pop(rng.randrange(len(live))))
                taken = extents.take(size_bytes)
                assert taken is not None
                live.append(taken[0])
                used_bytes += size_bytes
                written_bytes += size_bytes
            case chance if chance < 0.85:
                extent = rng.choice(live)
                lose(extent, max(1, extent.size_bytes * rng.randint(1, 3) // 4))
            case _:
                lose(live.pop(rng.randrange(len(live))))
    extents.validate()
    assert extents.moved_bytes < 3 * written_bytes


async def test_whatever_fits_the_budget_is_placed_after_many_random_changes() -> None:
    budget_bytes, rng = 1 << 20, random.Random(0)
    keys = [make_key(number) for number in range(400)]
    levels = [(rng.randint(100, 40_000), rng.randint(100, 20_000), rng.randint(100, 20_000)) for _ in keys]
    frames = [make_frame(key, sizes) for key, sizes in zip(keys, levels, strict=True)]
    metrics = Metrics()
    async with opened(budget_bytes, metrics) as backend:
        for _ in range(CHANGES // 4):
            n = rng.randrange(len(keys))
            match rng.random():
                case chance if chance < 0.7:
                    [stored] = await backend.put([(keys[n], frames[n])])
                    assert stored.error is None
                    assert isinstance((await backend.get([keys[n]], level=0))[0], Frame)
                case chance if chance < 0.85:
                    await backend.trim([keys[n]], level=rng.randint(0, 1))
                case _:
                    await backend.delete([keys[n]])
            backend.extents.validate()
        used_bytes = metrics.registry.get_sample_value("kvstore_tier_bytes", {"tier": "gpu"})
        assert used_bytes is not None
        assert budget_bytes / 2 < used_bytes <= budget_bytes
        held = [key async for key, _ in backend.scan()]
        assert {contents(one) for one in await backend.get(held)} <= {
            contents(frame.truncated(level)) for frame in frames for level in range(3)
        }
        large = make_frame(KEYS[0], (budget_bytes * 31 // 32 - 8192,))
        assert (await backend.put([(KEYS[0], large)]))[0].outcome is Outcome.WRITTEN
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(large)


async def test_readers_beside_writers_see_whole_frames() -> None:
    """Every copy waits its turn in a thread, while frames are put, moved, trimmed and deleted around it."""
    rng = random.Random(1)
    keys = [make_key(number) for number in range(60)]
    frames = {key: make_frame(key, (rng.randint(1000, 60_000), rng.randint(1000, 60_000))) for key in keys}
    metrics = Metrics()
    async with opened(1 << 20, metrics) as backend:

        async def change() -> None:
            for _ in range(150):
                key = rng.choice(keys)
                await backend.put([(key, frames[key])])
                await backend.trim([rng.choice(keys)], level=0)
                await backend.delete([rng.choice(keys)])

        async def read() -> int:
            whole = 0
            for _ in range(150):
                wanted = rng.sample(keys, 4)
                for key, found in zip(wanted, await backend.get(wanted), strict=True):
                    if isinstance(found, Frame):
                        assert contents(found) == contents(frames[key].truncated(found.levels - 1))
                        whole += 1
            return whole

        counts = await asyncio.gather(read(), change(), read(), change())
        assert all(count for count in counts if count is not None)
        assert metrics.registry.get_sample_value("kvstore_corrupt_total", {"tier": "gpu"}) in (None, 0.0)


async def test_a_put_whose_caller_is_cancelled_is_whole_all_the_same() -> None:
    async with opened() as backend:
        putting = asyncio.create_task(backend.put(ITEMS))
        await asyncio.sleep(0)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        assert [contents(one) for one in await backend.get(KEYS)] == [contents(frame) for frame in FRAMES]


def bytes_of(lent: Resident | Miss) -> bytes:
    assert isinstance(lent, Resident)
    return bytes(lent.payload.cpu().tolist())


def payload_of(frame: Frame) -> bytes:
    return b"".join(map(bytes, frame.payload))


async def test_leases_lend_the_payloads_asked_for() -> None:
    async with opened() as backend:
        await backend.put(ITEMS[:2])
        async with backend.lease([KEYS[1], KEYS[5], KEYS[0]], level=0) as found:
            assert found[1] == Miss(Reason.ABSENT)
            assert bytes_of(found[0]) == payload_of(FRAMES[1].truncated(0))
            assert bytes_of(found[2]) == payload_of(FRAMES[0].truncated(0))
        async with backend.lease(KEYS[:1]) as [whole]:
            assert isinstance(whole, Resident)
            assert (whole.key, whole.levels, whole.size_bytes) == (KEYS[0], 2, FRAMES[0].size_bytes)
            assert bytes_of(whole) == payload_of(FRAMES[0])
            assert bytes_of(whole.truncated(0)) == payload_of(FRAMES[0].truncated(0))
            assert whole.truncated(None) is whole


async def test_frames_move_together_around_what_is_on_lease() -> None:
    slab, each = 2048 * UNIT_BYTES, 60 * UNIT_BYTES
    keys = [make_key(number) for number in range(100, 128)]
    frames = [make_frame(key, (each // 2, each // 2 - 100)) for key in keys]
    filler = make_frame(KEYS[0], (slab - len(keys) * each,))
    wide = make_frame(KEYS[1], (4 * each,))
    async with opened(slab) as backend:
        await backend.put(list(zip(keys, frames, strict=True)))
        await backend.delete(keys[:20:2])
        await backend.put([(KEYS[0], filler)])
        assert backend.extents.free_bytes == 10 * each
        async with backend.lease([keys[9], keys[11]]) as lent:
            await backend.trim([keys[9]], level=0)
            await backend.delete([keys[11]])
            assert backend.extents.free_bytes == 10 * each, "what is on lease is not given away"
            assert (await backend.put([(KEYS[1], wide)]))[0].outcome is Outcome.WRITTEN
            assert backend.extents.moved_bytes == 3 * each, "four holes and what lies between them"
            assert [bytes_of(one) for one in lent] == [payload_of(frames[9]), payload_of(frames[11])]
        assert backend.extents.free_bytes == 7 * each + each // 2, "it is once the lease ends"
        kept = {key: frame for key, frame in zip(keys, frames, strict=True) if key not in {*keys[:20:2], keys[11]}}
        kept |= {keys[9]: frames[9].truncated(0), KEYS[0]: filler, KEYS[1]: wide}
        assert [contents(one) for one in await backend.get(list(kept))] == list(map(contents, kept.values()))


async def test_no_room_between_leases_is_said_and_passes_with_them() -> None:
    async with opened(64 << 10) as backend:
        small, large = make_frame(KEYS[0], (20 << 10,)), make_frame(KEYS[1], (50 << 10,))
        await backend.put([(KEYS[0], small)])
        async with backend.lease(KEYS[:1]):
            [stored] = await backend.put([(KEYS[1], large)])
            assert stored.outcome is Outcome.FAILED
            assert isinstance(stored.error, BackendBusyError)
            assert [key async for key, _ in backend.scan()] == [KEYS[0]], "and nothing was evicted for it"
        assert (await backend.put([(KEYS[1], large)]))[0].outcome is Outcome.WRITTEN
        assert contents((await backend.get(KEYS[1:2]))[0]) == contents(large)


async def test_damage_is_a_counted_miss_once_and_then_the_chunk_is_gone() -> None:
    metrics = Metrics()
    async with opened(metrics=metrics) as backend:
        await backend.put(ITEMS)
        async with backend.lease(KEYS[:1]) as [lent]:
            assert isinstance(lent, Resident)
            lent.payload[-20] ^= 1
        assert isinstance((await backend.get(KEYS[:1], level=0))[0], Frame), "level 0 is sound"
        assert (await backend.get(KEYS[:2]))[0] == Miss(Reason.CORRUPT)
        assert await backend.match(KEYS[:1]) == ([], Miss(Reason.CORRUPT))
        assert metrics.registry.get_sample_value("kvstore_corrupt_total", {"tier": "gpu"}) == 1
        assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.WRITTEN
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])


async def test_a_frame_under_the_key_of_another_is_damage() -> None:
    async with opened() as backend:
        await backend.put([(KEYS[0], FRAMES[1])])
        assert await backend.get(KEYS[:1]) == [Miss(Reason.CORRUPT)]


async def test_puts_answer_what_memory_is_good_for_and_nothing_once_it_is_closed() -> None:
    async with opened() as backend:
        assert [stored.ack for stored in await backend.put(ITEMS[:2], ack=Ack.DISK)] == [Ack.MEMORY] * 2
        async with backend.lease(KEYS[:1]) as [lent]:
            await backend.aclose()
            assert bytes_of(lent) == payload_of(FRAMES[0]), "memory on lease outlives the tier"
        assert await backend.get(KEYS[:1]) == [Miss(Reason.ABSENT)]
        with pytest.raises(BackendUnavailableError, match="is closed"):
            await backend.put(ITEMS)


async def test_a_copy_that_fails_takes_the_frame_away_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened() as backend:
        await backend.put(ITEMS[:1])

        def fail(*_: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        with monkeypatch.context() as patch:
            patch.setattr("kvstore.backends.gpu_slab.Slab.write", fail)
            async with asyncio.TaskGroup() as group:
                putting = group.create_task(backend.put([(KEYS[1], make_frame(KEYS[1], seed=17))]))
                getting = group.create_task(backend.get(KEYS[1:2]))
        [stored] = putting.result()
        assert (stored.outcome, stored.ack) == (Outcome.FAILED, None)
        assert isinstance(stored.error, BackendUnavailableError)
        assert isinstance(getting.result()[0], Miss)
        assert (backend.state.up, "illegal memory access" in backend.state.detail) == (False, True)
        held, _ = await backend.match(KEYS[:2])
        assert len(held) == 1
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])


@pytest.mark.parametrize(
    ("budget_bytes", "device", "message"),
    [
        (1 << 20, "nowhere", "'nowhere'"),
        (1 << 20, "cuda:99", "'cuda:99'"),
        (1 << 60, "cpu", f"{1 << 60} bytes on the device 'cpu'"),
        (UNIT_BYTES - 1, "cpu", "at least 1024 bytes"),
        (-1, "cpu", "at least 1024 bytes"),
    ],
)
async def test_a_device_or_memory_that_is_not_there_is_said(budget_bytes: int, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await GpuBackend.open(budget_bytes, device=device)


def test_the_module_loads_without_torch_and_opening_says_what_to_install() -> None:
    code = """
import asyncio, importlib, sys
sys.modules["torch"] = None
backend = importlib.import_module("kvstore.backends.gpu").GpuBackend
try:
    asyncio.run(backend.open(1 << 20))
except Exception as exc:
    print(type(exc).__name__, exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ConfigError the gpu tier needs torch: pip install 'kvstore[gpu]'"
