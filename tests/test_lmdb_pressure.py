"""A disk tier that is always full, with chunks of very different sizes, and killed in the middle of writes.

`make test-lmdb` runs it at full size: 20,000 chunks of 10 KiB to 32 MiB through a budget of 1 GiB, in some minutes.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.lmdb_store import SLACK_BYTES
from kvstore.config import parse_size
from kvstore.frame import Frame
from kvstore.fsck import run_fsck
from kvstore.testing import make_frame, make_key
from tests.lmdb_workload import Workload, workload_frame, workload_key, workload_number

OPERATIONS = int(os.environ.get("LMDB_PRESSURE_OPERATIONS", "200"))
BUDGET_BYTES = parse_size(os.environ.get("LMDB_PRESSURE_BUDGET", "8MiB"))
FULL = OPERATIONS >= 10_000
SIZES_BYTES = (10 << 10, 32 << 20) if FULL else (2 << 10, 512 << 10)
KILLS = 5 if FULL else 1
FILE_BYTES_MAX = BUDGET_BYTES * 5 // 4 + SLACK_BYTES

State = dict[int, int]
"""Levels that are held, by the number of the chunk."""


@contextmanager
def _working(work: Workload) -> Iterator[subprocess.Popen[str]]:
    """The workload as a process, which is killed at the end."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in work._asdict().items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lmdb_workload", json.dumps(values)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _figures(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What the workload says of each tenth of its run."""
    assert process.stdout is not None
    tenths = []
    for _ in range(10):
        line = process.stdout.readline()
        assert line, "the workload ended early"
        print(line.strip(), flush=True)
        tenths.append(json.loads(line))
    return tenths


def _kill_in_a_transaction(process: subprocess.Popen[str], journal: Path, acknowledged: int) -> None:
    """Kill a process once it has acknowledged so many puts and says that a transaction is under way."""
    deadline_s = time.monotonic() + 100
    while _acknowledged(journal) < acknowledged or not _last_line(journal).startswith("I "):
        assert process.poll() is None, "the workload ended early"
        assert time.monotonic() < deadline_s
    process.send_signal(signal.SIGKILL)
    process.wait()


def _acknowledged(journal: Path) -> int:
    return journal.read_text().count("A ") if journal.exists() else 0


def _last_line(journal: Path) -> str:
    return journal.read_text().rstrip("\n").rpartition("\n")[2]


def _states(journal: Path) -> tuple[State, State]:
    """What must be held after a kill: with the last transaction not made, and made."""
    state: State = {}
    intents: State = {}
    for line in journal.read_text().splitlines():
        kind, *values = line.split()
        if kind == "I":
            intents[int(values[0])] = int(values[1])
        elif kind == "D":
            state |= intents
            intents = {}
        elif kind == "F":
            intents = {}
        else:
            assert int(values[0]) in state, "a put was acknowledged before it was committed"
    return _held(state), _held(state | intents)


def _held(state: State) -> State:
    return {number: levels for number, levels in state.items() if levels}


async def _reopened(work: Workload) -> State:
    """What is there, every frame read and compared with the one that was put."""
    backend = await LmdbBackend.open(work.directory, work.budget_bytes)
    numbers = [workload_number(key) async for key, _ in backend.scan()]
    found: State = {}
    for number in numbers:
        [frame] = await backend.get([workload_key(number)])
        assert isinstance(frame, Frame), (number, frame)
        assert frame.payload == workload_frame(work, number).payload[: frame.levels]
        found[number] = frame.levels
    await backend.aclose()
    return found


async def test_a_tier_that_is_always_full_takes_every_size_and_outlives_kills(tmp_path: Path) -> None:
    work = Workload(tmp_path / "lmdb", tmp_path / "journal", BUDGET_BYTES, 0, OPERATIONS, *SIZES_BYTES)
    with _working(work) as process:
        tenths = await asyncio.to_thread(_figures, process)
        await asyncio.to_thread(_kill_in_a_transaction, process, work.journal, OPERATIONS)
    _check(work, tenths)
    for kill in range(KILLS):
        without, with_last = _states(work.journal)
        found = await _reopened(work)
        assert found in (without, with_last)
        assert (work.directory / "data.mdb").stat().st_size <= FILE_BYTES_MAX
        _forget(work.journal, found)
        next_work = work._replace(first=OPERATIONS * (kill + 2), operations=10)
        with _working(next_work) as process:
            await asyncio.to_thread(_kill_in_a_transaction, process, work.journal, 5 * (kill + 1))
    assert run_fsck(work.directory, dry_run=True)["status"] == "clean"
    print(json.dumps({"after kills": len(await _reopened(work)), "bound": FILE_BYTES_MAX}), flush=True)


def _forget(journal: Path, found: State) -> None:
    """Begin the journal anew with what was found."""
    journal.write_text("".join(f"I {number} {levels}\n" for number, levels in found.items()) + "D\n")


def _check(work: Workload, tenths: list[dict[str, Any]]) -> None:
    """The tier stays full, the file bounded, and no work grows with time."""
    full = tenths[4:]
    assert all(tenth["file_bytes"] <= FILE_BYTES_MAX for tenth in tenths)
    assert min(tenth["used_share"] for tenth in full) >= (0.95 if FULL else 0.8)
    assert tenths[-1]["map_full"] <= work.operations // 100
    assert tenths[-1]["evictions"] > 0
    assert tenths[-1]["shrinks"] > 0
    # Beside its payload a put writes the pages on the way to its records; nothing else is written, early or late.
    paths_bytes = work.operations // 10 * 100_000
    assert all(tenth["written_bytes"] <= 1.1 * tenth["put_bytes"] + paths_bytes for tenth in full)


async def test_large_chunks_find_room_between_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second one of many small chunks goes, so what is free is in small pieces all over the file."""
    monkeypatch.setattr("kvstore.backends.lmdb_store.SLACK_BYTES", 0)
    backend = await LmdbBackend.open(tmp_path, 24 << 20)
    small = [make_key(number) for number in range(290)]
    await backend.put([(key, make_frame(key, (30_000, 40_000))) for key in small])
    await backend.delete(small[::2])
    large = [make_key(1000 + number) for number in range(8)]
    for key in large:
        [stored] = await backend.put([(key, make_frame(key, (600_000, 600_000)))])
        assert stored.error is None
    assert backend.map_full == 0
    assert {key async for key, _ in backend.scan()} == {*small[1::2], *large}
    await backend.aclose()


async def test_room_that_trims_and_deletes_leave_is_used_again(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, 64 << 20)
    sizes_bytes = []
    for lap in range(8):
        keys = [make_key(1000 * lap + number) for number in range(10)]
        await backend.put([(key, make_frame(key, (100_000, 400_000, 1_000_000))) for key in keys])
        await backend.trim(keys, level=1)
        await backend.trim(keys[::2], level=0)
        await backend.delete(keys)
        sizes_bytes.append((tmp_path / "data.mdb").stat().st_size)
    # Pages come back with the next transaction but one; a lap whose room were lost would add three quarters.
    assert max(sizes_bytes) < 1.1 * sizes_bytes[1]
    await backend.aclose()


@pytest.mark.parametrize("limit_bytes", [1, 300_000])
async def test_much_is_deleted_in_transactions_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_bytes: int
) -> None:
    monkeypatch.setattr("kvstore.backends.lmdb._FREED_BYTES_MAX", limit_bytes)
    backend = await LmdbBackend.open(tmp_path, 16 << 20)
    keys = [make_key(number) for number in range(20)]
    await backend.put([(key, make_frame(key, (50_000, 40_000))) for key in keys])
    await backend.trim(keys, level=0)
    await backend.delete([*keys[:10], make_key(99)])
    assert {key async for key, _ in backend.scan()} == set(keys[10:])
    await backend.aclose()
    backend = await LmdbBackend.open(tmp_path, 1 << 20)
    held = [key async for key, held in backend.scan() if len(held.copy.level_bytes) == 1]
    assert 0 < len(held) <= 10
    await backend.aclose()
