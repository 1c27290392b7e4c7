"""The S3 tier on a server that keeps what it acknowledges: the suite, and storms in which everything is killed.

`make test-s3` runs it; S3_STORM_S says how long a storm is (60 s). Its figures go to standard output.
"""

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from kvstore.backend import Backend, Outcome
from kvstore.backends.s3 import S3Backend, S3Settings
from kvstore.frame import Frame
from kvstore.metrics import Metrics
from kvstore.testing import BackendSuite, make_frame, make_key
from tests.ceph_s3 import Ceph, running_ceph
from tests.fault_proxy import FAULTS, FaultProxy, fault_proxy
from tests.s3_servers import S3Server
from tests.s3_storm import Account, read_log, storm, verify

STORM_S = float(os.environ.get("S3_STORM_S", "60"))
pytestmark = pytest.mark.timeout(300 + 10 * STORM_S)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ceph, S3Server]]:
    with running_ceph(tmp_path_factory.mktemp("ceph")) as node:
        yield node


@asynccontextmanager
async def _open(server: S3Server) -> AsyncIterator[Backend]:
    backend = await S3Backend.open(server.settings(deadline_s=20.0, read_timeout_s=10.0))
    yield backend
    await backend.aclose()


class TestCeph(BackendSuite):
    bounded = False
    examples = 20
    server: S3Server

    @pytest.fixture(autouse=True)
    def _serve(self, node: tuple[Ceph, S3Server]) -> None:
        type(self).server = node[1]

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return _open(self.server)


async def test_bytes_that_are_changed_on_the_way_there_are_refused(node: tuple[Ceph, S3Server]) -> None:
    async with fault_proxy(node[1].port) as proxy:
        backend = await S3Backend.open(node[1].settings(endpoint_url=proxy.url, attempts=1))
        proxy.next.extend(["corrupt_request"] * 4)
        key = make_key(0)
        while (await backend.put([(key, make_frame(key, (100_000,)))]))[0].outcome is not Outcome.WRITTEN:
            assert proxy.happened["corrupt_request"] > 0
        assert proxy.happened["corrupt_request"] == 4
        assert isinstance((await backend.get([key]))[0], Frame)
        await backend.aclose()


async def test_a_storm_with_kills_of_the_server(node: tuple[Ceph, S3Server]) -> None:
    ceph, server = node
    metrics, account, kills = Metrics(), Account(), ceph.kills
    async with fault_proxy(server.port, seed=5) as proxy:
        _rage(proxy)
        settings = _storm_settings(server, proxy)
        backend = await S3Backend.open(settings, metrics=metrics)
        killer = asyncio.create_task(_kill_and_start(ceph))
        report = await storm(
            backend, account, killer.done, numbers=range(120), deadline_s=settings.deadline_s, workers=12
        )
        await killer
        proxy.share = 0.0
        certain = await verify(backend, account)
        await backend.aclose()
    fresh = await S3Backend.open(_calm(settings, server))
    assert await verify(fresh, account) == certain
    await fresh.aclose()
    _print(report.calls, proxy, account, certain, metrics, slowest_s=report.slowest_s, kills=ceph.kills - kills)
    assert account.wrong == []
    assert report.late == []
    assert account.acknowledged > 20
    assert certain > 10
    assert metrics.registry.get_sample_value("kvstore_breaker_opened_total", {"tier": "s3"})


async def test_a_storm_with_kills_of_the_client(node: tuple[Ceph, S3Server], tmp_path: Path) -> None:
    server = node[1]
    rng = random.Random(7)
    accounts, acknowledged, wrong, kills = [], 0, [], 0
    async with fault_proxy(server.port, seed=6) as proxy:
        _rage(proxy)
        settings = _storm_settings(server, proxy)
        end_s = time.monotonic() + STORM_S
        while time.monotonic() < end_s:
            file = tmp_path / f"{kills}.log"
            arguments = [json.dumps(dataclasses.asdict(settings)), str(file), str(1000 + 60 * kills), str(kills)]
            process = subprocess.Popen([sys.executable, "-m", "tests.s3_storm", *arguments])  # noqa: ASYNC220
            await asyncio.sleep(rng.uniform(3, 8))
            assert process.poll() is None, "the client ended by itself"
            process.kill()
            process.wait()
            kills += 1
            accounts.append(read_log(file))
    # Requests that were under way when the client died may still be carried out.
    await asyncio.sleep(2)
    fresh = await S3Backend.open(_calm(settings, server))
    certain = sum([await verify(fresh, account) for account in accounts])
    await fresh.aclose()
    for account in accounts:
        acknowledged += account.acknowledged
        wrong += account.wrong
    print(
        f"\nkills of the client: {kills}; acknowledged puts: {acknowledged}; must be there: {certain}; wrong: {wrong}"
    )
    assert wrong == []
    assert acknowledged > 20


def _rage(proxy: FaultProxy) -> None:
    proxy.share, proxy.stall_s, proxy.rate_bytes_per_s = 0.2, 2.0, 200_000
    proxy.kinds = (*FAULTS, "corrupt_request")


def _storm_settings(server: S3Server, proxy: FaultProxy) -> S3Settings:
    return server.settings(
        endpoint_url=proxy.url, deadline_s=4.0, read_timeout_s=1.5, threads=12, breaker_cooldown_max_s=1.0
    )


def _calm(settings: S3Settings, server: S3Server) -> S3Settings:
    return dataclasses.replace(settings, endpoint_url=server.url, deadline_s=20.0, read_timeout_s=20.0)


async def _kill_and_start(ceph: Ceph) -> None:
    """Kill the server every now and then, until the storm has lasted long enough."""
    rng = random.Random(3)
    end_s = time.monotonic() + STORM_S
    while time.monotonic() < end_s:
        await asyncio.sleep(rng.uniform(4, 10))
        await asyncio.to_thread(ceph.kill)
        await asyncio.sleep(rng.uniform(0, 2))
        await asyncio.to_thread(ceph.start)
    await asyncio.sleep(3)


def _print(
    calls: Counter[str],
    proxy: FaultProxy,
    account: Account,
    certain: int,
    metrics: Metrics,
    *,
    slowest_s: float,
    kills: int,
) -> None:
    opened = metrics.registry.get_sample_value("kvstore_breaker_opened_total", {"tier": "s3"})
    print(f"\ncalls: {sum(calls.values())}: {dict(sorted(calls.items()))}")
    print(f"requests at the proxy, by fault: {dict(sorted(proxy.happened.items()))}")
    print(f"kills of the server: {kills}; breaker opened: {opened:.0f} times; slowest call: {slowest_s:.2f} s")
    print(f"acknowledged puts: {account.acknowledged}; must be there: {certain}; wrong: {account.wrong}")
