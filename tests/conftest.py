"""Shared fixtures: a server in this process, and servers as processes of their own."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import settings

from kvstore.config import ServerConfig
from kvstore.frame import Frame
from kvstore.keys import NAMESPACE_BYTES, ChunkKey
from kvstore.server import running_server
from kvstore.wire import FRAME_TYPE
from tests.frames import frame_bytes

# Kernels run under triton's interpreter where there is no GPU; triton reads this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run; HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

PROBLEM_FIELDS = {"type", "title", "status", "code", "detail"}
FRAME = {"Content-Type": FRAME_TYPE}


def path_of(key: ChunkKey) -> str:
    """Path of a chunk."""
    return f"/v1/kv/{key[:NAMESPACE_BYTES].hex()}/{key[NAMESPACE_BYTES:].hex()}"


class Answer:
    """A response with its body read."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes, json: Any) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.json = json


class Server:
    """A server that answers, and a session to ask it."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, stop: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.url = url
        self._stop = stop
        self.host, self.port = "127.0.0.1", int(url.rsplit(":", 1)[1])
        self.session = session

    async def ask(self, method: str, path: str, **request: Any) -> Answer:
        """The answer to a request."""
        if isinstance(body := request.get("data"), bytes):
            # aiohttp wants large bodies as files.
            request["data"] = io.BytesIO(body)
        async with self.session.request(method, self.url + path, **request) as response:
            body = await response.read()
            is_json = "json" in response.content_type and body
            return Answer(response.status, response.headers, body, await response.json() if is_json else None)

    async def stop(self) -> None:
        """Stop the server as SIGTERM does; stopping it twice is stopping it once."""
        assert self._stop is not None, "a server that is a process is stopped as one"
        await self._stop()

    async def put(self, frame: Frame, ack: str = "memory") -> Answer:
        """The answer to the put of a frame."""
        path = f"{path_of(frame.key)}?ack={ack}"
        return await self.ask("PUT", path, data=frame_bytes(frame), headers=FRAME)

    async def bytes_of(self, key: ChunkKey) -> bytes:
        """What is stored under a key."""
        answer = await self.ask("GET", path_of(key))
        assert answer.status == 200, answer.body
        return answer.body

    async def holds(self, key: ChunkKey) -> bool:
        """Whether anything is stored under a key."""
        return (await self.ask("HEAD", path_of(key))).status == 200

    async def refused(self, method: str, path: str, status: int, code: str | None = None, **request: Any) -> Answer:
        """Check that a request is refused with a problem of this status and code."""
        answer = await self.ask(method, path, **request)
        assert_problem(answer, code)
        assert answer.status == status, answer.body
        return answer

    async def metric(self, line: str) -> float:
        """Value of a metric, such as `kvstore_corrupt_total{tier="lmdb"}`; 0 where it was never counted."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        found = re.search(f"^{re.escape(line)} (.*)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare connection."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()


def assert_problem(answer: Answer, code: str | None = None) -> None:
    """Check that an answer is a problem of the client's making, as RFC 9457 wants it."""
    assert 400 <= answer.status < 500 or answer.status in (503, 507), (answer.status, answer.body)
    assert answer.headers["Content-Type"].partition(";")[0] == "application/problem+json"
    assert answer.json.keys() >= PROBLEM_FIELDS
    assert answer.json["status"] == answer.status
    assert code in (None, answer.json["code"]), answer.json


Start = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts servers in this process, with the settings given; they stop when the test ends."""
    async with AsyncExitStack() as stack:

        async def start_server(**settings: Any) -> Server:
            defaults: dict[str, Any] = {"port": 0, "data_dir": tmp_path / "data", "memory_bytes": 64 << 20}
            config = ServerConfig(**defaults | {"disk_bytes": 64 << 20, "shutdown_timeout_s": 1.0} | settings)
            server = await stack.enter_async_context(AsyncExitStack())
            url = await server.enter_async_context(running_server(config))
            session = await server.enter_async_context(aiohttp.ClientSession())
            return Server(url, session, server.aclose)

        yield start_server


@pytest.fixture
async def server(start: Start) -> Server:
    """A server in this process with small tiers and default limits."""
    return await start()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session for servers that run as processes."""
    async with aiohttp.ClientSession() as opened:
        yield opened


class Process:
    """`kvstore serve` as a process of its own."""

    def __init__(self, command: Sequence[str], environ: dict[str, str], cwd: Path) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, cwd=cwd
        )
        assert self._process.stdout is not None
        self._stderr: str | None = None
        self.announced = self._process.stdout.readline().strip()
        self.pid = self._process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self.announced.startswith("listening on http://"), self.announced
        return self.announced.removeprefix("listening on ")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self) -> int:
        """Exit status, once it has ended."""
        return self.end()[0]

    def terminate(self) -> int:
        """Ask it to stop, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> int:
        """End it as a power cut would, and its exit status."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def end(self) -> tuple[int, str]:
        """Exit status and standard error, once it has ended."""
        if self._stderr is None:
            try:
                _, self._stderr = self._process.communicate(timeout=20)
            finally:
                self._process.kill()
        return self._process.returncode, self._stderr


Serve = Callable[..., Process]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts `kvstore serve` on a free port, with further flags; no process outlives the test."""
    started: list[Process] = []

    def start_process(*flags: str, prelude: str = "", environ: dict[str, str] | None = None) -> Process:
        code = f"{prelude}\nfrom kvstore.cli import main\nraise SystemExit(main())"
        program = ["-c", code] if prelude else ["-m", "kvstore"]
        command = [sys.executable, *program, "serve", "--port", "0", "--data-dir", str(tmp_path / "data"), *flags]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
        started.append(Process(command, clean | (environ or {}), tmp_path))
        return started[-1]

    yield start_process
    for process in started:
        process.kill()


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
