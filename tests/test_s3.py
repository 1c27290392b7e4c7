"""The S3 tier on real servers: what lies in the bucket, other servers' writes, damage, the rebuilding of the index."""

import asyncio
import dataclasses
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.backend import Ack, Backend, Miss, Outcome, Reason
from kvstore.backends.s3 import S3Backend, S3Settings
from kvstore.errors import BackendFullError, ConfigError
from kvstore.frame import Frame, parse_frame
from kvstore.metrics import Metrics
from kvstore.testing import BackendSuite, make_frame, make_key
from tests.fault_proxy import fault_proxy
from tests.frames import forge, frame_bytes, header_fields
from tests.s3_servers import BUCKET, S3Server, free_port, name_of, running_moto, running_rclone

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key, (5000, 3000)) for key in KEYS]
OTHER = [make_frame(key, (5000, 3000), seed=1) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with running_moto() as server:
        yield server


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_rclone(tmp_path_factory.mktemp("bucket")) as server:
        yield server


@pytest.fixture(params=["moto", "rclone"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@asynccontextmanager
async def opened(settings: S3Settings, *, rebuilt: bool = True, **options: Any) -> AsyncIterator[S3Backend]:
    backend = await S3Backend.open(settings, **options)
    try:
        if rebuilt:
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


def data(answer: Frame | Miss) -> bytes | Reason:
    return answer.reason if isinstance(answer, Miss) else frame_bytes(answer)


class TestSuite(BackendSuite):
    """tests/s3_on_ceph.py runs it on a server that keeps what it is given."""

    bounded = False
    examples = 5

    @pytest.fixture(autouse=True)
    def _serve(self, moto: S3Server) -> None:
        self.server = moto

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        return opened(self.server.settings())


# What lies in the bucket


async def test_an_object_is_a_frame_under_its_key(server: S3Server) -> None:
    settings = server.settings()
    async with opened(settings) as backend:
        assert {stored.ack for stored in await backend.put(ITEMS)} == {Ack.REMOTE}
        await backend.trim(KEYS[:1], level=0)
        await backend.delete(KEYS[1:3])
    assert sorted(server.names(settings)) == sorted(
        name_of(settings, key).removeprefix(settings.prefix) for key in (KEYS[0], *KEYS[3:])
    )
    assert server.read(settings, KEYS[0]) == frame_bytes(FRAMES[0].truncated(0))
    assert server.read(settings, KEYS[3]) == frame_bytes(FRAMES[3])


async def test_what_was_put_is_known_after_reopening(server: S3Server) -> None:
    settings = server.settings()
    inexact = make_frame(KEYS[5], (5000, 3000), seed=1)
    async with opened(settings) as backend:
        await backend.put([*ITEMS[:5], (KEYS[5], inexact)])
        await backend.trim(KEYS[1:2], level=0)
        before = dict([found async for found in backend.scan()])
    metrics = Metrics()
    async with opened(settings, metrics=metrics) as backend:
        assert dict([found async for found in backend.scan()]) == before
        assert (await backend.match(KEYS)).miss is None
        assert [data(frame) for frame in await backend.get(KEYS[:2])] == [
            frame_bytes(FRAMES[0]),
            frame_bytes(FRAMES[1].truncated(0)),
        ]
        assert sample(metrics, "kvstore_tier_chunks", tier="s3") == 6
        assert sample(metrics, "kvstore_tier_bytes", tier="s3") == sum(
            held.copy.head_bytes + sum(held.copy.level_bytes) for held in before.values()
        )


async def test_only_the_levels_asked_for_are_fetched(moto: S3Server) -> None:
    large = make_frame(KEYS[0], (1000, 1 << 20))
    async with fault_proxy(moto.port) as proxy, opened(moto.settings(endpoint_url=proxy.url)) as backend:
        await backend.put([(KEYS[0], large)])
        assert (await backend.match(KEYS)).held[0].copy.level_bytes == large.head.level_bytes
        proxy.answer_bytes = 0
        assert data((await backend.get(KEYS[:1], level=0))[0]) == frame_bytes(large.truncated(0))
        assert proxy.answer_bytes < 10_000
        assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(large)


async def test_match_and_known_answers_ask_nothing(moto: S3Server) -> None:
    async with fault_proxy(moto.port) as proxy, opened(moto.settings(endpoint_url=proxy.url)) as backend:
        await backend.put(ITEMS[:3])
        proxy.requests.clear()
        assert len((await backend.match(KEYS)).held) == 3
        assert await backend.get(KEYS[4:]) == [Miss(Reason.ABSENT)] * 2
        again = await backend.put([*ITEMS[:2], (KEYS[2], OTHER[2])])
        assert [stored.outcome for stored in again] == [Outcome.EXISTS, Outcome.EXISTS, Outcome.OTHER]
        assert proxy.requests == []


async def test_large_frames_are_sent_in_parts(server: S3Server) -> None:
    settings = server.settings(multipart_bytes=5 << 20, part_bytes=5 << 20)
    frame = make_frame(KEYS[0], (5 << 20, 1 << 20))
    async with opened(settings) as backend:
        assert [stored.outcome for stored in await backend.put([(KEYS[0], frame.truncated(0))])] == [Outcome.WRITTEN]
        assert [stored.outcome for stored in await backend.put([(KEYS[0], frame)])] == [Outcome.EXTENDED]
        assert [stored.outcome for stored in await backend.put([(KEYS[0], frame)])] == [Outcome.EXISTS]
        assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(frame)
    assert server.read(settings, KEYS[0]) == frame_bytes(frame)


async def test_parts_of_a_put_that_failed_do_not_stay(moto: S3Server) -> None:
    async with fault_proxy(moto.port) as proxy:
        settings = moto.settings(
            endpoint_url=proxy.url, multipart_bytes=6 << 20, part_bytes=5 << 20, attempts=1, breaker_failures=99
        )
        async with opened(settings) as backend:
            proxy.next.extend(["none", "none", "error", "none"])
            [stored] = await backend.put([(KEYS[0], make_frame(KEYS[0], (7 << 20,)))])
            assert (stored.outcome, stored.ack) == (Outcome.FAILED, None)
            assert await backend.get(KEYS[:1]) == [Miss(Reason.ABSENT)]
    uploads = moto.client.list_multipart_uploads(Bucket=BUCKET, Prefix=settings.prefix)
    assert uploads.get("Uploads", []) == []


async def test_a_frame_above_the_limit_is_refused(moto: S3Server) -> None:
    async with opened(moto.settings(frame_bytes_max=10_000)) as backend:
        [stored] = await backend.put([(KEYS[0], make_frame(KEYS[0], (20_000,)))])
        assert stored.outcome is Outcome.FAILED
        assert isinstance(stored.error, BackendFullError)


async def test_objects_are_encrypted_where_it_is_asked_for(moto: S3Server) -> None:
    settings = moto.settings(encryption="AES256")
    async with opened(settings) as backend:
        await backend.put(ITEMS[:1])
    answer = moto.client.head_object(Bucket=BUCKET, Key=name_of(settings, KEYS[0]))
    assert answer["ServerSideEncryption"] == "AES256"


async def test_connections_are_used_again(moto: S3Server) -> None:
    async with opened(moto.settings(threads=1, rebuild_threads=1)) as backend:
        pool = backend._store._client._endpoint.http_session._manager.pools
        for item in ITEMS:
            await backend.put([item])
            await backend.get([item[0]], level=0)
            await backend.get([item[0]])
        [one] = [pool.get(key) for key in pool.keys()]  # noqa: SIM118 (no mapping)
        assert one.num_requests >= 18
        assert one.num_connections <= 2


# Other servers on the same bucket


async def test_of_two_servers_one_wins(moto: S3Server) -> None:
    settings = moto.settings()
    async with opened(settings) as here, opened(settings) as there:
        first = await asyncio.gather(here.put(ITEMS), there.put(list(zip(KEYS, OTHER, strict=True))))
        for (ours,), (theirs,), key in zip(*([[one] for one in stored] for stored in first), KEYS, strict=True):
            assert sorted([ours.outcome, theirs.outcome]) == [Outcome.OTHER, Outcome.WRITTEN]
            winner = FRAMES if ours.outcome is Outcome.WRITTEN else OTHER
            expected = frame_bytes(winner[KEYS.index(key)])
            assert [data((await side.get([key]))[0]) for side in (here, there)] == [expected, expected]


async def test_levels_that_another_server_added_are_not_taken_away(moto: S3Server) -> None:
    settings = moto.settings()
    frame = make_frame(KEYS[0], (500, 400, 300))
    async with opened(settings) as here, opened(settings) as there:
        await here.put([(KEYS[0], frame.truncated(0))])
        assert (await there.put([(KEYS[0], frame)]))[0].outcome is Outcome.EXTENDED
        assert (await here.put([(KEYS[0], frame.truncated(1))]))[0].outcome is Outcome.EXISTS
        assert moto.read(settings, KEYS[0]) == frame_bytes(frame)
        await there.trim(KEYS[:1], level=0)
        assert data((await here.get(KEYS[:1]))[0]) == frame_bytes(frame.truncated(0))
        assert len((await here.match(KEYS[:1])).held[0].copy.level_bytes) == 1


async def test_a_server_that_knows_no_conditions_is_written_to_without(moto: S3Server) -> None:
    async with fault_proxy(moto.port) as proxy, opened(moto.settings(endpoint_url=proxy.url)) as backend:
        proxy.conditions = False
        assert [stored.outcome for stored in await backend.put([(KEYS[0], FRAMES[0].truncated(0))])] == [
            Outcome.WRITTEN
        ]
        assert await backend.put(ITEMS[:1]) == [(Outcome.EXTENDED, Ack.REMOTE, None)]
        assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(FRAMES[0])


async def test_what_vanished_from_the_bucket_is_evicted_and_can_come_back(server: S3Server) -> None:
    settings = server.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS)
        for key in KEYS[:3]:
            server.delete(settings, key)
        assert [data(answer) for answer in await backend.get(KEYS[:1])] == [Reason.EVICTED]
        await backend.trim(KEYS[1:2], level=0)
        assert (await backend.match(KEYS[1:2])).miss == Miss(Reason.EVICTED)
        extended = await backend.put([(KEYS[0], FRAMES[0]), (KEYS[1], FRAMES[1])])
        assert [stored.outcome for stored in extended] == [Outcome.WRITTEN] * 2
        assert all(isinstance(frame, Frame) for frame in await backend.get(KEYS[:2]))


# Damage


def _flip(frame: bytes) -> bytes:
    return frame[:-20] + bytes([frame[-20] ^ 1]) + frame[-19:]


def _huge(frame: bytes) -> bytes:
    # The head claims a TiB that is not there.
    size_bytes = 1 << 40
    return forge(header_fields(parse_frame(frame).key), [(0, size_bytes, 0)], b"", payload_bytes=size_bytes)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": _flip,
    "truncated": lambda frame: frame[:-1],
    "head cut": lambda frame: frame[:100],
    "empty": lambda _: b"",
    "no frame": lambda _: b"garbage " * 1000,
    "another chunk's": lambda _: frame_bytes(FRAMES[1]),
    "huge": _huge,
    "huge head": lambda frame: frame[:12] + b"\xff" * 8 + frame[20:],
    "longer": lambda frame: frame + bytes(16),
}


async def test_damage_is_a_counted_miss_and_goes_to_quarantine(server: S3Server) -> None:
    settings, metrics = server.settings(), Metrics()
    keys = [make_key(100 + number) for number in range(len(DAMAGE))]
    frames = [make_frame(key, (5000, 3000)) for key in keys]
    async with opened(settings, metrics=metrics) as backend:
        await backend.put([*zip(keys, frames, strict=True), ITEMS[1]])
        damaged = [damage(frame_bytes(frame)) for damage, frame in zip(DAMAGE.values(), frames, strict=True)]
        for key, body in zip(keys, damaged, strict=True):
            server.write(settings, key, body)
        found = dict(zip((*DAMAGE, "sound"), await backend.get([*keys, KEYS[1]]), strict=True))
        assert data(found.pop("sound")) == frame_bytes(FRAMES[1])
        assert found == dict.fromkeys(DAMAGE, Miss(Reason.CORRUPT))
        assert await backend.get(keys) == [Miss(Reason.CORRUPT)] * len(keys)
        assert (await backend.match(keys)).miss == Miss(Reason.CORRUPT)
        assert sample(metrics, "kvstore_corrupt_total", tier="s3") == len(keys)
        local = [name_of(settings, key).removeprefix(settings.prefix) for key in keys]
        assert not set(local) & set(server.names(settings))
        for name, body in zip(local, damaged, strict=True):
            kept = server.client.get_object(Bucket=BUCKET, Key=f"{settings.prefix}quarantine/{name}")
            assert kept["Body"].read() == body
        again = await backend.put(list(zip(keys, frames, strict=True)))
        assert {stored.outcome for stored in again} == {Outcome.WRITTEN}
        assert [data(answer) for answer in await backend.get(keys)] == [frame_bytes(frame) for frame in frames]


async def test_sound_levels_below_damage_are_served(moto: S3Server) -> None:
    settings = moto.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS[:1])
        moto.write(settings, KEYS[0], _flip(frame_bytes(FRAMES[0])))
        assert data((await backend.get(KEYS[:1], level=0))[0]) == frame_bytes(FRAMES[0].truncated(0))
        await backend.trim(KEYS[:1], level=0)
        assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(FRAMES[0].truncated(0))


