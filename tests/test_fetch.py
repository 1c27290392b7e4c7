"""Fetches: whole runs of chunks as one stream, coarse levels first, usable wherever it is cut."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.backend import Miss, Reason
from kvstore.client import Client
from kvstore.errors import BackendBusyError, BackendError, BackendUnavailableError
from kvstore.fetch import fetch_run
from kvstore.frame import Frame, pack_frame, padded_bytes
from kvstore.header import Header
from kvstore.keys import ChunkKey
from kvstore.stream import RECORD_BYTES, STREAM_TYPE, Fetch, Fetched, stream_bytes, stream_views
from kvstore.testing import make_frame, make_key
from kvstore.wire import DIGESTS_TYPE, BodyReader
from tests.conftest import Answer, Server, Start
from tests.frames import frame_bytes

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key, (400, 300, 200), groups=(2, 1)) for key in KEYS]
NAMESPACE = KEYS[0][:16].hex()
DIGESTS = {"Content-Type": DIGESTS_TYPE}
RECORD = struct.Struct("<BBHIIIQQ")


@pytest.fixture
async def server(start: Start) -> Server:
    return await start(disk_bytes=0)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.url) as client:
        yield client


async def ask(server: Server, keys: Sequence[ChunkKey], **query: Any) -> Answer:
    params = {"namespace": NAMESPACE} | {name: str(value) for name, value in query.items()}
    body = b"".join(key[16:] for key in keys)
    return await server.ask("POST", "/v1/fetch", params=params, data=body, headers=DIGESTS)


def records(data: bytes) -> list[tuple[tuple[int, ...], bytes]]:
    """Records of a stream, read as docs/http.md says."""
    found: list[tuple[tuple[int, ...], bytes]] = []
    while data:
        kind, level, group, chunk, plane, zero, length, checksum = RECORD.unpack(data[:RECORD_BYTES])
        assert zero == 0
        found.append(((kind, level, group, chunk, plane, checksum), data[RECORD_BYTES : RECORD_BYTES + length]))
        data = data[RECORD_BYTES + length :]
    return found


class Stream:
    """A body that has come as far as it will."""

    def __init__(self, data: bytes, part_bytes: int = 1 << 16) -> None:
        self._parts = [data[start : start + part_bytes] for start in range(0, len(data), part_bytes)]

    def at_eof(self) -> bool:
        return not self._parts

    async def readchunk(self) -> tuple[bytes, bool]:
        return self._parts.pop(0), True


def opened(data: bytes, keys: Sequence[ChunkKey] = KEYS, limit_bytes: int = 1 << 20) -> Fetch:
    return Fetch(BodyReader(Stream(data), limit_bytes, None), keys)  # type: ignore[arg-type]


async def _read(fetch: Fetch) -> int:
    return len([arrived async for arrived in fetch])


async def result(data: bytes, keys: Sequence[ChunkKey] = KEYS, limit_bytes: int = 1 << 20) -> Fetched:
    fetch = opened(data, keys, limit_bytes)
    await _read(fetch)
    return fetch.fetched()


def bytes_of(frames: Sequence[Frame], miss: Miss | None = None) -> bytes:
    data = b"".join(stream_views(frames, miss))
    assert len(data) == stream_bytes(frames, miss)
    return data


def sizes(frames: Sequence[Frame]) -> list[bytes]:
    return [frame_bytes(frame) for frame in frames]


# What a server sends


async def test_a_stream_has_heads_first_and_then_levels_of_all_chunks(server: Server) -> None:
    for frame in FRAMES[:3]:
        await server.put(frame)
    answer = await ask(server, KEYS[:4])
    assert (answer.status, answer.headers["Content-Type"]) == (200, STREAM_TYPE)
    found = records(answer.body)
    assert [payload for _, payload in found[:3]] == [frame.head.raw for frame in FRAMES[:3]]
    assert found[3] == ((1, 0, 0, 3, 0, 0), b"absent")
    places = [(level, group, chunk, plane) for (_, level, group, chunk, plane, _), _ in found[4:]]
    assert places == [(level, group, chunk, 0) for level in range(3) for group in range(2) for chunk in range(3)]
    for (_, level, group, chunk, _, checksum), payload in found[4:]:
        segment = FRAMES[chunk].head.segments[2 * level + group]
        assert (checksum, len(payload)) == (segment.checksum, padded_bytes(segment.length))


async def test_a_level_and_what_a_tier_has_limit_the_stream(server: Server, client: Client) -> None:
    await client.put([(frame.key, frame.truncated(level)) for frame, level in zip(FRAMES[:3], (2, 0, 1), strict=True)])
    whole = await fetch_run(client, KEYS[:3])
    assert whole == Fetched([FRAMES[0], FRAMES[1].truncated(0), FRAMES[2].truncated(1)], None)
    assert [frame.levels for frame in (await fetch_run(client, KEYS[:3], level=1)).frames] == [2, 1, 2]
    assert [(await ask(server, KEYS[:1], level=level)).status for level in (0, 15)] == [200, 200]


async def test_planes_and_groups_may_differ_from_chunk_to_chunk(client: Client) -> None:
    rng = random.Random(0)
    planes = [(("k", "v"), ("k.1",)), (("k",),), (("a", "b", "c"), ("d",), ("e", "f"))]
    frames = []
    for key, names, groups in zip(KEYS, planes, [(1,), (3, 3, 1), (2, 2)], strict=False):
        header = Header(key, 256, 0, groups, names, ({"stage": "test"},))
        frames.append(
            pack_frame(header, [rng.randbytes(rng.randrange(1, 99)) for _ in range(sum(header.segment_counts()))])
        )
    await client.put([(frame.key, frame) for frame in frames])
    async with client.fetch(KEYS[:3]) as fetch:
        arrived = [one async for one in fetch]
    assert sizes(fetch.fetched().frames) == sizes(frames)
    order = [(one.level, one.group, one.chunk) for one in arrived]
    assert order == sorted(order)
    for chunk, frame in enumerate(frames):
        mine = [(one.level, one.group, one.plane, bytes(one.data)) for one in arrived if one.chunk == chunk]
        assert mine == [(level, group, name, bytes(view)) for level, group, name, view in frame.segments()]


async def test_blobs_and_frames_of_no_bytes_stream_as_others_do(server: Server, client: Client) -> None:
    empty = make_frame(KEYS[1], (0,))
    await server.put(empty)
    await server.ask("PUT", f"/v1/kv/{NAMESPACE}/{KEYS[0][16:].hex()}", data=b"hello")
    frames, miss, cut = await fetch_run(client, KEYS[:2])
    assert (len(frames), miss, cut) == (2, None, None)
    assert bytes(frames[0].payload[0][:5]) == b"hello"
    assert frames[1] == empty


async def test_a_run_ends_at_its_first_miss(client: Client) -> None:
    await client.put([(KEYS[0], FRAMES[0]), (KEYS[2], FRAMES[2])])
    assert await fetch_run(client, KEYS[:3]) == Fetched([FRAMES[0]], Miss(Reason.ABSENT))
    assert await fetch_run(client, KEYS[1:3]) == Fetched([], Miss(Reason.ABSENT))


async def test_a_fetch_waits_for_its_chunks(server: Server, client: Client) -> None:
    await server.put(FRAMES[0])
    fetched = asyncio.create_task(fetch_run(client, KEYS[:2], wait_ms=60_000))
    async with asyncio.timeout(10):
        while await server.metric("kvstore_waiting") != 1:
            await asyncio.sleep(0.01)
        await server.put(FRAMES[1])
        assert await fetched == Fetched(FRAMES[:2], None)
    assert await fetch_run(client, KEYS[:3], wait_ms=20) == Fetched(FRAMES[:2], Miss(Reason.ABSENT))


async def test_what_does_not_fit_into_the_room_comes_with_the_next_stream(start: Start) -> None:
    frames = [make_frame(key, (4000, 4000)) for key in KEYS]
    server = await start(disk_bytes=0, fetch_bytes_max=3 * frames[0].size_bytes)
    async with Client(server.url) as client:
        await client.put([(frame.key, frame) for frame in frames])
        async with client.fetch(KEYS) as fetch:
            assert len([one async for one in fetch]) == 6
        assert fetch.fetched() == Fetched(frames[:3], None)
        assert await fetch_run(client, KEYS) == Fetched(frames, None)
        large = make_frame(make_key(9), (40_000,))
        await client.put([(large.key, large)])
        assert (await fetch_run(client, [large.key])).frames == [large], "a chunk larger than the room goes alone"


async def test_streams_that_nobody_reads_hold_a_bounded_room(start: Start) -> None:
    large = [make_frame(key, (20 << 20,)) for key in KEYS[:2]]
    server = await start(disk_bytes=0, fetch_bytes_max=30 << 20)
    async with Client(server.url) as client:
        await client.put([(frame.key, frame) for frame in large])
        async with client.fetch(KEYS[:1]) as stalled:
            iterator = aiter(stalled)
            assert await server.metric("kvstore_fetching_bytes") == large[0].size_bytes
            with pytest.raises(BackendBusyError):
                await fetch_run(client, KEYS[1:2])
            assert (await anext(iterator)).chunk == 0
        async with asyncio.timeout(10):
            while await server.metric("kvstore_fetching_bytes"):
                await asyncio.sleep(0.01)
        assert (await fetch_run(client, KEYS[1:2])).frames == large[1:]


async def test_tenants_fetch_their_own(start: Start) -> None:
    server = await start(disk_bytes=0, token="one", tenants={"b": "two"}, tenant_secret="x")
    async with Client(server.url, token="one") as one, Client(server.url, token="two") as two:
        await one.put([(KEYS[0], FRAMES[0])])
        await two.put([(KEYS[0], FRAMES[0]), (KEYS[1], FRAMES[1])])
        assert len((await fetch_run(one, KEYS[:2])).frames) == 1
        assert await fetch_run(two, KEYS[:2]) == Fetched(FRAMES[:2], None)


async def test_a_bad_fetch_is_refused(server: Server) -> None:
    params = {"namespace": NAMESPACE}
    for body, code in ((b"", "bad-request"), (bytes(31), "bad-key"), (bytes(32 * 1025), "bad-request")):
        await server.refused("POST", "/v1/fetch", 400, code, params=params, data=body, headers=DIGESTS)
    for query, code in (
        ({"level": "16"}, "bad-request"),
        ({"namespace": "x"}, "bad-key"),
        ({"wait_ms": "x"}, "bad-request"),
    ):
        body = KEYS[0][16:]
        await server.refused("POST", "/v1/fetch", 400, code, params=params | query, data=body, headers=DIGESTS)
    await server.refused("POST", "/v1/fetch", 415, "bad-media-type", params=params, data=KEYS[0][16:])


# Where a stream is cut


async def test_wherever_a_stream_is_cut_the_levels_before_are_complete() -> None:
    frames = FRAMES[:3]
    data = bytes_of(frames)
    ends = _level_ends(frames)
    # Around every end of a level, and at a prime distance elsewhere.
    for end in sorted(
        {*range(0, len(data), 7), *(end + near for end in ends for near in (-1, 0, 1))} - {len(data), len(data) + 1}
    ):
        found = await result(data[:end], KEYS[:3])
        complete = sum(1 for level_end in ends if level_end <= end)
        assert found.cut == Miss(Reason.CORRUPT)
        if complete:
            assert all(frame.levels >= complete for frame in found.frames)
            assert len(found.frames) == 3
            assert found.miss is None
        for frame, whole in zip(found.frames, frames, strict=False):
            frame.verify(whole.key)
            assert frame == whole.truncated(frame.levels - 1)
    assert await result(data, KEYS[:3]) == Fetched(frames, None)


def _level_ends(frames: Sequence[Frame]) -> list[int]:
    """Where in a stream each level of all chunks is complete."""
    end = sum(RECORD_BYTES + len(frame.head.raw) for frame in frames)
    ends = []
    for level in range(3):
        end += sum(2 * RECORD_BYTES + len(frame.payload[level]) for frame in frames)
        ends.append(end)
    return ends


async def test_a_client_that_stops_keeps_the_levels_that_came(server: Server, client: Client) -> None:
    frames = [make_frame(key, (2000, 4 << 20, 8 << 20)) for key in KEYS[:3]]
    await client.put([(frame.key, frame) for frame in frames])
    async with client.fetch(KEYS[:3]) as fetch:
        async for arrived in fetch:
            if (arrived.level, arrived.chunk) == (1, 1):
                break
    found = fetch.fetched()
    assert found == Fetched([frames[0].truncated(1), frames[1].truncated(1), frames[2].truncated(0)], None, found.cut)
    async with asyncio.timeout(10):
        while await server.metric("kvstore_fetching_bytes"):
            await asyncio.sleep(0.01)
    assert (await fetch_run(client, KEYS[:3])).cut is None, "the next fetch is a whole one"


async def test_what_the_callers_block_raises_is_the_callers(client: Client) -> None:
    await client.put([(KEYS[0], FRAMES[0])])
    with pytest.raises(TimeoutError):
        async with client.fetch(KEYS[:1]):
            raise TimeoutError


@asynccontextmanager
async def stalling(data: bytes, status: int = 200, *, announced: int | None = None) -> AsyncIterator[Client]:
    """A client of a server that sends some bytes and then nothing; with `announced` it hangs up instead."""
    released = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != "/v1/fetch":
            raise web.HTTPNotFound
        response = web.StreamResponse(status=status)
        if announced is not None:
            response.content_length = announced
        await response.prepare(request)
        await response.write(data)
        if announced is None:
            await released.wait()
        elif request.transport is not None:
            request.transport.close()
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}", timeout_s=5) as client:
            yield client
    finally:
        released.set()
        await runner.cleanup()


async def test_at_the_deadline_every_chunk_has_its_complete_levels() -> None:
    data = bytes_of(FRAMES[:2])
    ends = _level_ends(FRAMES[:2])
    async with stalling(data[: ends[1] + 50]) as client, asyncio.timeout(10):
        found = await fetch_run(client, KEYS[:2], deadline_s=0.2)
    assert found == Fetched([frame.truncated(1) for frame in FRAMES[:2]], None, Miss(Reason.DEADLINE))
    async with stalling(data[: ends[0] - 1]) as client, asyncio.timeout(10):
        assert await fetch_run(client, KEYS[:2], deadline_s=0.2) == Fetched(
            [FRAMES[0].truncated(0)], Miss(Reason.DEADLINE), Miss(Reason.DEADLINE)
        )


async def test_a_server_that_does_not_begin_in_time_is_a_miss_by_deadline(server: Server, client: Client) -> None:
    async with asyncio.timeout(10):
        found = await fetch_run(client, KEYS[:2], wait_ms=60_000, deadline_s=0.2)
    assert found.frames == []
    assert found.miss in (Miss(Reason.DEADLINE), Miss(Reason.ABSENT))
    assert (await fetch_run(client, KEYS[:2], deadline_s=0)).miss == Miss(Reason.DEADLINE)
    async with Client("http://127.0.0.1:9") as nobody:
        with pytest.raises(BackendUnavailableError):
            await fetch_run(nobody, KEYS[:2], deadline_s=5)


async def test_a_server_that_hangs_up_leaves_what_came() -> None:
    data = bytes_of(FRAMES[:2])
    end = _level_ends(FRAMES[:2])[0]
    async with stalling(data[: end + 10], announced=len(data)) as client:
        found = await fetch_run(client, KEYS[:2])
    assert found == Fetched([frame.truncated(0) for frame in FRAMES[:2]], None, Miss(Reason.BREAKER))


# Servers that lie


async def test_a_damaged_segment_ends_its_chunk_at_the_level_before() -> None:
    data = bytearray(bytes_of(FRAMES[:3]))
    ends = _level_ends(FRAMES[:3])
    # The last byte of a chunk's padding, the first of another's data.
    data[ends[0] - 1] ^= 1
    assert await result(bytes(data), KEYS[:3]) == Fetched(FRAMES[:2], Miss(Reason.CORRUPT), Miss(Reason.CORRUPT))
    data[ends[0] - 1] ^= 1
    data[ends[0] + RECORD_BYTES] ^= 1
    found = await result(bytes(data), KEYS[:3])
    assert found == Fetched([FRAMES[0].truncated(0), *FRAMES[1:3]], None, Miss(Reason.CORRUPT))


@settings(max_examples=300, deadline=None)
@given(st.data())
async def test_no_flipped_byte_gives_a_wrong_frame(data: st.DataObject) -> None:
    sound = bytearray(bytes_of(FRAMES[:2], Miss(Reason.ABSENT)))
    place = data.draw(st.integers(0, len(sound) - 1))
    sound[place] ^= data.draw(st.integers(1, 255))
    found = await result(bytes(sound), KEYS[:3])
    for frame, whole in zip(found.frames, FRAMES, strict=False):
        assert frame == whole.truncated(frame.levels - 1)
    assert found.cut is not None or found.frames == FRAMES[:2]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
async def test_garbage_is_no_stream(data: bytes) -> None:
    assert (await result(data)).frames == []


def record(kind: int, level: int = 0, group: int = 0, chunk: int = 0, plane: int = 0, size: int = 0) -> bytes:
    return RECORD.pack(kind, level, group, chunk, plane, 0, size, 0)


HEAD = record(0, 3, size=len(FRAMES[0].head.raw)) + FRAMES[0].head.raw


@pytest.mark.parametrize(
    "data",
    [
        b"",
        record(7),
        record(0, 3, size=1 << 60),
        record(1, size=1 << 60),
        record(0, 3, size=4) + b"abcd",
        HEAD.replace(b"\0\3", b"\0\0", 1),
        record(0, 4, size=len(FRAMES[0].head.raw)) + FRAMES[0].head.raw,
        record(0, 0, size=len(FRAMES[0].head.raw)) + FRAMES[0].head.raw,
        record(0, 3, chunk=1, size=len(FRAMES[1].head.raw)) + FRAMES[1].head.raw,
        record(0, 3, size=len(FRAMES[1].head.raw)) + FRAMES[1].head.raw,
        record(1, chunk=0, size=6) + b"absent" + record(1, chunk=0, size=6) + b"absent",
        record(1, chunk=0, size=6) + b"absent" + HEAD,
        record(2),
        HEAD + record(2, level=1),
        HEAD + record(2, size=1 << 60),
        HEAD + record(2, size=400) + bytes(400),
        HEAD + HEAD,
    ],
)
async def test_a_stream_that_cannot_be_gives_nothing(data: bytes) -> None:
    found = await result(data)
    assert (found.frames, found.cut) == ([], Miss(Reason.CORRUPT))


async def test_chunks_larger_than_may_come_are_refused_before_anything_is_allocated() -> None:
    header = Header(KEYS[0], 256, 0, (1,), (("k",),), ({"stage": "test"},))
    frame = pack_frame(header, [bytes(300_000)])
    data = bytes_of([frame])
    assert (await result(data, KEYS, limit_bytes=200_000)).frames == []
    announced = Fetch(BodyReader(Stream(data[:2000]), 1 << 30, 2000), KEYS)  # type: ignore[arg-type]
    assert await _read(announced) == 0
    assert announced.fetched() == Fetched([], Miss(Reason.CORRUPT), Miss(Reason.CORRUPT))


async def test_more_than_was_announced_is_no_whole_stream() -> None:
    found = await result(bytes_of(FRAMES[:2]) + b"x", KEYS[:2])
    assert found == Fetched(FRAMES[:2], None, Miss(Reason.CORRUPT))
    assert (await result(bytes_of(FRAMES[:3]), KEYS[:2])).frames == []


async def test_a_head_of_a_newer_format_is_a_miss_of_identity() -> None:
    data = bytearray(bytes_of(FRAMES[:1]))
    data[RECORD_BYTES + 8] = 2
    assert (await result(bytes(data))).miss == Miss(Reason.IDENTITY)


async def test_an_unknown_reason_is_absent() -> None:
    assert await result(record(1, size=5) + b"newer") == Fetched([], Miss(Reason.ABSENT))


async def test_an_empty_fetch_asks_nobody(client: Client) -> None:
    assert await fetch_run(client, []) == Fetched([], None)


async def test_an_error_of_the_server_is_an_error() -> None:
    async with stalling(b"{}", 400, announced=2) as client:
        with pytest.raises(BackendError, match="400"):
            await fetch_run(client, KEYS[:1])
