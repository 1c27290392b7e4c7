"""Writing behind the answer: the queue's bounds and order, outages below, and what a shutdown flushes."""

import asyncio
import logging
from collections.abc import Sequence

import pytest

from kvstore.backend import Ack, Miss, Outcome, Reason, Stored
from kvstore.backends.host import HostBackend
from kvstore.errors import BackendBusyError, BackendFullError, BackendUnavailableError
from kvstore.frame import Frame
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.testing import FaultyBackend, make_frame, make_key
from kvstore.tiers import TieredBackend, WriteBehind

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))
DOWN = BackendUnavailableError("lower", "out of order on purpose", retry_after_s=0.0)


async def test_a_full_queue_refuses_and_recovers() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow, queue_bytes_max=3 * FRAMES[0].memory_bytes)
    for item in ITEMS[:3]:
        await queue.put([item])
    with pytest.raises(BackendBusyError, match="try again"):
        await queue.put(ITEMS[3:4])
    assert len((await queue.match(KEYS)).held) == 3
    assert all(isinstance(frame, Frame) for frame in await queue.get(KEYS[:3]))
    slow.gate.set()
    await queue.flush()
    assert [stored.outcome for stored in await queue.put(ITEMS[3:4])] == [Outcome.WRITTEN]
    await queue.aclose()


async def test_the_answer_says_where_a_chunk_is_that_was_there_already() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    await slow.put(ITEMS[:1])
    slow.gate.clear()
    queue = WriteBehind(slow, queue_bytes_max=FRAMES[1].memory_bytes)
    assert await queue.put(ITEMS[1:2]) == [Stored(Outcome.WRITTEN, Ack.MEMORY)]
    # The queue is full, but nothing more need be queued for these.
    for item, ack in ((ITEMS[0], Ack.DISK), (ITEMS[1], Ack.MEMORY)):
        assert await queue.put([item]) == [Stored(Outcome.EXISTS, ack)]
    assert await queue.get(KEYS[1:2], level=0) == [FRAMES[1].truncated(0)]
    slow.gate.set()
    await queue.flush()
    assert await queue.put(ITEMS[1:2]) == [Stored(Outcome.EXISTS, Ack.DISK)]
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


async def test_a_put_that_waits_for_the_disk_takes_along_what_is_queued_of_its_chunk() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow, batch_bytes=1)
    await queue.put([ITEMS[0], ITEMS[1], (KEYS[2], FRAMES[2].truncated(0)), (KEYS[3], make_frame(KEYS[3], seed=1))])
    while "put" not in slow.calls:
        await asyncio.sleep(0)
    durable = asyncio.create_task(queue.put([(KEYS[1], FRAMES[1].truncated(0)), ITEMS[2], ITEMS[3]], ack=Ack.DISK))
    await asyncio.sleep(0)
    slow.gate.set()
    assert [stored.outcome for stored in await durable] == [Outcome.EXISTS, Outcome.EXTENDED, Outcome.OTHER]
    assert await slow.get(KEYS[1:3]) == FRAMES[1:3]
    await queue.flush()
    assert await slow.get(KEYS[3:4]) == [make_frame(KEYS[3], seed=1)]
    await queue.aclose()


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


async def test_what_replaces_a_frame_while_that_is_written_is_written_too() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    slow.gate.clear()
    queue = WriteBehind(slow)
    await queue.put([(KEYS[0], make_frame(KEYS[0], seed=3, behind=Behind(0, 0.1))), (KEYS[1], FRAMES[1].truncated(0))])
    while "put" not in slow.calls:
        await asyncio.sleep(0)
    assert [stored.outcome for stored in await queue.put(ITEMS[:2])] == [Outcome.WRITTEN, Outcome.EXTENDED]
    slow.gate.set()
    await queue.flush()
    assert await slow.get(KEYS[:2]) == FRAMES[:2]
    await queue.aclose()


async def test_what_is_queued_waits_for_a_backend_that_is_down() -> None:
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    queue = WriteBehind(lower, inner_ack=Ack.REMOTE)
    lower.error = DOWN
    assert {stored.outcome for stored in await queue.put(ITEMS)} == {Outcome.WRITTEN}
    while lower.calls.count("put") < 3:
        await asyncio.sleep(0.01)
    assert not queue.state.up
    assert [frame.id for frame in await queue.get(KEYS) if isinstance(frame, Frame)] == [frame.id for frame in FRAMES]
    lower.error = None
    await queue.flush()
    assert len((await lower.match(KEYS)).held) == len(KEYS)
    await queue.aclose()


async def test_an_outage_below_does_not_refuse_what_is_above() -> None:
    metrics = Metrics()
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    queue = WriteBehind(lower, inner_ack=Ack.REMOTE, queue_bytes_max=2 * FRAMES[0].memory_bytes, metrics=metrics)
    upper = HostBackend(1 << 20)
    stack = TieredBackend([upper, queue])
    lower.error = DOWN
    for item in ITEMS:
        [stored] = await stack.put([item])
        assert (stored.outcome, stored.ack, stored.error) == (Outcome.WRITTEN, Ack.MEMORY, None)
    assert len((await upper.match(KEYS)).held) == len(KEYS)
    skipped = metrics.registry.get_sample_value("kvstore_write_behind_skips_total", {"tier": "lower"})
    assert skipped == len(KEYS) - 2
    [remote] = await stack.put([(make_key(9), make_frame(make_key(9)))], ack=Ack.REMOTE)
    assert (remote.outcome, remote.ack) == (Outcome.WRITTEN, Ack.MEMORY)
    assert isinstance(remote.error, BackendUnavailableError)
    lower.error = None
    await stack.aclose()


