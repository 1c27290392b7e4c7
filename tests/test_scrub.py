"""The scrubber finds damage before anybody asks, is not noticed, and writes down what an outage left out."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.backend import Miss, Reason
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Policies
from kvstore.errors import BackendBusyError, BackendError, BackendUnavailableError
from kvstore.frame import Frame
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.testing import FaultyBackend, make_frame, make_key
from kvstore.tiers import Scrubber, TieredBackend

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))


async def test_damage_is_found_counted_and_taken_away(tmp_path: Path) -> None:
    metrics, policies = Metrics(), Policies()
    disk = await LmdbBackend.open(tmp_path, 1 << 20, metrics=metrics, policies=policies)
    await disk.put(ITEMS[1:])
    await disk.put([(KEYS[0], FRAMES[1])])
    scrubber = Scrubber([disk], local=["lmdb"], bytes_per_s=1e12, history=policies.history, metrics=metrics)
    assert await scrubber.scrub() == (5, sum(frame.size_bytes for frame in FRAMES[1:]), 1, 0, 0)
    assert (await disk.match(KEYS[:1])).miss == Miss(Reason.CORRUPT)
    assert await scrubber.scrub() == (5, sum(frame.size_bytes for frame in FRAMES[1:]), 0, 0, 0)
    assert metrics.registry.get_sample_value("kvstore_corrupt_total", {"tier": "lmdb"}) == 1
    assert [file.suffix for file in (tmp_path / "quarantine").iterdir()] == [".damaged"]
    await disk.aclose()


async def test_scrubbing_does_not_make_a_chunk_look_wanted() -> None:
    policies = Policies()
    host = HostBackend(1 << 20, policies=policies)
    await host.put(ITEMS)
    await Scrubber([host], local=["host"], bytes_per_s=1e12, history=policies.history).scrub()
    assert [policies.history.reads(key) for key in KEYS] == [0] * len(KEYS)
    await host.get(KEYS[:1])
    assert policies.history.reads(KEYS[0]) == 1


async def test_what_an_outage_left_out_is_written_down() -> None:
    policies = Policies()
    upper = HostBackend(1 << 20, policies=policies)
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    stack = TieredBackend([upper, lower], policies=policies)
    scrubber = Scrubber(stack.tiers, local=["host"], durable=["lower"], bytes_per_s=1e12, history=policies.history)
    await stack.put(ITEMS[:2])
    lower.error = BackendUnavailableError("lower", "out of order on purpose")
    await stack.put(ITEMS[2:])
    assert (await scrubber.scrub()).written == 0
    lower.error = BackendBusyError("lower", "busy on purpose")
    assert (await scrubber.scrub()).written == 0
    lower.error = None
    assert (await scrubber.scrub()).written == 4
    assert len((await lower.match(KEYS)).held) == len(KEYS)
    assert (await scrubber.scrub()).written == 0


async def test_levels_and_exactness_that_an_outage_left_out_are_written_down() -> None:
    policies = Policies()
    upper = HostBackend(1 << 20, policies=policies)
    lower = FaultyBackend(HostBackend(1 << 20, name="lower"))
    stack = TieredBackend([upper, lower], policies=policies)
    await stack.put([(KEYS[0], FRAMES[0].truncated(0)), (KEYS[1], make_frame(KEYS[1], seed=3, behind=Behind(0, 0.1)))])
    lower.error = BackendUnavailableError("lower", "out of order on purpose")
    await stack.put(ITEMS[:2])
    lower.error = None
    scrubber = Scrubber(stack.tiers, local=["host"], durable=["lower"], bytes_per_s=1e12, history=policies.history)
    assert (await scrubber.scrub()).written == 2
    assert await lower.get(KEYS[:2]) == FRAMES[:2]
    assert (await scrubber.scrub()).written == 0


async def test_a_chunk_that_is_deleted_meanwhile_is_not_written_down() -> None:
    class SlowToDelete(HostBackend):
        async def delete(self, keys: Sequence[ChunkKey]) -> None:
            begun.set()
            await go_on.wait()
            await super().delete(keys)

    begun, go_on = asyncio.Event(), asyncio.Event()
    upper, lower = SlowToDelete(1 << 20), HostBackend(1 << 20, name="lower")
    stack = TieredBackend([upper, lower])
    await upper.put(ITEMS[:2])
    scrubber = Scrubber(
        stack.tiers,
        local=["host"],
        durable=["lower"],
        bytes_per_s=1e12,
        history=Policies().history,
        changes=stack.changes,
    )
    deleting = asyncio.create_task(stack.delete(KEYS[:1]))
    await begun.wait()
    assert (await scrubber.scrub()).written == 1
    go_on.set()
    await deleting
    assert (await stack.match(KEYS[:1])).miss == Miss(Reason.ABSENT)


async def test_a_chunk_that_cannot_be_read_does_not_keep_the_scrubber_from_the_others() -> None:
    class Unreadable(HostBackend):
        async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
            if KEYS[2] in keys:
                raise BackendError("host", "cannot be read on purpose")
            return await super().get(keys, level=level)

    host = Unreadable(1 << 20)
    await host.put(ITEMS)
    scrubbed = await Scrubber([host], local=["host"], bytes_per_s=1e12, history=Policies().history).scrub()
    assert (scrubbed.chunks, scrubbed.failed) == (5, 1)


async def test_an_unexpected_error_does_not_end_the_scrubbing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(HostBackend):
        async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
            reads.append(keys[0])
            raise RuntimeError("no error that anybody expects")

    reads: list[ChunkKey] = []
    host = Broken(1 << 20)
    await host.put(ITEMS)
    monkeypatch.setattr("kvstore.tiers.scrub._REST_S", 0.0)
    scrubbing = asyncio.create_task(
        Scrubber([host], local=["host"], bytes_per_s=1e12, history=Policies().history).run()
    )
    while len(reads) < 3:
        assert not scrubbing.done()
        await asyncio.sleep(0)
    scrubbing.cancel()
    await asyncio.gather(scrubbing, return_exceptions=True)


async def test_tiers_that_are_not_local_are_not_read() -> None:
    upper, lower = HostBackend(1 << 20), FaultyBackend(HostBackend(1 << 20, name="lower"))
    await lower.put(ITEMS)
    lower.calls.clear()
    scrubber = Scrubber([upper, lower], local=["host"], bytes_per_s=1e12, history=Policies().history)
    assert await scrubber.scrub() == (0, 0, 0, 0, 0)
    assert lower.calls == []
