"""What a server does with requests that are broken, hostile or cut off: it says so and stays as it was."""

import asyncio
import gzip
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvstore.testing import make_frame
from kvstore.wire import BATCH_TYPE, DIGESTS_TYPE
from tests.conftest import FRAME, Answer, Serve, Server, Start, assert_problem, path_of
from tests.frames import (
    batch_bytes,
    checksum,
    flipped,
    forge,
    forge_sound,
    frame_bytes,
    header_fields,
    level_ends,
    random_keys,
)

NEIGHBOUR, KEY, OTHER = random_keys(3)
NAMESPACE, DIGEST = KEY[:16].hex(), KEY[16:].hex()
SOUND = make_frame(KEY)
DATA = frame_bytes(SOUND)
HEAD_BYTES = len(SOUND.head.raw)
U64 = 2**64 - 1
BATCH = {"Content-Type": BATCH_TYPE}
DIGESTS = {"Content-Type": DIGESTS_TYPE}


async def _stores_nothing_else(server: Server, neighbour: bytes) -> None:
    """Check that the neighbour is all there is, that it is intact, and that the server still takes a sound frame."""
    listed = (await server.ask("GET", f"/v1/scan?namespace={NAMESPACE}")).json["chunks"]
    assert [chunk["digest"] for chunk in listed] == [NEIGHBOUR[16:].hex()]
    assert await server.bytes_of(NEIGHBOUR) == neighbour
    assert (await server.ask("PUT", path_of(KEY), data=DATA, headers=FRAME)).status == 201
    assert await server.bytes_of(KEY) == DATA


@pytest.fixture
async def server(start: Start) -> Server:
    """A server in this process without a disk tier, which opens faster."""
    return await start(disk_bytes=0)


@pytest.fixture
async def guarded(server: Server) -> AsyncIterator[Server]:
    """A server that holds one chunk; once the test has ended, that must be all it holds, and it must still work."""
    neighbour = make_frame(NEIGHBOUR)
    assert (await server.put(neighbour)).status == 201
    yield server
    await _stores_nothing_else(server, frame_bytes(neighbour))


async def _refuses_frame(server: Server, data: bytes, code: str | None = None) -> Answer:
    answer = await server.ask("PUT", path_of(KEY), data=data, headers=FRAME)
    assert_problem(answer, code)
    assert not await server.holds(KEY)
    return answer


async def _in_parts(data: bytes, part_bytes: int = 1 << 16) -> AsyncIterator[bytes]:
    """A body of unannounced length."""
    for start in range(0, len(data), part_bytes):
        yield data[start : start + part_bytes]


async def _raw(server: Server, request: bytes, *, half_close: bool = False) -> bytes:
    """The first answer to bytes on a bare connection; empty where the server just closes it."""
    async with server.connection() as (reader, writer):
        writer.write(request)
        if half_close:
            writer.write_eof()
        return await _read_answer(reader)


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", answer)
            answer += await reader.readexactly(int(length[1]) if length else 0)
    return answer


def _request(method: str, path: str, length: int, content_type: str, *, close: bool = True) -> bytes:
    end = "Connection: close\r\n" if close else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {length}\r\n{end}\r\n".encode()


# Keys and parameters


