"""Concurrent misses share one read, whatever becomes of whoever asked first."""

import asyncio
from collections.abc import Sequence

import pytest

from kvstore.backend import Miss, Reason
from kvstore.backends.host import HostBackend
from kvstore.errors import BackendError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.testing import FaultyBackend, make_frame, make_key
from kvstore.tiers import TieredBackend

KEYS = [make_key(number) for number in range(6)]
ITEMS = [(key, make_frame(key)) for key in KEYS]


async def held_below() -> tuple[HostBackend, FaultyBackend, TieredBackend]:
    upper, lower = HostBackend(1 << 20), FaultyBackend(HostBackend(1 << 20, name="lower"))
    await lower.put(ITEMS)
    lower.gate.clear()
    lower.calls.clear()
    return upper, lower, TieredBackend([upper, lower])


async def started(*tasks: asyncio.Task[list[Frame | Miss]], calls: list[str]) -> None:
    """Wait until the first of them reads, and give the others their turn."""
    while "get" not in calls:
        await asyncio.sleep(0)
    for _ in range(20 * len(tasks)):
        await asyncio.sleep(0)


async def test_concurrent_misses_read_once() -> None:
    upper, lower, _ = await held_below()
    promoted = FaultyBackend(upper)
    stack = TieredBackend([promoted, lower])
    tasks = [asyncio.create_task(stack.get(KEYS)) for _ in range(8)]
    await started(*tasks, calls=lower.calls)
    lower.gate.set()
    for found in await asyncio.gather(*tasks):
        assert [frame.id for frame in found if isinstance(frame, Frame)] == [frame.id for _, frame in ITEMS]
    assert lower.calls == ["get"]
    assert promoted.calls.count("put") == 1


async def test_a_reader_of_fewer_levels_joins_and_one_of_more_does_not() -> None:
    _, lower, stack = await held_below()
    wanted = [1, 0, None]
    tasks = [asyncio.create_task(stack.get(KEYS[:1], level=level)) for level in wanted]
    await started(*tasks, calls=lower.calls)
    lower.gate.set()
    found = [frame.levels for [frame] in await asyncio.gather(*tasks) if isinstance(frame, Frame)]
    assert found == [2, 1, 3]
    assert lower.calls == ["get", "get"]


async def test_one_who_gives_up_does_not_take_the_others_along() -> None:
    _, lower, stack = await held_below()
    first, second = (asyncio.create_task(stack.get(KEYS)) for _ in range(2))
    await started(first, second, calls=lower.calls)
    first.cancel()
    await asyncio.sleep(0)
    lower.gate.set()
    assert all(isinstance(frame, Frame) for frame in await second)
    with pytest.raises(asyncio.CancelledError):
        await first
    assert lower.calls == ["get"]


async def test_all_who_wait_for_a_read_that_fails_get_a_miss() -> None:
    _, lower, stack = await held_below()
    tasks = [asyncio.create_task(stack.get(KEYS[:2])) for _ in range(3)]
    await started(*tasks, calls=lower.calls)
    lower.error = BackendError("lower", "broken on purpose")
    lower.gate.set()
    assert await asyncio.gather(*tasks) == [[Miss(Reason.BREAKER)] * 2] * 3
    lower.error = None
    assert all(isinstance(frame, Frame) for frame in await stack.get(KEYS))


async def test_nobody_joins_a_read_that_began_before_a_delete() -> None:
    upper, lower, stack = await held_below()
    early = asyncio.create_task(stack.get(KEYS[:1]))
    await started(early, calls=lower.calls)
    deleting = asyncio.create_task(stack.delete(KEYS[:1]))
    await asyncio.sleep(0)
    late = asyncio.create_task(stack.get(KEYS[:1]))
    await asyncio.sleep(0)
    lower.gate.set()
    await asyncio.gather(early, deleting)
    assert lower.calls.count("get") == 2
    await late
    assert await stack.get(KEYS[:1]) == [Miss(Reason.ABSENT)]
    assert (await upper.match(KEYS[:1])).held == []


async def test_nobody_joins_a_read_that_began_during_a_delete() -> None:
    class Slow(HostBackend):
        async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
            found = await super().get(keys, level=level)
            if deleting.is_set():
                begun.set()
                await answer.wait()
            return found

        async def delete(self, keys: Sequence[ChunkKey]) -> None:
            deleting.set()
            await begun.wait()
            await super().delete(keys)
            deleting.clear()

    deleting, begun, answer = asyncio.Event(), asyncio.Event(), asyncio.Event()
    lower = Slow(1 << 20, name="lower")
    stack = TieredBackend([HostBackend(1 << 20), lower])
    await lower.put(ITEMS[:1])
    removal = asyncio.create_task(stack.delete(KEYS[:1]))
    await deleting.wait()
    during = asyncio.create_task(stack.get(KEYS[:1]))
    await removal
    after = asyncio.create_task(stack.get(KEYS[:1]))
    await asyncio.sleep(0)
    answer.set()
    assert isinstance((await during)[0], Frame)
    assert await after == [Miss(Reason.ABSENT)]
