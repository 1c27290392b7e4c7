"""What is left after a kill, a stop, damage, a full disk and a wrong data directory."""

import asyncio
import signal
from contextlib import suppress
from pathlib import Path

import aiohttp
import lmdb
import pytest

from kvstore.errors import BackendFullError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.testing import make_frame
from kvstore.wire import BATCH_TYPE, DIGESTS_TYPE
from tests.conftest import FRAME, Process, Serve, Server, Start, path_of
from tests.frames import batch_bytes, frame_bytes, random_keys

KEY, NEIGHBOUR = random_keys(2)
NAMESPACE = KEY[:16].hex()
DISK_LIMIT_BYTES = 8 << 20
SMALL_FILES = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({DISK_LIMIT_BYTES}, {DISK_LIMIT_BYTES}))"


async def _held(server: Server, frames: list[Frame]) -> list[Frame]:
    """Those of some frames that are held, each as it was put."""
    held = []
    for frame in frames:
        answer = await server.ask("GET", path_of(frame.key))
        if answer.status == 200:
            assert answer.body == frame_bytes(frame)
            held.append(frame)
        else:
            assert answer.json["reason"] in ("absent", "evicted")
    return held


# Kill and stop


async def test_what_was_acknowledged_as_on_disk_survives_a_kill(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve()
    frames = [make_frame(key, (30_000, 10_000)) for key in random_keys(200)]
    acknowledged = await _put_until_killed(process, session, frames, kill_after=60)
    assert 60 <= len(acknowledged) < 200
    again = Server(serve().url, session)
    held = await _held(again, frames)
    assert [frame for frame in acknowledged if frame not in held] == []
    for frame in frames:
        assert (await again.put(frame, "disk")).status in (200, 201)


async def _put_until_killed(
    process: Process, session: aiohttp.ClientSession, frames: list[Frame], kill_after: int
) -> list[Frame]:
    """Put frames all at once, kill the server when some are acknowledged, and say which were."""
    server = Server(process.url, session)
    acknowledged: list[Frame] = []

    async def put(frame: Frame) -> None:
        with suppress(aiohttp.ClientError):
            answer = await server.put(frame, "disk")
            assert (answer.status, answer.headers["Kvstore-Ack"]) == (201, "disk")
            acknowledged.append(frame)
            if len(acknowledged) == kill_after:
                process.signal(signal.SIGKILL)

    await asyncio.gather(*map(put, frames))
    return acknowledged


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_flushes_what_was_acknowledged_in_memory(
    serve: Serve, session: aiohttp.ClientSession, number: signal.Signals
) -> None:
    process = serve()
    server = Server(process.url, session)
    frames = [make_frame(key, (30_000, 10_000)) for key in random_keys(100)]
    answers = await asyncio.gather(*(server.put(frame, "memory") for frame in frames))
    assert {answer.status for answer in answers} == {201}
    process.signal(number)
    assert process.wait() == 0
    assert len(await _held(Server(serve().url, session), frames)) == len(frames)


async def test_a_stop_lets_running_requests_end(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve(environ={"KVSTORE_BODY_TIMEOUT_S": "5"})
    frame = make_frame(KEY)
    data = frame_bytes(frame)
    head = f"PUT {path_of(KEY)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\nExpect: 100-continue\r\n"
    async with Server(process.url, session).connection() as (reader, writer):
        writer.write(f"{head}Content-Type: {FRAME['Content-Type']}\r\n\r\n".encode())
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(data[:500])
        process.signal(signal.SIGTERM)
        await _until_closed(process.url)
        writer.write(data[500:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 201")
    assert process.wait() == 0
    assert await _held(Server(serve().url, session), [frame]) == [frame]


async def _until_closed(url: str) -> None:
    """Wait until nobody listens any more."""
    port = int(url.rsplit(":", 1)[1])
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            await asyncio.sleep(0.01)


async def test_a_client_that_stalls_does_not_keep_a_server_from_stopping(
    serve: Serve, session: aiohttp.ClientSession
) -> None:
    process = serve(environ={"KVSTORE_SHUTDOWN_TIMEOUT_S": "0.2"})
    server = Server(process.url, session)
    frame = make_frame(NEIGHBOUR)
    await server.put(frame, "memory")
    async with server.connection() as (reader, writer):
        head = f"PUT {path_of(KEY)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head.encode())
        await reader.readuntil(b"\r\n\r\n")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    assert await _held(Server(serve().url, session), [frame]) == [frame]


async def test_what_was_deleted_or_trimmed_stays_so_after_a_restart(start: Start) -> None:
    server = await start()
    frames = [make_frame(key) for key in random_keys(3)]
    for frame in frames:
        await server.put(frame, "memory")
    headers = {"Content-Type": DIGESTS_TYPE}
    trim = f"/v1/trim?namespace={NAMESPACE}&level=0"
    await server.ask("POST", trim, data=frames[1].key[16:], headers=headers)
    await server.ask("DELETE", path_of(frames[2].key))
    await server.stop()
    again = await start()
    assert await again.bytes_of(frames[0].key) == frame_bytes(frames[0])
    assert await again.bytes_of(frames[1].key) == frame_bytes(frames[1].truncated(0))
    assert not await again.holds(frames[2].key)


async def test_a_delete_that_fails_says_so_and_leaves_the_chunk(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await start()
    frame = make_frame(KEY)
    await server.put(frame, "disk")

    def fail(*_: object) -> None:
        raise BackendFullError("lmdb", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("kvstore.backends.lmdb_store.LmdbStore.delete", fail)
        await server.refused("DELETE", path_of(KEY), 507, "storage-full")
    before = await _held(server, [frame])
    await server.stop()
    assert await _held(await start(), [frame]) == before


@pytest.mark.parametrize("ack", ["memory", "disk"])
async def test_two_frames_for_one_key_leave_the_one_that_was_written_after_a_restart(start: Start, ack: str) -> None:
    first, second = make_frame(KEY), make_frame(KEY, seed=1)
    server = await start()
    body = batch_bytes(frame_bytes(first), frame_bytes(second))
    answer = await server.ask("POST", f"/v1/put?ack={ack}", data=body, headers={"Content-Type": BATCH_TYPE})
    assert [stored["outcome"] for stored in answer.json["stored"]] == ["written", "other"]
    await server.stop()
    assert await _held(await start(), [first]) == [first]


async def test_concurrent_puts_of_one_key_leave_the_same_frame_after_a_restart(start: Start) -> None:
    server = await start()
    keys = random_keys(20, seed=2)
    pairs = [(make_frame(key), make_frame(key, seed=1)) for key in keys]
    puts = [server.put(frame, ack) for pair in pairs for frame, ack in zip(pair, ("disk", "memory"), strict=True)]
    await asyncio.gather(*puts)
    before = [await server.bytes_of(key) for key in keys]
    await server.stop()
    again = await start()
    assert [await again.bytes_of(key) for key in keys] == before


# Damage


def _flip_on_disk(data_dir: Path, pattern: bytes) -> None:
    """Turn over a bit wherever a pattern lies in the data file."""
    file = data_dir / "lmdb" / "data.mdb"
    data = bytearray(file.read_bytes())
    places: list[int] = []
    while (place := data.find(pattern, places[-1] + 1 if places else 0)) >= 0:
        places.append(place)
    assert places, "the pattern must lie in the file in one piece"
    for place in places:
        data[place] ^= 1
    file.write_bytes(data)


async def _put_and_damage(start: Start, data_dir: Path, patterns: list[bytes], frames: list[Frame]) -> Server:
    """A server that opens a data directory in which some bytes are not what was written."""
    server = await start(data_dir=data_dir)
    for frame in frames:
        assert (await server.put(frame, "disk")).status == 201
    await server.stop()
    for pattern in patterns:
        _flip_on_disk(data_dir, pattern)
    return await start(data_dir=data_dir)


DAMAGED = make_frame(KEY, (20_000, 10_000, 5_000))
INTACT = make_frame(NEIGHBOUR, (20_000, 10_000, 5_000))
PATTERNS = {
    "first level": bytes(DAMAGED.payload[0][100:200]),
    "last level": bytes(DAMAGED.payload[2][-64:]),
    "head": KEY[16:].hex().encode(),
}


@pytest.mark.parametrize("place", PATTERNS)
async def test_a_frame_damaged_on_disk_is_a_counted_miss_and_never_served(
    start: Start, tmp_path: Path, place: str
) -> None:
    server = await _put_and_damage(start, tmp_path / "data", [PATTERNS[place]], [DAMAGED, INTACT])
    for _ in range(2):
        answer = await server.refused("GET", path_of(KEY), 404, "miss")
        assert answer.json["reason"] == "corrupt"
    assert await server.metric('kvstore_corrupt_total{tier="lmdb"}') == 1
    assert await server.metric('kvstore_misses_total{reason="corrupt"}') == 2
    assert await server.bytes_of(NEIGHBOUR) == frame_bytes(INTACT)


@pytest.mark.parametrize("place", PATTERNS)
async def test_a_damaged_frame_is_quarantined_and_gone_for_good(start: Start, tmp_path: Path, place: str) -> None:
    server = await _put_and_damage(start, tmp_path / "data", [PATTERNS[place]], [DAMAGED, INTACT])
    assert not await server.holds(KEY)
    [file] = (tmp_path / "data" / "lmdb" / "quarantine").iterdir()
    kept = file.read_bytes()
    assert len(kept) == DAMAGED.size_bytes
    assert kept != frame_bytes(DAMAGED)
    await server.stop()
    again = await start()
    assert await _held(again, [DAMAGED, INTACT]) == [INTACT]


async def test_a_damaged_frame_can_be_put_again(start: Start, tmp_path: Path) -> None:
    server = await _put_and_damage(start, tmp_path / "data", [PATTERNS["first level"]], [DAMAGED])
    assert not await server.holds(KEY)
    assert (await server.put(DAMAGED, "disk")).json["outcome"] == "written"
    assert await server.bytes_of(KEY) == frame_bytes(DAMAGED)
    await server.stop()
    assert await _held(await start(), [DAMAGED]) == [DAMAGED]


async def test_damage_in_a_batch_is_a_miss_among_frames(start: Start, tmp_path: Path) -> None:
    server = await _put_and_damage(start, tmp_path / "data", [PATTERNS["last level"]], [INTACT, DAMAGED])
    answer = await server.ask(
        "POST",
        f"/v1/get?namespace={NAMESPACE}",
        data=NEIGHBOUR[16:] + KEY[16:] + NEIGHBOUR[16:],
        headers={"Content-Type": DIGESTS_TYPE},
    )
    sound = batch_bytes(frame_bytes(INTACT))
    assert answer.body == sound + batch_bytes(b"corrupt", kind=1) + sound
    match = await server.ask(
        "POST",
        f"/v1/match?namespace={NAMESPACE}",
        data=NEIGHBOUR[16:] + KEY[16:],
        headers={"Content-Type": DIGESTS_TYPE},
    )
    assert (match.json["matched"], match.json["miss"]) == (1, "corrupt")


async def test_damage_is_a_miss_even_where_it_cannot_be_quarantined(start: Start, tmp_path: Path) -> None:
    (tmp_path / "data" / "lmdb").mkdir(parents=True)
    (tmp_path / "data" / "lmdb" / "quarantine").write_text("in the way")
    server = await _put_and_damage(start, tmp_path / "data", [PATTERNS["head"]], [DAMAGED, INTACT])
    answer = await server.refused("GET", path_of(KEY), 404, "miss")
    assert answer.json["reason"] == "corrupt"
    assert await server.bytes_of(NEIGHBOUR) == frame_bytes(INTACT)
    assert (await server.put(DAMAGED, "disk")).json["outcome"] == "written"
    assert await server.bytes_of(KEY) == frame_bytes(DAMAGED)


async def test_fewer_levels_than_the_index_says_are_damage(start: Start, tmp_path: Path) -> None:
    server = await start()
    await server.put(DAMAGED, "disk")
    await server.stop()
    _delete_level(tmp_path / "data", KEY, 2)
    again = await start()
    answer = await again.refused("GET", path_of(KEY), 404, "miss")
    assert answer.json["reason"] == "corrupt"
    assert await again.metric('kvstore_corrupt_total{tier="lmdb"}') == 1


def _delete_level(data_dir: Path, key: ChunkKey, level: int) -> None:
    with lmdb.open(str(data_dir / "lmdb"), max_dbs=4, map_size=1 << 28) as env:
        levels = env.open_db(b"levels")
        with env.begin(write=True, db=levels) as transaction:
            assert transaction.delete(key + bytes([level]))


async def test_frames_that_changed_places_on_disk_are_damage(start: Start, tmp_path: Path) -> None:
    server = await start()
    for frame in (DAMAGED, INTACT):
        await server.put(frame, "disk")
    await server.stop()
    _swap(tmp_path / "data", KEY, NEIGHBOUR)
    again = await start()
    for key in (KEY, NEIGHBOUR):
        answer = await again.refused("GET", path_of(key), 404, "miss")
        assert answer.json["reason"] == "corrupt"


def _swap(data_dir: Path, one: ChunkKey, other: ChunkKey) -> None:
    """Exchange heads and levels of two chunks."""
    with lmdb.open(str(data_dir / "lmdb"), max_dbs=4, map_size=1 << 28) as env:
        places = [(b"heads", b""), *((b"levels", bytes([level])) for level in range(3))]
        databases = {name: env.open_db(name) for name, _ in places}
        with env.begin(write=True) as transaction:
            for name, suffix in places:
                values = [transaction.get(key + suffix, db=databases[name]) for key in (one, other)]
                for key, value in zip((other, one), values, strict=True):
                    assert value is not None
                    transaction.put(key + suffix, value, db=databases[name])


# A full disk


async def _fill(server: Server, frames: list[Frame]) -> list[Frame]:
    """Put frames until the disk is full; those that are on it."""
    stored: list[Frame] = []
    for frame in frames:
        answer = await server.put(frame, "disk")
        if answer.status != 201:
            assert (answer.status, answer.json["code"]) == (507, "storage-full"), answer.body
            return stored
        stored.append(frame)
    raise AssertionError("the disk never became full")


FILLING = [make_frame(key, (700_000, 300_000)) for key in random_keys(12, seed=4)]


async def test_a_full_disk_refuses_and_goes_on_serving(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve("--memory", "1MiB", prelude=SMALL_FILES)
    server = Server(process.url, session)
    stored = await _fill(server, FILLING)
    assert 4 <= len(stored) <= 8
    for _ in range(2):
        assert (await server.put(FILLING[-1], "disk")).status == 507
    assert (await server.put(stored[0], "disk")).status == 200
    assert await _held(server, stored) == stored
    assert (await server.ask("GET", "/readyz")).status == 200
    assert process.terminate() == 0
    assert await _held(Server(serve().url, session), stored) == stored


async def test_a_full_disk_leaves_no_half_of_a_batch(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve(prelude=SMALL_FILES)
    server = Server(process.url, session)
    stored = await _fill(server, FILLING)
    batch = [make_frame(key, (500_000,)) for key in random_keys(6, seed=5)]
    body = batch_bytes(*map(frame_bytes, batch))
    answer = await server.ask("POST", "/v1/put?ack=disk", data=body, headers={"Content-Type": BATCH_TYPE})
    assert {result["code"] for result in answer.json["stored"]} == {"storage-full"}
    process.kill()
    assert await _held(Server(serve().url, session), [*stored, *batch]) == stored


async def test_what_a_full_disk_says_is_deleted_stays_deleted(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve("--memory", "1MiB", prelude=SMALL_FILES)
    server = Server(process.url, session)
    stored = await _fill(server, FILLING)
    answer = await server.ask("DELETE", path_of(stored[0].key))
    gone = [stored[0]] if answer.status == 204 else []
    assert gone or answer.status == 507
    left = [frame for frame in stored if frame not in gone]
    assert await _held(server, stored) == left
    process.kill()
    assert await _held(Server(serve().url, session), stored) == left


async def test_a_full_disk_takes_chunks_again_once_there_is_room(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve("--memory", "1MiB", prelude=SMALL_FILES)
    server = Server(process.url, session)
    stored = await _fill(server, FILLING)
    for frame in stored[:3]:
        assert (await server.ask("DELETE", path_of(frame.key))).status == 204
    assert (await server.put(FILLING[-1], "disk")).status == 201
    assert await server.bytes_of(FILLING[-1].key) == frame_bytes(FILLING[-1])


async def test_a_full_disk_is_no_matter_to_what_memory_is_enough_for(
    serve: Serve, session: aiohttp.ClientSession
) -> None:
    server = Server(serve(prelude=SMALL_FILES).url, session)
    stored = await _fill(server, FILLING)
    assert (await server.put(FILLING[-1], "memory")).status in (200, 201)
    async with asyncio.timeout(10):
        while not await server.metric('kvstore_write_behind_failures_total{tier="lmdb"}'):
            await asyncio.sleep(0.02)
    assert await _held(server, [*stored, FILLING[-1]]) == [*stored, FILLING[-1]]


# Data directories that cannot be used


def _refusal(process: Process) -> str:
    """What a server says that ends with exit status 2."""
    status, stderr = process.end()
    assert process.announced == ""
    assert status == 2, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("kvstore: ")
    return stderr


async def test_a_second_server_on_a_data_directory_is_refused(serve: Serve, session: aiohttp.ClientSession) -> None:
    first = Server(serve().url, session)
    message = _refusal(serve())
    assert "in use" in message
    assert "data" in message
    assert (await first.put(make_frame(KEY), "disk")).status == 201


def test_a_data_directory_of_a_killed_server_can_be_used_at_once(serve: Serve) -> None:
    serve().kill()
    assert serve().url


@pytest.mark.parametrize("in_the_way", ["data", "data/lmdb", "data/lmdb/data.mdb/x", "data/lmdb/lock.kvstore/x"])
def test_a_data_directory_that_cannot_be_made_is_refused(serve: Serve, tmp_path: Path, in_the_way: str) -> None:
    place = tmp_path / in_the_way
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    assert str(tmp_path / "data") in _refusal(serve())


def test_a_data_directory_of_another_format_is_refused_and_left_alone(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "lmdb"
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), max_dbs=4) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as transaction:
            transaction.put(b"format", b"kvstore lmdb 99")
    before = (folder / "data.mdb").read_bytes()
    message = _refusal(serve())
    assert "kvstore lmdb 99" in message
    assert (folder / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "short", "half"])
async def test_a_data_file_that_is_broken_is_refused(start: Start, serve: Serve, tmp_path: Path, damage: str) -> None:
    server = await start()
    for frame in (DAMAGED, INTACT):
        await server.put(frame, "disk")
    await server.stop()
    file = tmp_path / "data" / "lmdb" / "data.mdb"
    data = file.read_bytes()
    file.write_bytes({"garbage": b"garbage" * 10_000, "short": data[:100], "half": data[: len(data) // 2]}[damage])
    assert str(tmp_path / "data") in _refusal(serve())