async def test_closing_gives_up_at_its_deadline_and_says_what_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    queue = WriteBehind(lower, flush_timeout_s=0.05)
    await queue.put(ITEMS[:1])
    await queue.flush()
    lower.error = DOWN
    await queue.put(ITEMS[1:])
    with caplog.at_level(logging.INFO):
        await queue.aclose()
    size_bytes = sum(frame.size_bytes for frame in FRAMES[1:])
    assert f"5 of 5 chunks that waited for lower, {size_bytes} bytes, are not known to be written" in caplog.text
    assert "out of order on purpose" in caplog.text


async def test_closing_does_not_wait_for_ever_for_a_write_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    queue = WriteBehind(lower, flush_timeout_s=0.05)
    lower.gate.clear()
    await queue.put(ITEMS)
    with caplog.at_level(logging.INFO):
        await queue.aclose()
    assert "6 of 6 chunks that waited for lower" in caplog.text


async def test_closing_says_what_it_wrote(caplog: pytest.LogCaptureFixture) -> None:
    inner = HostBackend(1 << 20, name="lower")
    queue = WriteBehind(inner)
    await queue.put(ITEMS)
    with caplog.at_level(logging.INFO):
        await queue.aclose()
    assert "the 6 chunks that waited for lower are written" in caplog.text


async def test_closing_does_not_say_that_it_wrote_what_could_not_be_written(caplog: pytest.LogCaptureFixture) -> None:
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    queue = WriteBehind(lower, batch_bytes=1)
    lower.gate.clear()
    await queue.put(ITEMS)
    closing = asyncio.create_task(queue.aclose())
    while "put" not in lower.calls:
        await asyncio.sleep(0)
    lower.error = BackendFullError("lower", "full on purpose")
    with caplog.at_level(logging.INFO):
        lower.gate.set()
        await closing
    assert "6 of 6 chunks that waited for lower could not be written" in caplog.text
    assert "are written" not in caplog.text


async def test_an_answer_that_is_none_does_not_end_the_writing_behind() -> None:
    class Forgetful(HostBackend):
        async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
            return (await super().put(items, ack=ack))[1:]

    queue = WriteBehind(Forgetful(1 << 20), flush_timeout_s=5.0)
    await queue.put(ITEMS)
    await queue.flush()
    await queue.aclose()


async def test_what_is_queued_over_an_older_copy_is_what_match_and_get_answer() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    queue = WriteBehind(slow)
    inexact = make_frame(KEYS[1], seed=3, behind=Behind(0, 0.1))
    await slow.put([(KEYS[0], FRAMES[0].truncated(0)), (KEYS[1], inexact), ITEMS[2]])
    slow.gate.clear()
    assert [stored.outcome for stored in await queue.put(ITEMS[:2] + ITEMS[3:4])] == [
        Outcome.EXTENDED,
        Outcome.WRITTEN,
        Outcome.WRITTEN,
    ]
    for count in (2, 4, 6):
        match = await queue.match(KEYS[:count])
        found = {key: held async for key, held in queue.scan()}
        assert match.held == [found[key] for key in KEYS[: min(count, 4)]]
        assert [held.frame_id for held in match.held] == [frame.id for frame in FRAMES[: min(count, 4)]]
        assert {len(held.copy.level_bytes) for held in match.held} == {3}
        assert (match.miss is None) == (count <= 4)
    slow.gate.set()
    await queue.aclose()


@pytest.mark.parametrize("change", ["delete", "trim", "aclose"])
async def test_a_put_that_waits_for_another_comes_before_what_is_asked_for_later(change: str) -> None:
    """It must not be queued once that is done: a deleted chunk would come back, and a closed queue never be written."""
    slow = FaultyBackend(HostBackend(1 << 20))
    queue = WriteBehind(slow, flush_timeout_s=0.1)
    slow.gate.clear()
    durable = asyncio.create_task(queue.put([(KEYS[0], FRAMES[0].truncated(0))], ack=Ack.DISK))
    while "put" not in slow.calls:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(queue.put(ITEMS[:1]))
    await asyncio.sleep(0)
    if change == "aclose":
        await queue.aclose()
        slow.gate.set()
        await durable
        with pytest.raises(BackendUnavailableError, match="closing"):
            await waiting
        return
    call = queue.delete(KEYS[:1]) if change == "delete" else queue.trim(KEYS[:1], level=0)
    changing = asyncio.create_task(call)
    await asyncio.sleep(0)
    slow.gate.set()
    await asyncio.gather(durable, waiting, changing)
    await queue.flush()
    held = (await queue.match(KEYS[:1])).held
    assert [len(one.copy.level_bytes) for one in held] == ([] if change == "delete" else [1])
    await queue.aclose()


async def test_one_frame_that_a_backend_cannot_take_does_not_hold_up_the_others() -> None:
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    queue = WriteBehind(lower, batch_bytes=1)
    lower.gate.clear()
    await queue.put(ITEMS)
    lower.error = DOWN
    lower.gate.set()
    while lower.calls.count("put") < 2:
        await asyncio.sleep(0.01)
    lower.error = None
    await queue.flush()
    assert len((await lower.match(KEYS)).held) == len(KEYS)
    await queue.aclose()
