"""The scrubber finds damage before anybody asks, is not noticed, and writes down what an outage left out."""

from pathlib import Path

from kvstore.backend import Miss, Reason
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Policies
from kvstore.errors import BackendBusyError, BackendUnavailableError
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
    assert await scrubber.scrub() == (5, sum(frame.size_bytes for frame in FRAMES[1:]), 1, 0)
    assert (await disk.match(KEYS[:1])).miss == Miss(Reason.CORRUPT)
    assert await scrubber.scrub() == (5, sum(frame.size_bytes for frame in FRAMES[1:]), 0, 0)
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


async def test_tiers_that_are_not_local_are_not_read() -> None:
    upper, lower = HostBackend(1 << 20), FaultyBackend(HostBackend(1 << 20, name="lower"))
    await lower.put(ITEMS)
    lower.calls.clear()
    scrubber = Scrubber([upper, lower], local=["host"], bytes_per_s=1e12, history=Policies().history)
    assert await scrubber.scrub() == (0, 0, 0, 0)
    assert lower.calls == []
