"""The LMDB tier: what it acknowledged outlives the process, damage is found, the file stays bounded."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import lmdb
import pytest

from kvstore.backend import Ack, Miss, Outcome, Reason
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.lmdb_store import SLACK_BYTES
from kvstore.errors import ConfigError
from kvstore.frame import Frame
from kvstore.metrics import Metrics
from kvstore.testing import make_frame, make_key

KEYS = [make_key(number) for number in range(6)]
FRAMES = [make_frame(key, (5000, 3000)) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))


async def test_what_was_put_is_there_after_reopening(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    assert {stored.ack for stored in await backend.put(ITEMS)} == {Ack.DISK}
    await backend.trim(KEYS[1:2], level=0)
    await backend.delete(KEYS[2:3])
    before = dict([found async for found in backend.scan()])
    await backend.aclose()
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    assert dict([found async for found in backend.scan()]) == before
    found = await backend.get(KEYS)
    assert [frame.levels if isinstance(frame, Frame) else frame.reason for frame in found] == [2, 1, "absent", 2, 2, 2]
    await backend.aclose()


async def test_a_smaller_budget_gives_up_chunks_at_start(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    await backend.put(ITEMS)
    await backend.aclose()
    backend = await LmdbBackend.open(tmp_path, 50_000)
    kept = [key async for key, _ in backend.scan()]
    await backend.aclose()
    assert 0 < len(kept) < len(KEYS)
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    assert [key async for key, _ in backend.scan()] == sorted(kept)
    await backend.aclose()


async def test_damage_is_a_counted_miss_once_and_then_the_chunk_is_gone(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    await backend.put(ITEMS)
    await backend.aclose()
    _change_level(tmp_path, KEYS[0] + b"\1", lambda level: level[:-1] + bytes([level[-1] ^ 1]))
    _change_level(tmp_path, KEYS[1] + b"\0", lambda _: None)
    _change_level(tmp_path, KEYS[2] + b"\1", lambda level: level + bytes(16))
    metrics = Metrics()
    backend = await LmdbBackend.open(tmp_path, 1 << 20, metrics=metrics)
    assert isinstance((await backend.get(KEYS[:1], level=0))[0], Frame), "level 0 is sound"
    assert (await backend.get(KEYS))[:3] == [Miss(Reason.CORRUPT)] * 3
    assert (await backend.match(KEYS[:1])) == ([], Miss(Reason.CORRUPT))
    assert metrics.registry.get_sample_value("kvstore_corrupt_total", {"tier": "lmdb"}) == 3
    assert len(list((tmp_path / "quarantine").iterdir())) == 3
    assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.WRITTEN
    assert isinstance((await backend.get(KEYS[:1]))[0], Frame)
    await backend.aclose()


async def test_a_frame_under_the_key_of_another_is_damage(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    await backend.put([(KEYS[0], FRAMES[1])])
    assert await backend.get(KEYS[:1]) == [Miss(Reason.CORRUPT)]
    await backend.aclose()


async def test_the_quarantine_is_bounded(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    for number in range(30):
        key = make_key(number)
        await backend.put([(key, make_frame(make_key(number + 1000), (100,)))])
        assert await backend.get([key]) == [Miss(Reason.CORRUPT)]
    assert len(list((tmp_path / "quarantine").iterdir())) == 16
    await backend.aclose()


async def test_mixed_sizes_under_pressure_never_fill_the_map(tmp_path: Path) -> None:
    budget_bytes = 8 << 20
    backend = await LmdbBackend.open(tmp_path, budget_bytes)
    for number in range(400):
        key = make_key(number)
        [stored] = await backend.put([(key, make_frame(key, (10_000 * (1 + number * 37 % 90),)))])
        assert stored.outcome is Outcome.WRITTEN
    assert (tmp_path / "data.mdb").stat().st_size <= budget_bytes * 5 // 4 + SLACK_BYTES
    await backend.aclose()


async def test_a_full_map_gives_up_more_chunks_instead_of_failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without slack the map is full long before the budget is.
    monkeypatch.setattr("kvstore.backends.lmdb_store.SLACK_BYTES", -(1 << 20))
    backend = await LmdbBackend.open(tmp_path, 4 << 20)
    for number in range(200):
        key = make_key(number)
        [stored] = await backend.put([(key, make_frame(key, (50_000 * (1 + number % 7),)))])
        assert stored.outcome is Outcome.WRITTEN, stored
        assert isinstance((await backend.get([key]))[0], Frame)
    await backend.aclose()


async def test_one_directory_belongs_to_one_server(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    with pytest.raises(ConfigError, match="in use"):
        await LmdbBackend.open(tmp_path, 1 << 20)
    await backend.aclose()
    await (await LmdbBackend.open(tmp_path, 1 << 20)).aclose()


async def test_a_directory_of_another_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    await (await LmdbBackend.open(tmp_path, 1 << 20)).aclose()
    with lmdb.open(str(tmp_path), max_dbs=4) as env, env.begin(write=True) as txn:
        txn.put(b"format", b"kvstore lmdb 9", db=env.open_db(b"meta", txn))
    with pytest.raises(ConfigError, match="format"):
        await LmdbBackend.open(tmp_path, 1 << 20)


async def test_a_file_that_is_no_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"garbage" * 10_000)
    with pytest.raises(ConfigError, match="cannot open"):
        await LmdbBackend.open(tmp_path, 1 << 20)


def _change_level(directory: Path, key: bytes, change: object) -> None:
    assert callable(change)
    with lmdb.open(str(directory), max_dbs=4) as env, env.begin(write=True) as txn:
        levels = env.open_db(b"levels", txn)
        stored = txn.get(key, db=levels)
        assert stored is not None
        changed = change(bytes(stored))
        if changed is None:
            txn.delete(key, db=levels)
        else:
            txn.put(key, changed, db=levels)


@pytest.mark.parametrize("change", ["put", "delete", "trim"])
async def test_a_change_that_is_cancelled_is_made_or_not_made_but_never_half_made(tmp_path: Path, change: str) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    if change != "put":
        await backend.put(ITEMS)
    changes: dict[str, Coroutine[Any, Any, object]] = {
        "put": backend.put(ITEMS),
        "delete": backend.delete(KEYS),
        "trim": backend.trim(KEYS, level=0),
    }
    task = asyncio.create_task(changes.pop(change))
    for unused in changes.values():
        unused.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await backend.put([])
    indexed = dict([found async for found in backend.scan()])
    frames = [frame for frame in await backend.get(KEYS) if isinstance(frame, Frame)]
    assert len(frames) == len(indexed)
    await backend.aclose()
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    assert dict([found async for found in backend.scan()]) == indexed
    await backend.aclose()


async def test_many_tiny_frames_are_cut_into_transactions_that_fit(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    keys = [make_key(number) for number in range(300)]
    stored = await backend.put([(key, make_frame(key, (1,))) for key in keys])
    assert {result.outcome for result in stored} == {Outcome.WRITTEN}
    await backend.aclose()


async def test_a_damaged_record_costs_its_own_chunk_and_no_other(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    await backend.put(ITEMS)
    await backend.aclose()
    with lmdb.open(str(tmp_path), max_dbs=4) as env, env.begin(write=True) as txn:
        index = env.open_db(b"index", txn)
        record = txn.get(KEYS[0], db=index)
        assert record is not None
        txn.put(KEYS[0], bytes(record[:-8]) + (1 << 50).to_bytes(8, "little"), db=index)
        txn.put(KEYS[1], b"short", db=index)
    for _ in range(2):
        backend = await LmdbBackend.open(tmp_path, 1 << 20)
        assert [key async for key, _ in backend.scan()] == sorted(KEYS[2:])
        assert all(isinstance(frame, Frame) for frame in await backend.get(KEYS[2:]))
        await backend.aclose()
