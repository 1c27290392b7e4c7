"""The stack: promotion, levels from different tiers, deletes that stay deleted, writes behind the answer."""

import asyncio
from pathlib import Path

import pytest

from kvstore.backend import Ack, Miss, Outcome, Reason
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.client import Client
from kvstore.errors import BackendError, BackendFullError, BackendUnavailableError
from kvstore.frame import Frame
from kvstore.metrics import Metrics
from kvstore.testing import FaultyBackend, make_frame, make_key
from kvstore.tiers import TieredBackend, WriteBehind

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))


def two_tiers() -> tuple[HostBackend, FaultyBackend, TieredBackend, Metrics]:
    metrics = Metrics()
    upper, lower = HostBackend(1 << 20), FaultyBackend(HostBackend(1 << 20, name="lower"))
    return upper, lower, TieredBackend([upper, lower], metrics=metrics), metrics


async def test_what_a_lower_tier_serves_is_promoted() -> None:
    upper, lower, stack, metrics = two_tiers()
    await lower.put(ITEMS)
    assert all(isinstance(frame, Frame) for frame in await stack.get(KEYS))
    assert len((await upper.match(KEYS)).held) == len(KEYS)
    lower.calls.clear()
    await stack.get(KEYS)
    assert lower.calls == []
    hits = [metrics.registry.get_sample_value("kvstore_hits_total", {"tier": tier}) for tier in ("host", "lower")]
    assert hits == [6, 6]


async def test_only_what_the_upper_tier_lacks_is_read_below() -> None:
    upper, lower, stack, _ = two_tiers()
    await upper.put(ITEMS[:3])
    await lower.put(ITEMS)
    match = await stack.match(KEYS)
    assert [held.copy.tier for held in match.held] == ["host"] * 3 + ["lower"] * 3
    found = await stack.get(KEYS)
    assert [frame.id for frame in found if isinstance(frame, Frame)] == [frame.id for frame in FRAMES]


async def test_match_goes_on_where_another_tier_has_the_next_chunk() -> None:
    upper, lower, stack, _ = two_tiers()
    await upper.put([ITEMS[0], ITEMS[2], ITEMS[3]])
    await lower.put([ITEMS[1], ITEMS[4]])
    match = await stack.match(KEYS)
    assert ([held.copy.tier for held in match.held], match.miss) == (
        ["host", "lower", "host", "host", "lower"],
        Miss(Reason.ABSENT),
    )


async def test_missing_levels_come_from_the_tier_that_has_them() -> None:
    upper, lower, stack, _ = two_tiers()
    await upper.put([(key, frame.truncated(0)) for key, frame in ITEMS])
    await lower.put(ITEMS)
    assert [len(held.copy.level_bytes) for held in (await stack.match(KEYS)).held] == [3] * 6
    lower.calls.clear()
    await stack.get(KEYS, level=0)
    assert lower.calls == []
    assert [frame.levels for frame in await stack.get(KEYS) if isinstance(frame, Frame)] == [3] * 6
    assert [len(held.copy.level_bytes) for held in (await upper.match(KEYS)).held] == [3] * 6


async def test_levels_of_different_frames_are_not_joined_across_tiers() -> None:
    upper, lower, stack, _ = two_tiers()
    other = make_frame(KEYS[0], seed=1)
    await upper.put([(KEYS[0], FRAMES[0].truncated(0))])
    await lower.put([(KEYS[0], other)])
    [found] = await stack.get(KEYS[:1])
    assert isinstance(found, Frame)
    assert (found.id, found.levels) == (FRAMES[0].id, 1)


async def test_one_frame_is_kept_across_tiers() -> None:
    upper, lower, stack, _ = two_tiers()
    await lower.put(ITEMS[:1])
    [stored] = await stack.put([(KEYS[0], make_frame(KEYS[0], seed=1))])
    assert stored.outcome is Outcome.OTHER
    assert (await upper.match(KEYS[:1])).held == []


async def test_a_get_that_began_before_a_delete_does_not_bring_the_chunk_back() -> None:
    upper, lower, stack, _ = two_tiers()
    await lower.put(ITEMS[:1])
    lower.gate.clear()
    reading = asyncio.create_task(stack.get(KEYS[:1]))
    while "get" not in lower.calls:
        await asyncio.sleep(0)
    deleting = asyncio.create_task(stack.delete(KEYS[:1]))
    await asyncio.sleep(0)
    lower.gate.set()
    await asyncio.gather(reading, deleting)
    assert (await upper.match(KEYS[:1])).held == []
    assert await stack.get(KEYS[:1]) == [Miss(Reason.ABSENT)]


