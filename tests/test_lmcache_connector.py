"""The LMCache connector without LMCache: its contract as recorded, the full sequence of calls, and faults."""

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.backend import Backend, Miss, Outcome, Reason
from kvstore.backends.host import HostBackend
from kvstore.codecs import encode, named_pipeline
from kvstore.connectors import lmcache_buffers
from kvstore.connectors.lmcache_chunks import Chunk, Codec, Codecs, Shape, Shard
from kvstore.connectors.lmcache_options import LMCacheOptions, Role, SinglePlane, parse_options
from kvstore.connectors.lmcache_store import ChunkStore
from kvstore.errors import BackendUnavailableError, ConfigError, PipelineError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey, split_key
from kvstore.testing import FaultyBackend, make_frame
from tests.conftest import Server, Start
from tests.lmcache_double import (
    MEMORY_FORMAT,
    RECORD,
    Bitmap,
    Buffer,
    Controllers,
    EngineKey,
    Memory,
    ObjectKey,
    installed,
    signatures,
)

URL = "http://127.0.0.1:9"
"""Nobody listens there."""
KV = (2, 3, 16, 128)
SHARD = Shard("org/tiny", 0, 1)


@pytest.fixture
def lmcache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(lmcache_buffers, "version", lambda _: RECORD["version"])
    with installed() as module:
        yield module


def numbers(shape: Sequence[int] = KV, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blank(like: torch.Tensor) -> Buffer:
    return Buffer(torch.zeros_like(like))


def object_keys(count: int, **fields: Any) -> list[ObjectKey]:
    return [ObjectKey(bytes([number]) * 32, **fields) for number in range(count)]


def options(**given: Any) -> LMCacheOptions:
    defaults: dict[str, Any] = {"url": URL, "lookup_deadline_s": 5.0}
    return LMCacheOptions(**defaults | given)


def shape_of(dims: Sequence[int] = KV, dtype: str = "bfloat16", **known: Any) -> Shape:
    return Shape(((tuple(dims), dtype),), **known)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def chunks_of(codec: Codec, tensors: Sequence[torch.Tensor]) -> list[Chunk]:
    return [Chunk(codec.key(bytes([number])), codec, bytes_of(one)) for number, one in enumerate(tensors)]


class Stalled:
    """A store over a backend in memory that can fail and wait."""

    def __init__(self, **given: Any) -> None:
        self.options = options(**given)
        self.store = ChunkStore(self.options, self._open)
        self.codec = Codecs(self.options).of(SHARD, shape_of())
        # The probe at the start is no call of the test.
        assert self.store.probe().result() is None

    def _open(self, _: LMCacheOptions) -> Backend:
        self.inner = HostBackend(64 << 20)
        self.backend = FaultyBackend(self.inner)
        return self.backend

    def gate(self, opened: bool) -> None:
        """Let gets and puts through, or not."""
        gate = self.backend.gate
        self.store._background.submit(_set(gate, opened)).result()

    def __enter__(self) -> "Stalled":
        return self

    def __exit__(self, *_: object) -> None:
        self.gate(True)
        self.store.close()


async def _set(gate: asyncio.Event, opened: bool) -> None:
    (gate.set if opened else gate.clear)()


# The contract.


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ("lmcache.v1.distributed.l2_adapters.base:L2AdapterInterface", "KvstoreL2Adapter"),
        ("lmcache.v1.storage_backend.connector.base_connector:RemoteConnector", "KvstoreRemoteConnector"),
        ("lmcache.v1.storage_backend.connector:ConnectorAdapter", "KvstoreConnectorAdapter"),
    ],
)
def test_the_connector_has_the_methods_that_lmcache_calls(lmcache: Any, recorded: str, name: str) -> None:
    ours = getattr(lmcache, name)
    assert not inspect.isabstract(ours)
    for method, _, is_async, parameters in signatures(recorded):
        found = vars(ours).get(method)
        if found is not None and method != "__init__":
            assert list(inspect.signature(found).parameters) == parameters, method
            assert inspect.iscoroutinefunction(found) == is_async, method


def test_the_recorded_version_is_a_supported_one() -> None:
    assert RECORD["version"] in lmcache_buffers.SUPPORTED


def test_the_fields_that_the_connector_reads_are_recorded_ones() -> None:
    fields = RECORD["fields"]
    key = fields["lmcache.v1.distributed.api:ObjectKey"]
    assert key == ["chunk_hash", "model_name", "kv_rank", "object_group_id", "cache_salt"], "each is in our key"
    assert {"shapes", "dtypes"} <= set(fields["lmcache.v1.distributed.api:MemoryLayoutDesc"])
    assert {"shape", "dtype", "shapes", "dtypes"} <= set(fields["lmcache.v1.memory_management:MemoryObjMetadata"])


# Keys and bytes.


