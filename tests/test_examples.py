"""The examples run, and do what they say."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Start

EXAMPLES = Path(__file__).parent.parent / "examples"
BODY = {"model": "m", "prompt": "To be", "max_tokens": 7, "min_tokens": 2, "temperature": 0}


async def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed."""
    process = await asyncio.create_subprocess_exec(*map(str, command), stdout=PIPE, stderr=PIPE)
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()


async def test_curl_alone_is_enough(start: Start) -> None:
    server = await start()
    out = await run("sh", EXAMPLES / "http_curl.sh", server.url)
    assert "the same 100000 bytes\nthe first ten bytes\n" in out
    assert '"matched": 1' in out
    assert "\nhere it is\n" in out
    assert '{"pinned": 1, "missing": 0}' in out
    assert out.endswith('{"deleted": 2}\n')


async def test_the_python_client_waits_and_fetches(start: Start) -> None:
    server = await start(disk_bytes=0)
    out = await run(sys.executable, EXAMPLES / "python_client.py", server.url)
    assert "put 1024 tokens" in out
    assert "1024 tokens at level 1" in out
    assert "4 chunks with [3, 3, 3, 3] levels" in out


# The router

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class Engine:
    """An engine as far as the router sees one: it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[str] = []
        self.url = ""
        self.answer: Answer = self.say
        self.healthy = True

    async def say(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"path": request.path, "choices": [{"text": "x" * body["max_tokens"]}]})

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(body["max_tokens"]):
            await response.write(f"data: {number}\n\n".encode())
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def break_off(self, request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 0\n\n")
        assert request.transport is not None
        request.transport.abort()
        return response

    def status(self, status: int) -> None:
        async def answer(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
            return web.json_response({"error": {"message": "no", "code": status}}, status=status)

        self.answer = answer

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Engine"]:
        async def complete(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            self.asked.append((request.path, body))
            self.headers.append(request.headers.get("Authorization", ""))
            return await self.answer(request, body)

        async def health(_: web.Request) -> web.Response:
            return web.Response(status=200 if self.healthy else 503)

        async def models(_: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "m"}]})

        app = web.Application()
        app.add_routes([web.post("/v1/{name:.*}", complete), web.get("/health", health), web.get("/v1/models", models)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


class Routed:
    """A router that runs, and the engines behind it."""

    def __init__(self, url: str, session: aiohttp.ClientSession, prefill: Engine, decode: Engine) -> None:
        self.url, self.session, self.prefill, self.decode = url, session, prefill, decode

    async def post(self, body: Any, path: str = "/v1/completions") -> tuple[int, str, str]:
        """Status, `Kvstore-Prefill` and body of an answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        async with self.session.post(self.url + path, data=data, headers=headers) as answer:
            return answer.status, answer.headers.get("Kvstore-Prefill", ""), await answer.text()


async def _started(*flags: str) -> tuple[Process, str]:
    command = [str(EXAMPLES / "pd_router.py"), "--port", "0", *flags]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith("listening on "), line
    return process, line.removeprefix("listening on ").strip()


@pytest.fixture
async def routed() -> AsyncIterator[Routed]:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(Engine().running())
        decode = await stack.enter_async_context(Engine().running())
        session = await stack.enter_async_context(aiohttp.ClientSession())
        process, url = await _started("--prefill", prefill.url, "--decode", decode.url)
        try:
            yield Routed(url, session, prefill, decode)
        finally:
            process.terminate()
            _, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()


async def test_the_router_prefills_one_token_and_decodes_the_rest(routed: Routed) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, prefilled, text = await routed.post(BODY, path)
        assert (status, prefilled) == (200, "ok")
        assert json.loads(text) == {"path": path, "choices": [{"text": "x" * 7}]}
    assert routed.decode.asked == [("/v1/completions", BODY), ("/v1/chat/completions", BODY)]
    asked = {name: value for name, value in BODY.items() if name != "min_tokens"}
    assert routed.prefill.asked[0] == ("/v1/completions", asked | {"max_tokens": 1, "n": 1, "stream": False})
    assert routed.prefill.headers == routed.decode.headers == ["Bearer secret"] * 2


async def test_the_router_passes_a_stream_on(routed: Routed) -> None:
    routed.decode.answer = routed.decode.stream
    status, _, text = await routed.post(BODY | {"stream": True, "stream_options": {"include_usage": True}})
    assert (status, text) == (200, "".join(f"data: {number}\n\n" for number in range(7)) + "data: [DONE]\n\n")
    assert routed.prefill.asked[0][1]["stream"] is False
    assert "stream_options" not in routed.prefill.asked[0][1]
    routed.decode.answer = routed.decode.break_off
    with pytest.raises(aiohttp.ClientError):
        await routed.post(BODY | {"stream": True})


async def test_the_router_reports_the_errors_of_either_side(routed: Routed) -> None:
    for status in (400, 429):
        routed.prefill.status(status)
        assert (await routed.post(BODY))[:2] == (status, f"refused; {status}")
    assert routed.decode.asked == [], "what the prefill engine refuses goes no further"
    routed.prefill.status(500)
    status, prefilled, text = await routed.post(BODY)
    assert (status, prefilled, len(json.loads(text)["choices"][0]["text"])) == (200, "failed; status 500", 7)
    routed.decode.status(404)
    assert (await routed.post(BODY))[0] == 404
    assert (await routed.post(b"{"))[0] == (await routed.post(b"[]"))[0] == 400


async def test_the_router_knows_which_engines_are_well(routed: Routed) -> None:
    async with routed.session.get(routed.url + "/health") as answer:
        assert (answer.status, await answer.json()) == (200, {"down": []})
    async with routed.session.get(routed.url + "/v1/models") as answer:
        assert (await answer.json())["data"] == [{"id": "m"}]
    routed.decode.healthy = False
    async with routed.session.get(routed.url + "/health") as answer:
        assert (answer.status, await answer.json()) == (503, {"down": [f"decode {routed.decode.url}"]})


async def test_the_router_does_without_engines_that_are_down() -> None:
    nobody = "http://127.0.0.1:9"
    async with Engine().running() as decode, aiohttp.ClientSession() as session:
        process, url = await _started("--prefill", nobody, "--decode", decode.url, nobody)
        try:
            routed = Routed(url, session, decode, decode)
            status, prefilled, _ = await routed.post(BODY)
            assert (status, prefilled) == (200, "failed; ClientConnectorError")
            status, _, text = await routed.post(BODY)
            assert status == 502
            assert "cannot be asked" in json.loads(text)["error"]["message"]
        finally:
            process.terminate()
            await process.communicate()
