"""The S3 tier when S3 fails: every call ends in time, the breaker opens and closes, nothing acknowledged is lost."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvstore.backend import Ack, Miss, Outcome, Reason
from kvstore.backends.s3 import S3Backend, S3Settings
from kvstore.errors import BackendUnavailableError
from kvstore.frame import Frame
from kvstore.metrics import Metrics
from kvstore.testing import make_frame, make_key
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.frames import frame_bytes
from tests.s3_servers import S3Server, running_moto
from tests.s3_storm import Account, storm, verify

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key, (5000, 3000)) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with running_moto() as server:
        yield server


@pytest.fixture
async def proxy(moto: S3Server) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(moto.port) as proxy:
        yield proxy


@asynccontextmanager
async def opened(settings: S3Settings, **options: Any) -> AsyncIterator[S3Backend]:
    backend = await S3Backend.open(settings, **options)
    try:
        await until(lambda: backend.state == (True, ""))
        yield backend
    finally:
        await backend.aclose()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a state; the test's own time limit ends one that never comes."""
    while not holds():
        await asyncio.sleep(0.005)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-s3")]


async def test_the_breaker_opens_answers_at_once_and_closes_by_itself(moto: S3Server, proxy: FaultProxy) -> None:
    metrics = Metrics()
    settings = moto.settings(
        endpoint_url=proxy.url, attempts=1, breaker_failures=3, breaker_cooldown_s=0.5, breaker_cooldown_max_s=0.5
    )
    async with opened(settings, metrics=metrics) as backend:
        assert sample(metrics, "kvstore_tier_up", tier="s3") == 1
        await backend.put(ITEMS[:1])
        proxy.down = True
        for _ in range(3):
            assert await backend.get(KEYS[:1]) == [Miss(Reason.BREAKER)]
        assert not backend.state.up
        assert backend.state.detail.startswith("breaker open: ")
        assert backend.state.detail.endswith("; next try in 1 s")
        assert sample(metrics, "kvstore_tier_up", tier="s3") == 0
        asked = len(proxy.requests)
        [stored] = await backend.put(ITEMS[1:2])
        assert (stored.outcome, stored.ack) == (Outcome.FAILED, None)
        assert isinstance(stored.error, BackendUnavailableError)
        assert 0 < stored.error.retry_after_s <= 0.5
        assert await backend.get(KEYS[:2]) == [Miss(Reason.BREAKER), Miss(Reason.ABSENT)]
        for change in (backend.delete(KEYS[:1]), backend.trim(KEYS[:1], level=0)):
            with pytest.raises(BackendUnavailableError, match="left alone"):
                await change
        assert len((await backend.match(KEYS[:1])).held) == 1
        assert len(proxy.requests) == asked
        proxy.down = False
        await until(lambda: backend.state.up)
        assert isinstance((await backend.get(KEYS[:1]))[0], Frame)
        assert sample(metrics, "kvstore_breaker_opened_total", tier="s3") >= 1
        assert sample(metrics, "kvstore_tier_up", tier="s3") == 1


async def test_a_tier_that_opens_without_s3_comes_up_when_s3_does(moto: S3Server, proxy: FaultProxy) -> None:
    settings = moto.settings(endpoint_url=proxy.url, attempts=1)
    async with opened(settings) as backend:
        await backend.put(ITEMS)
    proxy.down = True
    backend = await S3Backend.open(settings)
    assert not backend.state.up
    proxy.down = False
    await until(lambda: backend.state == (True, ""))
    assert (await backend.match(KEYS)).miss is None
    await backend.aclose()


@pytest.mark.parametrize("fault", ["stall_request", "stall_answer", "throttle", "held"])
async def test_no_call_outlives_its_deadline_nor_its_threads(moto: S3Server, proxy: FaultProxy, fault: str) -> None:
    settings = moto.settings(
        endpoint_url=proxy.url, deadline_s=0.6, read_timeout_s=0.4, threads=2, breaker_failures=1000, rebuild_threads=1
    )
    frames = [(key, make_frame(key, (100_000,))) for key in KEYS]
    async with opened(settings) as backend:
        await backend.put(frames[:4])
        if fault == "held":
            proxy.hold = "kvtest"
        else:
            proxy.share, proxy.kinds, proxy.rate_bytes_per_s = 1.0, (fault,), 20_000
        calls: list[Any] = [backend.get(KEYS[:4]), backend.put(frames[4:]), backend.get(KEYS[:1])]
        began = time.monotonic()
        first, stored, second = await asyncio.gather(*calls)
        assert time.monotonic() - began < settings.deadline_s + 1
        assert {answer.reason for answer in first + second if isinstance(answer, Miss)} == {Reason.DEADLINE}
        if fault in ("stall_request", "held"):
            assert {one.outcome for one in stored} == {Outcome.FAILED}
            with pytest.raises(BackendUnavailableError):
                await backend.delete(KEYS[5:])
        proxy.share, proxy.hold = 0.0, ""
        proxy.release.set()
        # With two threads, this can only be answered once the others have let go.
        await until_answered(backend)
    await until(lambda: not threads())


