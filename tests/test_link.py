"""Links: connections that left HTTP behind carry the same requests, with the same limits, checks and errors."""

import asyncio
import json
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from kvstore.answers import MALFORMED, pack_match, pack_puts, unpack_match, unpack_puts
from kvstore.backend import Ack, Copy, Held, Match, Miss, Outcome, Reason, Stored
from kvstore.client import Client
from kvstore.config import ServerConfig
from kvstore.errors import (
    AuthError,
    BackendBusyError,
    BackendError,
    BackendFullError,
    BackendUnavailableError,
    BodyLengthError,
    BodySizeError,
)
from kvstore.frame import Frame, pack_frame
from kvstore.header import Header
from kvstore.keys import ChunkKey
from kvstore.link import PROTOCOL, Link, LinkClosedError, pack_message, unpack_message
from kvstore.link_body import IN_PARTS, LinkBody, pack_part
from kvstore.server import running_server
from kvstore.testing import make_frame
from kvstore.wire import DamagedFrameError, read_batch
from tests.conftest import Server, Start
from tests.frames import batch_bytes, flipped, frame_bytes, random_keys
from tests.tcp_relay import tcp_relay

KEY, OTHER, *MORE = random_keys(12)
NAMESPACE, DIGEST = KEY[:16], KEY[16:]
FRAME = make_frame(KEY)
LARGE = make_frame(OTHER, (300_000, 1_000_000, 70_000))
UPGRADE = f"GET /v1/link HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n\r\n".encode()
UPGRADED = 'kvstore_requests_total{route="/v1/link",status="101"}'


@pytest.fixture
async def server(start: Start) -> Server:
    """A server in this process without a disk tier."""
    return await start(disk_bytes=0)