@pytest.mark.parametrize(
    ("namespace", "digest"),
    [
        (NAMESPACE[:-1], DIGEST),
        (NAMESPACE + "0", DIGEST),
        (NAMESPACE, DIGEST[:-1]),
        (NAMESPACE, DIGEST + "0"),
        (NAMESPACE.upper(), DIGEST),
        (NAMESPACE, DIGEST.upper()),
        ("g" + NAMESPACE[1:], DIGEST),
        (NAMESPACE, DIGEST[:-1] + "%0a"),
        (NAMESPACE, "%2e%2e%2f" * 7 + "x"),
        (NAMESPACE, "٣" * 64),
        (NAMESPACE[:-2] + "%00", DIGEST),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
async def test_a_malformed_key_is_refused(guarded: Server, method: str, namespace: str, digest: str) -> None:
    path = f"/v1/kv/{namespace}/{digest}"
    await guarded.refused(method, path, 400, "bad-key", data=b"x" if method == "PUT" else None)


async def test_an_unknown_key_is_a_miss_with_its_reason(guarded: Server) -> None:
    answer = await guarded.refused("GET", path_of(OTHER), 404, "miss")
    assert answer.json["reason"] == "absent"
    assert (await guarded.ask("HEAD", path_of(OTHER))).status == 404


@pytest.mark.parametrize("level", ["-1", "16", "99999999999999999999", "1.0", "", "²", "0x1", " 1", "all"])
@pytest.mark.parametrize("route", ["chunk", "/v1/get", "/v1/trim"])
async def test_a_bad_level_is_refused(guarded: Server, route: str, level: str) -> None:
    if route == "chunk":
        await guarded.refused("GET", path_of(NEIGHBOUR), 400, "bad-request", params={"level": level})
    else:
        query = {"namespace": NAMESPACE, "level": level}
        await guarded.refused("POST", route, 400, "bad-request", params=query, data=NEIGHBOUR[16:], headers=DIGESTS)


async def test_a_trim_names_the_level_to_keep(guarded: Server) -> None:
    path = f"/v1/trim?namespace={NAMESPACE}"
    await guarded.refused("POST", path, 400, "bad-request", data=NEIGHBOUR[16:], headers=DIGESTS)


@pytest.mark.parametrize("ack", ["", "durable", "0", "disk,memory", "memory\0"])
@pytest.mark.parametrize("route", ["chunk", "/v1/put"])
async def test_a_bad_ack_is_refused(guarded: Server, route: str, ack: str) -> None:
    method, path = ("PUT", path_of(KEY)) if route == "chunk" else ("POST", route)
    headers = FRAME if route == "chunk" else BATCH
    data = DATA if route == "chunk" else batch_bytes(DATA)
    await guarded.refused(method, path, 400, "bad-request", params={"ack": ack}, data=data, headers=headers)


@pytest.mark.parametrize("namespace", ["", NAMESPACE[:-1], NAMESPACE.upper(), None])
@pytest.mark.parametrize("route", ["match", "get", "trim", "delete", "scan"])
async def test_a_bad_namespace_in_a_query_is_refused(guarded: Server, route: str, namespace: str | None) -> None:
    query = {"level": "0"} | ({} if namespace is None else {"namespace": namespace})
    if route == "scan":
        await guarded.refused("GET", "/v1/scan", 400, "bad-key", params=query)
    else:
        await guarded.refused("POST", f"/v1/{route}", 400, "bad-key", params=query, data=b"", headers=DIGESTS)


async def test_a_bad_scan_position_is_refused(guarded: Server) -> None:
    await guarded.refused("GET", f"/v1/scan?namespace={NAMESPACE}&after=00", 400, "bad-key")


# Routes and methods


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/kv", "/v1/nothing", "/%2e%2e/etc/passwd"])
async def test_an_unknown_route_is_a_problem(guarded: Server, path: str) -> None:
    await guarded.refused("GET", path, 404, "not-found")


async def test_an_upgrade_that_a_proxy_did_not_pass_on_stays_http(guarded: Server) -> None:
    # aiohttp leaves `Connection` out of its own accord.
    await guarded.refused("GET", "/v1/link", 426, "upgrade-required", headers={"Upgrade": "kvstore-link/2"})


async def test_a_namespace_cannot_be_read(guarded: Server) -> None:
    await guarded.refused("GET", f"/v1/kv/{NAMESPACE}", 405, "method-not-allowed")


@pytest.mark.parametrize("ttl", ["", "-1", "nan", "1e3", "1_0", "forever", "2592001", "\u0661"])
async def test_a_bad_time_to_live_is_refused(guarded: Server, ttl: str) -> None:
    query = {"namespace": NAMESPACE, "ttl_s": ttl}
    await guarded.refused("POST", "/v1/pins", 400, "bad-request", params=query, data=KEY[16:], headers=DIGESTS)


@pytest.mark.parametrize("namespace", ["0" * 31, "0" * 33, "A" * 32, "no"])
async def test_a_bad_namespace_is_not_purged(guarded: Server, namespace: str) -> None:
    await guarded.refused("DELETE", f"/v1/kv/{namespace}", 400, "bad-key")


@pytest.mark.parametrize("method", ["POST", "PATCH", "OPTIONS"])
async def test_an_unsupported_method_is_a_problem(guarded: Server, method: str) -> None:
    answer = await guarded.refused(method, path_of(KEY), 405, "method-not-allowed")
    assert {"GET", "HEAD", "PUT", "DELETE"} == {name.strip() for name in answer.headers["Allow"].split(",")}


# Bodies that are cut, too long or altered


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
async def test_a_truncated_frame_is_refused_and_nothing_is_stored(guarded: Server, announced: bool) -> None:
    ends = level_ends(SOUND)
    places = {0, 1, 7, 8, 39, 40, 41, HEAD_BYTES - 24, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1}
    places |= {end + step for end in ends for step in (-16, -1, 1, 16)} - {ends[-1] + 1, ends[-1] + 16}
    for cut in sorted(places):
        data = DATA[:cut]
        body = data if announced else _in_parts(data, 100)
        answer = await guarded.ask("PUT", path_of(KEY), data=body, headers=FRAME)
        assert_problem(answer)
        assert answer.json["code"] in ("frame-corrupt", "body-length"), cut
        assert not await guarded.holds(KEY), cut


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
@pytest.mark.parametrize("extra", [b"\0", b"x" * 16, DATA])
async def test_a_frame_with_bytes_behind_it_is_refused(guarded: Server, extra: bytes, announced: bool) -> None:
    body = DATA + extra if announced else _in_parts(DATA + extra, 100)
    answer = await guarded.ask("PUT", path_of(KEY), data=body, headers=FRAME)
    assert_problem(answer)
    assert answer.json["code"] in ("frame-corrupt", "body-length")


@pytest.mark.parametrize("content_type", [FRAME["Content-Type"], "application/octet-stream"])
@pytest.mark.parametrize("sent", [0, 20, HEAD_BYTES, level_ends(SOUND)[0], len(DATA) - 1])
async def test_a_body_shorter_than_announced_stores_nothing(guarded: Server, content_type: str, sent: int) -> None:
    request = _request("PUT", path_of(KEY), len(DATA), content_type) + DATA[:sent]
    answer = await _raw(guarded, request, half_close=True)
    # Who ends the connection in mid-body need not get an answer; a 4xx is one, success is not.
    assert re.match(rb"HTTP/1.1 4\d\d|$", answer), answer


async def test_a_frame_longer_than_announced_is_refused(guarded: Server) -> None:
    async with guarded.connection() as (reader, writer):
        writer.write(_request("PUT", path_of(KEY), len(DATA) - 1, FRAME["Content-Type"]) + DATA[:-1])
        answer = await _read_answer(reader)
        writer.write(DATA[-1:])
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"frame-corrupt"' in answer


async def test_bytes_beyond_the_announced_body_are_no_part_of_it(server: Server) -> None:
    async with server.connection() as (reader, writer):
        writer.write(_request("PUT", path_of(KEY), 5, "text/plain", close=False) + b"hello")
        assert (await _read_answer(reader)).startswith(b"HTTP/1.1 201")
        writer.write(b"\0garbage\r\n\r\n" * 9)
        assert b" 400 " in await _read_answer(reader)
    assert await server.bytes_of(KEY) == b"hello"


async def test_a_broken_chunked_body_is_refused(guarded: Server) -> None:
    head = f"PUT {path_of(KEY)} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert b" 400 " in await _raw(guarded, head + b"5\r\nhello\r\nzz\r\n")


async def test_a_chunked_body_that_breaks_later_is_refused(start: Start) -> None:
    server = await start(body_timeout_s=0.1, body_bytes_max=1 << 16)
    async with _upload(server, None) as (reader, writer):
        writer.write(b"zz\r\n")
        answer = await _read_answer(reader)
    assert re.match(rb"HTTP/1.1 40[08] ", answer), answer
    assert not await server.holds(OTHER)


async def test_a_body_of_two_lengths_is_refused(guarded: Server) -> None:
    head = _request("PUT", path_of(KEY), 5, "text/plain").replace(b"Host", b"Transfer-Encoding: chunked\r\nHost")
    assert b" 400 " in await _raw(guarded, head + b"5\r\nhello\r\n0\r\n\r\n")


@pytest.mark.parametrize("content_type", [FRAME["Content-Type"], "application/octet-stream"])
async def test_a_compressed_body_is_refused(guarded: Server, content_type: str) -> None:
    headers = {"Content-Type": content_type, "Content-Encoding": "gzip"}
    await guarded.refused("PUT", path_of(KEY), 415, "bad-media-type", data=gzip.compress(DATA), headers=headers)


async def test_every_flipped_byte_of_a_head_is_found(guarded: Server) -> None:
    rng = random.Random(1)
    for position in range(HEAD_BYTES):
        code = "frame-version" if position in (8, 9) else None
        await _refuses_frame(guarded, flipped(DATA, position, rng.randrange(8)), code)


async def test_flipped_bits_of_a_payload_are_found(guarded: Server) -> None:
    rng = random.Random(2)
    places = [HEAD_BYTES, len(DATA) - 1, *(rng.randrange(HEAD_BYTES, len(DATA)) for _ in range(200))]
    for position in places:
        await _refuses_frame(guarded, flipped(DATA, position, rng.randrange(8)), "frame-corrupt")


async def test_random_bytes_are_no_frame(guarded: Server) -> None:
    rng = random.Random(3)
    for length in [*range(1, 60), *(rng.randrange(5000) for _ in range(40))]:
        await _refuses_frame(guarded, rng.randbytes(length))
        await _refuses_frame(guarded, DATA[:12] + rng.randbytes(length))


async def test_segments_that_changed_places_are_found(guarded: Server) -> None:
    first, second = make_frame(KEY, (512,), groups=(1,)), make_frame(OTHER, (512,), groups=(1,))
    swapped = first.head.raw + bytes(second.payload[0])
    await _refuses_frame(guarded, swapped, "frame-corrupt")
    payload = bytes(first.payload[0])
    await _refuses_frame(guarded, first.head.raw + payload[256:] + payload[:256], "frame-corrupt")


# Heads that lie


async def test_a_frame_that_is_right_is_taken(server: Server) -> None:
    # The other tests change this one, so it must be sound.
    data = forge_sound(KEY, b"x" * 32)
    assert (await server.ask("PUT", path_of(KEY), data=data, headers=FRAME)).status == 201
    assert await server.bytes_of(KEY) == data


async def test_another_magic_is_refused(guarded: Server) -> None:
    await _refuses_frame(guarded, b"\x89PNG\r\n\x1a\n" + DATA[8:], "frame-corrupt")


@pytest.mark.parametrize("version", [0, 2, 65535])
async def test_another_version_is_refused_as_such(guarded: Server, version: int) -> None:
    await _refuses_frame(guarded, forge(header_fields(KEY), version=version), "frame-version")


async def test_a_frame_of_another_key_is_refused(guarded: Server) -> None:
    await _refuses_frame(guarded, frame_bytes(make_frame(OTHER)), "frame-mismatch")
    assert not await guarded.holds(OTHER)


@pytest.mark.parametrize(
    "data",
    [
        forge(header_fields(KEY), header_bytes=2**32 - 1),
        forge(header_fields(KEY), header_bytes=2**16 + 64),
        forge(header_fields(KEY), header_bytes=0),
        forge(header_fields(KEY), segments=2**32 - 1),
        forge(header_fields(KEY), segments=2**14 + 8),
        forge(header_fields(KEY), segments=0),
        forge(header_fields(KEY), payload_bytes=U64),
        forge(header_fields(KEY), payload_bytes=1),
        forge(header_fields(KEY), zero_a=1),
        forge(header_fields(KEY), zero_b=1),
        forge(header_fields(KEY), [(0, U64, 0)], payload_bytes=U64),
        forge(header_fields(KEY), [(0, U64 - 15, 0)], payload_bytes=U64 - 15),
        forge(header_fields(KEY), [(0, 2**40, 0)], payload_bytes=2**40),
        forge(header_fields(KEY), [(16, 16, 0)], b"x" * 32),
        forge(header_fields(KEY), [(U64, 16, 0)], b"x" * 16),
        forge(header_fields(KEY, groups=[1, 1]), [(0, U64 - 15, 0), (U64 - 15, 16, 0)], payload_bytes=0),
        forge(header_fields(KEY, groups=[1, 1]), [(0, 16, 0), (0, 16, 0)], b"x" * 16),
        forge(header_fields(KEY, groups=[1, 1]), [(0, 16, 0)], b"x" * 16),
        forge(header_fields(KEY, groups=[1] * 1024, planes=[[f"p{n}" for n in range(64)]] * 16)),
        forge(header_fields(KEY, planes=[["k"], ["k"]]), [(0, 16, 0), (16, 0, 0)], b"x" * 16),
    ],
)
async def test_absurd_sizes_are_refused(guarded: Server, data: bytes) -> None:
    await _refuses_frame(guarded, data)
    answer = await guarded.ask("PUT", path_of(KEY), data=_in_parts(data), headers=FRAME)
    assert_problem(answer)


ABSURD_NUMBERS: list[Any] = [-1, 2**63, 10**400, 1.5, 1e300, float("nan"), float("inf"), True, None, "1", [], {}]
SOUND_NUMBERS = dict.fromkeys(("behind.kl_nats", "distortion"), (2**63, 1.5, 1e300))
NUMBER_FIELDS = ("tokens", "first_position", "groups", "behind.level", "behind.kl_nats", "distortion")


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (field, number)
        for field in NUMBER_FIELDS
        for number in ABSURD_NUMBERS
        if number not in SOUND_NUMBERS.get(field, ())
    ],
    ids=lambda part: str(part)[:20],
)
async def test_absurd_numbers_in_a_header_are_refused(guarded: Server, field: str, number: Any) -> None:
    changed = {
        "groups": [number],
        "behind.level": {"level": number, "kl_nats": 0.1},
        "behind.kl_nats": {"level": 0, "kl_nats": number},
        "distortion": {"k": [number]},
    }.get(field, number)
    await _refuses_frame(guarded, forge_sound(KEY, b"x" * 16, **{field.partition(".")[0]: changed}), "frame-corrupt")