async def until_answered(backend: S3Backend) -> None:
    while any(isinstance(answer, Miss) for answer in await backend.get(KEYS[:4])):
        await asyncio.sleep(0.01)


async def test_a_body_that_is_cut_is_read_on_from_there(moto: S3Server, proxy: FaultProxy) -> None:
    frame = make_frame(KEYS[0], (300_000, 200_000))
    async with opened(moto.settings(endpoint_url=proxy.url, attempts=3)) as backend:
        await backend.put([(KEYS[0], frame)])
        proxy.next.extend(["cut_answer", "cut_answer"])
        proxy.answer_bytes = 0
        [found] = await backend.get(KEYS[:1])
        assert isinstance(found, Frame)
        assert frame_bytes(found) == frame_bytes(frame)
        assert proxy.happened["cut_answer"] == 2


async def test_bytes_that_are_changed_on_their_way_are_read_again(moto: S3Server, proxy: FaultProxy) -> None:
    metrics, frame = Metrics(), make_frame(KEYS[0], (300_000,))
    settings = moto.settings(endpoint_url=proxy.url)
    async with opened(settings, metrics=metrics) as backend:
        await backend.put([(KEYS[0], frame)])
        proxy.next.append("corrupt_answer")
        [found] = await backend.get(KEYS[:1])
        assert isinstance(found, Frame)
        assert frame_bytes(found) == frame_bytes(frame)
        assert proxy.happened["corrupt_answer"] == 1
        assert sample(metrics, "kvstore_corrupt_total", tier="s3") == 0
        assert len(moto.names(settings)) == 1


async def test_a_late_put_lands_before_a_delete_and_not_after_it(moto: S3Server, proxy: FaultProxy) -> None:
    settings = moto.settings(endpoint_url=proxy.url, deadline_s=1.0)
    async with opened(settings) as backend:
        proxy.delay_s = 0.7
        proxy.next.append("late")
        [stored] = await backend.put(ITEMS[:1])
        assert (stored.outcome, stored.ack) == (Outcome.FAILED, None)
        asked = len(proxy.requests)
        await backend.delete(KEYS[:1])
        assert [line.split()[0] for line in proxy.requests[asked:]] == ["DELETE"]
        assert moto.names(settings) == []
        assert (await backend.match(KEYS[:1])).held == []


async def test_a_delete_that_would_overtake_a_put_fails(moto: S3Server, proxy: FaultProxy) -> None:
    settings = moto.settings(endpoint_url=proxy.url, deadline_s=0.3)
    async with opened(settings) as backend:
        # A body is not sent before the server says that it wants it, or a second has passed.
        proxy.hold = "PUT"
        assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.FAILED
        with pytest.raises(BackendUnavailableError, match="within"):
            await backend.delete(KEYS[:1])
        assert not any("DELETE" in line for line in proxy.requests)


async def test_the_index_learns_of_a_late_put(moto: S3Server, proxy: FaultProxy) -> None:
    async with opened(moto.settings(endpoint_url=proxy.url, deadline_s=1.0)) as backend:
        proxy.delay_s = 0.7
        proxy.next.append("late")
        assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.FAILED
        await until(lambda: backend._index.get(KEYS[0]) is not None)
        assert isinstance((await backend.get(KEYS[:1]))[0], Frame)


