"""`kvstore serve` on a data directory that it cannot use: one line that says why, exit status 2, and nothing is harmed.

Permission bits mean nothing to root, so the servers here give up the right to pass over them before they start.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import lmdb
import pytest

from kvstore.backends.lmdb import LmdbBackend
from kvstore.testing import make_frame, make_key
from tests.conftest import Serve, Server, path_of
from tests.frames import frame_bytes

KEYS = [make_key(number) for number in range(3)]
FRAMES = [make_frame(key, (30_000, 20_000)) for key in KEYS]

# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, which only root has.
BOUND_BY_PERMISSIONS = """
import ctypes, os, sys
if os.geteuid() == 0:
    for capability in (1, 2):
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "kvstore", *sys.argv[1:]])
"""


def _fill(data_dir: Path) -> None:
    async def fill() -> None:
        backend = await LmdbBackend.open(data_dir / "lmdb", 64 << 20)
        await backend.put(list(zip(KEYS, FRAMES, strict=True)))
        await backend.aclose()

    asyncio.run(fill())


def _refused(data_dir: Path, *flags: str, prelude: str = BOUND_BY_PERMISSIONS) -> str:
    """What a server says that does not start."""
    command = [sys.executable, "-c", prelude, "serve", "--port", "0", "--data-dir", str(data_dir), *flags]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=30)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("kvstore: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# Directories that cannot be written to


def test_a_directory_on_a_read_only_filesystem_is_refused() -> None:
    assert "/proc/kvstore-data" in _refused(Path("/proc/kvstore-data"))


@pytest.mark.parametrize("below", ["", "far/below"])
def test_a_data_directory_that_is_a_file_or_below_one_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert str(tmp_path / "file") in _refused(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "not a directory"


@pytest.fixture
def forbid() -> Iterator[Callable[[Path, int], None]]:
    """Changes permissions of a path until the test ends."""
    changed: list[tuple[Path, int]] = []

    def change(path: Path, mode: int) -> None:
        changed.append((path, path.stat().st_mode))
        path.chmod(mode)

    yield change
    for path, mode in reversed(changed):
        path.chmod(mode)


@pytest.mark.parametrize(("place", "mode"), [("data", 0o000), ("data/lmdb", 0o500)], ids=["closed", "read-only"])
def test_a_directory_without_permission_is_refused(
    tmp_path: Path, forbid: Callable[[Path, int], None], place: str, mode: int
) -> None:
    data_dir = tmp_path / "data"
    _fill(data_dir)
    (data_dir / "lmdb" / "lock.kvstore").unlink()
    forbid(tmp_path / place, mode)
    message = _refused(data_dir)
    assert "Permission denied" in message
    assert str(data_dir) in message


@pytest.mark.parametrize(("name", "mode"), [("data.mdb", 0o400), ("lock.kvstore", 0o000)])
def test_a_file_without_permission_is_refused(
    tmp_path: Path, forbid: Callable[[Path, int], None], name: str, mode: int
) -> None:
    _fill(tmp_path)
    before = (tmp_path / "lmdb" / "data.mdb").read_bytes()
    forbid(tmp_path / "lmdb" / name, mode)
    message = _refused(tmp_path)
    assert "Permission denied" in message
    assert str(tmp_path) in message
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before


# Directories that hold something else


def _put(directory: Path, database: bytes | None, key: bytes, value: bytes) -> bytes:
    """Put a record into an environment; the bytes of its file."""
    directory.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(directory), max_dbs=4) as env, env.begin(write=True) as txn:
        txn.put(key, value, db=env.open_db(database, txn) if database else None)
    return (directory / "data.mdb").read_bytes()


@pytest.mark.parametrize("found", [b"kvstore lmdb 1 to 2", b"kvstore lmdb to 3", b"kvstore lmdb 4"])
def test_another_format_is_refused_and_left_alone(tmp_path: Path, found: bytes) -> None:
    _fill(tmp_path)
    before = _put(tmp_path / "lmdb", b"meta", b"format", found)
    message = _refused(tmp_path)
    assert repr(found) in message
    assert ("kvstore fsck --data-dir" in message) == (found != b"kvstore lmdb 4")
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("database", [None, b"meta"])
def test_another_programs_environment_is_refused_and_left_alone(tmp_path: Path, database: bytes | None) -> None:
    before = _put(tmp_path / "lmdb", database, b"somebody", b"else's")
    assert "another program" in _refused(tmp_path)
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before


def test_an_environment_whose_names_are_something_else_is_refused(tmp_path: Path) -> None:
    before = _put(tmp_path / "lmdb", None, b"meta", b"no database")
    assert str(tmp_path) in _refused(tmp_path)
    assert (tmp_path / "lmdb" / "data.mdb").read_bytes() == before


async def test_the_first_of_two_servers_keeps_serving(
    serve: Serve, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    first = Server(serve().url, session)
    assert (await first.put(FRAMES[0], "disk")).status == 201
    assert "in use" in await asyncio.to_thread(_refused, tmp_path / "data")
    assert (await first.put(FRAMES[1], "disk")).status == 201
    assert await first.bytes_of(KEYS[0]) == frame_bytes(FRAMES[0])
    assert (await first.ask("DELETE", path_of(KEYS[0]))).status == 204


# Disks and address spaces that are too small


def test_a_disk_larger_than_any_address_space_is_refused(tmp_path: Path) -> None:
    message = _refused(tmp_path, "--disk", "256TiB")
    assert "Cannot allocate memory" in message
    assert "set a smaller --disk" in message


def test_a_disk_without_room_for_the_first_page_is_refused(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    message = _refused(tmp_path, prelude=f"{limit}from kvstore.cli import main\nraise SystemExit(main())")
    assert str(tmp_path) in message


async def test_a_disk_smaller_than_its_budget_serves_until_it_is_full(
    serve: Serve, session: aiohttp.ClientSession
) -> None:
    # The map is an address range: nothing of it is on the disk before it is written.
    server = Server(serve("--disk", "16TiB").url, session)
    assert (await server.put(FRAMES[0], "disk")).headers["Kvstore-Ack"] == "disk"


async def test_a_server_starts_on_a_full_disk_and_serves_what_is_there(
    serve: Serve, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await asyncio.to_thread(_fill, tmp_path / "data")
    size_bytes = (tmp_path / "data" / "lmdb" / "data.mdb").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes}, {size_bytes}))"
    server = Server(serve(prelude=limit).url, session)
    for key, frame in zip(KEYS, FRAMES, strict=True):
        assert await server.bytes_of(key) == frame_bytes(frame)
    large = make_frame(make_key(9), (4 << 20,))
    assert (await server.put(large, "disk")).status == 507
