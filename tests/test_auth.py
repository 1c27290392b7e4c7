"""Who may ask, and that tenants never meet."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kvstore.backends.host import HostBackend
from kvstore.client import Client
from kvstore.config import ServerConfig
from kvstore.errors import AuthError, ConfigError
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.server import create_app
from kvstore.testing import make_frame
from kvstore.tiers import TieredBackend
from kvstore.wire import BATCH_TYPE, DIGESTS_TYPE
from tests.conftest import FRAME, Answer, Server, Start, path_of
from tests.frames import batch_bytes, frame_bytes, random_keys
from tests.test_profiles import a_set

TOKEN = "t0p secret"
KEY, OTHER = random_keys(2)
NAMESPACE = KEY[:16].hex()
STATUS_PATHS = {"/healthz", "/health", "/healthcheck", "/readyz", "/metrics", "/version"}
WRONG_TOKENS = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong"},
    "prefix": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "longer": {"Authorization": f"Bearer {TOKEN}x"},
    "case": {"Authorization": f"Bearer {TOKEN.upper()}"},
    "empty": {"Authorization": "Bearer "},
    "bare": {"Authorization": TOKEN},
    "basic": {"Authorization": f"Basic {TOKEN}"},
    "bytes": {"Authorization": "Bearer \udcff"},
}


def _routes() -> list[tuple[str, str]]:
    """Method and path of every route of the application, for `KEY`."""

    async def opened() -> TieredBackend:
        return TieredBackend([HostBackend(1 << 20)])

    app = create_app(opened, ServerConfig(), Metrics())
    names = {"namespace": NAMESPACE, "digest": KEY[16:].hex()}
    return [(route.method, _path(route, names)) for route in app.router.routes()]


def _path(route: web.AbstractRoute, names: dict[str, str]) -> str:
    assert route.resource is not None
    return route.resource.canonical.format(**names)


def _request(method: str, path: str) -> dict[str, Any]:
    """A request that the route answers, when it may."""
    if path == "/v1/put":
        return {"data": batch_bytes(frame_bytes(make_frame(KEY))), "headers": {"Content-Type": BATCH_TYPE}}
    if path == "/v1/plan":
        context = {"chunk_bytes": 1 << 20, "chunk_tokens": 256}
        asked = {"op": "get", "namespace": NAMESPACE, "digests": KEY[16:].hex(), "context": context}
        return {"data": json.dumps(asked).encode(), "headers": {"Content-Type": "application/json"}}
    if path == "/v1/observe":
        said = {"decision": "0" * 16, "took_s": 1.0}
        return {"data": json.dumps(said).encode(), "headers": {"Content-Type": "application/json"}}
    if method == "PUT" and path.startswith("/v1/profiles/"):
        # A set of them, or an artefact that none of them needs.
        kind = "application/octet-stream" if "artefacts" in path else "application/json"
        return {"data": json.dumps(a_set()).encode(), "headers": {"Content-Type": kind}}
    if method == "PUT":
        return {"data": frame_bytes(make_frame(KEY)), "headers": dict(FRAME)}
    params = {"namespace": NAMESPACE, "level": "0", "ttl_s": "60"}
    if method == "POST":
        return {"params": params, "data": KEY[16:], "headers": {"Content-Type": DIGESTS_TYPE}}
    return {"params": params, "headers": {}}


ROUTES = _routes()
DATA_ROUTES = [route for route in ROUTES if route[1].startswith("/v1/")]


def _with_token(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# Tokens


def test_every_route_is_a_data_route_or_a_known_status_route() -> None:
    assert {path for _, path in ROUTES if not path.startswith("/v1/")} == STATUS_PATHS
    assert len(DATA_ROUTES) >= 10


@pytest.mark.parametrize("wrong", WRONG_TOKENS)
@pytest.mark.parametrize(("method", "path"), DATA_ROUTES)
async def test_a_data_route_refuses_a_missing_or_wrong_token(start: Start, method: str, path: str, wrong: str) -> None:
    server = await start(token=TOKEN, disk_bytes=0)
    request = _request(method, path)
    request["headers"] |= WRONG_TOKENS[wrong]
    answer = await server.ask(method, path, **request)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert method == "HEAD" or answer.json["code"] == "unauthorized"
    assert (await server.ask("GET", path_of(KEY), headers=_with_token(TOKEN))).status == 404


@pytest.mark.parametrize(("method", "path"), DATA_ROUTES)
async def test_a_data_route_answers_who_has_the_token(start: Start, method: str, path: str) -> None:
    server = await start(token=TOKEN, disk_bytes=0)
    if (method, path) != ("PUT", path_of(KEY)):
        await _put(server, TOKEN, KEY)
    request = _request(method, path)
    request["headers"] |= {"Authorization": f"bearer  {TOKEN} "}
    if path.startswith("/v1/profiles/") and method != "PUT":
        held = _request("PUT", f"/v1/profiles/{NAMESPACE}")
        await server.ask("PUT", f"/v1/profiles/{NAMESPACE}", **held | {"headers": held["headers"] | _with_token(TOKEN)})
    # The last is the answer to a request for a link that is no upgrade; nobody needs the artefact.
    expected = (400, 404) if "artefacts" in path else (200, 201, 204, 426)
    assert (await server.ask(method, path, **request)).status in expected


@pytest.mark.parametrize("path", sorted(STATUS_PATHS))
async def test_a_status_route_needs_no_token(start: Start, path: str) -> None:
    server = await start(token=TOKEN, disk_bytes=0)
    assert (await server.ask("GET", path)).status == 200


async def test_a_token_of_any_letters_works(start: Start) -> None:
    server = await start(token="schlüssel-ключ", disk_bytes=0)
    async with server.connection() as (reader, writer):
        writer.write(f"GET {path_of(KEY)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer schlüssel-ключ\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 404")


async def test_a_refused_body_is_not_read(start: Start) -> None:
    server = await start(token=TOKEN, disk_bytes=0)
    async with server.connection() as (reader, writer):
        writer.write(f"PUT {path_of(KEY)} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 401")


# Names that a web page could be served under


async def _with_host(server: Server, host: str, path: str = path_of(KEY)) -> Answer:
    return await server.ask("GET", path, headers={"Host": host})


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "10.0.0.1",
        "0.0.0.0",
        "[::2]:80",
        "169.254.169.254",
        "127.0.0.1@evil.example",
        "2130706433",
        "",
    ],
)
async def test_a_foreign_name_is_refused_without_a_token(start: Start, host: str) -> None:
    server = await start(disk_bytes=0)
    answer = await _with_host(server, host.format(port=server.port))
    assert answer.status == 401
    assert answer.json["code"] == "unauthorized"


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:{port}", "LocalHost", "127.0.0.1:{port}", "127.0.0.2", "[::1]:{port}", "a.localhost"],
)
async def test_a_local_name_is_answered_without_a_token(start: Start, host: str) -> None:
    server = await start(disk_bytes=0)
    assert (await _with_host(server, host.format(port=server.port))).status == 404


async def test_every_name_is_answered_with_a_token_or_where_anybody_may_ask(start: Start) -> None:
    with_token = await start(token=TOKEN, disk_bytes=0)
    answer = await with_token.ask("GET", path_of(KEY), headers=_with_token(TOKEN) | {"Host": "kv.example"})
    assert answer.status == 404
    insecure = await start(insecure=True, disk_bytes=0)
    assert (await _with_host(insecure, "kv.example")).status == 404


@pytest.mark.parametrize(("method", "path"), DATA_ROUTES)
async def test_every_data_route_refuses_a_foreign_name(start: Start, method: str, path: str) -> None:
    server = await start(disk_bytes=0)
    request = _request(method, path)
    request["headers"] |= {"Host": "evil.example"}
    assert (await server.ask(method, path, **request)).status == 401
    assert not await server.holds(KEY)


# Addresses


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.2", "kv.example", "localhost.example"])
def test_an_open_address_needs_a_token_or_a_word_for_it(host: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        ServerConfig(host=host)
    with pytest.raises(ConfigError, match="token"):
        ServerConfig(host=host, token="")
    ServerConfig(host=host, token=TOKEN)
    ServerConfig(host=host, insecure=True)
    ServerConfig(host=host, tenants={"a": "x"}, tenant_secret="s")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost"])
def test_a_local_address_needs_no_token(host: str) -> None:
    assert ServerConfig(host=host).is_loopback


@pytest.mark.parametrize(
    "settings",
    [
        {"tenants": {"a": "x"}},
        {"tenants": {"a": "x"}, "tenant_secret": ""},
        {"tenants": {"a": "x", "b": "x"}, "tenant_secret": "s"},
        {"tenants": {"a": "x"}, "tenant_secret": "s", "token": "x"},
        {"tenants": {"a": ""}, "tenant_secret": "s"},
        {"tenants": {"": "x"}, "tenant_secret": "s"},
    ],
)
def test_tenants_need_a_secret_a_name_and_a_token_of_their_own(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**settings)


# Tenants

TENANTS = {"": TOKEN, "alice": "a token", "bob": "b token", "bo": "c token"}


async def _put(server: Server, token: str, key: ChunkKey, seed: int = 0) -> Answer:
    data = frame_bytes(make_frame(key, seed=seed))
    return await server.ask("PUT", path_of(key), data=data, headers=FRAME | _with_token(token))


async def _batch(server: Server, token: str, route: str, key: ChunkKey = KEY) -> Answer:
    params = {"namespace": NAMESPACE, "level": "0", "ttl_s": "60"}
    headers = {"Content-Type": DIGESTS_TYPE} | _with_token(token)
    return await server.ask("POST", f"/v1/{route}", params=params, data=key[16:], headers=headers)


async def _scan(server: Server, token: str) -> list[str]:
    answer = await server.ask("GET", f"/v1/scan?namespace={NAMESPACE}", headers=_with_token(token))
    return [chunk["digest"] for chunk in answer.json["chunks"]]


async def _get(server: Server, token: str, key: ChunkKey = KEY) -> bytes | None:
    answer = await server.ask("GET", path_of(key), headers=_with_token(token))
    return answer.body if answer.status == 200 else None


@pytest.fixture
async def shared(start: Start) -> Server:
    """A server with a default tenant and three others."""
    tenants = {name: token for name, token in TENANTS.items() if name}
    return await start(token=TOKEN, tenants=tenants, tenant_secret="secret")


@pytest.mark.parametrize("owner", TENANTS)
async def test_a_chunk_is_found_by_its_tenant_only(shared: Server, owner: str) -> None:
    await _put(shared, TENANTS[owner], KEY)
    for tenant, token in TENANTS.items():
        is_owner = tenant == owner
        assert ((await _get(shared, token)) is not None) == is_owner
        assert (await _batch(shared, token, "match")).json["matched"] == is_owner
        assert (b"absent" in (await _batch(shared, token, "get")).body) != is_owner
        assert bool(await _scan(shared, token)) == is_owner


async def test_tenants_keep_different_chunks_under_one_key(shared: Server) -> None:
    for seed, token in enumerate(TENANTS.values()):
        assert (await _put(shared, token, KEY, seed)).json["outcome"] == "written"
    for seed, token in enumerate(TENANTS.values()):
        assert await _get(shared, token) == frame_bytes(make_frame(KEY, seed=seed))
        assert await _scan(shared, token) == [KEY[16:].hex()]


@pytest.mark.parametrize("route", ["trim", "delete"])
async def test_a_tenant_cannot_take_away_what_is_anothers(shared: Server, route: str) -> None:
    await _put(shared, TENANTS["alice"], KEY)
    for tenant in ("", "bob"):
        assert (await _batch(shared, TENANTS[tenant], route)).status == 204
        assert (await shared.ask("DELETE", path_of(KEY), headers=_with_token(TENANTS[tenant]))).status == 204
    assert await _get(shared, TENANTS["alice"]) == frame_bytes(make_frame(KEY))


async def test_a_second_put_tells_a_tenant_nothing_of_anothers(shared: Server) -> None:
    # Were tenants not kept apart, the answer would say that the chunk is there, and so what somebody else asked.
    await _put(shared, TENANTS["alice"], KEY)
    answer = await _put(shared, TENANTS["bob"], KEY)
    assert (answer.status, answer.json["outcome"]) == (201, "written")


async def test_a_tenant_finds_its_chunks_after_a_restart(tmp_path: Path, start: Start) -> None:
    settings = {"tenants": {"alice": "a", "bob": "b"}, "tenant_secret": "secret"}
    first = await start(data_dir=tmp_path / "one", **settings)
    await _put(first, "a", KEY)
    await _put(first, "a", OTHER)
    # The same tenants on another server find the same names for their namespaces.
    second = await start(data_dir=tmp_path / "two", **settings)
    assert await _get(second, "a") is None
    await first.stop()
    again = await start(data_dir=tmp_path / "one", **settings)
    assert await _get(again, "a") == frame_bytes(make_frame(KEY))
    assert await _get(again, "b") is None


async def test_another_secret_hides_what_tenants_stored(tmp_path: Path, start: Start) -> None:
    first = await start(tenants={"alice": "a"}, tenant_secret="secret")
    await _put(first, "a", KEY)
    await first.stop()
    again = await start(tenants={"alice": "a"}, tenant_secret="other")
    assert await _get(again, "a") is None


async def test_a_client_sends_its_token(shared: Server) -> None:
    frame = make_frame(KEY)
    async with Client(shared.url, token=TENANTS["alice"]) as alice, Client(shared.url) as stranger:
        await alice.put([(KEY, frame)])
        assert len((await alice.match([KEY])).held) == 1
        with pytest.raises(AuthError):
            await stranger.match([KEY])
        with pytest.raises(AuthError):
            await stranger.put([(KEY, frame)])


async def test_no_page_of_another_origin_is_let_in(start: Start) -> None:
    server = await start(disk_bytes=0)
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"}
    answer = await server.ask("OPTIONS", path_of(KEY), headers=headers)
    assert answer.status == 405
    plain = await server.ask("GET", path_of(KEY), headers={"Origin": "https://evil.example"})
    assert not [name for name in (*answer.headers, *plain.headers) if name.lower().startswith("access-control")]


def test_a_token_is_never_shown() -> None:
    assert TOKEN not in repr(ServerConfig(token=TOKEN, tenants={"a": "x token"}, tenant_secret="s3"))
    assert "x token" not in repr(ServerConfig(token=TOKEN, tenants={"a": "x token"}, tenant_secret="s3"))
