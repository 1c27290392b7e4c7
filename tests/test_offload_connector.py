"""The tier behind vLLM's offloading without vLLM: its contract as recorded, jobs in their order, and faults."""

import asyncio
import inspect
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvstore.errors import ConfigError
from tests.conftest import Server, Start
from tests.lmcache_double import RECORD, signatures

OURS = "kvstore.connectors.vllm_offload"
BASE = "vllm.v1.kv_offload.base"
TIER = "vllm.v1.kv_offload.tiering.base:SecondaryTierManager"
LOOKUPS = "vllm.v1.kv_offload.tiering.async_lookup:AsyncLookupManager"
ROW_BYTES = 4096
ROWS = 8


class _Tier:
    """What vLLM's base class of tiers does by itself."""

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, detector: Any = None) -> None:
        assert primary_kv_view.strides is not None
        self.block_size_bytes = primary_kv_view.strides[0]


class _Lookups:
    """vLLM's look-ups: unknown until the step is over; here without a thread."""

    def __init__(self, tier_type: str) -> None:
        self._asked: list[bytes] = []
        self._found: dict[bytes, bool] = {}

    def lookup(self, key: bytes, req_context: Any) -> bool | None:
        if key not in self._found:
            self._asked.append(key)
        return self._found.get(key)

    def flush(self) -> None:
        asked, self._asked = self._asked, []
        found = self.batch_lookup(asked, None)  # type: ignore[attr-defined]
        self._found |= dict(zip(asked, found, strict=True))

    def mark_miss(self, keys: list[bytes]) -> None:
        self._found |= dict.fromkeys(keys, False)

    def cleanup(self, req_id: str) -> None:
        self._found.clear()

    def shutdown(self) -> None:
        pass


class _Stats:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def increase_counter(self, name: str, amount: float, labelvalues: tuple[str, ...]) -> None:
        self.counts[labelvalues[0]] += int(amount)


def _base(name: str, does: type) -> type:
    """A base class with the recorded abstract methods."""
    members = {method: abstractmethod(lambda self: None) for method, abstract, _, _ in signatures(name) if abstract}
    return type(name.partition(":")[2], (does, ABC), members)


def _recorded(name: str, otherwise: Any = None, **values: Any) -> Any:
    """An instance of a dataclass with the recorded fields."""
    fields = RECORD["fields"][f"vllm.v1.kv_offload.{name}"]
    assert values.keys() <= set(fields)
    return make_dataclass(name.partition(":")[2], fields)(*(values.get(field, otherwise) for field in fields))


def _job_result(
    job_id: int,
    success: bool,
    successful_keys: Any = None,
    transfer_time: float | None = None,
    transfer_bytes: int | None = None,
) -> Any:
    given = dict(locals())
    return _recorded("tiering.base:JobResult", **given)


LOOKUP_RESULT: Any = Enum("LookupResult", RECORD["members"][f"{BASE}:LookupResult"])  # type: ignore[misc]
MODULES: dict[str, dict[str, Any]] = {
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics": {"OffloadingConnectorStats": _Stats},
    BASE: {
        "Locality": lambda name: name,
        "LookupResult": LOOKUP_RESULT,
        "Medium": SimpleNamespace(STORAGE="STORAGE"),
        "OffloadingCounterMetadata": SimpleNamespace,
        "RequestOffloadingContext": SimpleNamespace,
        "get_offload_group_idx": lambda key: key[-4:],
    },
    LOOKUPS.partition(":")[0]: {"AsyncLookupManager": _base(LOOKUPS, _Lookups)},
    TIER.partition(":")[0]: {"JobResult": _job_result, "SecondaryTierManager": _base(TIER, _Tier)},
}


