"""The S3 tier passes the shipped suite; tests/s3_on_ceph.py runs it on a server that keeps what it is given."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from kvstore.backend import Backend
from kvstore.backends.s3 import S3Backend
from kvstore.testing import BackendSuite
from tests.s3_servers import S3Server, running_moto


@asynccontextmanager
async def _open(server: S3Server) -> AsyncIterator[Backend]:
    backend = await S3Backend.open(server.settings())
    yield backend
    await backend.aclose()


class TestMoto(BackendSuite):
    bounded = False
    examples = 6
    server: S3Server

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with running_moto() as cls.server:
            yield

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _open(self.server)