async def test_damage_that_cannot_be_taken_away_is_written_over(moto: S3Server) -> None:
    async with fault_proxy(moto.port) as proxy:
        settings = moto.settings(endpoint_url=proxy.url, attempts=1)
        async with opened(settings) as backend:
            await backend.put(ITEMS[:1])
            moto.write(settings, KEYS[0], _flip(frame_bytes(FRAMES[0])))
            proxy.next.extend(["none", "none", "error"])
            assert await backend.get(KEYS[:1]) == [Miss(Reason.CORRUPT)]
            assert (await backend.put(ITEMS[:1]))[0] == (Outcome.WRITTEN, Ack.REMOTE, None)
            assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(FRAMES[0])
    assert moto.read(settings, KEYS[0]) == frame_bytes(FRAMES[0])


async def test_a_frame_of_a_later_version_is_left_alone(moto: S3Server) -> None:
    settings = moto.settings()
    later = forge(header_fields(KEYS[0]), version=2)
    async with opened(settings) as backend:
        await backend.put(ITEMS[:1])
        moto.write(settings, KEYS[0], later)
        assert await backend.get(KEYS[:1]) == [Miss(Reason.IDENTITY)]
    async with opened(settings) as backend:
        assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.OTHER
        await backend.trim(KEYS[:1], level=0)
    assert moto.read(settings, KEYS[0]) == later


