"""The client: every error comes out as ours, and a server that lies does no harm."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from kvstore import errors
from kvstore.answers import error_classes, error_from
from kvstore.backend import Ack, Miss, Outcome, Reason
from kvstore.backends.host import HostBackend
from kvstore.client import Client
from kvstore.errors import BackendError, BackendUnavailableError, ConfigError, KVStoreError
from kvstore.frame import Frame
from kvstore.server.problems import STATUS, status_of
from kvstore.testing import make_frame, make_key
from kvstore.tiers import TieredBackend

KEY = make_key(1)
FRAME = make_frame(KEY)
DATA = b"".join(bytes(view) for view in FRAME.buffers())
RECORD = struct.pack("<B7xQ", 0, len(DATA)) + DATA
RUNS = (
    b'{"miss": null, "runs": [{"count": 1000000000000000000000000000000, "tier": "host", "head_bytes": 64, '
    b'"level_bytes": [1], "levels": 1, "inexact": false}]}'
)
CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, KVStoreError)]


@asynccontextmanager
async def answering(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[Client]:
    """A client of a server that answers everything in one way."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}", timeout_s=5) as client:
        yield client
    await runner.cleanup()


def body(data: bytes, status: int = 200) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=data, status=status)

    return answer


@pytest.mark.parametrize("error_class", CLASSES)
def test_every_error_class_has_a_code_of_its_own_and_a_status(error_class: type[KVStoreError]) -> None:
    assert error_classes()[error_class.code] is error_class
    error = error_from("remote", error_class.code, "detail")
    assert type(error) is (BackendError if error_class is KVStoreError else error_class)
    assert "detail" in str(error)
    assert status_of(error) >= 400


def test_the_table_of_statuses_names_known_classes() -> None:
    assert set(STATUS) <= set(CLASSES)


@pytest.mark.parametrize("code", ["no-such-code", ""])
def test_an_unknown_code_is_a_backend_error(code: str) -> None:
    assert type(error_from("remote", code, "detail")) is BackendError


@pytest.mark.parametrize("url", ["127.0.0.1:8420", "ftp://x", "", "http://", "http://x:y", "http://x:70000"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a server's URL: .* such as http://"):
        Client(url)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with Client("http://127.0.0.1:9") as client:
        for call in (client.match([KEY]), client.get([KEY]), client.put([(KEY, FRAME)]), client.delete([KEY])):
            with pytest.raises(BackendUnavailableError, match=r"127\.0\.0\.1:9"):
                await call


async def test_a_server_that_does_not_answer_is_unavailable() -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return web.Response()

    async with answering(never) as client:
        impatient = Client(client.url, timeout_s=0.1)
        with pytest.raises(BackendUnavailableError, match="did not answer"):
            await impatient.match([KEY])
        await impatient.aclose()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"runs": 3}', b'{"runs": [{}], "miss": null}', RUNS, b"[" * 100000, b"\xff"]
)
async def test_an_answer_that_is_no_answer_is_a_backend_error(data: bytes) -> None:
    async with answering(body(data)) as client:
        with pytest.raises(BackendError):
            await client.match([KEY])
    async with answering(body(data, 500)) as client:
        with pytest.raises(BackendError):
            await client.match([KEY])


def run_of(level_bytes: list[int], levels: int = 3, head_bytes: int = 9) -> dict[str, object]:
    copy = {"tier": "host", "head_bytes": head_bytes, "level_bytes": level_bytes, "levels": levels, "inexact": False}
    return {"count": 1, **copy}


@pytest.mark.parametrize(
    "answer",
    [
        {"runs": [], "miss": None},
        {"runs": [run_of([1])], "miss": "absent"},
        {"runs": [run_of([])], "miss": None},
        {"runs": [run_of([1, 2], levels=1)], "miss": None},
        {"runs": [run_of([1, -2])], "miss": None},
        {"runs": [run_of([1], head_bytes=-1)], "miss": None},
    ],
)
async def test_a_match_that_cannot_be_is_a_backend_error(answer: dict[str, object]) -> None:
    """A stack would ask for ever for what it is told to be neither held nor missing."""
    async with answering(body(json.dumps(answer).encode())) as client, asyncio.timeout(10):
        with pytest.raises(BackendError):
            await client.match([KEY])
        stack = TieredBackend([HostBackend(1 << 20), client])
        assert await stack.match([KEY]) == ([], Miss(Reason.BREAKER))


