"""The LMDB environment behind `LmdbBackend`: plain blocking calls for its threads.

Three named databases: `index` (key -> what is held; read once at start), `heads` (key -> head of the frame) and
`levels` (key and level number -> payload of that level). No view or transaction outlives the call that made it: a
slow reader would pin pages until the map is full.
"""

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lmdb

from kvstore.backend import Copy, Held, check_copy
from kvstore.backends.index import Move, held_from, shared_copy
from kvstore.backends.policies import Origin
from kvstore.buffers import allocate
from kvstore.errors import BackendError, BackendFullError, ConfigError, FrameError
from kvstore.frame import HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX, Frame, parse_head
from kvstore.header import LEVELS_MAX
from kvstore.keys import DIGEST_BYTES, KEY_BYTES, NAMESPACE_BYTES, ChunkKey, split_key

FORMAT = b"kvstore lmdb 2"
SLACK_BYTES = 64 << 20
"""Room beyond 1.25 times the budget for pages that LMDB cannot reuse yet."""

_PAGE_BYTES = 4096
_QUARANTINE_FILES_MAX = 16
# A disk that fills up in the middle of a write is a short write, which LMDB reports as EIO.
_FULL_ERRNOS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO}
_RECORD = struct.Struct("<16sBBBxIIQ32s")
_NO_PARENT = bytes(DIGEST_BYTES)
_LEVEL_SIZE = struct.Struct("<Q")


log = logging.getLogger(__name__)


class MapFullError(BackendFullError):
    """LMDB found no run of free pages in its map that is long enough."""


class Wanted(NamedTuple):
    """A chunk to read: its key, what is held of it, and how many levels to read."""

    key: ChunkKey
    held: Held
    levels: int