async def test_a_frame_larger_than_this_server_takes_is_left_alone(moto: S3Server) -> None:
    settings = moto.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS[:1])
    async with opened(dataclasses.replace(settings, frame_bytes_max=5000)) as backend:
        assert (await backend.match(KEYS[:1])).held == []
        small = make_frame(KEYS[0], (100,), seed=1)
        assert (await backend.put([(KEYS[0], small)]))[0].outcome is Outcome.OTHER
    assert moto.read(settings, KEYS[0]) == frame_bytes(FRAMES[0])


# The rebuilding of the index


async def test_foreign_and_damaged_objects_are_passed_over(server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    settings = server.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS)
    server.write(settings, KEYS[0], b"garbage")
    server.write(settings, KEYS[1], frame_bytes(FRAMES[1])[:-1])
    server.write(settings, KEYS[2], frame_bytes(FRAMES[3]))
    for name in ("readme.txt", "ab/cd", f"{'A' * 32}/{'0' * 64}", "quarantine/x/y"):
        server.client.put_object(Bucket=BUCKET, Key=settings.prefix + name, Body=b"x")
    async with opened(settings) as backend:
        assert {key async for key, _ in backend.scan()} == set(KEYS[3:])
        assert (backend._rebuild.damaged, backend._rebuild.foreign) == (3, 3)
        assert "no sound frame" in caplog.text
        assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.WRITTEN
        assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(FRAMES[0])