@pytest.fixture
def offload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported over what was recorded of vLLM."""
    for name, members in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        vars(sys.modules[name]).update(members)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield __import__(OURS, fromlist=["KvstoreTier"])
    del sys.modules[OURS]


def spec(tp_size: int = 1) -> Any:
    config = _recorded(
        "config:OffloadingConfig",
        groups=(_recorded("config:OffloadingGroupConfig", tokens_per_block=32, layer_names=("layer.0",), group_id=0),),
        model=SimpleNamespace(name="org/tiny", dtype="bfloat16"),
        cache=_recorded("config:OffloadingCacheConfig", tokens_per_hash=32, blocks_per_chunk=1),
        parallel=_recorded("config:OffloadingParallelConfig", 1, tp_size=tp_size),
    )
    return SimpleNamespace(config=config)


class Tier:
    """A tier, and the calls of vLLM's manager."""

    def __init__(self, offload: Any, url: str, of: Any = None, **given: Any) -> None:
        self.memory = bytearray(ROW_BYTES * ROWS)
        view = memoryview(self.memory).cast("B", (ROWS, ROW_BYTES))
        options = {"url": url, "lookup_deadline_s": 5.0, **given}
        self.tier = offload.KvstoreTier(of or spec(), view, tier_type="KvstoreTier", **options)
        self.request = SimpleNamespace(req_id="request")
        self.tier.on_new_request(self.request)
        self._jobs = 0

    def row(self, number: int) -> bytes:
        return bytes(self.memory[number * ROW_BYTES :][:ROW_BYTES])

    def fill(self, number: int) -> bytes:
        self.memory[number * ROW_BYTES : (number + 1) * ROW_BYTES] = bytes([number + 1]) * ROW_BYTES
        return self.row(number)

    def store(self, keys: list[bytes], rows: list[int]) -> Any:
        return self._run(self.tier.submit_store, keys, rows)

    def load(self, keys: list[bytes], rows: list[int]) -> Any:
        return self._run(self.tier.submit_load, keys, rows)

    def look_up(self, keys: list[bytes]) -> list[Any]:
        """What is found once a step is over."""
        for key in keys:
            self.tier.lookup(key, self.request)
        self.tier.on_schedule_end(None)
        return [self.tier.lookup(key, self.request) for key in keys]

    def _run(self, submit: Callable[[Any], None], keys: list[bytes], rows: list[int]) -> Any:
        self._jobs += 1
        submit(SimpleNamespace(job_id=self._jobs, keys=keys, chunk_ids=rows))
        self.tier.drain_jobs()
        [result] = self.tier.get_finished_jobs()
        assert result.job_id == self._jobs
        return result

    def stop(self) -> None:
        self.tier.on_request_finished(self.request)
        self.tier.shutdown()


KEYS = [bytes([number]) * 32 + bytes(4) for number in range(4)]
HIT, MISS, RETRY = (LOOKUP_RESULT[name] for name in ("HIT", "MISS", "RETRY"))


@pytest.mark.parametrize(("recorded", "name"), [(TIER, "KvstoreTier"), (LOOKUPS, "_Lookups")])
def test_the_tier_has_the_methods_that_vllm_calls(offload: Any, recorded: str, name: str) -> None:
    ours = getattr(offload, name)
    assert not inspect.isabstract(ours)
    for method, _, _, parameters in signatures(recorded):
        found = vars(ours).get(method)
        if found is not None and method != "__init__":
            assert list(inspect.signature(found).parameters) == parameters, method
    assert {"offloading_spec", "primary_kv_view", "tier_type", "backpressure_detector"} <= set(
        inspect.signature(offload.KvstoreTier).parameters
    ), "vLLM names them"


