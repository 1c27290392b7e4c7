"""`kvstore fsck`: every kind of damage is found and mended, and nothing that is intact is lost."""

import asyncio
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import lmdb
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvstore.backend import Ack
from kvstore.backends.findings import Damage
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.lmdb_pages import check_pages
from kvstore.backends.lmdb_records import PART_BYTES, level_suffix
from kvstore.cli import main
from kvstore.errors import ConfigError
from kvstore.frame import Frame
from kvstore.fsck import Report, exit_status, run_fsck, verify_backend
from kvstore.keys import ChunkKey
from kvstore.testing import make_frame, make_key
from tests.conftest import Serve, Server

KEYS = [make_key(number) for number in range(5)]
FRAMES = {key: make_frame(key, (5000, 3000, 4000)) for key in KEYS}
HURT, *OTHERS = KEYS
BUDGET_BYTES = 64 << 20

Databases = Mapping[str, Any]
Change = Callable[[lmdb.Transaction, Databases], None]


def _fill(data_dir: Path, frames: Sequence[Frame]) -> None:
    async def fill() -> None:
        backend = await LmdbBackend.open(data_dir / "lmdb", BUDGET_BYTES)
        for stored in await backend.put([(frame.key, frame) for frame in frames]):
            assert stored.ack is Ack.DISK
        await backend.aclose()

    asyncio.run(fill())


def _held(data_dir: Path) -> dict[ChunkKey, Frame]:
    """Every frame that a server finds in a data directory, each read and verified."""

    async def read() -> dict[ChunkKey, Frame]:
        backend = await LmdbBackend.open(data_dir / "lmdb", BUDGET_BYTES)
        keys = [key async for key, _ in backend.scan()]
        frames = await backend.get(keys)
        await backend.aclose()
        assert all(isinstance(frame, Frame) for frame in frames), "fsck left damage"
        return {key: frame for key, frame in zip(keys, frames, strict=True) if isinstance(frame, Frame)}

    return asyncio.run(read())


@contextmanager
def _changing(data_dir: Path) -> Iterator[tuple[lmdb.Transaction, Databases]]:
    """A transaction in the environment of a disk tier."""
    with lmdb.open(str(data_dir / "lmdb"), max_dbs=4, map_size=1 << 28) as env:
        databases = {name: env.open_db(name.encode()) for name in ("meta", "index", "heads", "levels")}
        with env.begin(write=True) as txn:
            yield txn, databases


def _change(data_dir: Path, change: Change) -> None:
    with _changing(data_dir) as (txn, databases):
        change(txn, databases)


def _levels_of(held: Mapping[ChunkKey, Frame]) -> dict[ChunkKey, int]:
    return {key: frame.levels for key, frame in held.items()}


def _quarantine(data_dir: Path) -> list[Path]:
    folder = data_dir / "lmdb" / "quarantine"
    return sorted(folder.iterdir()) if folder.exists() else []


# What is wrong, how many levels of the chunk are left, and whether bytes of it are kept in the quarantine


def _delete(name: str, suffix: bytes = b"") -> Change:
    def change(txn: lmdb.Transaction, databases: Databases) -> None:
        assert txn.delete(HURT + suffix, db=databases[name])

    return change


def _edit(name: str, suffix: bytes, edit: Callable[[bytes], bytes]) -> Change:
    def change(txn: lmdb.Transaction, databases: Databases) -> None:
        stored = txn.get(HURT + suffix, db=databases[name])
        assert stored is not None
        assert txn.put(HURT + suffix, edit(bytes(stored)), db=databases[name])

    return change


def _add(name: str, key: bytes, value: bytes = b"stray") -> Change:
    def change(txn: lmdb.Transaction, databases: Databases) -> None:
        assert txn.put(key, value, db=databases[name])

    return change


def _several(*changes: Change) -> Change:
    def change(txn: lmdb.Transaction, databases: Databases) -> None:
        for one in changes:
            one(txn, databases)

    return change


def _exchange(txn: lmdb.Transaction, databases: Databases) -> None:
    """Put another chunk's head and levels under the key."""
    other = make_frame(make_key(99), (5000, 3000, 4000))
    txn.put(HURT, other.head.raw, db=databases["heads"])
    for level, view in enumerate(other.payload):
        txn.put(HURT + level_suffix(level), view, db=databases["levels"])


