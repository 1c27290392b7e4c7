"""The secondary tier in vLLM's own offloading: its manager and its memory, without the copies to and from a GPU.

vLLM offloads on GPUs only, but what runs in its scheduler needs none. Run by `make test-engines`.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstore.errors import ConfigError
from tests.conftest import Serve

ROW_BYTES = 64 << 10
KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(6)]


class Scheduler:
    """vLLM's tiering as its scheduler drives it."""

    def __init__(self, url: str, model: str = "org/tiny", groups: int = 1, tp: int = 1, **given: Any) -> None:
        tier = {"type": "KvstoreTier", "module_path": "kvstore.connectors.vllm_offload", "url": url, **given}
        config = OffloadingConfig(
            groups=tuple(OffloadingGroupConfig(32, (f"layer.{group}",), group) for group in range(groups)),
            worker_kv_bytes_per_block=ROW_BYTES // tp,
            enable_kv_cache_events=False,
            extra_config={"cpu_bytes_to_use": 8 * ROW_BYTES, "secondary_tiers": [tier]},
            engine_id=f"kvstore-test-{uuid.uuid4().hex}",
            model=OffloadingModelConfig(model, "bfloat16"),
            cache=OffloadingCacheConfig(32, 1),
            parallel=OffloadingParallelConfig(0, tp, tp, 1, 1, 1, 0, 1, None, False),
        )
        self.spec = TieringOffloadingSpec(config)
        self.manager: Any = self.spec.get_manager()
        [self.tier] = self.manager.secondary_tiers
        self.request = ReqContext(uuid.uuid4().hex)
        self.manager.on_new_request(self.request)

    def rows(self) -> memoryview:
        """The memory of the tier in front."""
        return memoryview(self.manager.primary_tier.get_kv_memoryview()).cast("B")

    def step(self) -> None:
        """The end of a step of the scheduler."""
        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        self.manager.lookup(make_offload_key(bytes(32), 9), self.request)

    def store(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """What workers do: a GPU's blocks are in memory now."""
        prepared = self.manager.prepare_store(keys, self.request)
        assert prepared.keys_to_store == list(keys)
        with self.rows() as memory:
            for number, row in zip(prepared.store_spec.chunk_ids, rows, strict=True):
                memory[int(number) * ROW_BYTES :][:ROW_BYTES] = row
        self.manager.complete_store(keys, self.request)
        self.settle()

    def settle(self) -> None:
        """Step until the tier has nothing more to do."""
        ends = time.monotonic() + 60
        self.step()
        while self.manager.has_pending_work():
            assert time.monotonic() < ends, "the tier does not come to an end"
            time.sleep(0.01)
            self.step()

    def look_up(self, key: bytes) -> Any:
        """What is found in the end, loaded into memory if it is."""
        found = LookupResult.RETRY
        ends = time.monotonic() + 60
        while found in (LookupResult.RETRY, LookupResult.HIT_PENDING):
            assert time.monotonic() < ends, "no look-up ends"
            found = self.manager.lookup(key, self.request)
            self.step()
            time.sleep(0.01)
        return found

    def loaded(self, keys: Sequence[bytes]) -> list[bytes]:
        """The rows of memory that chunks are in."""
        spec = self.manager.prepare_load(keys, self.request)
        with self.rows() as memory:
            rows = [bytes(memory[int(number) * ROW_BYTES :][:ROW_BYTES]) for number in spec.chunk_ids]
        self.manager.complete_load(keys, self.request)
        return rows

    def counts(self) -> dict[str, Any]:
        """What the tier tells vLLM."""
        return dict(self.tier.get_stats().reduce())

    def stop(self) -> None:
        self.manager.on_request_finished(self.request)
        self.manager.shutdown()


@pytest.fixture
def schedulers() -> Iterator[list[Scheduler]]:
    started: list[Scheduler] = []
    yield started
    for scheduler in started:
        scheduler.stop()


def row(seed: int) -> bytes:
    return bytes((seed + number) % 251 for number in range(ROW_BYTES))


def test_a_fresh_engine_loads_what_another_offloaded(serve: Serve, schedulers: list[Scheduler]) -> None:
    url = serve().url
    writer, reader = Scheduler(url), Scheduler(url)
    schedulers += [writer, reader]
    rows = [row(seed) for seed in range(3)]
    writer.store(KEYS[:3], rows)
    found = [reader.look_up(key) for key in KEYS[:4]]
    assert found == [LookupResult.HIT] * 3 + [LookupResult.MISS]
    assert reader.loaded(KEYS[:3]) == rows
    assert any("loaded_chunks" in name and amount == 3 for name, amount in reader.counts().items())


@pytest.mark.parametrize("other", [{"model": "org/other"}, {"groups": 2}, {"tp": 2}, {"revision": "b"}])
def test_an_engine_that_differs_finds_nothing(serve: Serve, schedulers: list[Scheduler], other: dict[str, Any]) -> None:
    url = serve().url
    writer, reader = Scheduler(url), Scheduler(url, **other)
    schedulers += [writer, reader]
    writer.store(KEYS[:1], [row(1)])
    assert reader.look_up(KEYS[0]) is LookupResult.MISS


def test_a_server_that_goes_away_makes_misses_and_ends_jobs(serve: Serve, schedulers: list[Scheduler]) -> None:
    process = serve()
    writer, reader = Scheduler(process.url), Scheduler(process.url)
    schedulers += [writer, reader]
    writer.store(KEYS[:1], [row(1)])
    # Found, but gone before it is loaded.
    while reader.tier.lookup(KEYS[0], reader.request) is LookupResult.RETRY:
        reader.tier.on_schedule_end(None)
    process.kill()
    assert reader.look_up(KEYS[0]) is LookupResult.MISS
    assert reader.look_up(KEYS[1]) is LookupResult.MISS
    writer.store(KEYS[1:2], [row(2)])
    assert not writer.manager.has_pending_work()
    assert any("unavailable_errors" in name for name in writer.counts())


def test_drained_jobs_have_their_results(serve: Serve, schedulers: list[Scheduler]) -> None:
    scheduler = Scheduler(serve().url)
    schedulers.append(scheduler)
    prepared = scheduler.manager.prepare_store(KEYS, scheduler.request)
    scheduler.manager.complete_store(prepared.keys_to_store, scheduler.request)
    scheduler.manager.on_schedule_end(ScheduleEndContext((), ()))
    scheduler.manager.reset_cache()
    assert not scheduler.tier.has_pending_work()


@pytest.mark.parametrize("given", [{"url": "ftp://x"}, {"pipeline": "kivi"}, {"colour": "red"}])
def test_wrong_options_leave_vllm_without_the_tier_or_stop_it(
    schedulers: list[Scheduler], given: dict[str, Any]
) -> None:
    given = {"url": "http://127.0.0.1:9"} | given
    open_scheduler = Scheduler(**given)
    schedulers.append(open_scheduler)
    assert open_scheduler.look_up(KEYS[0]) is LookupResult.MISS
    open_scheduler.store(KEYS[:1], [row(1)])
    with pytest.raises(ConfigError, match=r"url|pipeline|colour"):
        Scheduler(**given, fail_open=False)