@pytest.mark.parametrize("field", header_fields(KEY))
async def test_every_field_of_a_header_is_required(guarded: Server, field: str) -> None:
    fields = header_fields(KEY)
    del fields[field]
    await _refuses_frame(guarded, forge(fields), "frame-corrupt")


@pytest.mark.parametrize(
    "changed",
    [
        {"namespace": NAMESPACE.upper()},
        {"digest": DIGEST + "00"},
        {"digest": 7},
        {"tokens": 65537},
        {"first_position": 2**40 + 1},
        {"groups": []},
        {"groups": [0]},
        {"groups": [2**20 + 1]},
        {"groups": "1"},
        {"planes": []},
        {"planes": [[]]},
        {"planes": ["k"]},
        {"planes": [["k", "k"]]},
        {"planes": [[""]]},
        {"planes": [["k" * 65]]},
        {"planes": [["k"]] * 17},
        {"pipeline": []},
        {"pipeline": ["test"]},
        {"pipeline": [{}]},
        {"pipeline": [{"stage": 1}]},
        {"pipeline": [{"stage": "test"}] * 33},
        {"artefacts": ["00"]},
        {"artefacts": [None]},
        {"artefacts": ["0" * 64] * 33},
        {"distortion": []},
        {"distortion": {"k": [float("inf")]}},
        {"distortion": {"k": [0.0] * 17}},
        {"behind": {"level": 0}},
        {"behind": 1},
    ],
    ids=str,
)
async def test_a_field_out_of_range_is_refused(guarded: Server, changed: dict[str, Any]) -> None:
    await _refuses_frame(guarded, forge_sound(KEY, b"x" * 16, **changed), "frame-corrupt")


