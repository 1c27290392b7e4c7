"""Every backend passes the shipped suite: host, LMDB, write-behind, the client, and stacks of them with GPU and S3.

The suites of the GPU and S3 tiers alone are beside their other tests.
"""

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from kvstore.backend import Ack, Backend
from kvstore.backends.gpu import GpuBackend
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Policies
from kvstore.backends.s3 import S3Backend
from kvstore.client import Client
from kvstore.config import ServerConfig
from kvstore.server import running_server
from kvstore.testing import BackendSuite
from kvstore.tiers import TieredBackend, WriteBehind
from tests.s3_servers import S3Server, running_moto

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
async def _four_tiers(moto: S3Server) -> AsyncIterator[Backend]:
    with tempfile.TemporaryDirectory() as directory:
        policies = Policies()
        tiers: list[Backend] = [
            await GpuBackend.open(BUDGET // 2, device="cpu", policies=policies),
            HostBackend(BUDGET // 2, policies=policies),
            WriteBehind(await LmdbBackend.open(Path(directory), BUDGET, policies=policies), queue_bytes_max=BUDGET),
            WriteBehind(await S3Backend.open(moto.settings()), inner_ack=Ack.REMOTE),
        ]
        backend = TieredBackend(tiers, promoted=["gpu"], policies=policies)
        yield backend
        await backend.aclose()


@asynccontextmanager
async def _engine() -> AsyncIterator[Backend]:
    """What an engine's process has: tiers of its own in front of a server."""
    with tempfile.TemporaryDirectory() as directory:
        config = ServerConfig(port=0, data_dir=Path(directory), memory_bytes=BUDGET // 2, disk_bytes=BUDGET)
        async with running_server(config) as url:
            policies = Policies()
            gpu = await GpuBackend.open(BUDGET // 4, device="cpu", policies=policies)
            tiers: list[Backend] = [gpu, HostBackend(BUDGET // 4, policies=policies), Client(url)]
            backend = TieredBackend(tiers, promoted=["gpu"], policies=policies)
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


class TestEngine(BackendSuite):
    examples = 20

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _engine()


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with running_moto() as server:
        yield server


class TestFourTiers(BackendSuite):
    bounded = False
    examples = 20

    @pytest.fixture(autouse=True)
    def _server(self, moto: S3Server) -> None:
        self.moto = moto

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _four_tiers(self.moto)