async def test_many_pages_are_listed(moto: S3Server) -> None:
    settings = moto.settings(threads=16, deadline_s=30.0)
    keys = [make_key(number) for number in range(25)]
    async with opened(settings) as backend:
        await backend.put([(key, make_frame(key, (10,))) for key in keys])
    backend = await S3Backend.open(settings)
    # Pages of their usual size would take a thousand objects to make a second one.
    listing = backend._store._client.list_objects_v2
    backend._store._client.list_objects_v2 = lambda **request: listing(**request, MaxKeys=10)
    await until(lambda: backend.state == (True, ""))
    assert {key async for key, _ in backend.scan()} == set(keys)
    await backend.aclose()


async def test_while_it_runs_unknown_chunks_are_looked_for(server: S3Server) -> None:
    settings = server.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS[:4])
    async with fault_proxy(server.port) as proxy:
        proxy.hold = "list-type=2"
        waiting = dataclasses.replace(settings, endpoint_url=proxy.url, deadline_s=20.0, read_timeout_s=20.0)
        async with opened(waiting, rebuilt=False) as backend:
            assert backend.state == (True, "rebuilding its index: 0 objects so far")
            assert (await backend.match(KEYS[:1])).miss == Miss(Reason.ABSENT)
            found = await backend.get([KEYS[0], KEYS[5]])
            assert [data(answer) for answer in found] == [frame_bytes(FRAMES[0]), Reason.ABSENT]
            assert len((await backend.match(KEYS[:1])).held) == 1, "what was read is known"
            other, again, fresh = await backend.put([(KEYS[1], OTHER[1]), ITEMS[1], ITEMS[4]])
            assert [other.outcome, again.outcome, fresh.outcome] == [Outcome.OTHER, Outcome.EXISTS, Outcome.WRITTEN]
            await backend.trim(KEYS[2:3], level=0)
            await backend.delete(KEYS[3:4])
            proxy.release.set()
            await until(lambda: backend.state == (True, ""))
            assert [data(answer) for answer in await backend.get(KEYS)] == [
                frame_bytes(FRAMES[0]),
                frame_bytes(FRAMES[1]),
                frame_bytes(FRAMES[2].truncated(0)),
                Reason.ABSENT,
                frame_bytes(FRAMES[4]),
                Reason.ABSENT,
            ]
    assert len(server.names(settings)) == 4