def _text(**changed: Any) -> str:
    return json.dumps(header_fields(KEY, **changed))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 30000,
        "[" * 30000 + "]" * 30000,
        '{"a":' * 10000 + "1" + "}" * 10000,
        _text()[:-1] + ',"x":' + "[" * 20000 + "]" * 20000 + "}",
        _text()[:-1] + f',"digest":"{OTHER[16:].hex()}"}}',
        _text().replace('"tokens"', f'"digest":"{DIGEST}","tokens"'),
        _text()[:-1] + ',"tokens":0}',
        _text(pipeline=[{"stage": "test", "step": float("nan")}]),
        _text(pipeline=[{"stage": "test", "step": float("-inf")}]),
        _text().replace("256", "1" * 5000),
        _text().replace("256", "1e999"),
        _text() + "{}",
        _text() + ",",
        "//" + _text(),
        "",
        "null",
        "[]",
        '"text"',
        _text().encode("utf-16"),
        _text().encode("utf-32-be"),
        b"\xef\xbb\xbf" + _text().encode(),
        _text(pipeline=[{"stage": "test", "ü": 1}]).replace("\\u00fc", "ü"),
        _text().encode() + b"\0",
        _text().encode() + b"\xff",
    ],
    ids=lambda text: repr(text[:24]),
)
async def test_a_header_that_readers_could_read_differently_is_refused(guarded: Server, text: str | bytes) -> None:
    await _refuses_frame(guarded, forge(text), "frame-corrupt")