@asynccontextmanager
async def raw_link(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that has been upgraded by hand."""
    async with server.connection() as (reader, writer):
        writer.write(UPGRADE)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        assert f"upgrade: {PROTOCOL}\r\n".encode() in head.lower()
        yield reader, writer


def message(target: str, body: bytes = b"", body_bytes: int | None = None) -> bytes:
    return pack_message(len(target), len(body) if body_bytes is None else body_bytes) + target.encode() + body


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    status, body_bytes = unpack_message(await reader.readexactly(16))
    if body_bytes != IN_PARTS:
        return status, await reader.readexactly(body_bytes)
    body = b""
    while part_bytes := struct.unpack("<Q", await reader.readexactly(8))[0]:
        body += await reader.readexactly(part_bytes)
    return status, body


async def code_of(reader: asyncio.StreamReader) -> tuple[int, str]:
    status, body = await answer_of(reader)
    return status, json.loads(body)["code"]


async def test_a_client_moves_frames_over_one_link(server: Server) -> None:
    async with Client(server.url) as client:
        stored = await client.put([(KEY, FRAME), (OTHER, LARGE)])
        assert [result.outcome for result in stored] == [Outcome.WRITTEN] * 2
        found = await client.get([KEY, MORE[0], OTHER])
        assert isinstance(found[0], Frame)
        assert isinstance(found[2], Frame)
        assert (frame_bytes(found[0]), frame_bytes(found[2])) == (frame_bytes(FRAME), frame_bytes(LARGE))
        assert found[1] == Miss(Reason.ABSENT)
        [cut] = await client.get([OTHER], level=0)
        assert isinstance(cut, Frame)
        assert cut.levels == 1
        await client.trim([OTHER], level=1)
        assert [len(held.copy.level_bytes) for held in (await client.match([KEY, OTHER])).held] == [3, 2]
        await client.delete([KEY])
        assert (await client.match([KEY])).miss == Miss(Reason.ABSENT)
    assert await server.metric(UPGRADED) == 1
    assert await server.metric('kvstore_requests_total{route="/v1/get",status="200"}') == 2
    assert await server.metric("kvstore_received_bytes_total") > LARGE.size_bytes


async def test_no_more_links_are_opened_than_may_be(server: Server) -> None:
    async with Client(server.url, connections=3) as client:
        await client.put([(OTHER, LARGE)])
        found = await asyncio.gather(*(client.get([OTHER]) for _ in range(20)))
    assert all(isinstance(frame, Frame) and frame.id == LARGE.id for [frame] in found)
    assert 1 <= await server.metric(UPGRADED) <= 3


async def test_other_answers_to_an_upgrade_than_101_mean_http(server: Server) -> None:
    async def strip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A proxy that does not know the protocol and drops the header."""
        upstream_reader, upstream = await asyncio.open_connection(server.host, server.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    target.write(re.sub(rb"\r\nUpgrade: [^\r]*", b"", data) if target is upstream else data)
                    await target.drain()
            target.close()

        await asyncio.gather(copy(reader, upstream), copy(upstream_reader, writer))

    proxied = []

    async def remember(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxied.append(asyncio.current_task())
        await strip(reader, writer)

    proxy = await asyncio.start_server(remember, "127.0.0.1", 0)
    async with proxy, Client(f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}") as client:
        for key, frame in ((KEY, FRAME), (OTHER, LARGE)):
            await client.put([(key, frame)])
            [found] = await client.get([key])
            assert isinstance(found, Frame)
            assert found.id == frame.id
        assert len((await client.match([KEY, OTHER])).held) == 2
    await asyncio.gather(*filter(None, proxied))
    assert await server.metric('kvstore_requests_total{route="/v1/link",status="426"}') == 1, (
        "it is not asked each time"
    )
    assert await server.metric(UPGRADED) == 0


async def test_a_link_needs_the_token(start: Start) -> None:
    server = await start(disk_bytes=0, token="secret")
    async with Client(server.url, token="wrong") as client:
        with pytest.raises(AuthError):
            await client.match([KEY])
    async with Client(server.url, token="secret") as client:
        assert (await client.match([KEY])).held == []
    assert await server.metric(UPGRADED) == 1


async def test_tenants_on_links_do_not_meet(start: Start) -> None:
    server = await start(disk_bytes=0, tenants={"a": "token-a", "b": "token-b"}, tenant_secret="x" * 32)
    async with Client(server.url, token="token-a") as a, Client(server.url, token="token-b") as b:
        await a.put([(KEY, FRAME)])
        assert isinstance((await a.get([KEY]))[0], Frame)
        assert await b.get([KEY]) == [Miss(Reason.ABSENT)]
        assert (await b.match([KEY])).held == []
    assert await server.metric(UPGRADED) == 2


async def test_a_server_that_was_started_again_is_asked_over_a_new_link(tmp_path: Path) -> None:
    config = ServerConfig(port=0, data_dir=tmp_path, disk_bytes=0)
    async with running_server(config) as url:
        client = Client(url)
        await client.put([(KEY, FRAME)])
    again = ServerConfig(port=int(url.rsplit(":", 1)[1]), data_dir=tmp_path, disk_bytes=0)
    async with client, running_server(again):
        assert await client.get([KEY]) == [Miss(Reason.ABSENT)]
        assert [result.outcome for result in await client.put([(KEY, FRAME)])] == [Outcome.WRITTEN]


async def test_an_idle_link_does_not_hold_up_a_shutdown(start: Start) -> None:
    server = await start(disk_bytes=0, shutdown_timeout_s=60.0)
    async with Client(server.url) as client:
        await client.match([KEY])
        async with asyncio.timeout(20):
            await server.stop()
        with pytest.raises(BackendUnavailableError):
            await client.match([KEY])


async def test_a_body_over_the_limit_is_refused_and_the_link_lives_on(start: Start) -> None:
    server = await start(disk_bytes=0, body_bytes_max=1 << 20)
    async with Client(server.url) as client:
        with pytest.raises(BodySizeError):
            await client.put([(OTHER, LARGE)])
        assert (await client.put([(KEY, FRAME)]))[0].outcome is Outcome.WRITTEN
        assert (await client.match([OTHER])).held == []
    assert await server.metric(UPGRADED) == 1


async def test_too_many_bytes_in_receipt_are_busy_and_the_link_lives_on(start: Start) -> None:
    server = await start(disk_bytes=0, body_bytes_max=2 << 20, inflight_bytes_max=2 << 20)
    first, second = batch_bytes(frame_bytes(LARGE)), make_frame(MORE[1], (1_500_000,))
    async with raw_link(server) as (reader, writer), Client(server.url) as client:
        # More than half of what may be in receipt is, and stays there until its end comes.
        writer.write(message("put?ack=memory", first[:-1], len(first)))
        outcomes: list[object] = []
        while not outcomes or isinstance(outcomes[-1], list):
            await client.delete([second.key])
            outcomes += await asyncio.gather(client.put([(second.key, second)]), return_exceptions=True)
        assert isinstance(outcomes[-1], BackendBusyError)
        assert outcomes[-1].retry_after_s == 1.0
        assert (await client.match([KEY])).held == []
        writer.write(first[-1:])
        assert (await answer_of(reader))[0] == 200
        assert (await client.put([(second.key, second)]))[0].outcome is Outcome.WRITTEN
    assert await server.metric(UPGRADED) == 2


@pytest.mark.parametrize(
    ("target", "body", "status", "code"),
    [
        (
            "put",
            batch_bytes(frame_bytes(FRAME))[:16] + flipped(frame_bytes(FRAME), FRAME.size_bytes - 50),
            400,
            "frame-corrupt",
        ),
        ("put", b"\x07" * 64, 400, "frame-corrupt"),
        ("put", batch_bytes(frame_bytes(FRAME))[:-1], 413, "body-too-large"),
        ("put?ack=never", batch_bytes(frame_bytes(FRAME)), 400, "bad-request"),
        (f"get?namespace={NAMESPACE.hex()}", DIGEST[:-1], 400, "bad-key"),
        (f"get?namespace={NAMESPACE.hex()}&level=x", DIGEST, 400, "bad-request"),
        ("get?namespace=zz", DIGEST, 400, "bad-key"),
        ("get", DIGEST, 400, "bad-key"),
        (f"match?namespace={NAMESPACE.hex()}", bytes(32 * 65_537), 413, "body-too-large"),
        (f"trim?namespace={NAMESPACE.hex()}", DIGEST, 400, "bad-request"),
        ("scan?namespace=00", b"", 400, "bad-request"),
        ("", b"", 400, "bad-request"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), b"abc", 400, "bad-request"),
    ],
)
async def test_what_is_wrong_is_said_and_the_link_lives_on(
    server: Server, target: str, body: bytes, status: int, code: str
) -> None:
    async with raw_link(server) as (reader, writer):
        raw = target.encode("latin-1")
        writer.write(pack_message(len(raw), len(body)) + raw + body)
        assert await code_of(reader) == (status, code)
        # The rest of a refused body is not taken for the next message.
        writer.write(
            message("put", batch_bytes(frame_bytes(FRAME))) + message(f"get?namespace={NAMESPACE.hex()}", DIGEST)
        )
        status, stored = await answer_of(reader)
        assert (status, [result.outcome for result in unpack_puts("", 1, stored)]) == (200, [Outcome.WRITTEN])
        assert await answer_of(reader) == (200, batch_bytes(frame_bytes(FRAME)))


@pytest.mark.parametrize("head", [pack_message(1025, 0), pack_message(3, IN_PARTS)])
async def test_a_message_that_is_none_ends_the_link(server: Server, head: bytes) -> None:
    async with raw_link(server) as (reader, writer):
        writer.write(head + b"get")
        with suppress(ConnectionError):
            assert await reader.read() == b""


async def test_a_body_that_does_not_arrive_is_not_waited_for(start: Start) -> None:
    server = await start(disk_bytes=0, body_timeout_s=0.2)
    async with raw_link(server) as (reader, writer):
        writer.write(message("put", batch_bytes(frame_bytes(LARGE))[:1000], len(batch_bytes(frame_bytes(LARGE)))))
        assert await code_of(reader) == (408, "body-timeout")
        assert await reader.read() == b""
    async with raw_link(server) as (reader, writer):
        writer.write(pack_message(10, 0) + b"mat")
        assert await reader.read() == b""


async def test_a_cancelled_get_gives_its_link_up(server: Server) -> None:
    async with Client(server.url, connections=1) as client:
        await client.put([(OTHER, LARGE)])
        for turns in range(12):
            task = asyncio.create_task(client.get([OTHER] * 8))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            found = await client.get([OTHER])
            assert [frame.id for frame in found if isinstance(frame, Frame)] == [LARGE.id]


@asynccontextmanager
async def lying(
    answer: bytes, *, then_close: bool, timeout_s: float = 5, connections: int = 16
) -> AsyncIterator[Client]:
    """A client of a server that upgrades, and answers every request with these bytes."""
    upgraded = f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: {PROTOCOL}\r\nConnection: Upgrade\r\n\r\n".encode()

    tasks = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(upgraded)
            while True:
                target_bytes, body_bytes = unpack_message(await reader.readexactly(16))
                await reader.readexactly(target_bytes + body_bytes)
                writer.write(answer)
                if then_close:
                    break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with Client(f"http://127.0.0.1:{port}", timeout_s=timeout_s, connections=connections) as client:
            yield client
        await asyncio.gather(*filter(None, tasks))


DAMAGED = flipped(batch_bytes(frame_bytes(FRAME)), len(batch_bytes(frame_bytes(FRAME))) - 50)
RECORDS = pack_message(200, IN_PARTS) + pack_part(len(DAMAGED))


async def test_a_damaged_record_is_a_miss() -> None:
    async with lying(RECORDS + DAMAGED + pack_part(0), then_close=False) as client:
        assert await client.get([KEY]) == [Miss(Reason.CORRUPT)]


async def test_records_of_an_answer_that_makes_no_sense_are_misses() -> None:
    for wrong in (pack_part(1 << 62), pack_part(8) + b"\7" * 8 + pack_part(0), pack_part(20) + b"\7" * 20):
        async with lying(pack_message(200, IN_PARTS) + wrong, then_close=True) as client:
            assert await client.get([KEY, OTHER]) == [Miss(Reason.CORRUPT)] * 2


@pytest.mark.parametrize("end", [0, 7, 16, 30, len(RECORDS) + 60, len(RECORDS) + len(DAMAGED) - 1])
async def test_an_answer_that_is_cut_off_before_its_first_record_ends_is_no_answer(end: int) -> None:
    whole = RECORDS + batch_bytes(frame_bytes(FRAME))
    async with lying(whole[:end], then_close=True) as client:
        with pytest.raises(BackendUnavailableError):
            await client.get([KEY])


async def test_a_record_that_came_whole_is_kept_when_the_end_of_the_answer_is_cut_off() -> None:
    async with lying(RECORDS + batch_bytes(frame_bytes(FRAME)), then_close=True) as client:
        [found] = await client.get([KEY])
        assert isinstance(found, Frame)
        assert found.id == FRAME.id


@pytest.mark.parametrize("ask", [lambda client: client.match([KEY]), lambda client: client.put([(KEY, FRAME)])])
async def test_an_answer_of_another_shape_is_an_error(ask: Callable[[Client], Awaitable[object]]) -> None:
    for text in (b"", b"[]", b'{"stored": []}', b"\xff"):
        async with lying(pack_message(200, len(text)) + text, then_close=False) as client:
            with pytest.raises(BackendError):
                await ask(client)


@pytest.mark.parametrize("body_bytes", [(16 << 20) + 1, IN_PARTS])
async def test_a_small_answer_that_is_announced_large_is_refused_before_anything_is_allocated(body_bytes: int) -> None:
    async with lying(pack_message(200, body_bytes), then_close=False) as client:
        with pytest.raises(BodySizeError):
            await client.match([KEY])


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (Client.match, b""),
        (Client.match, pack_message(200, 100) + b"x"),
        (Client.get, b""),
        (Client.get, RECORDS + DAMAGED[:-100]),
    ],
)
async def test_who_waits_for_an_answer_waits_no_longer_than_was_said(
    ask: Callable[[Client, list[ChunkKey]], Awaitable[object]], answer: bytes
) -> None:
    async with lying(answer, then_close=False, timeout_s=0.1) as client:
        with pytest.raises(BackendUnavailableError, match=r"in 0\.1 s"):
            await ask(client, [KEY])


