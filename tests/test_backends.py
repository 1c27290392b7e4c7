"""Every backend passes the shipped suite: host, LMDB, write-behind, the stack, and the client through a server."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from kvstore.backend import Backend
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.client import Client
from kvstore.config import ServerConfig
from kvstore.server import running_server
from kvstore.testing import BackendSuite
from kvstore.tiers import TieredBackend, WriteBehind

BUDGET = BackendSuite.budget_bytes


@asynccontextmanager
async def _host() -> AsyncIterator[Backend]:
    backend = HostBackend(BUDGET)
    yield backend
    await backend.aclose()


@asynccontextmanager
async def _lmdb() -> AsyncIterator[Backend]:
    with tempfile.TemporaryDirectory() as directory:
        backend = await LmdbBackend.open(Path(directory), BUDGET)
        yield backend
        await backend.aclose()


@asynccontextmanager
async def _write_behind() -> AsyncIterator[Backend]:
    with tempfile.TemporaryDirectory() as directory:
        backend = WriteBehind(await LmdbBackend.open(Path(directory), BUDGET), queue_bytes_max=BUDGET)
        yield backend
        await backend.aclose()


@asynccontextmanager
async def _stack() -> AsyncIterator[Backend]:
    with tempfile.TemporaryDirectory() as directory:
        disk = WriteBehind(await LmdbBackend.open(Path(directory), BUDGET), queue_bytes_max=BUDGET)
        backend = TieredBackend([HostBackend(BUDGET // 2), disk])
        yield backend
        await backend.aclose()


@asynccontextmanager
async def _remote() -> AsyncIterator[Backend]:
    with tempfile.TemporaryDirectory() as directory:
        config = ServerConfig(port=0, data_dir=Path(directory), memory_bytes=BUDGET // 2, disk_bytes=BUDGET)
        async with running_server(config) as url, Client(url) as client:
            yield client


class TestHost(BackendSuite):
    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _host()


class TestLmdb(BackendSuite):
    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _lmdb()


class TestWriteBehind(BackendSuite):
    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _write_behind()


class TestStack(BackendSuite):
    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _stack()


class TestRemote(BackendSuite):
    examples = 20

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _remote()