class LmdbStore:
    """One LMDB environment, locked against a second server.

    Args:
        directory: Where it lives; created if need be.
        budget_bytes: Budget of the tier; the file is at most `1.25 * budget_bytes + SLACK_BYTES`.
        name: Name of the tier, for errors.

    Raises:
        ConfigError: The directory cannot be used, is in use, or has another format.
    """

    def __init__(self, directory: Path, budget_bytes: int, name: str) -> None:
        self._name = name
        self._directory = directory
        self._lock_fd = _lock(directory)
        try:
            self._env = lmdb.open(
                str(directory), map_size=budget_bytes * 5 // 4 + SLACK_BYTES, max_dbs=4, readahead=False
            )
            self._open_databases()
        except (lmdb.Error, OverflowError) as exc:
            os.close(self._lock_fd)
            raise ConfigError(f"cannot open the disk tier in {directory}: {exc}") from exc
        except ConfigError:
            self.close()
            raise

    def load(self) -> list[tuple[ChunkKey, Held, Origin]]:
        """Every chunk that the index database names; those whose record is damaged are deleted."""
        loaded, damaged = [], []
        with self._transaction() as txn:
            for raw, record in txn.cursor(self._index):
                key = ChunkKey(bytes(raw))
                if len(key) == KEY_BYTES and (found := _unpack_record(self._name, key, record)) is not None:
                    loaded.append((key, *found))
                else:
                    damaged.append(key)
        if damaged:
            log.warning("%d damaged records were taken out of the index of %s", len(damaged), self._directory)
            self.delete(damaged)
        return loaded

    def read(self, wanted: Sequence[Wanted]) -> list[Frame | None]:
        """Verified frames, in order; None where one is damaged or not there with all levels wanted."""
        with self._transaction() as txn:
            copies = [self._copy_out(txn, want) for want in wanted]
        return [_verified(want, *copy) for want, copy in zip(wanted, copies, strict=True)]

    def write(self, items: Iterable[tuple[ChunkKey, Frame, Origin]], moves: Iterable[Move]) -> None:
        """Make moves and store frames in one transaction.

        Raises:
            BackendFullError: The map or the disk is full; nothing was changed.
        """
        with self._transaction(write=True) as txn:
            for move in moves:
                if move.after is None:
                    self._delete(txn, move.key)
                else:
                    self._shrink(txn, move.key, move.after)
            for key, frame, origin in items:
                self._put(txn, key, frame, origin)

    def trim(self, shorter: Mapping[ChunkKey, Held]) -> None:
        """Drop the levels that the given copies no longer have."""
        with self._transaction(write=True) as txn:
            for key, held in shorter.items():
                self._shrink(txn, key, held)

    def delete(self, keys: Iterable[ChunkKey]) -> None:
        """Delete chunks in one transaction."""
        with self._transaction(write=True) as txn:
            for key in keys:
                self._delete(txn, key)

    def quarantine(self, key: ChunkKey) -> None:
        """Move the bytes of a damaged chunk out of the database into a file, for whoever looks into it."""
        with self._transaction() as txn:
            levels = (txn.get(_level_key(key, level), db=self._levels) for level in range(LEVELS_MAX))
            damaged = b"".join(part for part in (txn.get(key, db=self._heads), *levels) if part)
        try:
            self._keep_damaged(key, damaged)
        except OSError as exc:
            log.warning("the damaged chunk %s could not be kept: %s", key.hex(), exc)
        self.delete([key])

    def close(self) -> None:
        """Close the environment and release the lock."""
        self._env.close()
        os.close(self._lock_fd)

    def _keep_damaged(self, key: ChunkKey, damaged: bytes) -> None:
        folder = self._directory / "quarantine"
        folder.mkdir(exist_ok=True)
        kept = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in kept[: max(0, len(kept) - _QUARANTINE_FILES_MAX + 1)]:
            file.unlink()
        (folder / f"{key.hex()}.damaged").write_bytes(damaged)

    def _check_file(self) -> None:
        """Refuse a file that was cut short: reading a page behind its end would kill the process."""
        needed_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        found_bytes = (self._directory / "data.mdb").stat().st_size
        if needed_bytes > found_bytes:
            raise ConfigError(
                f"{self._directory}/data.mdb has {found_bytes} bytes of the {needed_bytes} that it must have: "
                "it was cut; use another data directory or a copy of the whole file"
            )

    def _check_format(self) -> None:
        """Refuse an environment of another format before anything is written to it."""
        try:
            meta = self._env.open_db(b"meta", create=False)
        except lmdb.NotFoundError:
            if self._env.stat()["entries"]:
                raise ConfigError(f"{self._directory} holds another program's LMDB environment") from None
            return
        with self._env.begin() as txn:
            if (found := txn.get(b"format", db=meta)) != FORMAT:
                raise ConfigError(
                    f"{self._directory} has the format {found!r}, this build knows {FORMAT!r}: "
                    "use another data directory or the version that wrote it"
                )

    def _open_databases(self) -> None:
        self._check_file()
        self._check_format()
        meta, self._index, self._heads, self._levels = (
            self._env.open_db(database) for database in (b"meta", b"index", b"heads", b"levels")
        )
        with self._env.begin(write=True) as txn:
            txn.put(b"format", FORMAT, db=meta)

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator["lmdb.Transaction[memoryview]"]:
        """A transaction whose LMDB errors come out as ours."""
        try:
            with self._env.begin(write=write, buffers=True) as txn:
                yield txn
        except lmdb.MapFullError as exc:
            raise MapFullError(self._name, "the LMDB map is full") from exc
        except (lmdb.Error, OSError) as exc:
            if _is_full(exc):
                raise BackendFullError(self._name, f"the disk is full or failing: {exc}") from exc
            raise BackendError(self._name, str(exc)) from exc

    def _copy_out(self, txn: "lmdb.Transaction[memoryview]", want: Wanted) -> tuple[bytes | None, list[memoryview]]:
        head = txn.get(want.key, db=self._heads)
        payload = []
        for level in range(want.levels):
            if (stored := txn.get(_level_key(want.key, level), db=self._levels)) is None:
                break
            payload.append(allocate(len(stored)))
            payload[-1][:] = stored
        return None if head is None else bytes(head), payload

    def _shrink(self, txn: "lmdb.Transaction[memoryview]", key: ChunkKey, held: Held) -> None:
        for level in range(len(held.copy.level_bytes), held.copy.levels):
            txn.delete(_level_key(key, level), db=self._levels)
        found = _unpack_record(self._name, key, txn.get(key, db=self._index) or memoryview(b""))
        txn.put(key, _pack_record(held, found[1] if found else Origin()), db=self._index)

    def _put(self, txn: "lmdb.Transaction[memoryview]", key: ChunkKey, frame: Frame, origin: Origin) -> None:
        # A frame that is replaced may have had more levels.
        self._delete(txn, key)
        txn.put(key, _pack_record(held_from(self._name, frame), origin), db=self._index)
        txn.put(key, frame.head.raw, db=self._heads)
        for level, view in enumerate(frame.payload):
            txn.put(_level_key(key, level), view, db=self._levels)

    def _delete(self, txn: "lmdb.Transaction[memoryview]", key: ChunkKey) -> None:
        txn.delete(key, db=self._index)
        txn.delete(key, db=self._heads)
        for level in range(LEVELS_MAX):
            txn.delete(_level_key(key, level), db=self._levels)


