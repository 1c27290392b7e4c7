"""The stack: promotion, levels from different tiers, deletes that stay deleted, pins, purges, coders by tier."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.backend import Ack, Match, Miss, Outcome, Reason, State
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Pins, Policies
from kvstore.client import Client
from kvstore.errors import BackendBusyError, BackendError, BackendFullError, BackendUnavailableError
from kvstore.frame import Frame
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.testing import FaultyBackend, make_frame, make_key
from kvstore.testing.frames import NAMESPACE
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


async def test_a_frame_that_only_an_upper_tier_holds_is_kept_across_tiers() -> None:
    upper, lower, stack, _ = two_tiers()
    await upper.put(ITEMS[:1])
    other = make_frame(KEYS[0], seed=1)
    assert [stored.outcome for stored in await stack.put([(KEYS[0], other), ITEMS[1]])] == [
        Outcome.OTHER,
        Outcome.WRITTEN,
    ]
    assert (await lower.match(KEYS[:1])).held == []
    assert await stack.get(KEYS[:2]) == FRAMES[:2]


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


async def test_a_delete_while_a_chunk_is_copied_up_is_not_undone() -> None:
    fast, host = FaultyBackend(HostBackend(1 << 20, name="gpu")), HostBackend(1 << 20)
    lower = HostBackend(1 << 20, name="lower")
    stack = TieredBackend([fast, host, lower])
    await lower.put(ITEMS[:2])
    fast.gate.clear()
    reading = asyncio.create_task(stack.get(KEYS[:2]))
    fast.gate.set()
    while fast.calls != ["get"]:
        await asyncio.sleep(0)
    fast.gate.clear()
    while fast.calls != ["get", "put"]:
        await asyncio.sleep(0)
    deleting = asyncio.create_task(stack.delete(KEYS[:1]))
    while fast.calls != ["get", "put", "delete"]:
        await asyncio.sleep(0)
    fast.gate.set()
    await asyncio.gather(reading, deleting)
    assert await stack.get(KEYS[:1]) == [Miss(Reason.ABSENT)]
    assert len((await host.match(KEYS[1:2])).held) == 1


async def test_a_get_during_a_trim_does_not_undo_it() -> None:
    class SlowToTrim(HostBackend):
        async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
            begun.set()
            await go_on.wait()
            await super().trim(keys, level=level)

    begun, go_on = asyncio.Event(), asyncio.Event()
    upper, lower = HostBackend(1 << 20), SlowToTrim(1 << 20, name="lower")
    stack = TieredBackend([upper, lower])
    await stack.put(ITEMS[:1])
    trimming = asyncio.create_task(stack.trim(KEYS[:1], level=0))
    await begun.wait()
    await stack.get(KEYS[:1])
    go_on.set()
    await trimming
    assert [len(held.copy.level_bytes) for held in (await upper.match(KEYS[:1])).held] == [1]


@pytest.mark.parametrize("change", ["delete", "trim"])
async def test_a_put_under_way_is_not_left_in_the_upper_tiers_only(change: str) -> None:
    upper, lower, stack, _ = two_tiers()
    lower.gate.clear()
    putting = asyncio.create_task(stack.put(ITEMS[:1]))
    while lower.calls != ["put"]:
        await asyncio.sleep(0)
    changing = asyncio.create_task(stack.delete(KEYS[:1]) if change == "delete" else stack.trim(KEYS[:1], level=0))
    while lower.calls != ["put", change]:
        await asyncio.sleep(0)
    lower.gate.set()
    await asyncio.gather(putting, changing)
    held = [[len(one.copy.level_bytes) for one in (await tier.match(KEYS[:1])).held] for tier in (upper, lower)]
    assert held == ([[], []] if change == "delete" else [[1], [1]])


async def test_a_get_that_began_before_a_put_does_not_copy_up_what_that_replaced() -> None:
    class SlowToAnswer(HostBackend):
        async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
            found = await super().get(keys, level=level)
            begun.set()
            await go_on.wait()
            return found

    begun, go_on = asyncio.Event(), asyncio.Event()
    fast, host = HostBackend(1 << 20, name="gpu"), SlowToAnswer(1 << 20)
    stack = TieredBackend([fast, host], promoted=["gpu"])
    await stack.put([(KEYS[0], make_frame(KEYS[0], seed=2, behind=Behind(0, 0.1)))])
    early = asyncio.create_task(stack.get(KEYS[:1]))
    await begun.wait()
    assert (await stack.put(ITEMS[:1]))[0].outcome is Outcome.WRITTEN
    go_on.set()
    await early
    assert await stack.get(KEYS[:1]) == [FRAMES[0]]


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
    lower.error = BackendBusyError("lower", "busy on purpose")
    with pytest.raises(BackendBusyError):
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


def test_a_stack_needs_a_tier() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TieredBackend([])


async def test_damage_below_is_told_and_not_that_the_chunk_was_evicted_above(tmp_path: Path) -> None:
    small = HostBackend(3 * FRAMES[0].memory_bytes)
    disk = await LmdbBackend.open(tmp_path, 1 << 20)
    stack = TieredBackend([small, disk])
    await disk.put([(KEYS[0], FRAMES[1])])
    await small.put(ITEMS)
    assert (await small.get(KEYS[:1]))[0] == Miss(Reason.EVICTED)
    assert (await stack.get(KEYS[:1]))[0] == Miss(Reason.CORRUPT)
    assert (await stack.match(KEYS[:1])).miss == Miss(Reason.CORRUPT)
    await disk.delete(KEYS[:1])
    assert (await stack.get(KEYS[:1]))[0] == Miss(Reason.EVICTED)
    assert (await stack.match(KEYS[:1])).miss == Miss(Reason.EVICTED)
    await stack.aclose()


async def test_an_upper_tier_that_is_busy_does_not_keep_a_lower_one_from_serving() -> None:
    upper, lower = FaultyBackend(HostBackend(1 << 20)), HostBackend(1 << 20, name="lower")
    await lower.put(ITEMS)
    upper.error = BackendBusyError("host", "busy on purpose")
    assert await TieredBackend([upper, lower]).get(KEYS) == FRAMES
    assert upper.calls == ["get", "put"]


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


class Asked(HostBackend):
    """Counts how often it is asked what it holds, and may not answer."""

    def __init__(self, *, answers: bool = True) -> None:
        super().__init__(16 << 20, name="lower")
        self.asked = 0
        self._answers = answers

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        self.asked += 1
        if not self._answers:
            raise BackendUnavailableError("lower", "does not answer")
        return await super().match(keys)


@pytest.mark.parametrize("answers", [True, False])
async def test_a_tier_is_not_asked_for_each_chunk_of_which_another_has_a_part(answers: bool) -> None:
    """A server that hangs would be waited for as often, and one that does not has its round trips."""
    keys = [make_key(number) for number in range(60)]
    upper, lower = HostBackend(16 << 20), Asked(answers=answers)
    stack = TieredBackend([upper, lower])
    await upper.put([(key, make_frame(key).truncated(0)) for key in keys])
    await lower.put([(key, make_frame(key)) for key in keys[:40]])
    assert [len(held.copy.level_bytes) for held in (await stack.match(keys[:40])).held] == [3 if answers else 1] * 40
    assert lower.asked <= 2
    found = await stack.get(keys[:40])
    assert [frame.levels for frame in found if isinstance(frame, Frame)] == [3 if answers else 1] * 40
    assert lower.asked <= 4


async def test_levels_are_found_below_behind_gaps_and_in_long_prompts() -> None:
    keys = [make_key(number) for number in range(1_100)]
    frames = [make_frame(key, (3, 2)) for key in keys]
    upper, lower = HostBackend(64 << 20), HostBackend(64 << 20, name="lower")
    stack = TieredBackend([upper, lower])
    await upper.put([(key, frame.truncated(0)) for key, frame in zip(keys, frames, strict=True)])
    below = [n for n in range(len(keys)) if n not in (0, 7, 8, 1023, 1024, 1025, 1099)]
    await lower.put([(keys[n], frames[n]) for n in below])
    match = await stack.match(keys)
    assert [n for n, held in enumerate(match.held) if held.copy.whole] == below
    found = await stack.get(keys)
    assert [n for n, frame in enumerate(found) if isinstance(frame, Frame) and frame.whole] == below


async def test_pinned_chunks_stay_until_their_time_and_others_go() -> None:
    now_s = 0.0
    policies = Policies(pins=Pins(lambda: now_s))
    room_bytes = 4 * FRAMES[0].memory_bytes
    host = HostBackend(room_bytes, policies=policies)
    stack = TieredBackend([host], policies=policies, pins_bytes_max=room_bytes)
    await stack.put(ITEMS[:4])
    assert await stack.pin(KEYS[:2] + KEYS[5:], ttl_s=10.0) == [True, True, False]
    for number in range(100, 120):
        await stack.put([(make_key(number), make_frame(make_key(number)))])
    assert [len(held.copy.level_bytes) for held in (await stack.match(KEYS[:2])).held] == [3, 3]
    assert len([key async for key, _ in stack.scan()]) >= 4
    now_s = 10.5
    for number in range(200, 240):
        await stack.put([(make_key(number), make_frame(make_key(number)))])
    assert (await stack.match(KEYS[:1])).miss == Miss(Reason.EVICTED)


async def test_more_than_may_be_pinned_is_refused_and_nothing_is_pinned_then() -> None:
    policies = Policies()
    stack = TieredBackend([HostBackend(1 << 20, policies=policies)], policies=policies, pins_bytes_max=4000)
    await stack.put(ITEMS)
    assert await stack.pin(KEYS[:1], ttl_s=60.0) == [True]
    with pytest.raises(BackendFullError, match="pinned"):
        await stack.pin(KEYS, ttl_s=60.0)
    assert [key in policies.pins for key in KEYS] == [True] + [False] * 5
    await stack.unpin(KEYS[:1])
    assert await stack.pin(KEYS[1:2], ttl_s=60.0) == [True]
    await stack.delete(KEYS[1:2])
    assert len(policies.pins) == 0


async def test_a_namespace_can_be_purged() -> None:
    upper, lower, stack, _ = two_tiers()
    foreign = make_key(0, namespace=b"\xff" * 16)
    await stack.put([*ITEMS, (foreign, make_frame(foreign))])
    await upper.delete(KEYS[:3])
    assert await stack.purge(NAMESPACE) == len(KEYS)
    assert await stack.get(KEYS) == [Miss(Reason.ABSENT)] * len(KEYS)
    assert (await lower.match(KEYS[:1])).held == []
    assert isinstance((await stack.get([foreign]))[0], Frame)


async def test_others_get_their_turn_while_a_large_namespace_is_listed() -> None:
    many = HostBackend(64 << 20, name="lower")
    await many.put([(make_key(number), FRAMES[0]) for number in range(5_000)])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others())
    assert len([key async for key, _ in TieredBackend([many]).scan()]) == 5_000
    waiting.cancel()
    assert turns >= 4


async def test_a_tier_that_only_promotion_fills_sees_no_puts_and_no_stale_frames() -> None:
    fast, host = FaultyBackend(HostBackend(1 << 20, name="gpu")), HostBackend(1 << 20)
    stack = TieredBackend([fast, host], promoted=["gpu"])
    inexact = make_frame(KEYS[0], seed=2, behind=Behind(0, 0.1))
    await stack.put([(KEYS[0], inexact), *ITEMS[1:]])
    assert fast.calls == []
    await stack.get(KEYS)
    assert len((await fast.match(KEYS)).held) == len(KEYS)
    await stack.put(ITEMS[:1])
    assert [frame.id for frame in await stack.get(KEYS) if isinstance(frame, Frame)] == [frame.id for frame in FRAMES]


async def test_a_stack_says_how_its_tiers_are() -> None:
    _, lower, stack, _ = two_tiers()
    assert stack.state == State(True)
    lower.error = BackendUnavailableError("lower", "out of order on purpose")
    assert stack.state == State(True, "lower: out of order on purpose")
    assert {name: state.up for name, state in stack.states().items()} == {"host": True, "lower": False}


async def test_chunks_of_a_prompt_are_known_to_follow_each_other() -> None:
    policies = Policies()
    stack = TieredBackend([HostBackend(1 << 20, policies=policies)], policies=policies)
    chain = [make_frame(key, first_position=256 * n) for n, key in enumerate(KEYS)]
    await stack.put(list(zip(KEYS[:3], chain[:3], strict=True)))
    assert [policies.history.parent(key) for key in KEYS[:4]] == [None, KEYS[0], KEYS[1], None]
    await stack.match(KEYS)
    await stack.put(list(zip(KEYS[3:], chain[3:], strict=True)))
    assert [policies.history.parent(key) for key in KEYS[3:]] == KEYS[2:5]


async def test_an_exact_coder_for_each_tier_is_put_in_and_its_levels_are_joined() -> None:
    def recode(frame: Frame, tier: str) -> Frame:
        """Stands in for a coder: the same planes in a frame of another id, and back."""
        return make_frame(frame.key, seed=int(tier == "lower")) if frame.whole else frame

    upper, lower = HostBackend(1 << 20), HostBackend(1 << 20, name="lower")
    stack = TieredBackend([upper, lower], recode=recode)
    assert {stored.outcome for stored in await stack.put(ITEMS)} == {Outcome.WRITTEN}
    assert {stored.outcome for stored in await stack.put(ITEMS)} == {Outcome.EXISTS}
    assert [frame.id for frame in await lower.get(KEYS) if isinstance(frame, Frame)] == [
        make_frame(key, seed=1).id for key in KEYS
    ]
    await upper.delete(KEYS)
    assert all(isinstance(frame, Frame) for frame in await stack.get(KEYS))
    assert [frame.id for frame in await upper.get(KEYS) if isinstance(frame, Frame)] == [frame.id for frame in FRAMES]
    # What the upper tier has lost of its levels is read below, in the other coder.
    await upper.trim(KEYS, level=0)
    assert [frame.levels for frame in await stack.get(KEYS) if isinstance(frame, Frame)] == [3] * 6
    assert [frame.levels for frame in await upper.get(KEYS) if isinstance(frame, Frame)] == [3] * 6
    # A part of a frame has no other coder, so it is not copied up, where it would be another frame.
    await upper.delete(KEYS)
    assert [frame.levels for frame in await stack.get(KEYS, level=0) if isinstance(frame, Frame)] == [1] * 6
    assert (await upper.match(KEYS)).held == []
    assert {stored.outcome for stored in await stack.put(ITEMS)} == {Outcome.EXISTS}
