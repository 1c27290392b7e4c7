"""The vLLM connector by contract: recorded signatures, and a small engine that calls it as the real one does.

What a real vLLM makes of it is tested by `make test-engines`.
"""

import asyncio
import dataclasses
import gc
import inspect
import random
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.connectors.vllm_options import Options
from kvstore.connectors.vllm_plan import COUNTERS
from kvstore.errors import ConfigError
from kvstore.links import Links
from tests.conftest import Server, Start
from tests.fault_proxy import fault_proxy
from tests.tcp_relay import tcp_relay
from tests.vllm_runner import Engine, Request, assert_recorded
from tests.vllm_stub import RECORD, cache_config, config, installed

CHUNK = 8


@pytest.fixture(scope="module")
def connector() -> Iterator[Any]:
    with installed() as module:
        yield module


@pytest.fixture
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy that makes faults speaks HTTP, so clients must not upgrade their connections to something else."""
    monkeypatch.setattr(Links, "refused", True)


@asynccontextmanager
async def engine(
    connector: Any, url: str, *, settings: dict[str, Any] | None = None, **extra: Any
) -> AsyncIterator[Engine]:
    """An engine of its own processes, as far as the connector can tell."""
    started = await asyncio.to_thread(Engine, connector, {"url": url} | extra, **settings or {})
    try:
        yield started
    finally:
        await asyncio.to_thread(started.shutdown)


async def serve(started: Engine, *requests: Request) -> dict[str, int]:
    """Run requests to their end, and wait until what they made is stored; the counts since the last call."""
    for request in requests:
        started.add(request)
    await asyncio.to_thread(started.run)
    for _ in range(1000):
        await asyncio.to_thread(started.step)
        if not started.worker._worker or not started.worker._worker.busy:
            break
        await asyncio.sleep(0.005)
    await asyncio.to_thread(started.step)
    counts, started.counts = started.counts, {}
    return counts


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=tokens)


def test_the_runner_gives_what_the_engine_gives() -> None:
    assert_recorded()


def test_signatures_are_those_of_the_tested_version(connector: Any) -> None:
    methods = RECORD["classes"]["KVConnectorBase_V1"] | RECORD["classes"]["SupportsHMA"]
    found = connector.KvstoreConnector
    assert not found.__abstractmethods__
    own = {name: value for name, value in vars(found).items() if not name.startswith("_") or name == "__init__"}
    assert own.keys() <= methods.keys(), "the engine never calls these"
    for name, value in own.items():
        assert type(value).__name__ == methods[name]["kind"], name
        if methods[name]["kind"] != "property":
            function = value.__func__ if isinstance(value, classmethod) else value
            parameters = [[p.name, p.kind.name] for p in inspect.signature(function).parameters.values()]
            assert parameters == [recorded[:2] for recorded in methods[name]["parameters"]], name


def test_everything_abstract_is_there(connector: Any) -> None:
    for own, base in (("WorkerMetadata", "KVConnectorWorkerMetadata"), ("KvstoreStats", "KVConnectorStats")):
        assert RECORD["classes"][base].keys() - {"__init__", "to_dict"} <= vars(getattr(connector, own)).keys()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("step_tokens", [64, 6])
async def test_a_second_engine_loads_what_the_first_computed(
    connector: Any, server: Server, caching: bool, step_tokens: int
) -> None:
    settings = {"caching": caching, "step_tokens": step_tokens}
    async with engine(connector, server.url, settings=settings) as first:
        counts = await serve(first, Request("a", prompt(1, 40)))
        assert counts["saved_tokens"] == 40
    async with engine(connector, server.url, settings=settings) as second:
        counts = await serve(second, Request("b", prompt(1, 40)))
        assert counts["loaded_tokens"] == 32
        assert second.computed_tokens == 8
        assert "saved_tokens" not in counts, "what was loaded or held is never saved again"


async def test_a_partial_tail_is_not_stored(connector: Any, server: Server) -> None:
    async with engine(connector, server.url) as first:
        assert (await serve(first, Request("a", prompt(1, 23))))["saved_tokens"] == 16


async def test_a_load_begins_behind_the_local_cache(connector: Any, server: Server) -> None:
    ids = prompt(2, 40)
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", ids))
    async with engine(connector, server.url) as second:
        # Three blocks are cached locally: they end in the middle of the second chunk.
        await serve(second, Request("b", [*ids[:12], *prompt(3, 3)]))
        counts = await serve(second, Request("c", ids))
        assert counts["loaded_tokens"] == 32 - 12


async def test_roles_are_honoured(connector: Any, server: Server) -> None:
    ids = prompt(4, 24)
    async with engine(connector, server.url, settings={"role": "kv_consumer"}) as consumer:
        assert "saved_tokens" not in await serve(consumer, Request("a", ids))
    async with engine(connector, server.url, settings={"role": "kv_producer"}) as producer:
        assert (await serve(producer, Request("b", ids)))["saved_tokens"] == 24
    async with engine(connector, server.url, settings={"role": "kv_producer"}) as producer:
        counts = await serve(producer, Request("c", ids))
        assert "loaded_tokens" not in counts
    async with engine(connector, server.url, settings={"role": "kv_consumer"}) as consumer:
        assert (await serve(consumer, Request("d", ids)))["loaded_tokens"] == 16


async def test_a_decode_engine_waits_for_the_prefill_engine(connector: Any, server: Server) -> None:
    ids = prompt(30, 40)
    async with (
        engine(connector, server.url, settings={"role": "kv_producer"}) as prefill,
        engine(connector, server.url, settings={"role": "kv_consumer"}) as decode,
    ):
        decode.add(Request("a", ids, kv_transfer_params={"do_remote_prefill": True}))
        await asyncio.to_thread(decode.step)
        assert decode.waiting, "nothing is there yet, so it is asked again"
        await serve(prefill, Request("a", ids))
        counts = await serve(decode)
        assert counts["loaded_tokens"] == 32
        assert counts["computed_tokens"] == 8


async def test_a_prefill_engine_ends_when_its_prompt_is_stored(connector: Any, server: Server) -> None:
    async with engine(connector, server.url, settings={"role": "kv_producer", "step_tokens": 12}) as prefill:
        prefill.add(Request("a", prompt(32, 40)))
        await asyncio.to_thread(prefill.run)
        assert prefill.worker._worker._queue.used_bytes == 0
    async with engine(connector, server.url) as decode:
        assert (await serve(decode, Request("a", prompt(32, 40))))["loaded_tokens"] == 32


async def test_waiting_for_a_prefill_engine_ends(connector: Any, server: Server) -> None:
    async with engine(connector, server.url, settings={"role": "kv_consumer"}, wait_s=0.1) as decode:
        counts = await serve(decode, Request("a", prompt(31, 24), kv_transfer_params={"do_remote_prefill": True}))
        assert counts["computed_tokens"] == 24
        assert "match_failures" not in counts


@pytest.mark.parametrize(
    "beside",
    [
        {"lora_request": "adapter"},
        {"mm_features": ("image",)},
        {"prompt_embeds": torch.zeros(1)},
        {"pooling_params": "mean"},
        {"resumable": True},
    ],
    ids=lambda beside: next(iter(beside)),
)
async def test_what_is_not_in_the_key_is_neither_stored_nor_served(
    connector: Any, server: Server, beside: dict[str, Any]
) -> None:
    async with engine(connector, server.url) as first:
        await serve(first, Request("plain", prompt(5, 24)))
        counts = await serve(first, Request("a", prompt(6, 24), **beside))
        assert counts == {"skipped_requests": 1, "computed_tokens": 24}
    async with engine(connector, server.url) as second:
        counts = await serve(second, Request("b", prompt(5, 24), **beside))
        assert counts == {"skipped_requests": 1, "computed_tokens": 24}


async def test_salts_keep_requests_apart(connector: Any, server: Server) -> None:
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", prompt(7, 24), cache_salt="one"))
    async with engine(connector, server.url) as second:
        assert "loaded_tokens" not in await serve(second, Request("b", prompt(7, 24), cache_salt="two"))
        assert (await serve(second, Request("c", prompt(7, 24), cache_salt="one")))["loaded_tokens"] == 16


async def test_prompts_whose_logits_are_wanted_are_not_loaded(connector: Any, server: Server) -> None:
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", prompt(8, 24)))
    async with engine(connector, server.url) as second:
        assert "loaded_tokens" not in await serve(second, Request("b", prompt(8, 24), skip_reading_prefix_cache=True))


@pytest.mark.parametrize(("fault", "reason"), [("flip", "corrupt"), ("cut", "unavailable"), ("stall", "deadline")])
async def test_a_load_that_fails_is_computed(connector: Any, server: Server, fault: str, reason: str) -> None:
    ids = prompt(9, 400)
    async with engine(connector, server.url, settings={"blocks": 128}) as first:
        await serve(first, Request("a", ids))
    async with (
        tcp_relay(server.port) as relay,
        engine(connector, relay.url, settings={"blocks": 128}, deadline_s=0.5 if fault == "stall" else 20.0) as second,
    ):
        relay.fault, relay.after_bytes = fault, 30_000
        counts = await serve(second, Request("b", ids))
        assert counts[f"failed_{reason}"] == 1, counts
        assert second.computed_tokens == 400 - counts.get("loaded_tokens", 0)
        relay.fault = ""
        # The next request is served, or does without, but is right.
        await serve(second, Request("c", ids))


@pytest.mark.usefixtures("plain_http")
async def test_a_chunk_that_failed_is_saved_again(connector: Any, server: Server) -> None:
    ids = prompt(10, 40)
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", ids))
    async with fault_proxy(server.port) as proxy, engine(connector, proxy.url) as second:
        second.add(Request("b", ids))
        await asyncio.to_thread(_until, second, lambda: bool(second.scheduler._scheduler._tracked["b"].lookup is None))
        scan = await server.ask("DELETE", f"/v1/kv/{_namespace(second)}")
        assert scan.status in (200, 204), scan.body
        counts = await serve(second)
        if "failed_absent" in counts:
            assert counts["saved_tokens"] == 40


def _until(started: Engine, done: Any) -> None:
    for _ in range(1000):
        if done():
            return
        started.scheduler.get_num_new_matched_tokens(started.waiting[0], 0)


def _namespace(started: Engine) -> str:
    return str(started.scheduler._scheduler._layouts[0].digest[:16].hex())


@pytest.mark.usefixtures("plain_http")
async def test_nothing_is_asked_while_the_server_is_away(connector: Any, server: Server) -> None:
    async with fault_proxy(server.port) as proxy, engine(connector, proxy.url) as only:
        proxy.down = True
        counts = await serve(only, Request("a", prompt(11, 24)))
        assert counts["match_failures"] == 1
        counts = await serve(only, Request("b", prompt(12, 24)))
        assert "match_failures" not in counts, "it is left alone for a while"
        assert counts["save_failures"] > 0


LOSSY: dict[str, Any] = {"pipeline": "ladder-packed", "level": 0}


async def test_chunks_behind_a_lossy_prefix_are_not_stored(connector: Any, server: Server) -> None:
    ids = prompt(13, 64)
    async with engine(connector, server.url, **LOSSY) as first:
        await serve(first, Request("a", ids[:32]))
    async with engine(connector, server.url, settings={"exact": False}, **LOSSY) as second:
        counts = await serve(second, Request("b", ids[:56]))
        assert counts["lossy_tokens"] == counts["loaded_tokens"] == 32
        assert counts["derived_tokens"] == 24
        # The same holds for whoever finds these blocks in the engine's own cache.
        counts = await serve(second, Request("c", ids))
        assert counts["derived_tokens"] == 32
        assert "saved_tokens" not in counts
        # What does not stand on them is stored.
        assert (await serve(second, Request("d", prompt(14, 24))))["saved_tokens"] == 24


async def test_derived_chunks_are_marked_and_give_way_to_exact_ones(connector: Any, server: Server) -> None:
    ids = prompt(15, 48)
    async with engine(connector, server.url, **LOSSY) as first:
        await serve(first, Request("a", ids[:24]))
    async with engine(connector, server.url, settings={"exact": False}, store_derived=True, **LOSSY) as second:
        assert (await serve(second, Request("b", ids)))["saved_tokens"] == 24
    async with engine(connector, server.url, settings={"role": "kv_producer"}, **LOSSY) as third:
        # It computes everything, and only what is inexact is replaced.
        counts = await serve(third, Request("c", ids))
        assert counts["saved_tokens"] == 24
        assert counts["save_exists"] == 3


async def test_lossy_chunks_are_not_used_where_exact_ones_are_asked_for(connector: Any, server: Server) -> None:
    ids = prompt(16, 40)
    async with engine(connector, server.url, pipeline="ladder-packed") as first:
        await serve(first, Request("a", ids))
    async with engine(connector, server.url) as second:
        counts = await serve(second, Request("b", ids))
        assert counts["failed_lossy"] == 1
        assert second.computed_tokens == 40
        counts = await serve(second, Request("c", [*ids[:24], *prompt(17, 8)]))
        assert "failed_lossy" not in counts, "it is not fetched again and again"


@pytest.mark.usefixtures("plain_http")
async def test_a_full_queue_drops_saves(connector: Any, server: Server) -> None:
    async with fault_proxy(server.port) as proxy, engine(connector, proxy.url, queue_bytes=1 << 20) as only:
        worker = only.worker._worker
        worker._queue._bytes_max = 2 * worker._layout.chunk_bytes
        proxy.hold = "/v1/put"
        only.add(Request("a", prompt(18, 64)))
        await asyncio.to_thread(only.run)
        await asyncio.to_thread(only.step)
        assert only.counts["save_dropped"] == 6
        assert worker._queue.used_bytes <= 2 * worker._layout.chunk_bytes
        proxy.hold = ""
        proxy.release.set()


@pytest.mark.usefixtures("plain_http")
async def test_shutdown_is_bounded(connector: Any, server: Server) -> None:
    async with fault_proxy(server.port) as proxy:
        started = await asyncio.to_thread(Engine, connector, {"url": proxy.url, "flush_s": 0.05})
        proxy.hold = "/v1/put"
        started.add(Request("a", prompt(19, 64)))
        await asyncio.to_thread(started.run)
        # It would wait for ever without a bound: the proxy never lets the put go.
        await asyncio.to_thread(started.shutdown)
        await asyncio.to_thread(started.shutdown)


async def test_the_guard_leaves_slow_fetches_out(connector: Any, server: Server) -> None:
    ids = prompt(20, 40)
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", ids))
    async with engine(connector, server.url, guard=True) as second:
        guard = second.scheduler._scheduler._guard
        guard.bytes_per_s, guard.prefill_tokens_per_s = 1e3, 1e6
        counts = await serve(second, Request("b", ids))
        assert counts["refused_tokens"] == 32
        assert second.computed_tokens == 40


@pytest.mark.usefixtures("plain_http")
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_storm_leaves_nothing_over(
    connector: Any, start: Start, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("kvstore.connectors.vllm_scheduler._PAUSE_S", (0.01, 0.05))
    monkeypatch.setattr("kvstore.connectors.vllm_worker._PAUSE_S", 0.01)
    server = await start()
    rng = random.Random(seed)
    bases = [prompt(100 + number, 80) for number in range(4)]
    kinds = ("error", "refuse", "cut_answer", "corrupt_answer", "delay", "stall_answer")
    async with fault_proxy(server.port, seed) as proxy:
        started = await asyncio.to_thread(
            Engine, connector, {"url": proxy.url, "deadline_s": 0.3}, blocks=96, step_tokens=24
        )
        proxy.kinds, proxy.stall_s, proxy.delay_s = kinds, 0.6, 0.01
        proxy.share = 0.2
        before = _open_files(), threading.active_count()
        # Which requests meet which fault is up to the threads; it goes on until loads have met some.
        while not {"loaded_tokens", "failed_tokens"} <= started.counts.keys():
            await asyncio.to_thread(_storm, started, rng, bases, 60)
        proxy.share = 0.0
        counts = await serve(started)
        assert counts["loaded_tokens"] > 0
        assert counts.get("failed_tokens", 0) > 0, counts
        assert sorted(started.free) == list(range(1, 96)), "blocks are left over"
        scheduler, worker = started.scheduler._scheduler, started.worker._worker
        assert not scheduler._tracked
        assert not scheduler._skipped
        assert not worker._loading
        assert not worker._in_flight
        assert worker._queue.used_bytes == 0
        assert threading.active_count() <= before[1] + 8
        await asyncio.to_thread(started.shutdown)
    gc.collect()
    assert _open_files() <= before[0] + 8
    own = ("kvstore-scheduler", "kvstore-worker", "kvstore-encode")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(own)]


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _storm(started: Engine, rng: random.Random, bases: list[list[int]], requests: int) -> None:
    """Requests that share prefixes come, are aborted and preempted at random."""
    for number in range(requests):
        base = rng.choice(bases)
        ids = base[: rng.randrange(8, 80)] + prompt(number, rng.randrange(1, 20))
        salt = rng.choice([None, None, "salt"])
        started.add(Request(f"r{number}", ids, cache_salt=salt))
        for _ in range(rng.randrange(4)):
            started.step()
            if rng.random() < 0.15 and started.requests:
                known = [name for name in started.requests if name not in started.ended_remote]
                if known:
                    started.abort(rng.choice(known))
            if rng.random() < 0.1 and started.running:
                started.preempt(rng.choice(started.running))
        if len(started.requests) > 12:
            started.run()
    started.run()


async def test_stored_chunks_are_announced(connector: Any, server: Server) -> None:
    ids = prompt(33, 20)
    async with engine(connector, server.url, settings={"events": True}) as first:
        first.add(Request("a", ids, cache_salt="salt"))
        request = first.requests["a"]
        await asyncio.to_thread(first.run)
        # The engine goes on stepping until the workers have said what became of the chunks.
        while first.scheduler.has_pending_push_work():
            await asyncio.to_thread(first.step)
        hashes = request.block_hashes
        assert [event.block_hashes for event in first.events] == [hashes[:2], hashes[2:4]]
        assert [event.parent_block_hash for event in first.events] == [None, hashes[1]]
        assert [event.token_ids for event in first.events] == [ids[:CHUNK], ids[CHUNK : 2 * CHUNK]]
        assert [event.extra_keys for event in first.events] == [[("salt",), None], [None, None]]
        assert {(event.medium, event.block_size) for event in first.events} == {("STORAGE", 4)}
        assert not first.scheduler._scheduler._events._saving
    async with engine(connector, server.url) as second:
        await serve(second, Request("b", ids))
        assert not second.events, "nobody asked for them"


@pytest.mark.usefixtures("plain_http")
async def test_chunks_that_are_not_stored_are_not_announced(connector: Any, server: Server) -> None:
    async with (
        fault_proxy(server.port) as proxy,
        engine(connector, proxy.url, settings={"events": True}) as only,
    ):
        proxy.down = True
        await serve(only, Request("a", prompt(34, 20)))
        while only.scheduler.has_pending_push_work():
            await asyncio.to_thread(only.step)
        assert not only.events


async def test_lost_chunks_are_announced(connector: Any, server: Server) -> None:
    ids = prompt(35, 400)
    async with engine(connector, server.url, settings={"blocks": 128}) as first:
        await serve(first, Request("a", ids))
    async with (
        tcp_relay(server.port) as relay,
        engine(connector, relay.url, settings={"blocks": 128, "events": True}) as second,
    ):
        relay.fault, relay.after_bytes = "flip", 30_000
        request = Request("b", ids)
        await serve(second, request)
        removed = [event for event in second.events if not hasattr(event, "token_ids")]
        [lost] = removed
        first_block = second.computed_tokens and request.block_hashes.index(lost.block_hashes[0])
        assert lost.block_hashes == request.block_hashes[first_block : first_block + 2]
        assert lost.medium == "STORAGE"


def test_counters_appear_under_their_names(connector: Any) -> None:
    seen: dict[str, float] = {}

    class Counter:
        def __init__(self, name: str, documentation: str, labelnames: list[str]) -> None:
            self.name = name
            assert documentation
            assert labelnames == ["engine"]

        def labels(self, *values: object) -> "Counter":
            return self

        def inc(self, amount: float) -> None:
            seen[self.name] = seen.get(self.name, 0) + amount

    metrics = connector.KvstoreConnector.build_prom_metrics(None, {"counter": Counter}, ["engine"], {0: ["0"]})
    stats = connector.KvstoreStats({"loads": 1}).aggregate(connector.KvstoreStats({"loads": 2, "queries": 1}))
    metrics.observe(stats.data, 0)
    assert seen == {"vllm:kvstore_loads": 3, "vllm:kvstore_queries": 1}
    assert connector.KvstoreConnector.build_kv_connector_stats().is_empty()


BAD_OPTIONS = [
    ({"url": None}, "option 'url'"),
    ({"url": "ftp://x"}, "http://"),
    ({"chunk_tokens": 30}, "set chunk_tokens to 32"),
    ({"chunk_tokens": 0}, "option 'chunk_tokens'"),
    ({"chunk_token": 32}, "known: url, token"),
    ({"pipeline": "zip"}, "pipeline: no pipeline is called 'zip'"),
    ({"pipeline": "ladder-klt"}, "option 'artefact'"),
    ({"artefact": "/nowhere"}, "artefact: cannot read /nowhere"),
    ({"level": -1}, "option 'level'"),
    ({"level": True}, "option 'level'"),
    ({"deadline_s": 0}, "option 'deadline_s'"),
    ({"queue_bytes": "1 cow"}, "option 'queue_bytes'"),
    ({"queue_bytes": 1}, "at least 1MiB"),
    ({"store_derived": "yes"}, "true or false"),
    ({"local_memory": -1}, "option 'local_memory'"),
    ({"token": ""}, "option 'token'"),
]


@pytest.mark.parametrize(("extra", "message"), BAD_OPTIONS, ids=[str(extra) for extra, _ in BAD_OPTIONS])
def test_a_bad_option_is_named_with_its_remedy(
    connector: Any, extra: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"url": "http://127.0.0.1:9", "revision": "1", "chunk_tokens": 32}
    for role in connector.KVConnectorRole:
        with pytest.raises(ConfigError, match=re.escape(message)):
            connector.KvstoreConnector(config(extra=good | extra | {"fail_open": False}), role, cache_config())
        caplog.clear()
        _runs_without(connector.KvstoreConnector(config(extra=good | extra), role, cache_config()))
        assert message in caplog.text
        assert "fail_open" in caplog.text


def _runs_without(found: Any) -> None:
    """Every call of the engine is answered as if there were no cache."""
    request = Request("a", [1] * 100)
    assert found.get_num_new_matched_tokens(request, 0) == (0, False)
    found.on_new_request(request)
    found.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: ([],)), 0)
    found.bind_connector_metadata(found.build_connector_meta(None))
    found.register_kv_caches({})
    found.start_load_kv(None)
    found.save_kv_layer("x", torch.zeros(1), None)
    found.wait_for_save()
    assert found.get_finished(set()) == (None, None)
    assert found.get_block_ids_with_load_errors() == set()
    assert found.get_kv_connector_stats() is None
    assert found.build_connector_worker_meta() is None
    assert found.request_finished(request, []) == (False, None)
    found.shutdown()


@pytest.mark.parametrize("where", ["read_layouts", "WorkerSide", "SchedulerSide", "Client", "probe_orders"])
async def test_an_error_that_nobody_foresaw_costs_the_cache_only(
    connector: Any, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    ids = prompt(36, 40)
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", ids))
    monkeypatch.setattr(connector, where, broken)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        await asyncio.to_thread(Engine, connector, {"url": server.url, "fail_open": False})
    async with engine(connector, server.url) as second:
        assert "nobody foresaw this" in caplog.text
        assert "Traceback" in caplog.text
        # The scheduler's half may have started, and then its loads must end.
        counts = await serve(second, Request("b", ids))
        assert second.computed_tokens == 40
        assert "loaded_tokens" not in counts
        assert "saved_tokens" not in counts
    gc.collect()
    assert threading.active_count() <= before + 8


BAD_ENGINES = [
    ({"sliding_window": 128}, {}, "sliding_window"),
    ({"dtype": torch.float8_e4m3fn}, {}, "kv_cache_dtype"),
    ({}, {"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
    ({}, {"speculative_config": SimpleNamespace(method="eagle")}, "draft model"),
    ({}, {"model_config__revision": "main"}, "set option 'revision'"),
]


@pytest.mark.parametrize(("spec", "changes", "message"), BAD_ENGINES, ids=[case[2] for case in BAD_ENGINES])
def test_models_that_cannot_be_served_are_refused(
    connector: Any, spec: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    extra = {"url": "http://127.0.0.1:9", "fail_open": False}
    if "revision" not in message:
        extra["revision"] = "1"
    with pytest.raises(ConfigError, match=message):
        connector.KvstoreConnector(
            config(extra=extra, **changes), connector.KVConnectorRole.WORKER, cache_config(**spec)
        )


def test_several_kinds_of_cache_are_refused(connector: Any) -> None:
    cache = cache_config()
    cache.kv_cache_groups *= 2
    extra = {"url": "http://127.0.0.1:9", "revision": "1", "fail_open": False}
    with pytest.raises(ConfigError, match="2 kinds of cache"):
        connector.KvstoreConnector(config(extra=extra), connector.KVConnectorRole.WORKER, cache)


@pytest.mark.parametrize(
    ("version", "good"), [("0.32.5", True), ("0.32.0+cpu", True), ("0.31.9", False), ("0.33.0rc1", False)]
)
def test_untested_versions_are_refused(
    connector: Any, monkeypatch: pytest.MonkeyPatch, version: str, good: bool
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    extra = {"url": "http://127.0.0.1:9", "revision": "1", "fail_open": False, "chunk_tokens": CHUNK}
    if good:
        connector.KvstoreConnector(config(extra=extra), connector.KVConnectorRole.WORKER, cache_config()).shutdown()
        return
    with pytest.raises(ConfigError, match=rf"vLLM {re.escape(version)}.*untested_version"):
        connector.KvstoreConnector(config(extra=extra), connector.KVConnectorRole.WORKER, cache_config())
    wanted = config(extra=extra | {"untested_version": True})
    connector.KvstoreConnector(wanted, connector.KVConnectorRole.WORKER, cache_config()).shutdown()


def test_an_unreachable_server_stops_who_wants_that(connector: Any, free_port: int) -> None:
    extra = {"url": f"http://127.0.0.1:{free_port}", "revision": "1", "chunk_tokens": CHUNK}
    role = connector.KVConnectorRole.SCHEDULER
    with pytest.raises(ConfigError, match=r"option 'url'.*kvstore serve"):
        connector.KvstoreConnector(config(extra=extra | {"fail_open": False}), role, cache_config())
    opened = connector.KvstoreConnector(config(extra=extra), role, cache_config())
    assert opened._scheduler is not None, "the server may come later"
    opened.shutdown()


async def test_a_wrong_token_is_named(connector: Any, start: Start, tmp_path: Path) -> None:
    server = await start(token="right")
    extra = {"url": server.url, "revision": "1", "chunk_tokens": CHUNK, "token": "wrong", "fail_open": False}
    role = connector.KVConnectorRole.SCHEDULER
    with pytest.raises(ConfigError, match="option 'token'"):
        await asyncio.to_thread(connector.KvstoreConnector, config(extra=extra), role, cache_config())
    good = config(extra=extra | {"token": "right"})
    opened = await asyncio.to_thread(connector.KvstoreConnector, good, role, cache_config())
    await asyncio.to_thread(opened.shutdown)


def test_every_option_and_counter_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text().partition("## vLLM")[2]
    section = page.partition("\n## ")[0]
    names = [setting.name for setting in dataclasses.fields(Options)]
    assert [name for name in [*names, *COUNTERS] if f"| `{name}` |" not in section] == []