def test_keys_are_what_they_always_were() -> None:
    namespace, digest = split_key(Codecs(options()).of(SHARD, shape_of()).key(b"object", b"\x01" * 32))
    assert namespace.hex() == "9472976b08085789fad2eb5836d179b5"
    assert digest.hex() == "3f8eceb2a9cf1ed50cd7fb4b592988ffcb2d1be4958d310c3fd6e3f1b4d89741"


def test_clients_that_differ_in_anything_have_different_namespaces() -> None:
    clients: list[tuple[dict[str, Any], Shard, Shape]] = [
        ({}, SHARD, shape_of()),
        ({}, SHARD._replace(model="org/other"), shape_of()),
        ({}, Shard("org/tiny", 0, 2), shape_of()),
        ({}, Shard("org/tiny", 1, 2), shape_of()),
        ({}, SHARD, shape_of(dtype="float16")),
        ({}, SHARD, shape_of((2, 3, 32, 128))),
        ({}, SHARD, shape_of((3, 16, 128))),
        ({}, SHARD, shape_of(head_dim=64)),
        ({}, SHARD, Shape((*shape_of().parts, ((2, 1, 16, 64), "float16")))),
        ({"revision": "b"}, SHARD, shape_of()),
        ({"pipeline": "ladder-packed", "store_derived": True}, SHARD, shape_of()),
        ({"pipeline": "kivi", "store_derived": True}, SHARD, shape_of()),
    ]
    codecs = [Codecs(options(**given)).of(shard, shape) for given, shard, shape in clients]
    assert len({codec.namespace for codec in codecs}) == len(codecs)


def test_lossless_pipelines_share_their_chunks() -> None:
    codecs = [Codecs(options(pipeline=name)).of(SHARD, shape_of()) for name in ("raw", "splitzip", "zstd")]
    assert len({codec.namespace for codec in codecs}) == 1


def test_fields_of_a_key_do_not_run_into_each_other() -> None:
    codec = Codecs(options()).of(SHARD, shape_of())
    assert codec.key(b"ab", b"c") != codec.key(b"a", b"bc") != codec.key(b"abc")


@pytest.mark.parametrize("pipeline", ["raw", "splitzip", "zstd", "ladder-packed", "kivi", "fp8"])
@pytest.mark.parametrize(
    ("dims", "known"),
    [
        (KV, {}),
        (KV, {"head_dim": 64}),
        ((3, 16, 128), {}),
        ((1, 3, 16, 128), {"single_plane": SinglePlane.LATENT}),
        ((3, 16, 128), {"single_plane": SinglePlane.FUSED, "head_dim": 32}),
    ],
)
def test_chunks_come_back(pipeline: str, dims: tuple[int, ...], known: dict[str, Any]) -> None:
    chosen = options(pipeline=pipeline, store_derived=True)
    codec = Codecs(chosen).of(SHARD, shape_of(dims, **known))
    truth, out = numbers(dims), torch.zeros(dims, dtype=torch.bfloat16)
    key = codec.key(b"chunk")
    frame = codec.encode(key, bytes_of(truth))
    assert codec.decode(key, frame, bytes_of(out)) == codec.size_bytes
    error = (out.float() - truth.float()).square().sum() / truth.float().square().sum()
    unknown = len(dims) == 3 and not known
    assert error < 0.2 if not chosen.lossless and not unknown else torch.equal(out, truth)
    assert frame.head.header.tokens == 16, "a chunk that LMCache describes is stored as planes"


@pytest.mark.parametrize(
    "shape",
    [
        Shape((((16, 2, 128), "bfloat16"), ((5, 7), "float32"))),
        shape_of((5, 2, 3, 16, 128)),
        shape_of((4, 3, 16, 128)),
    ],
)
def test_what_lmcache_does_not_describe_is_stored_as_it_is(shape: Shape) -> None:
    codec = Codecs(options(pipeline="ladder-packed", store_derived=True)).of(SHARD, shape)
    truth, out = bytes_of(torch.randint(0, 256, (codec.size_bytes,), dtype=torch.uint8)), bytearray(codec.size_bytes)
    key = codec.key(b"chunk")
    assert codec.decode(key, codec.encode(key, truth), memoryview(out)) == len(truth)
    assert out == truth


def test_a_last_chunk_with_fewer_tokens_is_stored_without_loss() -> None:
    codec = Codecs(options(pipeline="ladder-packed", store_derived=True)).of(SHARD, shape_of())
    truth, out = numbers((2, 3, 5, 128)), bytearray(codec.size_bytes)
    key = codec.key(b"chunk")
    size_bytes = codec.decode(key, codec.encode(key, bytes_of(truth)), memoryview(out))
    assert size_bytes == truth.numel() * 2
    assert out[:size_bytes] == bytes_of(truth)


def test_a_pipeline_that_does_not_fit_the_planes_gives_way_to_the_raw_one() -> None:
    codec = Codecs(options(pipeline="splitzip")).of(SHARD, shape_of(dtype="float16"))
    frame = codec.encode(codec.key(b"chunk"), bytes_of(numbers(dtype=torch.float16)))
    assert [stage["stage"] for stage in frame.head.header.pipeline] == ["raw"]