@pytest.mark.parametrize(
    ("outcome", "ack", "code"), [("written", None, None), ("failed", None, None), ("failed", "disk", "backend")]
)
async def test_a_put_that_cannot_end_so_is_a_backend_error(outcome: str, ack: str | None, code: str | None) -> None:
    stored = {"outcome": outcome, "ack": ack, "code": code, "detail": None}
    async with answering(body(json.dumps({"stored": [stored]}).encode())) as client:
        with pytest.raises(BackendError):
            await client.put([(KEY, FRAME)])
        [result] = await TieredBackend([HostBackend(1 << 20), client]).put([(KEY, FRAME)])
        assert (result.outcome, result.ack) == (Outcome.WRITTEN, Ack.MEMORY)
        with pytest.raises(BackendError):
            await client.put([(KEY, FRAME)])


@pytest.mark.parametrize("status", [302, 404, 500, 503])
async def test_a_status_without_a_problem_is_a_backend_error(status: int) -> None:
    async with answering(body(b"<html>", status)) as client:
        with pytest.raises(BackendError, match=str(status)):
            await client.match([KEY])


@pytest.mark.parametrize(
    "data",
    [
        RECORD[:16] + bytes(len(DATA)),
        RECORD[:-1] + bytes([RECORD[-1] ^ 1]),
        RECORD[:20] + b"\xff" + RECORD[21:],
        struct.pack("<B7xQ", 7, 3) + b"abc",
        struct.pack("<B7xQ", 0, 100) + DATA[:100],
    ],
)
async def test_a_damaged_answer_is_a_miss(data: bytes) -> None:
    async with answering(body(data)) as client:
        assert await client.get([KEY]) == [Miss(Reason.CORRUPT)]


async def test_a_frame_of_another_key_is_a_miss() -> None:
    async with answering(body(RECORD)) as client:
        assert await client.get([make_key(2)]) == [Miss(Reason.CORRUPT)]


async def test_a_frame_of_a_newer_format_is_a_miss_of_identity() -> None:
    async with answering(body(RECORD[:24] + b"\2" + RECORD[25:])) as client:
        assert await client.get([KEY]) == [Miss(Reason.IDENTITY)]


async def test_more_records_than_keys_are_a_damaged_answer() -> None:
    async with answering(body(RECORD * 2)) as client:
        found = await client.get([KEY])
        assert len(found) == 1


async def test_absurd_lengths_are_refused_before_anything_is_allocated() -> None:
    for data in (struct.pack("<B7xQ", 0, 1 << 60), struct.pack("<B7xQ", 1, 1 << 60)):
        async with answering(body(data)) as client:
            assert await client.get([KEY]) == [Miss(Reason.CORRUPT)]


async def test_an_answer_without_records_does_not_loop_for_ever() -> None:
    async with answering(body(b"")) as client:
        with pytest.raises(BackendError, match="without records"):
            await client.get([KEY])


async def test_an_answer_cut_short_is_unavailable() -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(RECORD)
        await response.prepare(request)
        await response.write(RECORD[:-10])
        assert request.transport is not None
        request.transport.close()
        return response

    async with answering(cut) as client:
        with pytest.raises(BackendUnavailableError):
            await client.get([KEY])


async def test_what_came_before_an_answer_was_cut_short_is_kept() -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 2 * len(RECORD)
        await response.prepare(request)
        await response.write(RECORD)
        await asyncio.sleep(0.1)
        assert request.transport is not None
        request.transport.close()
        return response

    async with answering(cut) as client:
        first, second = await client.get([KEY, make_key(7)])
        assert isinstance(first, Frame)
        assert second == Miss(Reason.BREAKER)


async def test_the_rest_of_a_batch_is_asked_for_again() -> None:
    """A server may answer fewer keys than it was asked for."""
    frames = {make_key(number): make_frame(make_key(number)) for number in range(3)}

    async def first_only(request: web.Request) -> web.Response:
        key = bytes.fromhex(request.query["namespace"]) + (await request.read())[:32]
        data = b"".join(bytes(view) for view in frames[key].buffers())  # type: ignore[index]
        return web.Response(body=struct.pack("<B7xQ", 0, len(data)) + data)

    async with answering(first_only) as client:
        found = await client.get(list(frames))
        assert [frame.id for frame in found if isinstance(frame, Frame)] == [frame.id for frame in frames.values()]


async def test_a_retry_after_comes_through() -> None:
    async def busy(_: web.Request) -> web.Response:
        problem = '{"code": "unavailable", "detail": "later"}'
        return web.Response(text=problem, status=503, headers={"Retry-After": "7"})

    async with answering(busy) as client:
        with pytest.raises(BackendUnavailableError) as caught:
            await client.put([(KEY, FRAME)], ack=Ack.DISK)
        assert caught.value.retry_after_s == 7


async def test_an_error_of_one_chunk_comes_with_its_answer() -> None:
    stored = b'{"stored": [{"outcome": "failed", "ack": null, "code": "storage-full", "detail": "no room"}]}'
    async with answering(body(stored)) as client:
        [result] = await client.put([(KEY, FRAME)])
        assert result.outcome is Outcome.FAILED
        assert isinstance(result.error, errors.BackendFullError)