def size_on_disk_bytes(copy: Copy) -> int:
    """Whole pages that a chunk takes in the environment, an estimate for its small records included."""
    return sum(_pages_bytes(size) for size in (copy.head_bytes, *copy.level_bytes)) + _PAGE_BYTES


def _pages_bytes(size_bytes: int) -> int:
    return -(-(size_bytes + 16) // _PAGE_BYTES) * _PAGE_BYTES


def _verified(want: Wanted, head: bytes | None, payload: list[memoryview]) -> Frame | None:
    if head is None or len(payload) != want.levels:
        return None
    try:
        frame = Frame(parse_head(head), tuple(payload))
        check_copy(want.key, frame)
    except FrameError:
        return None
    return frame if frame.id == want.held.frame_id else None


def _level_key(key: ChunkKey, level: int) -> bytes:
    return key + bytes([level])


def _pack_record(held: Held, origin: Origin) -> bytes:
    assert held.frame_id is not None, "a backend knows the ids of its own frames"
    copy = held.copy
    parent = _NO_PARENT if origin.parent is None else split_key(origin.parent)[1]
    sizes = b"".join(_LEVEL_SIZE.pack(size) for size in copy.level_bytes)
    return (
        _RECORD.pack(
            held.frame_id,
            len(copy.level_bytes),
            copy.levels,
            copy.inexact,
            copy.head_bytes,
            origin.tokens,
            origin.first_position,
            parent,
        )
        + sizes
    )


def _unpack_record(tier: str, key: ChunkKey, record: memoryview) -> tuple[Held, Origin] | None:
    if len(record) < _RECORD.size:
        return None
    frame_id, held_levels, levels, inexact, head_bytes, tokens, first_position, parent = _RECORD.unpack_from(record)
    if len(record) != _RECORD.size + held_levels * _LEVEL_SIZE.size or not 0 < held_levels <= levels:
        return None
    level_bytes = tuple(size for (size,) in _LEVEL_SIZE.iter_unpack(record[_RECORD.size :]))
    if levels > LEVELS_MAX or head_bytes > HEAD_BYTES_MAX or sum(level_bytes) > PAYLOAD_BYTES_MAX:
        return None
    # A prompt's chunks lie in one namespace.
    parent_key = None if parent == _NO_PARENT else ChunkKey(key[:NAMESPACE_BYTES] + parent)
    held = Held(frame_id, shared_copy(tier, head_bytes, level_bytes, levels, bool(inexact)))
    return held, Origin(tokens, first_position, parent_key)


def _lock(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(directory / "lock.kvstore", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot use the data directory {directory}: {exc}") from exc
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(lock_fd)
        raise ConfigError(f"the data directory {directory} is in use by another server") from exc
    return lock_fd


def _is_full(exc: Exception) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in _FULL_ERRNOS
    return any(os.strerror(number) in str(exc) for number in _FULL_ERRNOS)