async def test_a_fresh_tier_loads_what_another_stored(offload: Any, server: Server) -> None:
    def run() -> None:
        writer = Tier(offload, server.url)
        rows = [writer.fill(number) for number in (3, 5)]
        stored = writer.store(KEYS[:2], [3, 5])
        assert (stored.success, stored.transfer_bytes) == (True, 2 * ROW_BYTES)
        writer.stop()
        reader = Tier(offload, server.url)
        assert reader.tier.lookup(KEYS[0], reader.request) is RETRY
        assert reader.look_up(KEYS[:3]) == [HIT, HIT, MISS]
        loaded = reader.load(KEYS[:2], [1, 0])
        assert (loaded.success, loaded.transfer_bytes) == (True, 2 * ROW_BYTES)
        assert [reader.row(1), reader.row(0)] == rows
        assert reader.tier.get_stats().counts["loaded_chunks"] == 2
        assert not reader.tier.get_stats().counts, "what was told is not told again"
        reader.stop()

    await asyncio.to_thread(run)


async def test_of_a_load_that_fails_in_part_vllm_learns_which_part(offload: Any, server: Server) -> None:
    def run() -> None:
        tier = Tier(offload, server.url)
        tier.fill(0)
        tier.store(KEYS[:1], [0])
        assert tier.look_up(KEYS[:1]) == [HIT]
        loaded = tier.load(KEYS[:2], [1, 2])
        assert (loaded.success, loaded.successful_keys) == (False, (KEYS[0],))
        assert tier.tier.lookup(KEYS[1], tier.request) is MISS, "it is not asked for again and again"
        tier.stop()

    await asyncio.to_thread(run)


@pytest.mark.parametrize("other", [{"tp_size": 2}, {"revision": "b"}])
async def test_an_engine_that_differs_finds_nothing(offload: Any, server: Server, other: dict[str, Any]) -> None:
    def run() -> None:
        writer = Tier(offload, server.url)
        writer.store(KEYS[:1], [0])
        writer.stop()
        reader = (
            Tier(offload, server.url, spec(tp_size=2)) if "tp_size" in other else Tier(offload, server.url, **other)
        )
        assert reader.look_up(KEYS[:1]) == [MISS]
        reader.stop()

    await asyncio.to_thread(run)


async def test_a_server_that_goes_away_fails_jobs_and_finds_nothing(offload: Any, start: Start) -> None:
    server = await start()
    tier = await asyncio.to_thread(Tier, offload, server.url)
    await asyncio.to_thread(tier.store, KEYS[:1], [0])
    await server.stop()

    def run() -> None:
        assert tier.look_up(KEYS[:1]) == [MISS]
        loaded = tier.load(KEYS[:1], [1])
        assert (loaded.success, loaded.successful_keys) == (False, None)
        assert not tier.store(KEYS[1:2], [1]).success
        assert tier.tier.get_stats().counts["unavailable_errors"] >= 1
        assert not tier.tier.has_pending_work()
        tier.stop()

    await asyncio.to_thread(run)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"url": "redis://x"}, "url"),
        ({"pipeline": "ladder-packed"}, "pipeline"),
        ({"colour": "red"}, "colour"),
        ({"deadline_s": 0}, "deadline_s"),
    ],
)
def test_a_wrong_option_is_named_and_leaves_vllm_without_the_tier(
    offload: Any, given: dict[str, Any], option: str
) -> None:
    url = given.pop("url", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=option):
        Tier(offload, url, fail_open=False, **given)
    tier = Tier(offload, url, **given)
    assert tier.tier.lookup(KEYS[0], tier.request) is MISS
    assert not tier.store(KEYS[:1], [0]).success
    assert not tier.tier.has_pending_work()
    assert not tier.tier.get_stats().counts
    tier.stop()


async def test_jobs_keep_vllm_stepping_until_they_end(offload: Any, server: Server) -> None:
    def run() -> None:
        tier = Tier(offload, server.url)
        tier.tier.submit_store(SimpleNamespace(job_id=1, keys=KEYS, chunk_ids=[0, 1, 2, 3]))
        assert tier.tier.has_pending_work()
        found: list[Any] = []
        while not found:
            time.sleep(0.001)
            found = list(tier.tier.get_finished_jobs())
        assert found[0].success
        tier.stop()

    await asyncio.to_thread(run)