async def test_a_failing_tier_is_a_miss_for_what_only_it_has() -> None:
    upper, lower, stack, _ = two_tiers()
    await upper.put(ITEMS[:1])
    await lower.put(ITEMS[:2])
    lower.error = BackendError("lower", "broken on purpose")
    found = await stack.get(KEYS[:2])
    assert isinstance(found[0], Frame)
    assert found[1] == Miss(Reason.BREAKER)


async def test_a_full_tier_is_told_and_the_others_still_hold_the_chunk() -> None:
    _, lower, stack, _ = two_tiers()
    lower.error = BackendFullError("lower", "full on purpose")
    [stored] = await stack.put(ITEMS[:1], ack=Ack.DISK)
    assert (stored.outcome, stored.ack) == (Outcome.WRITTEN, Ack.MEMORY)
    assert isinstance(stored.error, BackendFullError)
    [relaxed] = await stack.put(ITEMS[1:2], ack=Ack.MEMORY)
    assert relaxed.error is None
    assert all(isinstance(frame, Frame) for frame in await stack.get(KEYS[:2]))


async def test_a_refused_put_leaves_nothing_anywhere() -> None:
    upper, lower, stack, _ = two_tiers()
    lower.error = BackendUnavailableError("lower", "busy on purpose")
    with pytest.raises(BackendUnavailableError):
        await stack.put(ITEMS[:1])
    assert (await upper.match(KEYS[:1])).held == []


async def test_closing_flushes_what_was_acknowledged_in_memory(tmp_path: Path) -> None:
    disk = WriteBehind(await LmdbBackend.open(tmp_path, 1 << 20))
    stack = TieredBackend([HostBackend(1 << 20), disk])
    assert {stored.ack for stored in await stack.put(ITEMS)} == {Ack.MEMORY}
    await stack.aclose()
    reopened = await LmdbBackend.open(tmp_path, 1 << 20)
    assert len((await reopened.match(KEYS)).held) == len(KEYS)
    await reopened.aclose()


async def test_a_put_that_asks_for_the_disk_waits_for_it(tmp_path: Path) -> None:
    disk = await LmdbBackend.open(tmp_path, 1 << 20)
    stack = TieredBackend([HostBackend(1 << 20), WriteBehind(disk)])
    await stack.put(ITEMS[:1])
    assert {stored.ack for stored in await stack.put(ITEMS, ack=Ack.DISK)} == {Ack.DISK}
    assert len((await disk.match(KEYS)).held) == len(KEYS)
    await stack.aclose()


async def test_a_full_queue_refuses_and_recovers() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow, queue_bytes_max=3 * FRAMES[0].memory_bytes)
    for item in ITEMS[:3]:
        await queue.put([item])
    with pytest.raises(BackendUnavailableError, match="try again"):
        await queue.put(ITEMS[3:4])
    assert len((await queue.match(KEYS)).held) == 3
    assert all(isinstance(frame, Frame) for frame in await queue.get(KEYS[:3]))
    slow.gate.set()
    await queue.flush()
    assert [stored.outcome for stored in await queue.put(ITEMS[3:4])] == [Outcome.WRITTEN]
    await queue.aclose()


async def test_a_batch_larger_than_the_queue_is_written_at_once() -> None:
    inner = HostBackend(1 << 20)
    queue = WriteBehind(inner, queue_bytes_max=FRAMES[0].memory_bytes)
    assert {stored.outcome for stored in await queue.put(ITEMS)} == {Outcome.WRITTEN}
    assert len((await inner.match(KEYS)).held) == len(KEYS)
    await queue.aclose()


async def test_a_delete_catches_what_is_queued_or_being_written() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow)
    await queue.put(ITEMS)
    while "put" not in slow.calls:
        await asyncio.sleep(0)
    deleting = asyncio.create_task(queue.delete(KEYS))
    await asyncio.sleep(0)
    slow.gate.set()
    await deleting
    await queue.flush()
    assert await queue.get(KEYS) == [Miss(Reason.ABSENT)] * len(KEYS)
    await queue.aclose()