@pytest.mark.parametrize(
    "changed",
    [
        {"pipeline": [{"stage": "blob"}], "groups": [1, 1], "tokens": 0},
        {"pipeline": [{"stage": "blob"}, {"stage": "test"}], "groups": [1, 1], "tokens": 0, "planes": [["blob"]]},
    ],
)
async def test_a_frame_that_only_calls_itself_a_blob_does_not_lose_bytes(
    server: Server, changed: dict[str, Any]
) -> None:
    sound = make_frame(KEY, (64,), groups=(1,))
    rows = [(segment.offset, 32, segment.checksum) for segment in sound.head.segments]
    data = forge(header_fields(KEY, **changed), rows, bytes(sound.payload[0]))
    answer = await server.ask("PUT", path_of(KEY), data=data, headers=FRAME)
    assert answer.status == 400 or await server.bytes_of(KEY) == data


async def test_absurd_claims_cost_no_memory(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve()
    server = Server(process.url, session)
    assert (await server.put(SOUND)).status == 201
    before = _peak_bytes(process.pid)
    claims = [(2**28 - 64, 0), (2**30, 0), (2**40, 0), (U64 - 15, 0)]
    for length, _ in claims * 3:
        data = forge(header_fields(OTHER), [(0, length, 0)], payload_bytes=length)
        await _refuses_frame_of(server, data)
        for announced in (length, len(data)):
            request = _request("PUT", path_of(OTHER), announced, FRAME["Content-Type"]) + data
            await _raw(server, request, half_close=True)
        request = _request("PUT", path_of(OTHER), length, "application/octet-stream") + data
        await _raw(server, request, half_close=True)
    assert _peak_bytes(process.pid) - before < 24 << 20
    assert not await server.holds(OTHER)
    assert await server.bytes_of(KEY) == DATA


async def _refuses_frame_of(server: Server, data: bytes) -> None:
    assert_problem(await server.ask("PUT", path_of(OTHER), data=data, headers=FRAME))
    assert_problem(await server.ask("PUT", path_of(OTHER), data=_in_parts(data), headers=FRAME))
    assert_problem(await server.ask("POST", "/v1/put", data=batch_bytes(data), headers=BATCH))


def _peak_bytes(pid: int) -> int:
    """Most memory that a process has used since it started."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.parametrize(
    ("changed", "segments", "count"),
    [
        ({"groups": [1] * 256, "planes": [[f"p{n}" for n in range(64)]]}, 1 << 14, 16),
        ({"pipeline": [{"stage": "test", "x": [[]] * 15000}]}, 1, 80),
    ],
    ids=["segments", "header"],
)
async def test_the_memory_budget_holds_for_frames_that_are_all_head(
    serve: Serve, session: aiohttp.ClientSession, changed: dict[str, Any], segments: int, count: int
) -> None:
    process = serve("--memory", "4MiB", "--disk", "0")
    server = Server(process.url, session)
    before = _peak_bytes(process.pid)
    for key in random_keys(count, seed=7):
        data = forge(header_fields(key, **changed), [(0, 0, checksum(key, b""))] * segments)
        answer = await server.ask("PUT", path_of(key), data=data, headers=FRAME)
        assert answer.status in (201, 400, 507), answer.body
    # The budget, and some more for what lies about while a request is served.
    assert _peak_bytes(process.pid) - before < 16 << 20


# Limits


async def test_an_announced_body_over_the_limit_is_refused_before_it_is_read(start: Start) -> None:
    server = await start(body_bytes_max=1 << 16)
    request = _request("PUT", path_of(KEY), (1 << 16) + 1, "application/octet-stream", close=False)
    answer = await _raw(server, request, half_close=False)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"body-too-large"' in answer
    assert not await server.holds(KEY)


@pytest.mark.parametrize("content_type", [FRAME["Content-Type"], "application/octet-stream"])
async def test_an_unannounced_body_over_the_limit_is_refused(start: Start, content_type: str) -> None:
    server = await start(body_bytes_max=1 << 16)
    data = frame_bytes(make_frame(KEY, (1 << 16, 1 << 16)))
    headers = {"Content-Type": content_type}
    await server.refused("PUT", path_of(KEY), 413, "body-too-large", data=_in_parts(data, 1000), headers=headers)
    assert not await server.holds(KEY)
    small = {"data": _in_parts(b"x" * (1 << 16)), "headers": {"Content-Type": "text/plain"}}
    assert (await server.ask("PUT", path_of(KEY), **small)).status == 201


async def test_a_batch_over_the_limit_is_refused(start: Start) -> None:
    server = await start(body_bytes_max=1 << 16)
    frames = [frame_bytes(make_frame(key, (10000,))) for key in random_keys(10)]
    body = batch_bytes(*frames)
    for data in (body, _in_parts(body, 1000)):
        await server.refused("POST", "/v1/put", 413, "body-too-large", data=data, headers=BATCH)
    assert (await server.ask("GET", f"/v1/scan?namespace={NAMESPACE}")).json == {"chunks": []}


@pytest.mark.parametrize("record", [b"", b"absent"])
async def test_an_endless_batch_is_refused_at_the_limit(start: Start, record: bytes) -> None:
    server = await start(body_bytes_max=1 << 16)
    head = _request("POST", "/v1/put", 0, BATCH_TYPE).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    part = batch_bytes(*[record] * 1000, kind=1)
    async with server.connection() as (reader, writer):
        writer.write(head)
        answer = asyncio.ensure_future(_read_answer(reader))
        # Sockets buffer some megabytes that the server never reads.
        for _ in range((16 << 20) // len(part)):
            if answer.done():
                break
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        else:
            pytest.fail("the server reads on and on")
        assert re.match(rb"HTTP/1.1 4..", await answer)


async def test_more_keys_than_a_request_may_have_are_refused(guarded: Server) -> None:
    digests = bytes(32 * ((1 << 16) + 1))
    for data in (digests, _in_parts(digests)):
        path = f"/v1/match?namespace={NAMESPACE}"
        await guarded.refused("POST", path, 413, "body-too-large", data=data, headers=DIGESTS)


@asynccontextmanager
async def _upload(
    server: Server, size_bytes: int | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A put of which the server has the first byte, and waits for the others; in chunks where it has no size."""
    request = _request("PUT", path_of(OTHER), size_bytes or 0, "text/plain", close=False)
    if size_bytes is None:
        request = request.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    async with server.connection() as (reader, writer):
        writer.write(request.replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"x" if size_bytes else b"1\r\nx\r\n")
        await writer.drain()
        yield reader, writer


async def test_too_many_bytes_in_flight_are_refused_for_a_while(start: Start) -> None:
    server = await start(body_bytes_max=1 << 20, inflight_bytes_max=1 << 20)
    body = {"data": b"y" * 1000, "headers": {"Content-Type": "text/plain"}}
    async with _upload(server, 1 << 20) as (reader, writer):
        # What counts is what has arrived, not what was announced.
        writer.write(b"x" * ((1 << 20) - 500))
        while (answer := await server.ask("PUT", path_of(OTHER), **body)).status != 503:
            await server.ask("DELETE", path_of(OTHER))
        assert_problem(answer, "busy")
        assert int(answer.headers["Retry-After"]) >= 1
        writer.write(b"x" * 499)
        assert (await _read_answer(reader)).startswith(b"HTTP/1.1 201")
    assert (await server.ask("PUT", path_of(KEY), **body)).status == 201


async def test_slow_uploads_of_unknown_length_leave_room_for_others(start: Start) -> None:
    server = await start(body_bytes_max=1 << 20, inflight_bytes_max=2 << 20)
    async with _upload(server, None), _upload(server, None):
        assert (await server.ask("PUT", path_of(KEY), data=b"y" * 1000)).status == 201


async def test_clients_that_leave_in_mid_body_take_no_room_with_them(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(body_bytes_max=1 << 20, inflight_bytes_max=1 << 20)
    for round_number in range(50):
        async with _upload(server, 1 << 20) as (_, writer):
            writer.write(b"x" * (round_number << 13))
            if round_number % 2:
                writer.write_eof()
    async with asyncio.timeout(10):
        # Only with nothing in flight may this one come in.
        while (await server.ask("PUT", path_of(KEY), data=b"y" * (1 << 20))).status == 503:
            await asyncio.sleep(0.01)
    assert await server.bytes_of(KEY) == b"y" * (1 << 20)
    assert not await server.holds(OTHER)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("content_type", [FRAME["Content-Type"], "text/plain"])
async def test_a_body_that_stops_arriving_is_given_up(start: Start, content_type: str) -> None:
    server = await start(body_timeout_s=0.1, body_bytes_max=1 << 16)
    request = _request("PUT", path_of(KEY), len(DATA), content_type)
    answer = await _raw(server, request + DATA[: HEAD_BYTES + 7])
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"body-timeout"' in answer
    assert not await server.holds(KEY)


async def test_a_batch_that_stops_arriving_is_given_up(start: Start) -> None:
    server = await start(body_timeout_s=0.1, body_bytes_max=1 << 16)
    body = batch_bytes(DATA, DATA)
    answer = await _raw(server, _request("POST", "/v1/put", len(body), BATCH_TYPE) + body[: len(DATA) + 40])
    assert answer.startswith(b"HTTP/1.1 408")
    assert not await server.holds(KEY)


# Batches


@pytest.mark.parametrize("route", ["match", "get", "trim", "delete", "put"])
@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
async def test_a_batch_of_another_type_is_refused(guarded: Server, route: str, content_type: str) -> None:
    # These are types that a web page may send to another origin without asking.
    path, headers = f"/v1/{route}?namespace={NAMESPACE}&level=0", {"Content-Type": content_type}
    await guarded.refused("POST", path, 415, "bad-media-type", data=NEIGHBOUR[16:], headers=headers)


@pytest.mark.parametrize("route", ["match", "get", "trim", "delete"])
@pytest.mark.parametrize("length", [1, 31, 33, 63])
async def test_digests_that_are_cut_are_refused(guarded: Server, route: str, length: int) -> None:
    path = f"/v1/{route}?namespace={NAMESPACE}&level=0"
    await guarded.refused("POST", path, 400, data=(NEIGHBOUR[16:] * 2)[:length], headers=DIGESTS)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
async def test_a_damaged_batch_stores_nothing_of_it(guarded: Server, announced: bool) -> None:
    sound, second = DATA, frame_bytes(make_frame(OTHER))
    whole = batch_bytes(sound, second)
    damaged = [whole[:cut] for cut in (1, 15, 16, 40, 16 + HEAD_BYTES, 16 + len(sound) + 8, len(whole) - 1)]
    damaged += [
        batch_bytes(sound, flipped(second, len(second) - 1)),
        batch_bytes(sound, flipped(second, HEAD_BYTES - 1)),
        batch_bytes(sound) + batch_bytes(second, kind=2),
        batch_bytes(sound) + batch_bytes(b"absent", kind=1),
        batch_bytes(sound) + batch_bytes(b"x" * 65, kind=1),
        batch_bytes(sound) + U64.to_bytes(16, "big"),
        batch_bytes(sound) + b"\0" * 8 + b"\xff" * 8,
        batch_bytes(sound) + b"garbage",
        batch_bytes(sound, b""),
        batch_bytes(sound, second + b"\0" * 16),
        batch_bytes(sound, second[:-1]),
    ]
    for body in damaged:
        answer = await guarded.ask("POST", "/v1/put", data=body if announced else _in_parts(body, 99), headers=BATCH)
        assert_problem(answer)
        assert not await guarded.holds(KEY)


async def test_a_batch_names_the_version_that_it_cannot_take(guarded: Server) -> None:
    body = batch_bytes(DATA, flipped(DATA, 8))
    await guarded.refused("POST", "/v1/put", 400, "frame-version", data=body, headers=BATCH)


# Ranges

BLOB = random.Random(4).randbytes(1000)


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=1000-",
        "bytes=1000-1001",
        "bytes=5-4",
        "bytes=-0",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "bytes=0-1,3-4",
        "bytes=0-1, -1",
        "bytes 0-1",
        "bytes=--1",
        "bytes=0x0-0x9",
        "bytes=+1-2",
        "bytes=0-1-2",
        f"bytes={'9' * 5000}-",
        f"bytes=0-{'9' * 5000}",
    ],
    ids=lambda asked: asked[:20],
)
@pytest.mark.parametrize("kind", ["blob", "frame"])
async def test_a_bad_range_is_refused(server: Server, kind: str, asked: str) -> None:
    data, headers = (BLOB, {}) if kind == "blob" else (frame_bytes(make_frame(KEY, (200,), groups=(1,))), FRAME)
    asked = asked.replace("1000", str(len(data)), 1) if len(asked) < 50 else asked
    await server.ask("PUT", path_of(KEY), data=data, headers=headers)
    await server.refused("GET", path_of(KEY), 416, "bad-range", headers={"Range": asked})
    assert await server.bytes_of(KEY) == data