def _flip(place: int) -> Callable[[bytes], bytes]:
    def edit(stored: bytes) -> bytes:
        changed = bytearray(stored)
        changed[place] ^= 1
        return bytes(changed)

    return edit


def _level(number: int) -> bytes:
    return level_suffix(number)


DAMAGE: dict[str, tuple[Change, Damage, int, bool]] = {
    "record missing": (_delete("index"), Damage.RECORD_MISSING, 3, False),
    "record short": (_edit("index", b"", lambda _: b"short"), Damage.RECORD_WRONG, 3, False),
    "record empty": (_edit("index", b"", lambda _: b""), Damage.RECORD_WRONG, 3, False),
    "record of another id": (_edit("index", b"", _flip(0)), Damage.RECORD_WRONG, 3, False),
    "record with another size": (_edit("index", b"", _flip(-8)), Damage.RECORD_WRONG, 3, False),
    "record with fewer levels": (
        _edit("index", b"", lambda stored: stored[:16] + b"\2" + stored[17:-8]),
        Damage.RECORD_WRONG,
        3,
        False,
    ),
    "record alone": (
        _several(_delete("heads"), *(_delete("levels", _level(number)) for number in range(3))),
        Damage.RECORD_ALONE,
        0,
        False,
    ),
    "levels without head": (_delete("heads"), Damage.HEAD_MISSING, 0, True),
    "levels alone": (_several(_delete("heads"), _delete("index")), Damage.HEAD_MISSING, 0, True),
    "head flipped": (_edit("heads", b"", _flip(60)), Damage.HEAD_DAMAGED, 0, True),
    "head cut": (_edit("heads", b"", lambda stored: stored[:-24]), Damage.HEAD_DAMAGED, 0, True),
    "head empty": (_edit("heads", b"", lambda _: b""), Damage.HEAD_DAMAGED, 0, True),
    "head alone": (
        _several(*(_delete("levels", _level(number)) for number in range(3))),
        Damage.LEVELS_MISSING,
        0,
        True,
    ),
    "no first level": (_delete("levels", _level(0)), Damage.LEVELS_CUT, 0, True),
    "a gap": (_delete("levels", _level(1)), Damage.LEVELS_CUT, 1, True),
    "no last level": (_delete("levels", _level(2)), Damage.LEVELS_CUT, 2, False),
    "first level flipped": (_edit("levels", _level(0), _flip(0)), Damage.LEVEL_DAMAGED, 0, True),
    "second level flipped": (_edit("levels", _level(1), _flip(2999)), Damage.LEVEL_DAMAGED, 1, True),
    "last level flipped": (_edit("levels", _level(2), _flip(100)), Damage.LEVEL_DAMAGED, 2, True),
    "last level cut": (_edit("levels", _level(2), lambda stored: stored[:-16]), Damage.LEVEL_DAMAGED, 2, True),
    "last level too long": (_edit("levels", _level(2), lambda stored: stored + b"x"), Damage.LEVEL_DAMAGED, 2, True),
    "another chunk's frame": (_exchange, Damage.KEY_WRONG, 0, True),
    "a part too many": (_add("levels", HURT + level_suffix(1, 1)), Damage.STRAY, 3, True),
    "a level too many": (_add("levels", HURT + level_suffix(3)), Damage.LEVEL_DAMAGED, 3, True),
    "a level key that is none": (_add("levels", HURT + b"\1\1"), Damage.STRAY, 3, True),
    "a long index key": (_add("index", HURT + b"x"), Damage.STRAY, 3, False),
    "a long head key": (_add("heads", HURT + b"x"), Damage.STRAY, 3, False),
    "a short index key": (_add("index", HURT[:20]), Damage.STRAY, 3, False),
    "a short level key": (_add("levels", HURT[:20]), Damage.STRAY, 3, True),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_mended_and_what_is_intact_is_kept(tmp_path: Path, kind: str) -> None:
    change, damage, levels, quarantined = DAMAGE[kind]
    _fill(tmp_path, list(FRAMES.values()))
    _change(tmp_path, change)
    before = (tmp_path / "lmdb" / "data.mdb").read_bytes()
    dry = run_fsck(tmp_path, dry_run=True)
    assert (dry["status"], dry["damage"], exit_status(dry)) == ("damaged", {damage.value: 1}, 1)
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before
    assert _quarantine(tmp_path) == []
    mended = run_fsck(tmp_path, dry_run=False)
    assert (mended["status"], exit_status(mended)) == ("mended", 0)
    assert {name: mended[name] for name in ("damage", "chunks", "levels", "quarantined")} == {
        name: dry[name] for name in ("damage", "chunks", "levels", "quarantined")
    }
    assert len(_quarantine(tmp_path)) == mended["quarantined"] == quarantined
    assert run_fsck(tmp_path, dry_run=False) | {"seconds": 0} == _clean(tmp_path, [levels, 3, 3, 3, 3])
    held = _held(tmp_path)
    assert _levels_of(held) == dict.fromkeys(OTHERS, 3) | ({HURT: levels} if levels else {})
    assert all(frame.payload == FRAMES[key].payload[: frame.levels] for key, frame in held.items())


def _clean(data_dir: Path, levels: Sequence[int]) -> Report:
    """What is said of a directory that holds the first levels of `FRAMES`."""
    kept = [frame.truncated(count - 1) for frame, count in zip(FRAMES.values(), levels, strict=True) if count]
    return {
        "status": "clean",
        "chunks": len(kept),
        "levels": sum(levels),
        "verified_bytes": sum(frame.size_bytes for frame in kept),
        "damage": {},
        "quarantined": 0,
        "unread": 0,
        "seconds": 0,
        "path": str(data_dir / "lmdb"),
    }


def test_what_is_intact_is_left_as_it_is(tmp_path: Path) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    before = (tmp_path / "lmdb" / "data.mdb").read_bytes()
    for dry_run in (True, False):
        assert run_fsck(tmp_path, dry_run=dry_run) | {"seconds": 0} == _clean(tmp_path, [3] * 5)
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before


def test_a_trimmed_chunk_is_intact(tmp_path: Path) -> None:
    async def trim() -> None:
        backend = await LmdbBackend.open(tmp_path / "lmdb", BUDGET_BYTES)
        await backend.trim([HURT], level=0)
        await backend.aclose()

    _fill(tmp_path, list(FRAMES.values()))
    asyncio.run(trim())
    assert run_fsck(tmp_path, dry_run=True) | {"seconds": 0} == _clean(tmp_path, [1, 3, 3, 3, 3])


def test_an_empty_tier_is_intact(tmp_path: Path) -> None:
    _fill(tmp_path, [])
    for dry_run in (True, False):
        assert run_fsck(tmp_path, dry_run=dry_run) | {"seconds": 0} == _clean(tmp_path, [0] * 5)


def test_the_whole_index_is_made_again_from_heads_and_levels(tmp_path: Path) -> None:
    def drop_index(txn: lmdb.Transaction, databases: Databases) -> None:
        txn.drop(databases["index"], delete=False)

    _fill(tmp_path, list(FRAMES.values()))
    before = _index(tmp_path)
    _change(tmp_path, drop_index)
    assert _held(tmp_path) == {}
    assert run_fsck(tmp_path, dry_run=False)["damage"] == {Damage.RECORD_MISSING.value: 5}
    assert _index(tmp_path) == before


def _index(data_dir: Path) -> dict[bytes, bytes]:
    with _changing(data_dir) as (txn, databases):
        return {bytes(key): bytes(record) for key, record in txn.cursor(databases["index"])}


def test_levels_of_many_parts_are_verified_and_cut_at_a_level(tmp_path: Path) -> None:
    large = make_frame(HURT, (100_000, 2 * PART_BYTES + 5000, PART_BYTES))
    _fill(tmp_path, [large])
    assert run_fsck(tmp_path, dry_run=True)["verified_bytes"] == large.size_bytes
    _change(tmp_path, _delete("levels", level_suffix(1, 1)))
    assert run_fsck(tmp_path, dry_run=False)["damage"] == {Damage.LEVEL_DAMAGED.value: 1}
    assert _levels_of(_held(tmp_path)) == {HURT: 1}
    [file] = _quarantine(tmp_path)
    assert file.stat().st_size == large.size_bytes - PART_BYTES


def test_a_frame_that_is_quarantined_is_kept_whole(tmp_path: Path) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    _change(tmp_path, _exchange)
    run_fsck(tmp_path, dry_run=False)
    [file] = _quarantine(tmp_path)
    assert file.read_bytes() == b"".join(make_frame(make_key(99), (5000, 3000, 4000)).buffers())


def test_more_is_quarantined_than_a_server_keeps(tmp_path: Path) -> None:
    _fill(tmp_path, [make_frame(make_key(number), (100,)) for number in range(30)])

    def drop_heads(txn: lmdb.Transaction, databases: Databases) -> None:
        txn.drop(databases["heads"], delete=False)

    _change(tmp_path, drop_heads)
    assert run_fsck(tmp_path, dry_run=False)["quarantined"] == 30
    assert len(_quarantine(tmp_path)) == 30


def test_damage_that_cannot_be_kept_is_left(tmp_path: Path) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    _change(tmp_path, _delete("heads"))
    (tmp_path / "lmdb" / "quarantine").write_text("in the way")
    with pytest.raises(ConfigError, match="quarantine"):
        run_fsck(tmp_path, dry_run=False)
    (tmp_path / "lmdb" / "quarantine").unlink()
    assert run_fsck(tmp_path, dry_run=False)["quarantined"] == 1


def test_large_directories_are_taken_some_chunks_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [make_frame(make_key(number), (100, 100)) for number in range(50)]
    _fill(tmp_path, frames)
    with _changing(tmp_path) as (txn, databases):
        for frame in frames[::3]:
            txn.delete(frame.key + _level(1), db=databases["levels"])
        for frame in frames[1::3]:
            txn.delete(frame.key, db=databases["index"])
    for name, value in (("_LOT_CHUNKS", 4), ("_LOT_BYTES", 700)):
        monkeypatch.setattr(f"kvstore.backends.lmdb_fsck.{name}", value)
    report = run_fsck(tmp_path, dry_run=False)
    assert report["damage"] == {Damage.LEVELS_CUT.value: 17, Damage.RECORD_MISSING.value: 17}
    assert _levels_of(_held(tmp_path)) == {frame.key: 1 + bool(n % 3) for n, frame in enumerate(frames)}


@hypothesis_settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_records_a_second_run_finds_nothing(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        data_dir = Path(folder)
        _fill(data_dir, list(FRAMES.values()))
        hurt: set[bytes] = set()
        for _ in range(data.draw(st.integers(1, 6))):
            hurt.add(_draw_damage(data, data_dir))
        run_fsck(data_dir, dry_run=False)
        assert run_fsck(data_dir, dry_run=True)["status"] == "clean"
        held = _held(data_dir)
        for key, frame in FRAMES.items():
            if key not in hurt:
                assert held[key].payload == frame.payload
            elif key in held:
                assert held[key].payload == frame.payload[: held[key].levels]
        assert held.keys() <= FRAMES.keys()


def _draw_damage(data: st.DataObject, data_dir: Path) -> bytes:
    """Delete, cut or change one record; the key of the chunk that it belongs to."""
    with _changing(data_dir) as (txn, databases):
        name = data.draw(st.sampled_from(["index", "heads", "levels"]))
        records = [(bytes(key), bytes(value)) for key, value in txn.cursor(databases[name])]
        if not records:
            return b""
        key, value = data.draw(st.sampled_from(records))
        place = data.draw(st.integers(0, len(value) - 1)) if value else 0
        changed = {
            "delete": None,
            "cut": value[:place],
            "flip": value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :] if value else b"x",
            "lengthen": value + bytes(8),
        }[data.draw(st.sampled_from(["delete", "cut", "flip", "lengthen"]))]
        if changed is None:
            txn.delete(key, db=databases[name])
        else:
            txn.put(key, changed, db=databases[name])
        return key[:48]


# Format 1


def _make_format_1(data_dir: Path, frames: Sequence[Frame]) -> None:
    """A directory as version 1 wrote it: records without origins, and every level in one record."""
    (data_dir / "lmdb").mkdir(parents=True)
    with _changing(data_dir) as (txn, databases):
        txn.put(b"format", b"kvstore lmdb 1", db=databases["meta"])
        for frame in frames:
            head = frame.head
            record = struct.pack("<16sBBBxI", frame.id, frame.levels, head.header.levels, 0, len(head.raw))
            sizes = struct.pack(f"<{frame.levels}Q", *(len(view) for view in frame.payload))
            txn.put(frame.key, record + sizes, db=databases["index"])
            txn.put(frame.key, head.raw, db=databases["heads"])
            for level, view in enumerate(frame.payload):
                txn.put(frame.key + bytes([level]), view, db=databases["levels"])


def _make_format_2(data_dir: Path, frames: Sequence[Frame]) -> None:
    """A directory as version 2 wrote it: records without profiles, each chunk behind the one before."""
    _make_format_1(data_dir, frames)
    with _changing(data_dir) as (txn, databases):
        txn.put(b"format", b"kvstore lmdb 2", db=databases["meta"])
        parent = bytes(32)
        for number, frame in enumerate(frames):
            numbers = (frame.levels, frame.head.header.levels, 0, len(frame.head.raw), 256, 256 * number)
            record = struct.pack("<16sBBBxIIQ32s", frame.id, *numbers, parent)
            sizes = struct.pack(f"<{frame.levels}Q", *(len(view) for view in frame.payload))
            txn.put(frame.key, record + sizes, db=databases["index"])
            parent = frame.key[16:]


def _format_1_frames(number: int = 6) -> list[Frame]:
    large = make_frame(make_key(100), (200_000, 3 << 20))
    return [large, *(make_frame(make_key(n), (5000, 3000)).truncated(n % 2) for n in range(number - 1))]


def test_a_server_says_how_format_1_is_brought_up_to_date(tmp_path: Path, serve: Serve) -> None:
    frames = _format_1_frames()
    _make_format_1(tmp_path / "data", frames)
    status, stderr = serve().end()
    assert status == 2
    assert f"kvstore fsck --data-dir {tmp_path / 'data'}'" in stderr
    assert "Traceback" not in stderr
    dry = run_fsck(tmp_path / "data", dry_run=True)
    assert (dry["damage"], dry["chunks"]) == ({Damage.RECORD_OLD.value: 6}, 6)
    report = run_fsck(tmp_path / "data", dry_run=False)
    assert (report["status"], report["damage"], report["quarantined"]) == ("mended", dry["damage"], 0)
    assert run_fsck(tmp_path / "data", dry_run=True)["status"] == "clean"
    held = _held(tmp_path / "data")
    assert {key: (frame.id, frame.payload) for key, frame in held.items()} == {
        frame.key: (frame.id, frame.payload) for frame in frames
    }


def test_origins_are_known_after_format_1_was_brought_up_to_date(tmp_path: Path) -> None:
    _make_format_1(tmp_path, _format_1_frames())
    run_fsck(tmp_path, dry_run=False)

    async def tokens() -> set[int]:
        backend = await LmdbBackend.open(tmp_path / "lmdb", BUDGET_BYTES)
        keys = [key async for key, _ in backend.scan()]
        found = {backend._index.origin(key).tokens for key in keys}
        await backend.aclose()
        return found

    assert asyncio.run(tokens()) == {256}


def test_what_follows_what_is_kept_when_format_2_is_brought_up_to_date(tmp_path: Path) -> None:
    frames = _format_1_frames()
    _make_format_2(tmp_path, frames)
    assert run_fsck(tmp_path, dry_run=True)["damage"] == {Damage.RECORD_OLD.value: 6}
    assert run_fsck(tmp_path, dry_run=False)["status"] == "mended"
    assert run_fsck(tmp_path, dry_run=True)["status"] == "clean"

    async def known() -> tuple[list[ChunkKey | None], set[bytes]]:
        backend = await LmdbBackend.open(tmp_path / "lmdb", BUDGET_BYTES)
        parents = [backend._index.origin(frame.key).parent for frame in frames]
        profiles = {held.copy.profile async for _, held in backend.scan()}
        await backend.aclose()
        return parents, profiles

    parents, profiles = asyncio.run(known())
    assert parents == [None, *(frame.key for frame in frames[:-1])]
    assert profiles == {frame.head.header.profile for frame in frames}


# Kills


@pytest.mark.parametrize(("method", "old"), [("_do_lot", True), ("_keep", False), ("_mend", True)])
def test_a_run_that_is_killed_leaves_what_another_can_mend(tmp_path: Path, method: str, old: bool) -> None:
    frames = _format_1_frames(12)
    if old:
        _make_format_1(tmp_path, frames)
    else:
        _fill(tmp_path, frames)
    with _changing(tmp_path) as (txn, databases):
        for frame in frames[1::2]:
            txn.delete(frame.key + _level(0), db=databases["levels"])
        for frame in frames[2::4]:
            txn.delete(frame.key, db=databases["index"])
    # In the third lot; `_keep` is before and `_mend` inside of its write transaction.
    code = (
        "import os, signal, sys\n"
        "from kvstore.backends import lmdb_fsck\n"
        "lmdb_fsck._LOT_CHUNKS = 3\n"
        f"method, calls = lmdb_fsck.LmdbFsck.{method}, []\n"
        "def killing(*args):\n"
        "    calls.append(args)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return method(*args)\n"
        f"lmdb_fsck.LmdbFsck.{method} = killing\n"
        "from kvstore.cli import main\n"
        "sys.exit(main(['fsck', '--data-dir', sys.argv[1]]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if old:
        # Neither build takes records for damaged that it does not know.
        with pytest.raises(ConfigError, match="kvstore fsck"):
            _held(tmp_path)
    run_fsck(tmp_path, dry_run=False)
    assert run_fsck(tmp_path, dry_run=True)["status"] == "clean"
    assert {key: frame.payload for key, frame in _held(tmp_path).items()} == {
        frame.key: frame.payload for frame in (frames[0], *frames[2::2])
    }


# The command


def _fsck(data_dir: Path, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore", "fsck", "--data-dir", str(data_dir), *flags]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, **{"stderr": subprocess.PIPE} | options)


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    _change(tmp_path, _delete("levels", _level(1)))
    dry = _fsck(tmp_path, "--dry-run", "--json")
    assert (dry.returncode, dry.stderr) == (1, "")
    assert json.loads(dry.stdout)["damage"] == {"levels missing": 1}
    done = _fsck(tmp_path)
    assert done.returncode == 0
    for words in ("mended", "5 with 13 levels", "levels missing"):
        assert words in done.stdout
    assert run_fsck(tmp_path, dry_run=True)["status"] == "clean"


def test_the_command_reads_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(tmp_path / "elsewhere", list(FRAMES.values()))
    (tmp_path / "kv.yaml").write_text(f"data_dir: {tmp_path / 'elsewhere'}\n")
    monkeypatch.delenv("KVSTORE_DATA_DIR", raising=False)
    assert main(["fsck", "--config", str(tmp_path / "kv.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 5
    monkeypatch.setenv("KVSTORE_DATA_DIR", str(tmp_path / "elsewhere"))
    assert main(["fsck", "--json"]) == 0


def test_the_directory_of_the_tier_may_be_named_itself(tmp_path: Path) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    assert run_fsck(tmp_path / "lmdb", dry_run=True)["chunks"] == 5


def test_a_terminal_is_shown_progress(tmp_path: Path) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    ours, theirs = pty.openpty()
    try:
        done = _fsck(tmp_path, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"})
        assert done.returncode == 0
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "verifying" in shown
    assert "bytes" in shown or "kB" in shown


def _refused(data_dir: Path, *flags: str) -> str:
    done = _fsck(data_dir, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvstore: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


async def test_a_directory_in_use_is_refused(serve: Serve, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    server = Server(serve().url, session)
    frame = FRAMES[HURT]
    assert (await server.put(frame, "disk")).status == 201
    for flags in ([], ["--dry-run"]):
        assert "in use" in await asyncio.to_thread(_refused, tmp_path / "data", *flags)
    assert await server.bytes_of(HURT) == b"".join(frame.buffers())


@pytest.mark.parametrize(("part", "flags"), [(0.02, []), (0.5, ["--dry-run"]), (0.99, [])])
def test_a_file_that_was_cut_short_is_said_to_be_so(tmp_path: Path, part: float, flags: list[str]) -> None:
    _fill(tmp_path, list(FRAMES.values()))
    file = tmp_path / "lmdb" / "data.mdb"
    os.truncate(file, int(file.stat().st_size * part))
    before = file.read_bytes()
    message = _refused(tmp_path, *flags)
    assert "cut" in message or "cannot open" in message
    assert file.read_bytes() == before


def test_a_directory_without_a_tier_is_refused_and_not_made(tmp_path: Path) -> None:
    assert "no disk tier" in _refused(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lmdb").mkdir()
    with lmdb.open(str(tmp_path / "lmdb")) as env, env.begin(write=True) as txn:
        txn.put(b"somebody", b"else's")
    before = (tmp_path / "lmdb" / "data.mdb").read_bytes()
    assert "another program" in _refused(tmp_path)
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path, [])
    _change(tmp_path, lambda txn, databases: _put_format(txn, databases, b"kvstore lmdb 99"))
    assert "kvstore lmdb 99" in _refused(tmp_path)


def _put_format(txn: lmdb.Transaction, databases: Databases, found: bytes) -> None:
    txn.put(b"format", found, db=databases["meta"])


# Any backend


async def test_any_backend_is_verified_by_reading_it(tmp_path: Path) -> None:
    host = HostBackend(1 << 20)
    await host.put(list(FRAMES.items()))
    read_bytes: list[int] = []
    found = await verify_backend(host, read_bytes.append)
    assert (found.chunks, found.levels, found.damage) == (5, 15, {})
    assert found.verified_bytes == sum(read_bytes) == sum(frame.size_bytes for frame in FRAMES.values())


async def test_damage_that_a_backend_finds_is_counted(tmp_path: Path) -> None:
    backend = await LmdbBackend.open(tmp_path, BUDGET_BYTES)
    frames = dict(FRAMES) | {HURT: make_frame(make_key(99))}
    await backend.put(list(frames.items()))
    found = await verify_backend(backend, lambda _: None)
    assert (found.chunks, found.damage, found.quarantined) == (4, {Damage.FRAME_DAMAGED: 1}, 1)
    assert (await verify_backend(backend, lambda _: None)).damage == {}
    await backend.aclose()


def test_every_kind_of_damage_is_described() -> None:
    text = (Path(__file__).parent.parent / "docs" / "fsck.md").read_text()
    assert [damage for damage in Damage if f"| {damage.value} |" not in text] == []


def test_every_flag_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fsck", "--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    text = (Path(__file__).parent.parent / "docs" / "fsck.md").read_text()
    assert [flag for flag in flags if f"| `{flag}" not in text] == []


def test_a_database_whose_own_pages_are_damaged_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    _fill(tmp_path, [make_frame(make_key(number), (3000, 2000)) for number in range(100)])
    file = tmp_path / "lmdb" / "data.mdb"
    data = bytearray(file.read_bytes())
    for page in range(2 * 4096, len(data), 4096):
        # Leaf and branch pages of the tree are flagged at byte 10; their nodes begin behind byte 16.
        if data[page + 10] in (1, 2):
            data[page + 16 : page + 48] = b"\xff" * 32
    file.write_bytes(data)
    assert str(tmp_path) in _refused(tmp_path)


# Pages of the database itself


@pytest.fixture(scope="module")
def used_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A data file in which much was written and deleted, with trees of several pages and a list of free ones."""

    async def use() -> None:
        backend = await LmdbBackend.open(data_dir / "lmdb", BUDGET_BYTES)
        keys = [make_key(number) for number in range(120)]
        for start in range(0, 120, 20):
            await backend.put([(key, make_frame(key, (3000, 900, 9000))) for key in keys[start : start + 20]])
            await backend.delete(keys[start : start + 20 : 3])
        await backend.aclose()

    data_dir = tmp_path_factory.mktemp("used")
    asyncio.run(use())
    return (data_dir / "lmdb" / "data.mdb").read_bytes()


def _tree_pages(data: bytes) -> list[int]:
    """Offsets of leaf and branch pages, those that are no longer in use included."""
    return [page for page in range(2 * 4096, len(data), 4096) if data[page + 10 : page + 12] in (b"\1\0", b"\2\0")]


def test_sound_pages_are_sound(tmp_path: Path, used_file: bytes) -> None:
    assert len(_tree_pages(used_file)) > 20
    (tmp_path / "data.mdb").write_bytes(used_file)
    check_pages(tmp_path / "data.mdb")


@pytest.mark.parametrize(
    "place", [0, 10, 12, 16, 4088], ids=["number", "kind", "end of nodes", "first node", "last node"]
)
def test_damaged_pages_are_found(tmp_path: Path, used_file: bytes, place: int) -> None:
    data = bytearray(used_file)
    for page in _tree_pages(used_file):
        data[page + place : page + place + 8] = b"\xff" * 8
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged"):
        check_pages(tmp_path / "data.mdb")


@hypothesis_settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_a_page_holds_is_sound_or_a_clear_error(used_file: bytes, data: st.DataObject) -> None:
    changed = bytearray(used_file)
    for _ in range(data.draw(st.integers(1, 4))):
        page = data.draw(st.sampled_from(_tree_pages(used_file)))
        place = data.draw(st.integers(0, 4095))
        new = data.draw(st.binary(min_size=1, max_size=min(8, 4096 - place)))
        changed[page + place : page + place + len(new)] = new
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.mdb"
        file.write_bytes(changed)
        try:
            check_pages(file)
        except ConfigError as exc:
            assert "is damaged" in str(exc)