async def test_what_cannot_be_written_behind_is_counted_and_the_queue_goes_on() -> None:
    metrics = Metrics()
    broken = FaultyBackend(HostBackend(1 << 20))
    queue = WriteBehind(broken, metrics=metrics)
    broken.error = BackendFullError("host", "full on purpose")
    await queue.put(ITEMS[:2])
    await queue.flush()
    broken.error = None
    await queue.put(ITEMS[2:])
    await queue.flush()
    failures = metrics.registry.get_sample_value("kvstore_write_behind_failures_total", {"tier": "host"})
    assert failures == 2
    assert [isinstance(frame, Frame) for frame in await queue.get(KEYS)] == [False, False, True, True, True, True]
    await queue.aclose()


async def test_trimming_reaches_what_is_queued() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    queue = WriteBehind(slow)
    await queue.put(ITEMS)
    await queue.trim(KEYS, level=0)
    await queue.flush()
    assert [frame.levels for frame in await queue.get(KEYS) if isinstance(frame, Frame)] == [1] * 6
    await queue.aclose()


def test_a_stack_needs_a_tier() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TieredBackend([])


async def test_a_put_that_waits_for_the_disk_does_not_overtake_what_is_queued() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow)
    first, other = make_frame(KEYS[0], seed=1), make_frame(KEYS[0], seed=2)
    assert (await queue.put([(KEYS[0], first)]))[0].outcome is Outcome.WRITTEN
    second = asyncio.create_task(queue.put([(KEYS[0], other)], ack=Ack.DISK))
    await asyncio.sleep(0)
    slow.gate.set()
    assert (await second)[0].outcome is Outcome.OTHER
    await queue.flush()
    [found] = await queue.get(KEYS[:1])
    assert isinstance(found, Frame)
    assert found.id == first.id
    await queue.aclose()


async def test_a_longer_queued_frame_is_what_a_waiting_put_of_a_shorter_one_writes() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow)
    await queue.put(ITEMS[:1])
    shorter = asyncio.create_task(queue.put([(KEYS[0], FRAMES[0].truncated(0))], ack=Ack.DISK))
    await asyncio.sleep(0)
    slow.gate.set()
    assert (await shorter)[0] == (Outcome.EXISTS, Ack.MEMORY, None)
    await queue.flush()
    [found] = await slow.get(KEYS[:1])
    assert isinstance(found, Frame)
    assert found.levels == 3
    await queue.aclose()


async def test_damage_below_is_told_and_not_that_the_chunk_was_evicted_above(tmp_path: Path) -> None:
    small = HostBackend(3 * FRAMES[0].memory_bytes)
    disk = await LmdbBackend.open(tmp_path, 1 << 20)
    stack = TieredBackend([small, disk])
    await disk.put([(KEYS[0], FRAMES[1])])
    await small.put(ITEMS)
    assert (await small.get(KEYS[:1]))[0] == Miss(Reason.EVICTED)
    assert (await stack.get(KEYS[:1]))[0] == Miss(Reason.CORRUPT)
    await stack.aclose()


async def test_one_unexpected_error_does_not_end_the_writing_behind() -> None:
    broken = FaultyBackend(HostBackend(1 << 20))
    queue = WriteBehind(broken)
    broken.error = RuntimeError("no error that anybody expects")  # type: ignore[assignment]
    await queue.put(ITEMS[:1])
    await asyncio.sleep(0.01)
    broken.error = None
    await queue.put(ITEMS[1:2])
    await queue.flush()
    assert isinstance((await queue.get(KEYS[1:2]))[0], Frame)
    await queue.aclose()


async def test_a_tier_that_cannot_be_asked_does_not_keep_the_others_from_serving() -> None:
    upper = HostBackend(1 << 20)
    await upper.put(ITEMS[:2])
    async with Client("http://127.0.0.1:9") as nobody:
        stack = TieredBackend([upper, nobody])
        match = await stack.match(KEYS)
        assert (len(match.held), match.miss) == (2, Miss(Reason.BREAKER))
        found = await stack.get(KEYS[:3])
        assert [isinstance(frame, Frame) for frame in found] == [True, True, False]
        assert found[2] == Miss(Reason.BREAKER)