def test_a_lossy_frame_is_a_miss_for_a_lossless_client() -> None:
    codec = Codecs(options()).of(SHARD, shape_of())
    assert codec.layout is not None
    key = codec.key(b"chunk")
    pair = numbers()
    planes = {name: pair[half].view(3, 16, 1, 128) for half, name in enumerate("kv")}
    lossy = encode(planes, codec.layout, named_pipeline("ladder-packed"), key=key)
    assert not isinstance(codec.decode(key, lossy, bytes_of(numbers())), int)


def test_a_frame_of_another_layout_or_key_is_a_miss() -> None:
    codec = Codecs(options()).of(SHARD, shape_of())
    other = Codecs(options()).of(SHARD, shape_of((2, 4, 16, 128)))
    key = codec.key(b"chunk")
    foreign = other.encode(other.key(b"chunk"), bytes_of(numbers((2, 4, 16, 128))))
    assert codec.decode(key, foreign, bytes_of(numbers())) == Miss(Reason.IDENTITY)
    assert isinstance(codec.decode(key, make_frame(key), bytes_of(numbers())), Miss)
    assert other.layout is not None
    planes = {name: torch.zeros(spec.shape, dtype=torch.bfloat16) for name, spec in other.layout.planes.items()}
    forged = encode(planes, other.layout, named_pipeline("raw"), key=key)
    assert codec.decode(key, forged, bytes_of(numbers())) == Miss(Reason.IDENTITY)


def test_a_head_dimension_that_divides_nothing_is_refused() -> None:
    with pytest.raises(PipelineError, match="head_dim"):
        Codecs(options(head_dim=48)).of(SHARD, shape_of())