async def test_a_refused_range_says_how_many_bytes_there_are(server: Server) -> None:
    await server.ask("PUT", path_of(KEY), data=BLOB)
    answer = await server.refused("GET", path_of(KEY), 416, "bad-range", headers={"Range": "bytes=1000-"})
    assert answer.headers.get("Content-Range") == "bytes */1000"


@pytest.mark.parametrize(
    ("asked", "first", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-999", 0, 1000),
        ("bytes=0-", 0, 1000),
        ("bytes=17-41", 17, 42),
        ("bytes=999-", 999, 1000),
        ("bytes=990-5000", 990, 1000),
        ("bytes=-1", 999, 1000),
        ("bytes=-1000", 0, 1000),
        ("bytes=-5000", 0, 1000),
        ("Bytes=1-2", 1, 3),
    ],
)
async def test_a_range_of_a_blob_is_served(server: Server, asked: str, first: int, stop: int) -> None:
    await server.ask("PUT", path_of(KEY), data=BLOB)
    answer = await server.ask("GET", path_of(KEY), headers={"Range": asked})
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {first}-{stop - 1}/1000"
    assert answer.body == BLOB[first:stop]


async def test_a_range_of_a_frame_may_lie_across_its_parts(server: Server) -> None:
    await server.put(SOUND)
    ends = [0, HEAD_BYTES, *level_ends(SOUND)]
    for start, stop in [*pairwise(ends), (HEAD_BYTES - 3, ends[2] + 3), (1, len(DATA) - 1)]:
        answer = await server.ask("GET", path_of(KEY), headers={"Range": f"bytes={start}-{stop - 1}"})
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"
        assert answer.body == DATA[start:stop]