@pytest.mark.parametrize("change", ["put", "extend", "trim", "delete"])
async def test_what_a_failed_change_did_is_looked_for(moto: S3Server, proxy: FaultProxy, change: str) -> None:
    settings = moto.settings(endpoint_url=proxy.url, attempts=1)
    async with opened(settings) as backend:
        if change != "put":
            await backend.put([(KEYS[0], FRAMES[0].truncated(0) if change == "extend" else FRAMES[0])])
        proxy.next.extend(["lose_answer"] if change in ("put", "delete") else ["none", "lose_answer"])
        if change == "trim":
            with pytest.raises(BackendUnavailableError):
                await backend.trim(KEYS[:1], level=0)
        elif change == "delete":
            with pytest.raises(BackendUnavailableError):
                await backend.delete(KEYS[:1])
        else:
            assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.FAILED
        expected = {"put": 2, "extend": 2, "trim": 1}
        if change == "delete":
            [stored] = await backend.put(ITEMS[:1])
            assert stored.outcome is Outcome.WRITTEN
        else:
            [found] = await backend.get(KEYS[:1])
            assert isinstance(found, Frame)
            assert found.levels == expected[change]
            [stored] = await backend.put(ITEMS[:1])
            assert stored.outcome is (Outcome.EXTENDED if change == "trim" else Outcome.EXISTS)
        assert moto.read(settings, KEYS[0]) == frame_bytes(FRAMES[0])


async def test_a_change_whose_answer_was_lost_is_made(moto: S3Server, proxy: FaultProxy) -> None:
    async with opened(moto.settings(endpoint_url=proxy.url)) as backend:
        proxy.next.append("lose_answer")
        [stored] = await backend.put(ITEMS[:1])
        assert stored in ((Outcome.WRITTEN, Ack.REMOTE, None), (Outcome.EXISTS, Ack.REMOTE, None))
        proxy.next.append("lose_answer")
        await backend.trim(KEYS[:1], level=0)
        proxy.next.append("lose_answer")
        await backend.delete(KEYS[:1])
        assert await backend.get(KEYS[:1]) == [Miss(Reason.ABSENT)]


async def test_a_reader_who_leaves_frees_its_threads(moto: S3Server, proxy: FaultProxy) -> None:
    frame = make_frame(KEYS[0], (2 << 20,))
    async with opened(moto.settings(endpoint_url=proxy.url, threads=1, deadline_s=30.0)) as backend:
        await backend.put([(KEYS[0], frame), *ITEMS[1:2]])
        proxy.next.append("throttle")
        reading = asyncio.create_task(backend.get(KEYS[:1]))
        await until(lambda: proxy.happened["throttle"] == 1)
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        began = time.monotonic()
        assert isinstance((await backend.get(KEYS[1:2]))[0], Frame)
        assert time.monotonic() - began < 10


async def test_closing_is_bounded_while_s3_is_silent(moto: S3Server, proxy: FaultProxy) -> None:
    settings = moto.settings(endpoint_url=proxy.url, deadline_s=0.5)
    backend = await S3Backend.open(settings)
    await until(lambda: backend.state == (True, ""))
    proxy.hold = "kvtest"
    putting = asyncio.create_task(backend.put(ITEMS))
    await until(lambda: proxy.requests[-1].startswith("PUT"))
    began = time.monotonic()
    await asyncio.gather(backend.aclose(), backend.aclose())
    assert time.monotonic() - began < settings.deadline_s + 1
    assert {stored.outcome for stored in await putting} == {Outcome.FAILED}
    with pytest.raises(BackendUnavailableError, match="closed"):
        await backend.get(KEYS)
    assert backend.state == (False, "closed")
    await until(lambda: not threads())


async def test_a_storm_of_faults_loses_nothing_that_was_acknowledged(moto: S3Server) -> None:
    metrics, account = Metrics(), Account()
    async with fault_proxy(moto.port, seed=11) as proxy:
        proxy.share, proxy.stall_s, proxy.rate_bytes_per_s = 0.3, 0.5, 200_000
        settings = moto.settings(
            endpoint_url=proxy.url,
            deadline_s=1.0,
            read_timeout_s=0.3,
            attempts=2,
            breaker_failures=4,
            breaker_cooldown_s=0.05,
            breaker_cooldown_max_s=0.2,
        )
        async with opened(settings, metrics=metrics) as backend:
            began = time.monotonic()

            def over() -> bool:
                # In between S3 is gone altogether, until the breaker has opened.
                passed_s = time.monotonic() - began
                opened = sample(metrics, "kvstore_breaker_opened_total", tier="s3") >= 1
                proxy.down = passed_s > 0.8 and not opened
                return passed_s > 2.0 and opened

            report = await storm(backend, account, over, numbers=range(30), deadline_s=settings.deadline_s)
            proxy.share = 0.0
            certain = await verify(backend, account)
    async with opened(moto.settings(prefix=settings.prefix)) as fresh:
        assert await verify(fresh, account) == certain
    assert account.wrong == []
    assert report.late == []
    assert certain >= 3
    assert sum(report.calls.values()) > 50
    assert sum(proxy.happened.values()) - proxy.happened["none"] >= 10
