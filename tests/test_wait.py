"""Readers that wait for chunks: woken by the put, bounded, and gone with their connection."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from kvstore.backend import Miss, Reason
from kvstore.backends.host import HostBackend
from kvstore.client import Client
from kvstore.errors import BackendUnavailableError
from kvstore.fetch import fetch_run
from kvstore.testing import make_frame, make_key
from kvstore.tiers import TieredBackend
from kvstore.tiers.arrivals import Waits
from kvstore.wire import DIGESTS_TYPE
from tests.conftest import Answer, Server, Start, path_of
from tests.frames import frame_bytes

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key) for key in KEYS]
NAMESPACE = KEYS[0][:16].hex()
DIGESTS = {"Content-Type": DIGESTS_TYPE}
LONG_MS = 60_000


@pytest.fixture
async def server(start: Start) -> Server:
    return await start(disk_bytes=0)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await true():
            await asyncio.sleep(0.01)


async def waiting(server: Server, count: int) -> None:
    """Return once that many requests wait."""

    async def as_many() -> bool:
        return await server.metric("kvstore_waiting") == count

    await until(as_many)


async def waits(server: Server, outcome: str) -> float:
    return await server.metric(f'kvstore_waits_total{{outcome="{outcome}"}}')


def get(server: Server, number: int, wait_ms: int = LONG_MS, **request: Any) -> asyncio.Task[Answer]:
    return asyncio.create_task(server.ask("GET", f"{path_of(KEYS[number])}?wait_ms={wait_ms}", **request))


def match(server: Server, count: int, wait_ms: int = LONG_MS) -> asyncio.Task[Answer]:
    params = {"namespace": NAMESPACE, "wait_ms": str(wait_ms)}
    digests = b"".join(key[16:] for key in KEYS[:count])
    return asyncio.create_task(server.ask("POST", "/v1/match", params=params, data=digests, headers=DIGESTS))


async def test_a_get_waits_for_the_put(server: Server) -> None:
    answers = [get(server, 0) for _ in range(3)]
    await waiting(server, 3)
    assert (await server.put(FRAMES[1])).status == 201, "another chunk wakes nobody"
    assert await server.metric("kvstore_waiting") == 3
    await server.put(FRAMES[0])
    assert {(await answer).body for answer in answers} == {frame_bytes(FRAMES[0])}
    assert await server.metric("kvstore_waiting") == 0
    assert await waits(server, "arrived") == 3


async def test_what_is_there_is_answered_at_once_and_takes_no_place(start: Start) -> None:
    server = await start(disk_bytes=0, waiters_max=0)
    await server.put(FRAMES[0])
    assert (await get(server, 0)).body == frame_bytes(FRAMES[0])
    assert (await match(server, 1)).json["matched"] == 1
    assert await server.metric("kvstore_waits_total") == 0


async def test_a_match_waits_for_the_whole_run_in_any_order_of_puts(server: Server) -> None:
    await server.put(FRAMES[0])
    answer = match(server, 4)
    await waiting(server, 1)
    for number in (3, 1):
        await server.put(FRAMES[number])
    assert not answer.done()
    await server.put(FRAMES[2])
    assert (await answer).json["matched"] == 4


async def test_a_wait_that_is_over_answers_what_is_there(server: Server) -> None:
    await server.put(FRAMES[0])
    answer = await match(server, 2, wait_ms=30)
    assert (answer.json["matched"], answer.json["miss"]) == (1, "absent")
    missing = await get(server, 1, wait_ms=30)
    assert (missing.status, missing.json["reason"]) == (404, "absent")
    assert await waits(server, "timeout") == 2


async def test_a_server_waits_no_longer_than_it_is_set_to(start: Start) -> None:
    server = await start(disk_bytes=0, wait_s_max=0.05)
    started_s = time.monotonic()
    assert (await get(server, 0)).status == 404
    assert time.monotonic() - started_s < LONG_MS / 1000


async def test_a_failed_put_wakes_nobody_for_good(server: Server) -> None:
    answer = get(server, 0)
    await waiting(server, 1)
    damaged = bytearray(frame_bytes(FRAMES[0]))
    damaged[-1] ^= 1
    frame = {"Content-Type": "application/vnd.kvstore.frame"}
    assert (await server.ask("PUT", path_of(KEYS[0]), data=bytes(damaged), headers=frame)).status == 400
    assert not answer.done()
    await server.put(FRAMES[0])
    assert (await answer).status == 200


async def test_a_wait_ends_with_its_connection(server: Server) -> None:
    for ask in (get, match):
        request = ask(server, 1)
        await waiting(server, 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await waiting(server, 0)
    assert await waits(server, "gone") == 2
    assert (await server.put(FRAMES[0])).status == 201


async def test_only_so_many_may_wait(start: Start) -> None:
    server = await start(disk_bytes=0, waiters_max=2)
    requests = [get(server, 0), match(server, 2)]
    await waiting(server, 2)
    refused = await server.refused("GET", f"{path_of(KEYS[0])}?wait_ms=1000", 503, "busy")
    assert int(refused.headers["Retry-After"]) >= 1
    assert await waits(server, "refused") == 1
    for number in range(2):
        await server.put(FRAMES[number])
    assert {(await request).status for request in requests} == {200}
    assert (await get(server, 3, wait_ms=10)).status == 404, "a place that is left can be taken"


async def test_a_tenant_leaves_room_for_others(start: Start) -> None:
    settings = {"token": "one", "tenants": {"b": "two"}, "tenant_secret": "x", "tenant_waiters_max": 1}
    server = await start(disk_bytes=0, **settings)
    one, two = ({"Authorization": f"Bearer {token}"} for token in ("one", "two"))
    first = get(server, 0, headers=one)
    await waiting(server, 1)
    await server.refused("GET", f"{path_of(KEYS[0])}?wait_ms=1000", 503, "busy", headers=one)
    second = get(server, 0, headers=two)
    await waiting(server, 2)
    body, frame = frame_bytes(FRAMES[0]), {"Content-Type": "application/vnd.kvstore.frame"}
    await server.ask("PUT", path_of(KEYS[0]), data=body, headers=one | frame)
    assert (await first).status == 200
    assert not second.done(), "a tenant does not wake another"
    second.cancel()
    await waiting(server, 0)


@pytest.mark.parametrize("wait_ms", ["-1", "1.5", "", "x", "1e3", "3600001", "99999999999", "²", " 1"])
async def test_a_bad_wait_is_refused(server: Server, wait_ms: str) -> None:
    params = {"namespace": NAMESPACE, "wait_ms": wait_ms}
    await server.refused("GET", path_of(KEYS[0]), 400, "bad-request", params=params)
    for route in ("/v1/match", "/v1/fetch"):
        body = KEYS[0][16:]
        await server.refused("POST", route, 400, "bad-request", params=params, data=body, headers=DIGESTS)


async def test_whoever_waits_is_answered_when_the_server_stops(start: Start, session: aiohttp.ClientSession) -> None:
    server = await start(disk_bytes=0, shutdown_timeout_s=30.0)
    await server.put(FRAMES[0])
    reader = Server(server.url, session)
    answers = match(reader, 2), get(reader, 1)
    await waiting(server, 2)
    async with asyncio.timeout(10):
        await server.stop()
        assert (await answers[0]).json["matched"] == 1
        assert (await answers[1]).status == 404


async def test_many_wait_for_one_chunk(server: Server) -> None:
    connector = aiohttp.TCPConnector(limit=300)
    async with aiohttp.ClientSession(connector=connector) as session:
        many = Server(server.url, session)
        answers = [match(many, 6) for _ in range(200)]
        await waiting(server, 200)
        async with Client(server.url) as client:
            await client.put(list(zip(KEYS, FRAMES, strict=True)))
        assert {(await answer).json["matched"] for answer in answers} == {6}


# Stacks and clients


async def test_a_client_waits(server: Server) -> None:
    async with Client(server.url, timeout_s=0.2) as client:
        assert isinstance(client, Waits)
        asked = asyncio.create_task(client.wait(KEYS[:2], 60))
        await waiting(server, 1)
        await asyncio.sleep(0.3)
        await server.put(FRAMES[0])
        await server.put(FRAMES[1])
        held, miss = await asked
        assert (len(held), miss) == (2, None)
        assert (await client.wait([*KEYS[:1], KEYS[3]], 0.01)).miss == Miss(Reason.ABSENT)


async def test_those_who_wait_leave_connections_to_others(server: Server) -> None:
    async with Client(server.url, connections=1, timeout_s=5) as client:
        waits = [asyncio.create_task(client.wait(KEYS[:1], 60)) for _ in range(3)]
        await waiting(server, 3)
        await client.put([(KEYS[1], FRAMES[1])])
        assert [key async for key, _ in client.scan(KEYS[1][:16])] == [KEYS[1]]
        assert (await fetch_run(client, KEYS[1:2])).frames == FRAMES[1:2]
        await client.put([(KEYS[0], FRAMES[0])])
        assert [(await wait).miss for wait in waits] == [None] * 3


async def test_a_fetch_that_waits_ends_with_its_connection(server: Server) -> None:
    async with Client(server.url) as client:
        fetched = asyncio.create_task(fetch_run(client, KEYS[:1], wait_ms=LONG_MS))
        await waiting(server, 1)
        fetched.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetched
        await waiting(server, 0)


async def test_a_stack_waits_for_a_put_of_its_own() -> None:
    stack = TieredBackend([HostBackend(1 << 20)])
    asked = asyncio.create_task(stack.wait(KEYS[:2], 60))
    await asyncio.sleep(0)
    await stack.put([(KEYS[1], FRAMES[1])])
    await stack.put([(KEYS[0], FRAMES[0])])
    async with asyncio.timeout(10):
        assert len((await asked).held) == 2
    assert len((await stack.wait(KEYS[:3], 0.01)).held) == 2


async def test_a_stack_waits_where_others_put(server: Server) -> None:
    async with Client(server.url) as client:
        stack = TieredBackend([HostBackend(1 << 20), client])
        await stack.put([(KEYS[0], FRAMES[0])])
        asked = asyncio.create_task(stack.wait(KEYS[:3], 60))
        await waiting(server, 1)
        await server.put(FRAMES[1])
        await stack.put([(KEYS[2], FRAMES[2])])
        async with asyncio.timeout(10):
            assert len((await asked).held) == 3


async def test_a_stack_whose_server_is_gone_answers_what_it_has() -> None:
    async with Client("http://127.0.0.1:9") as client:
        stack = TieredBackend([HostBackend(1 << 20), client])
        await stack.put([(KEYS[0], FRAMES[0])])
        async with asyncio.timeout(10):
            assert len((await stack.wait(KEYS[:2], 60)).held) == 1
        with pytest.raises(BackendUnavailableError):
            await client.wait(KEYS[:1], 60)