# Options.


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({}, "url"),
        ({"url": "redis://127.0.0.1"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://127.0.0.1:kv"}, "url"),
        ({"url": "http://127.0.0.1:99999"}, "url"),
        ({"url": URL, "chunk_tokens": 256}, "chunk_tokens"),
        ({"url": URL, "pipeline": "ladder"}, "pipeline"),
        ({"url": URL, "pipeline": "ladder-repeats"}, "pipeline"),
        ({"url": URL, "pipeline": "ladder-klt"}, "pipeline"),
        ({"url": URL, "pipeline": "gzip"}, "pipeline"),
        ({"url": URL, "pipeline": "ladder-packed"}, "store_derived"),
        ({"url": URL, "level": 16}, "level"),
        ({"url": URL, "level": "high"}, "level"),
        ({"url": URL, "role": "reader"}, "role"),
        ({"url": URL, "single_plane": "mla"}, "single_plane"),
        ({"url": URL, "single_plane": "fused"}, "head_dim"),
        ({"url": URL, "head_dim": -1}, "head_dim"),
        ({"url": URL, "head_dim": 1.5}, "head_dim"),
        ({"url": URL, "deadline_s": 0}, "deadline_s"),
        ({"url": URL, "lookup_deadline_s": "soon"}, "lookup_deadline_s"),
        ({"url": URL, "queue_bytes": "much"}, "queue_bytes"),
        ({"url": URL, "local_memory": 5}, "local_memory"),
        ({"url": URL, "threads": 0}, "threads"),
        ({"url": URL, "prefill_tokens_per_s": -1}, "prefill_tokens_per_s"),
        ({"url": URL, "prefill_tokens_per_s": "fast"}, "prefill_tokens_per_s"),
        ({"url": URL, "store_derived": "perhaps"}, "store_derived"),
        ({"url": URL, "revision": 7}, "revision"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(given: dict[str, object], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        parse_options(given, {})


def test_options_may_be_texts() -> None:
    found = parse_options({"url": URL, "queue_bytes": "1MiB", "threads": "3", "fail_open": "false", "level": "0"}, {})
    assert (found.queue_bytes, found.threads, found.fail_open, found.level) == (1 << 20, 3, False, 0)
    assert parse_options({"url": URL, "prefill_tokens_per_s": "0"}, {}).prefill_tokens_per_s == 0
    assert parse_options({"url": URL, "prefill_tokens_per_s": "9e3"}, {}).prefill_tokens_per_s == 9000


def test_the_token_may_come_from_the_environment() -> None:
    assert parse_options({"url": URL}, {"KVSTORE_TOKEN": "secret"}).token == "secret"
    assert parse_options({"url": URL, "token": "mine"}, {"KVSTORE_TOKEN": "secret"}).token == "mine"
    assert "secret" not in repr(parse_options({"url": URL}, {"KVSTORE_TOKEN": "secret"}))


@pytest.mark.parametrize("role", [Role.PRODUCER, Role.CONSUMER])
def test_errors_cannot_add_up_where_a_client_only_stores_or_only_loads(role: Role) -> None:
    assert not options(pipeline="ladder-packed", role=role).lossless


# The store.


def test_a_chunk_that_arrives_after_the_deadline_is_a_miss_and_touches_no_buffer() -> None:
    with Stalled(deadline_s=0.05) as stalled:
        truth = numbers()
        [outcome] = stalled.store.store(chunks_of(stalled.codec, [truth])).result()
        assert outcome is Outcome.WRITTEN
        stalled.gate(False)
        out = torch.zeros_like(truth)
        assert stalled.store.load(chunks_of(stalled.codec, [out])).result() == [0]
        stalled.gate(True)
        assert stalled.store.status()["missed_deadline_chunks"] == 1
        assert not out.any()
        assert stalled.store.load(chunks_of(stalled.codec, [out])).result() == [stalled.codec.size_bytes]
        assert torch.equal(out, truth)


def test_a_server_that_keeps_failing_is_left_alone() -> None:
    with Stalled() as stalled:
        stalled.backend.error = BackendUnavailableError("remote", "gone")
        for _ in range(10):
            assert stalled.store.load(chunks_of(stalled.codec, [numbers()])).result() == [0]
        assert stalled.backend.calls.count("get") == 3
        status = stalled.store.status()
        assert not status["is_healthy"]
        assert "gone" in status["detail"]
        assert status["missed_breaker_chunks"] == 10


def test_what_came_before_the_connection_broke_is_loaded_and_the_server_counts_as_failing() -> None:
    with Stalled() as stalled:
        truths = [numbers(seed=seed) for seed in range(2)]
        stalled.store.store(chunks_of(stalled.codec, truths)).result()
        whole_get = stalled.inner.get

        async def get_half(keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
            return [*await whole_get(keys[:1], level=level), *[Miss(Reason.BREAKER)] * (len(keys) - 1)]

        stalled.inner.get = get_half  # type: ignore[method-assign]
        outs = [torch.zeros_like(truth) for truth in truths]
        sizes = stalled.store.load(chunks_of(stalled.codec, outs)).result()
        assert sizes == [stalled.codec.size_bytes, 0]
        assert torch.equal(outs[0], truths[0])
        status = stalled.store.status()
        assert (status["missed_breaker_chunks"], status["unavailable_errors"]) == (1, 1)


def test_what_does_not_fit_into_the_queue_is_dropped_and_counted() -> None:
    with Stalled(queue_bytes=30_000) as stalled:
        stalled.gate(False)
        first = stalled.store.store(chunks_of(stalled.codec, [numbers()]))
        second = stalled.store.store(chunks_of(stalled.codec, [numbers()]))
        assert second.result() == [Outcome.FAILED]
        assert stalled.store.status()["queued_bytes"] == stalled.codec.size_bytes
        stalled.gate(True)
        assert first.result() == [Outcome.WRITTEN]
        assert stalled.store.status()["dropped_chunks"] == 1
        assert stalled.store.store(chunks_of(stalled.codec, [numbers()])).result() == [Outcome.EXISTS]
        assert stalled.store.status()["queued_bytes"] == 0


def test_a_chunk_that_is_held_is_not_sent_again() -> None:
    with Stalled() as stalled:
        chunks = chunks_of(stalled.codec, [numbers(seed=0), numbers(seed=1)])
        assert stalled.store.store(chunks[:1]).result() == [Outcome.WRITTEN]
        assert stalled.store.store(chunks).result() == [Outcome.EXISTS, Outcome.WRITTEN]
        assert stalled.store.status()["stored_chunks"] == 2


def test_a_chunk_that_cannot_be_encoded_does_not_take_others_with_it() -> None:
    with Stalled(pipeline="ladder-packed", store_derived=True) as stalled:
        outcomes = stalled.store.store(
            chunks_of(stalled.codec, [torch.full(KV, torch.nan, dtype=torch.bfloat16), numbers()])
        ).result()
        assert outcomes == [Outcome.FAILED, Outcome.WRITTEN]


def test_roles_only_store_or_only_load() -> None:
    with Stalled(role=Role.CONSUMER) as stalled:
        chunks = chunks_of(stalled.codec, [numbers()])
        assert stalled.store.store(chunks).result() == [Outcome.FAILED]
        assert stalled.backend.calls == []
    with Stalled(role=Role.PRODUCER) as stalled:
        chunks = chunks_of(stalled.codec, [numbers()])
        assert stalled.store.store(chunks).result() == [Outcome.WRITTEN]
        assert stalled.store.find([[chunks[0].key]]).result() == [[False]]


def test_rows_are_looked_at_up_to_their_first_gap_or_chunk_by_chunk() -> None:
    with Stalled() as stalled:
        chunks = chunks_of(stalled.codec, [numbers(seed=number) for number in range(5)])
        stalled.store.store([chunks[0], chunks[3]]).result()
        keys = [chunk.key for chunk in chunks]
        rows = [keys, keys[3:], []]
        assert stalled.store.find(rows).result() == [[True, False, False, False, False], [True, False], []]
        found = stalled.store.find(rows, gaps=True).result()
        assert found == [[True, False, False, True, False], [True, False], []]


def test_a_fetch_that_is_expected_to_take_longer_than_computing_reports_no_hit() -> None:
    for tokens_per_s, fetched in [(0.0, True), (1_000.0, True), (1e8, False)]:
        with Stalled(prefill_tokens_per_s=tokens_per_s) as stalled:
            chunks = chunks_of(stalled.codec, [numbers(seed=number) for number in range(60)])
            stalled.store.store(chunks).result()
            keys = [chunk.key for chunk in chunks]
            [row] = stalled.store.find([keys], codec=stalled.codec).result()
            assert row == [fetched] * 60
            status = stalled.store.status()
            assert (status.get("found_chunks", 0), status.get("refused_chunks", 0)) == ((60, 0) if fetched else (0, 60))


def test_the_guard_learns_from_a_load_that_came_late() -> None:
    # 960 tokens in 1.5 MB: 24 ms to compute.
    with Stalled(prefill_tokens_per_s=40_000.0, deadline_s=0.3) as stalled:
        chunks = chunks_of(stalled.codec, [numbers(seed=number) for number in range(60)])
        stalled.store.store(chunks).result()

        def find() -> int:
            return sum(stalled.store.find([[one.key for one in chunks]], codec=stalled.codec).result()[0])

        assert find() == 60
        stalled.gate(False)
        assert not any(stalled.store.load(chunks).result())
        stalled.gate(True)
        assert find() == 0


def test_a_call_that_fails_before_it_is_waited_for_is_counted_and_does_not_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        work.close()
        failed: Future[Any] = Future()
        failed.set_exception(ValueError("on purpose"))
        return failed

    with Stalled() as stalled:
        with monkeypatch.context() as patch:
            patch.setattr(stalled.store._background, "submit", fail)
            asking = threading.Thread(target=stalled.store.probe, daemon=True)
            asking.start()
            asking.join(10)
            assert not asking.is_alive()
        assert stalled.store.status()["internal_errors"] == 1
        assert stalled.store.status()["calls"] == 0


def test_closing_sees_stores_through_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    stalled = Stalled()
    stalled.gate(False)
    storing = stalled.store.store(chunks_of(stalled.codec, [numbers()]))
    opener = threading.Timer(0.05, stalled.gate, [True])
    opener.start()
    stalled.store.close()
    opener.join()
    assert storing.result() == [Outcome.WRITTEN]
    assert set(threading.enumerate()) <= before
    stalled.store.close()
    assert stalled.store.load(chunks_of(stalled.codec, [numbers()])).result() == [0]
    assert stalled.store.store(chunks_of(stalled.codec, [numbers()])).result() == [Outcome.FAILED]


def test_closing_gives_up_on_a_server_that_does_not_answer() -> None:
    before = set(threading.enumerate())
    stalled = Stalled(flush_timeout_s=0.05)
    stalled.gate(False)
    storing = stalled.store.store(chunks_of(stalled.codec, [numbers()]))
    stalled.store.close()
    assert storing.result() == [Outcome.FAILED]
    assert set(threading.enumerate()) <= before


def test_a_local_tier_serves_without_the_server() -> None:
    given = options(local_memory_bytes=8 << 20)
    store = ChunkStore(given)
    codec = Codecs(given).of(SHARD, shape_of())
    truth = numbers()
    store.store(chunks_of(codec, [truth])).result()
    out = torch.zeros_like(truth)
    assert store.load(chunks_of(codec, [out])).result() == [codec.size_bytes]
    assert torch.equal(out, truth)
    store.close()


# The L2 adapter.


def adapter_of(lmcache: Any, url: str, **given: Any) -> Any:
    return lmcache.KvstoreL2Adapter({"url": url, "lookup_deadline_s": 5.0} | given, l1_memory_desc=None)


async def test_a_fresh_adapter_loads_what_another_stored(lmcache: Any, server: Server) -> None:
    keys = object_keys(4)
    truth = [numbers(seed=number) for number in range(3)]

    def store_and_load() -> None:
        writer = adapter_of(lmcache, server.url)
        stored = Controllers(writer).store(keys[:3], [Buffer(one) for one in truth])
        assert stored == 3 * truth[0].numel() * 2
        assert [key for key, _ in writer.stored] == keys[:3]
        writer.close()
        reader = adapter_of(lmcache, server.url)
        calls = Controllers(reader)
        assert calls.look_up(keys, {0: truth[0]}) == [True, True, True, False]
        buffers = [blank(one) for one in truth]
        assert calls.load(keys[:3], buffers) == [True, True, True]
        assert all(torch.equal(one.tensor, other) for one, other in zip(buffers, truth, strict=True))
        assert reader.accessed == keys[:3]
        status = reader.report_status()
        assert (status["is_healthy"], status["loaded_chunks"]) == (True, 3)
        assert calls.store(keys[:3], [Buffer(one, shapes=True) for one in truth]) == stored
        assert reader.stored == [], "what was there already is not counted as new"
        reader.close()
        reader.close()

    await asyncio.to_thread(store_and_load)


@pytest.mark.parametrize(
    "other",
    [{"model_name": "org/other"}, {"kv_rank": 0x02010201}, {"object_group_id": 1}, {"cache_salt": "tenant"}],
)
async def test_no_field_of_an_object_key_is_left_out(lmcache: Any, server: Server, other: dict[str, Any]) -> None:
    def run() -> None:
        adapter = adapter_of(lmcache, server.url)
        calls = Controllers(adapter)
        calls.store(object_keys(1), [Buffer(numbers())])
        assert calls.look_up(object_keys(1), {0: numbers(), 1: numbers()}) == [True]
        assert calls.look_up(object_keys(1, **other), {0: numbers(), 1: numbers()}) == [False]
        assert calls.load(object_keys(1, **other), [blank(numbers())]) == [False]
        adapter.close()

    await asyncio.to_thread(run)


async def test_object_groups_keep_their_own_shapes_and_gaps(lmcache: Any, server: Server) -> None:
    window = (2, 1, 16, 64)
    groups = [object_keys(3, object_group_id=group) for group in (0, 1)]
    truth = [[numbers(dims, seed) for seed in range(3)] for dims in (KV, window)]

    def run() -> None:
        adapter = adapter_of(lmcache, server.url)
        calls = Controllers(adapter)
        calls.store(groups[0], [Buffer(one) for one in truth[0]])
        # Of a sliding window only what is in it is stored.
        calls.store(groups[1][2:], [Buffer(truth[1][2])])
        shapes = {0: truth[0][0], 1: truth[1][0]}
        assert calls.look_up([*groups[0], *groups[1]], shapes) == [True, True, True, False, False, True]
        buffers = [blank(truth[0][0]), blank(truth[1][2])]
        assert calls.load([groups[0][0], groups[1][2]], buffers) == [True, True]
        assert torch.equal(buffers[1].tensor, truth[1][2])
        adapter.close()

    await asyncio.to_thread(run)


async def test_a_group_that_lmcache_does_not_describe_is_a_miss(lmcache: Any, server: Server) -> None:
    def run() -> None:
        adapter = adapter_of(lmcache, server.url)
        calls = Controllers(adapter)
        calls.store(object_keys(1), [Buffer(numbers())])
        assert calls.look_up(object_keys(2), {}) == [False, False]
        adapter.close()

    await asyncio.to_thread(run)


async def test_a_server_that_goes_away_makes_misses_that_are_counted(lmcache: Any, start: Start) -> None:
    server = await start()
    keys = object_keys(2)

    def before() -> Any:
        adapter = adapter_of(lmcache, server.url)
        Controllers(adapter).store(keys, [Buffer(numbers()), Buffer(numbers())])
        return adapter

    def after(adapter: Any) -> None:
        calls = Controllers(adapter)
        assert calls.look_up(keys, {0: numbers()}) == [False, False]
        assert calls.load(keys, [blank(numbers()), blank(numbers())]) == [False, False]
        assert calls.store(object_keys(3)[2:], [Buffer(numbers())]) == -1
        status = adapter.report_status()
        assert not status["is_healthy"]
        assert status["missed_breaker_chunks"] >= 4
        assert status["unavailable_errors"] >= 3
        adapter.close()

    adapter = await asyncio.to_thread(before)
    await server.stop()
    await asyncio.to_thread(after, adapter)


async def test_deleted_chunks_are_gone(lmcache: Any, server: Server) -> None:
    def run() -> None:
        adapter = adapter_of(lmcache, server.url)
        calls = Controllers(adapter)
        calls.store(object_keys(2), [Buffer(numbers()), Buffer(numbers())])
        adapter.delete([*object_keys(1), *object_keys(1, model_name="org/unknown")])
        # What is asked for next is answered after the deletion only if the deletion has ended; so ask until then.
        while not adapter.deleted:
            calls.look_up(object_keys(1), {0: numbers()})
        assert [key for key, _ in adapter.deleted] == object_keys(1)
        assert calls.look_up(object_keys(2), {0: numbers()}) == [False, False]
        adapter.close()

    await asyncio.to_thread(run)


@pytest.mark.parametrize("given", [{"url": "ftp://x"}, {"url": URL, "pipelin": "raw"}, {}])
def test_with_wrong_options_lmcache_runs_without_the_store(lmcache: Any, given: dict[str, Any]) -> None:
    adapter = lmcache.KvstoreL2Adapter(given)
    calls = Controllers(adapter)
    assert calls.store(object_keys(1), [Buffer(numbers())]) == -1
    assert calls.look_up(object_keys(2), {0: numbers()}) == [False, False]
    assert calls.load(object_keys(1), [blank(numbers())]) == [False]
    adapter.delete(object_keys(1))
    status = adapter.report_status()
    assert not status["is_healthy"]
    assert "pipelin" in status["detail"] or "url" in status["detail"]
    adapter.close()


@pytest.mark.parametrize("given", [{"url": "ftp://x"}, {"url": URL}, {"url": URL, "pipelin": "raw"}])
def test_or_does_not_start_where_it_is_told_so(lmcache: Any, given: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"url|pipelin"):
        lmcache.KvstoreL2Adapter(given | {"fail_open": False})
    assert set(threading.enumerate()) <= before


async def test_a_wrong_token_is_named_at_start(lmcache: Any, start: Start) -> None:
    server = await start(token="right")

    def run() -> None:
        with pytest.raises(ConfigError, match="token"):
            adapter_of(lmcache, server.url, token="wrong", fail_open=False)
        adapter = adapter_of(lmcache, server.url, token="right", fail_open=False)
        assert Controllers(adapter).store(object_keys(1), [Buffer(numbers())]) > 0
        adapter.close()

    await asyncio.to_thread(run)
    with pytest.raises(SystemExit, match="set token or KVSTORE_TOKEN"):
        await asyncio.to_thread(connect, lmcache, context_of(server.url, Memory(), token="wrong", fail_open=False))


async def test_with_a_wrong_token_lmcache_runs_without_the_store(
    lmcache: Any, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(token="right")

    def run() -> None:
        adapter = adapter_of(lmcache, server.url, token="wrong")
        calls = Controllers(adapter)
        assert calls.look_up(object_keys(2), {0: numbers()}) == [False, False]
        assert calls.store(object_keys(1), [Buffer(numbers())]) == -1
        assert adapter.report_status()["token_errors"] >= 2
        adapter.close()

    await asyncio.to_thread(run)
    assert "set token or KVSTORE_TOKEN" in caplog.text


# The remote connector.


def context_of(url: str, memory: Memory, *, mla: bool = False, **given: Any) -> Any:
    shape = torch.Size([1 if mla else 2, 3, 16, 128])
    metadata = SimpleNamespace(
        model_name="tiny",
        worker_id=0,
        world_size=1,
        use_mla=mla,
        chunk_size=16,
        kv_shape=(3, 1 if mla else 2, 16, 2, 64),
        get_shapes=lambda: [shape],
        get_dtypes=lambda: [torch.bfloat16],
    )
    extra = {f"remote_storage_plugin.kvstore.{name}": value for name, value in ({"url": url} | given).items()}
    extra |= {
        "remote_storage_plugin.kvstore.module_path": "kvstore.connectors.lmcache",
        "remote_storage_plugin.kvstore.class_name": "KvstoreConnectorAdapter",
        "remote_storage_plugin.other.url": "fs://elsewhere",
    }
    config = SimpleNamespace(extra_config=extra, use_layerwise=False, remote_serde="naive")
    return SimpleNamespace(
        url="plugin://kvstore",
        loop=asyncio.get_running_loop(),
        local_cpu_backend=memory,
        config=config,
        metadata=metadata,
        plugin_name="kvstore",
    )


def connect(lmcache: Any, context: Any) -> Any:
    adapter = lmcache.KvstoreConnectorAdapter()
    assert adapter.can_parse(context.url)
    return adapter.create_connector(context)


def test_the_plugin_answers_to_its_own_name_only(lmcache: Any) -> None:
    adapter = lmcache.KvstoreConnectorAdapter()
    asked = ["plugin://kvstore", "plugin://kvstore.second", "plugin://kvstores", "plugin://fs", "redis://kvstore"]
    assert [adapter.can_parse(url) for url in asked] == [True, True, False, False, False]


@pytest.mark.parametrize("mla", [False, True])
async def test_a_fresh_connector_gets_what_another_put(lmcache: Any, server: Server, mla: bool) -> None:
    dims = (1 if mla else 2, 3, 16, 128)
    truth = [numbers(dims, seed) for seed in range(3)]
    keys = [EngineKey(number) for number in range(4)]
    memory = Memory()
    writer = connect(lmcache, context_of(server.url, memory, mla=mla))
    await writer.put(keys[0], Buffer(truth[0]))
    await writer.batched_put(keys[1:3], [Buffer(one) for one in truth[1:]])
    await writer.close()
    memory = Memory()
    reader = connect(lmcache, context_of(server.url, memory, mla=mla))
    assert await reader.exists(keys[0])
    assert not await reader.exists(keys[3])
    assert await asyncio.to_thread(reader.exists_sync, keys[2])
    assert await asyncio.to_thread(reader.batched_contains, keys) == 3
    assert await reader.batched_async_contains("id", keys) == 3
    got = await reader.get(keys[0])
    assert torch.equal(got.tensor, truth[0])
    found = await reader.batched_get(keys)
    assert all(torch.equal(one.tensor, other) for one, other in zip(found[:3], truth, strict=True))
    assert found[3] is None
    assert [buffer.holders for buffer in memory.given] == [1, 1, 1, 1, 0], "the buffer of a miss is given back"
    assert await reader.get(EngineKey(0, tag="user%7")) is None
    assert await reader.get(EngineKey(0, worker_id=1, world_size=2)) is None
    assert await asyncio.to_thread(reader.remove_sync, keys[0])
    assert not await reader.exists(keys[0])
    assert await reader.list() == []
    await reader.close()


async def test_a_last_chunk_comes_back_with_its_own_tokens(lmcache: Any, server: Server) -> None:
    truth = numbers((2, 3, 5, 128))
    connector = connect(lmcache, context_of(server.url, Memory()))
    await connector.put(EngineKey(1), Buffer(truth))
    got = await connector.get(EngineKey(1))
    assert torch.equal(got.tensor, truth)
    await connector.close()


async def test_only_the_chunks_before_the_first_gap_are_handed_over(lmcache: Any, server: Server) -> None:
    memory = Memory()
    connector = connect(lmcache, context_of(server.url, memory))
    await connector.batched_put([EngineKey(0), EngineKey(2)], [Buffer(numbers()), Buffer(numbers())])
    found = await connector.batched_get_non_blocking("id", [EngineKey(number) for number in range(3)])
    assert len(found) == 1
    assert [buffer.holders for buffer in memory.given] == [1, 0, 0]
    await connector.close()


async def test_without_memory_there_are_misses(lmcache: Any, server: Server) -> None:
    connector = connect(lmcache, context_of(server.url, Memory(buffers=1)))
    await connector.batched_put([EngineKey(0), EngineKey(1)], [Buffer(numbers()), Buffer(numbers())])
    found = await connector.batched_get([EngineKey(0), EngineKey(1)])
    assert [one is None for one in found] == [False, True]
    await connector.close()


async def test_a_server_that_is_away_makes_misses_and_no_errors(lmcache: Any) -> None:
    memory = Memory()
    connector = connect(lmcache, context_of(URL, memory))
    await connector.put(EngineKey(0), Buffer(numbers()))
    assert not await connector.exists(EngineKey(0))
    assert await connector.get(EngineKey(0)) is None
    assert await connector.batched_async_contains("id", [EngineKey(0)]) == 0
    assert [buffer.holders for buffer in memory.given] == [0]
    await connector.close()


async def test_a_get_that_lmcache_gives_up_on_keeps_its_buffer_until_nobody_writes_to_it(
    lmcache: Any, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    memory = Memory()
    connector = connect(lmcache, context_of(server.url, memory))
    await connector.put(EngineKey(0), Buffer(numbers()))
    decoding, go_on = threading.Event(), threading.Event()
    decode = Codec.decode

    def slowly(*args: Any) -> Any:
        decoding.set()
        assert go_on.wait(30)
        return decode(*args)

    monkeypatch.setattr(Codec, "decode", slowly)
    getting = asyncio.create_task(connector.get(EngineKey(0)))
    assert await asyncio.to_thread(decoding.wait, 30)
    getting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await getting
    assert [buffer.holders for buffer in memory.given] == [1]
    go_on.set()
    await connector.close()
    assert [buffer.holders for buffer in memory.given] == [0]


async def test_lmcache_frees_its_memory_only_when_puts_have_ended(lmcache: Any, server: Server) -> None:
    memory = Memory()
    connector = connect(lmcache, context_of(server.url, memory))
    putting = asyncio.create_task(connector.put(EngineKey(0), Buffer(numbers())))
    # LMCache closes its memory from another thread, and first.
    await asyncio.to_thread(memory.close)
    assert memory.closed
    assert putting.done()
    reader = connect(lmcache, context_of(server.url, Memory()))
    assert await reader.exists(EngineKey(0))
    await reader.close()
    await connector.close()


@pytest.mark.parametrize(
    ("setting", "value"), [("use_layerwise", True), ("remote_serde", "cachegen")], ids=["layerwise", "serde"]
)
async def test_settings_of_lmcache_that_do_not_fit_are_named(
    lmcache: Any, server: Server, setting: str, value: object
) -> None:
    context = context_of(server.url, Memory())
    setattr(context.config, setting, value)
    with pytest.raises(ConfigError, match=setting):
        connect(lmcache, context)


async def test_fail_closed_ends_the_process_as_lmcache_goes_on_after_every_error(lmcache: Any) -> None:
    with pytest.raises(SystemExit, match="url"):
        connect(lmcache, context_of(URL, Memory(), fail_open=False))
    with pytest.raises(SystemExit, match="head_dim"):
        connect(lmcache, context_of(URL, Memory(), fail_open="false", head_dim="many"))
    with pytest.raises(SystemExit, match="url"):
        connect(lmcache, context_of("lm://127.0.0.1:65432", Memory(), fail_open=False))
    with pytest.raises(SystemExit, match="colour"):
        connect(lmcache, context_of(URL, Memory(), fail_open=False, colour="red"))


def test_the_double_has_what_lmcache_has() -> None:
    assert {"KV_2LTD", "KV_MLA_FMT"} <= {member.name for member in MEMORY_FORMAT}
    assert Bitmap(3).bits() == [False] * 3


def test_every_option_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "engines.md").read_text()
    names = [
        name.removesuffix("_bytes") if name.startswith("local") else name
        for name in LMCacheOptions.__dataclass_fields__
    ]
    assert [name for name in names if f"| `{name}` |" not in text.partition("## LMCache")[2]] == []