async def test_what_changes_between_listing_and_reading_stays_changed(moto: S3Server) -> None:
    settings = moto.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS)
    async with fault_proxy(moto.port) as proxy:
        # Heads are asked for once the page was listed.
        proxy.hold = "GET /kvtest/test"
        waiting = dataclasses.replace(
            settings, endpoint_url=proxy.url, deadline_s=20.0, read_timeout_s=20.0, rebuild_threads=1
        )
        async with opened(waiting, rebuilt=False) as backend:
            await until(lambda: any("GET /kvtest/test" in line for line in proxy.requests))
            [busy] = [key for key in KEYS if key.hex()[32:] in proxy.requests[-1]]
            calm = [key for key in KEYS if key != busy]
            await backend.delete(calm[:1])
            deleting = asyncio.create_task(backend.delete([busy]))
            await asyncio.sleep(0.05)
            assert not deleting.done(), "changes of one chunk come one after the other"
            proxy.release.set()
            await deleting
            await until(lambda: backend.state == (True, ""))
            assert {key async for key, _ in backend.scan()} == set(calm[1:])


async def test_it_goes_through_faults(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.backends.s3_rebuild._FIRST_PAUSE_S", 0.02)
    settings = moto.settings(threads=16)
    keys = [make_key(number) for number in range(40)]
    async with opened(settings) as backend:
        await backend.put([(key, make_frame(key, (10,))) for key in keys])
    async with fault_proxy(moto.port, seed=3) as proxy:
        faulty = dataclasses.replace(
            settings, endpoint_url=proxy.url, attempts=1, read_timeout_s=0.2, breaker_cooldown_s=0.02
        )
        proxy.share, proxy.stall_s, proxy.down = 0.3, 0.4, True
        async with opened(faulty, rebuilt=False) as backend:
            assert not backend.state.up
            proxy.down = False
            await until(lambda: backend._rebuild.done)
            assert {key async for key, _ in backend.scan()} | backend._unsure == set(keys)
            assert sum(proxy.happened.values()) - proxy.happened["none"] > 5


async def test_heads_that_cannot_be_read_leave_their_chunks_to_be_looked_for(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.backends.s3_rebuild._FIRST_PAUSE_S", 0.01)
    settings = moto.settings()
    async with opened(settings) as backend:
        await backend.put(ITEMS[:2])
    async with fault_proxy(moto.port) as proxy:
        faulty = dataclasses.replace(settings, endpoint_url=proxy.url, attempts=1, breaker_failures=99)
        proxy.next.extend(["none", "none"] + ["error"] * 10)
        async with opened(faulty) as backend:
            assert backend._unsure == set(KEYS[:2])
            assert (await backend.match(KEYS)).held == []
            assert data((await backend.get(KEYS[:1]))[0]) == frame_bytes(FRAMES[0])
            assert (await backend.put([(KEYS[1], OTHER[1])]))[0].outcome is Outcome.OTHER
            assert len((await backend.match(KEYS)).held) == 2


# Bad settings


async def test_wrong_credentials_are_said_at_the_start(rclone: S3Server) -> None:
    with pytest.raises(ConfigError, match="check access_key, secret_key"):
        await S3Backend.open(rclone.settings(secret_key="wrong" * 4))


async def test_a_missing_bucket_is_said_at_the_start(server: S3Server) -> None:
    with pytest.raises(ConfigError, match="no bucket 'nobody-made-it'"):
        await S3Backend.open(server.settings(bucket="nobody-made-it"))


async def test_no_credentials_are_said_at_the_start(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigError, match="set access_key and secret_key"):
        await S3Backend.open(moto.settings(access_key=None, secret_key=None))


async def test_an_untrusted_bundle_is_said_at_the_start(moto: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CA bundle"):
        await S3Backend.open(moto.settings(ca_bundle=tmp_path / "none.pem"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint_url": "127.0.0.1:9000"},
        {"endpoint_url": "ftp://127.0.0.1"},
        {"endpoint_url": "http://"},
        {"endpoint_url": "http://host:99999"},
        {"endpoint_url": "http://me:secret@host"},
        {"endpoint_url": "nonsense"},
        {"bucket": ""},
        {"bucket": "a/b"},
        {"prefix": "/x"},
        {"secret_key": None},
        {"encryption": "rot13"},
        {"kms_key_id": "k"},
        {"threads": 0},
        {"deadline_s": 0.0},
        {"deadline_s": float("nan")},
        {"breaker_cooldown_s": 5.0},
        {"part_bytes": 1},
        {"retry_mode": "never"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(moto: S3Server, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="s3: "):
        moto.settings(**wrong)


def test_secrets_are_not_shown(moto: S3Server) -> None:
    settings = moto.settings(session_token="a session token")
    assert not any(secret in repr(settings) for secret in ("accesskey1", "secretkey", "a session token"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import kvstore.backends.s3, sys; print('boto3' in sys.modules)", "False"),
        (
            "import asyncio, sys; sys.modules['boto3'] = None\n"
            "from kvstore.backends.s3 import *; asyncio.run(S3Backend.open(S3Settings(bucket='kvtest')))",
            "pip install 'kvstore[s3]'",
        ),
    ],
)
def test_boto3_is_needed_only_where_the_tier_is_opened(code: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said in done.stdout + done.stderr


async def test_an_unreachable_endpoint_is_no_error(caplog: pytest.LogCaptureFixture, moto: S3Server) -> None:
    metrics = Metrics()
    settings = moto.settings(endpoint_url=f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    async with opened(settings, rebuilt=False, metrics=metrics) as backend:
        assert not backend.state.up
        assert "breaker open: Could not connect" in backend.state.detail
        assert "out of order" in caplog.text
        assert sample(metrics, "kvstore_tier_up", tier="s3") == 0
        assert await backend.get(KEYS[:1]) == [Miss(Reason.BREAKER)]
    assert time.monotonic() - began < settings.deadline_s