async def test_a_range_counts_within_the_levels_asked_for(server: Server) -> None:
    await server.put(SOUND)
    end = level_ends(SOUND)[0]
    answer = await server.ask("GET", f"{path_of(KEY)}?level=0", headers={"Range": "bytes=-16"})
    assert answer.headers["Content-Range"] == f"bytes {end - 16}-{end - 1}/{end}"
    assert answer.body == DATA[end - 16 : end]
    past_end = {"Range": f"bytes={end}-"}
    await server.refused("GET", f"{path_of(KEY)}?level=0", 416, "bad-range", headers=past_end)


async def test_a_range_of_another_copy_than_the_client_has_is_answered_in_full(server: Server) -> None:
    await server.ask("PUT", path_of(KEY), data=BLOB)
    tag = (await server.ask("HEAD", path_of(KEY))).headers["ETag"]
    part = await server.ask("GET", path_of(KEY), headers={"Range": "bytes=5-", "If-Range": tag})
    assert (part.status, part.body) == (206, BLOB[5:])
    whole = await server.ask("GET", path_of(KEY), headers={"Range": "bytes=5-", "If-Range": '"another"'})
    assert (whole.status, whole.body) == (200, BLOB)


async def test_an_empty_blob_has_no_ranges(server: Server) -> None:
    await server.ask("PUT", path_of(KEY), data=b"")
    await server.refused("GET", path_of(KEY), 416, "bad-range", headers={"Range": "bytes=0-"})