async def test_who_waits_for_a_link_waits_no_longer_than_was_said() -> None:
    async with lying(b"", then_close=False, timeout_s=0.1, connections=1) as client:
        asked = await asyncio.gather(*(client.match([KEY]) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in asked] == [BackendUnavailableError] * 3


SHAPES = [Copy("host", 1024, (62_720, 5), 3), Copy("disk é", 64, (1 << 39,), 1, True, True, b"a profil")]


@pytest.mark.parametrize(
    "match",
    [
        Match([], Miss(Reason.EVICTED)),
        Match([Held(None, SHAPES[0])] * 3, None),
        Match([Held(None, SHAPES[0])] * 2 + [Held(None, SHAPES[1])] + [Held(None, SHAPES[0])], Miss(Reason.ABSENT)),
    ],
)
def test_a_match_reads_back_as_it_was_packed(match: Match) -> None:
    packed = pack_match(match)
    asked = len(match.held) + (match.miss is not None)
    assert unpack_match(asked, packed) == match
    # A run may end earlier only where it says why.
    for wrong in [asked - 1] + ([asked + 1] if match.miss is None else []):
        with pytest.raises(MALFORMED):
            unpack_match(wrong, packed)
    if match.held:
        for end in range(len(packed)):
            with suppress(*MALFORMED):
                assert len(unpack_match(asked, packed[:end]).held) < len(match.held)


def test_what_became_of_puts_reads_back_as_it_was_packed() -> None:
    full = BackendFullError("host", "no room " * 1000)
    stored = [
        Stored(Outcome.WRITTEN, Ack.MEMORY),
        Stored(Outcome.FAILED, None, full),
        Stored(Outcome.EXISTS, Ack.DISK, BackendUnavailableError("s3", "down", 5.0)),
    ]
    packed = pack_puts(stored)
    found = unpack_puts("remote", 3, packed)
    assert [(result.outcome, result.ack, type(result.error)) for result in found] == [
        (result.outcome, result.ack, type(result.error)) for result in stored
    ]
    assert "no room" in str(found[1].error)
    for end in range(len(packed)):
        with pytest.raises(MALFORMED):
            unpack_puts("remote", 3, packed[:end])


def test_packed_answers_that_are_garbage_are_malformed() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        garbage = rng.randbytes(rng.randrange(60))
        for unpack in (lambda raw: unpack_match(2, raw), lambda raw: unpack_puts("remote", 2, raw)):
            with suppress(*MALFORMED):
                unpack(garbage)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Link, Link]]:
    """Two ends of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        left = socket.create_connection(listening.getsockname())
        right, _ = listening.accept()
    links = Link(left), Link(right)
    try:
        yield links
    finally:
        for link in links:
            link.close()


async def test_whatever_is_sent_arrives_however_it_is_asked_for() -> None:
    rng = random.Random(3)
    sizes = [1, 0, 16, 40, 65_535, 65_536, 65_537, 1 << 20, 12 << 20, 5, 300_000]
    parts = [rng.randbytes(size) for size in sizes]
    async with pair() as (left, right):

        async def receive() -> bytes:
            got = b""
            while len(got) < sum(sizes):
                wanted = min(rng.choice([1, 16, 70_000, 3 << 20]), sum(sizes) - len(got))
                if wanted <= 16:
                    got += await right.take(wanted)
                else:
                    buffer = bytearray(wanted)
                    seen: list[int] = []
                    await right.fill(memoryview(buffer), seen.append)
                    assert sum(seen) == wanted
                    got += buffer
            return got

        _, got = await asyncio.gather(left.send(parts), receive())
    assert got == b"".join(parts)


async def test_a_refused_arrival_leaves_the_rest_of_the_body_known() -> None:
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send([bytes(5 << 20), b"next"]))

        def refuse(size_bytes: int) -> None:
            raise BackendBusyError("server", "no")

        body = LinkBody(right, 5 << 20).bound(5 << 20, refuse)
        with pytest.raises(BackendBusyError):
            await body.fill(memoryview(bytearray(5 << 20)))
        await body.discard()
        assert await right.take(4) == b"next"
        await sending


async def test_a_buffer_larger_than_the_body_is_refused_before_anything_is_read() -> None:
    async with pair() as (_, right):
        with pytest.raises(BodyLengthError):
            await LinkBody(right, 10).fill(memoryview(bytearray(11)))
        with pytest.raises(BodyLengthError):
            await LinkBody(right, 10).take(11)


async def test_who_waits_on_a_link_that_is_closed_is_told() -> None:
    async with pair() as (left, right):
        waiting = [asyncio.create_task(left.take(1)), asyncio.create_task(left.send([bytes(64 << 20)]))]
        await asyncio.sleep(0)
        left.close()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, LinkClosedError)
        with pytest.raises(LinkClosedError):
            await right.fill(memoryview(bytearray(65 << 20)))


async def test_a_deadline_ends_whoever_still_waits_and_may_be_moved() -> None:
    loop = asyncio.get_running_loop()
    async with pair() as (left, right):
        with left.limited(loop.time() + 3600):
            waiting = asyncio.create_task(left.take(1))
            await asyncio.sleep(0)
            await right.send([b"a"])
            assert await waiting == b"a"
        # A timer is set for later than this.
        with pytest.raises(TimeoutError), left.limited(loop.time() + 0.02):
            await left.take(1)
        with left.limited(ends_s := loop.time() + 0.3):
            waiting = asyncio.create_task(left.take(1))
            await asyncio.sleep(0)
            left.reschedule(loop.time() + 3600)
            while loop.time() < ends_s + 0.01:
                await asyncio.sleep(0.01)
            await right.send([b"b"])
            assert await waiting == b"b"
        with pytest.raises(TimeoutError), right.limited(loop.time() + 0.02):
            await right.send([bytes(64 << 20)])


async def test_a_deadline_that_is_over_does_not_touch_who_waits_without_one() -> None:
    async with pair() as (left, right):
        with left.limited(asyncio.get_running_loop().time() + 0.02), pytest.raises(TimeoutError):
            await left.take(1)
        waiting = asyncio.create_task(left.take(1))
        await asyncio.sleep(0.05)
        await right.send([b"a"])
        assert await waiting == b"a"


SEGMENTED = pack_frame(
    Header(KEY, 256, 0, (1, 1), (("k", "v"), ("k",)), ({"stage": "test"},)),
    [b"", bytes(range(250)) * 40, b"a" * 33, b"", b"c" * 70_001, b"d"],
)


async def read_over_a_link(data: bytes, pieces: list[int]) -> list[Frame | Miss | DamagedFrameError]:
    """What a batch of these bytes reads as where it arrives in such pieces."""
    async with pair() as (left, right):

        async def send() -> None:
            start = 0
            for size_bytes in pieces:
                await left.send([data[start : start + size_bytes]])
                await asyncio.sleep(0)
                start += size_bytes
            await left.send([data[start:]])

        sending = asyncio.create_task(send())
        found = [record async for record in read_batch(LinkBody(right, len(data)))]
        await sending
        return found


async def test_damage_is_found_wherever_it_is_and_however_it_arrives() -> None:
    rng = random.Random(7)
    whole, other = frame_bytes(SEGMENTED), frame_bytes(FRAME)
    payload = len(SEGMENTED.head.raw)
    # Ends of segments, with the zeros that pad them, and anywhere.
    places = [payload, payload + 9_999, payload + 10_032, payload + 10_047, len(whole) - 1, len(whole) - 17]
    for position in places + [rng.randrange(payload, len(whole)) for _ in range(20)]:
        data = batch_bytes(other, flipped(whole, position), other)
        pieces = [rng.randrange(1, 60_000) for _ in range(rng.randrange(4))]
        first, damaged, last = await read_over_a_link(data, pieces)
        assert isinstance(damaged, DamagedFrameError), position
        assert isinstance(first, Frame)
        assert isinstance(last, Frame), "what follows a damaged frame is read"
        assert frame_bytes(last) == other


async def test_a_sound_frame_is_sound_however_it_arrives() -> None:
    rng = random.Random(8)
    for levels in (1, 2):
        frame = SEGMENTED.truncated(levels - 1)
        for _ in range(10):
            pieces = [rng.randrange(1, 60_000) for _ in range(rng.randrange(4))]
            [found] = await read_over_a_link(batch_bytes(frame_bytes(frame)), pieces)
            assert isinstance(found, Frame)
            assert (found.levels, frame_bytes(found)) == (levels, frame_bytes(frame))
            found.verify(KEY)


@pytest.mark.parametrize(("fault", "reason"), [("cut", Reason.BREAKER), ("stall", Reason.DEADLINE)])
async def test_what_arrived_before_the_connection_broke_is_kept(server: Server, fault: str, reason: Reason) -> None:
    frames = [(key, make_frame(key, (300_000,))) for key in MORE[:6]]
    async with (
        Client(server.url) as direct,
        tcp_relay(server.port) as relay,
        Client(relay.url, timeout_s=2) as client,
    ):
        await direct.put(frames)
        assert (await client.match([MORE[0]])).miss is None
        relay.fault, relay.after_bytes = fault, 1_000_000
        found = await client.get([key for key, _ in frames])
        whole = [frame.id for frame in found if isinstance(frame, Frame)]
        assert whole == [frame.id for _, frame in frames[:3]]
        assert found[3:] == [Miss(reason)] * 3