# Second puts


async def test_a_second_put_says_that_it_changed_nothing(server: Server) -> None:
    first = await server.put(SOUND)
    assert (first.status, first.json["outcome"]) == (201, "written")
    again = await server.put(SOUND)
    assert (again.status, again.json["outcome"]) == (200, "exists")
    shorter = await server.ask("PUT", path_of(KEY), data=DATA[: level_ends(SOUND)[0]], headers=FRAME)
    assert (shorter.status, shorter.json["outcome"]) == (200, "exists")
    other = await server.put(make_frame(KEY, seed=1))
    assert (other.status, other.json["outcome"]) == (200, "other")
    blob = await server.ask("PUT", path_of(KEY), data=b"blob")
    assert (blob.status, blob.json["outcome"]) == (200, "other")
    assert await server.bytes_of(KEY) == DATA


async def test_two_frames_for_one_key_in_one_batch_leave_the_first_in_every_tier(start: Start) -> None:
    first, second = make_frame(KEY), make_frame(KEY, seed=1)
    body = batch_bytes(frame_bytes(first), frame_bytes(second))
    server = await start()
    answer = await server.ask("POST", "/v1/put", data=body, headers=BATCH)
    assert [stored["outcome"] for stored in answer.json["stored"]] == ["written", "other"]
    assert await server.bytes_of(KEY) == frame_bytes(first)
