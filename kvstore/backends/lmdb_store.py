"""The LMDB environment behind `LmdbBackend`: plain blocking calls for its threads.

`lmdb_records` says what lies in it. No view or transaction outlives the call that made it: a slow reader would pin
pages until the map is full.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.backend import Held, check_copy
from kvstore.backends.index import Move, held_from
from kvstore.backends.lmdb_environment import FORMAT, Environment, Transaction
from kvstore.backends.lmdb_records import find_level, joined, level_suffix, pack_record, parts, unpack_record
from kvstore.backends.policies import Origin
from kvstore.errors import ConfigError, FrameError, KVStoreError
from kvstore.frame import Frame, parse_head
from kvstore.keys import KEY_BYTES, ChunkKey

SLACK_BYTES = 64 << 20
"""Room beyond 1.25 times the budget for pages that LMDB cannot reuse yet."""

_QUARANTINE_FILES_MAX = 16
_LOAD_CHUNKS = 4096

log = logging.getLogger(__name__)


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
        self._env = Environment(directory, budget_bytes * 5 // 4 + SLACK_BYTES, name)
        try:
            self._env.check_format(FORMAT)
            self._env.open_databases()
            if self._env.format is None:
                # Nothing else is written at start: a full disk can still be read.
                self._env.set_format(FORMAT)
        except KVStoreError as exc:
            self.close()
            raise exc if isinstance(exc, ConfigError) else ConfigError(str(exc)) from exc

    def load(self, after: bytes = b"") -> tuple[list[tuple[ChunkKey, Held, Origin]], bytes | None]:
        """The next chunks that the index database names, and where to go on; None where there are no more.

        Those whose record is damaged are deleted.
        """
        loaded, damaged = [], []
        with self._env.transaction() as txn, txn.cursor(self._env.index) as cursor:
            records = cursor.iternext() if cursor.set_range(after + b"\0" if after else after) else iter(())
            for raw, record in islice(records, _LOAD_CHUNKS):
                after = bytes(raw)
                if len(raw) == KEY_BYTES and (found := unpack_record(self._name, ChunkKey(after), record)) is not None:
                    loaded.append((ChunkKey(after), *found))
                else:
                    damaged.append(ChunkKey(after))
        if damaged:
            log.warning("%d damaged records were taken out of the index of %s", len(damaged), self._directory)
            self.delete(damaged)
        return loaded, after if len(loaded) + len(damaged) == _LOAD_CHUNKS else None

    def read(self, wanted: Sequence[Wanted]) -> list[Frame | None]:
        """Verified frames, in order; None where one is damaged or not there with all levels wanted."""
        return [self._read(want) for want in wanted]

    def write(self, items: Iterable[tuple[ChunkKey, Frame, Origin]], moves: Iterable[Move]) -> None:
        """Make moves and store frames in one transaction.

        Raises:
            BackendFullError: The map or the disk is full; nothing was changed.
        """
        with self._env.transaction(write=True) as txn:
            for move in moves:
                if move.after is None:
                    self._delete(txn, move.key)
                else:
                    self._shrink(txn, move.key, move.after)
            for key, frame, origin in items:
                self._put(txn, key, frame, origin)

    def trim(self, shorter: Mapping[ChunkKey, Held]) -> None:
        """Drop the levels that the given copies no longer have."""
        with self._env.transaction(write=True) as txn:
            for key, held in shorter.items():
                self._shrink(txn, key, held)

    def delete(self, keys: Iterable[ChunkKey]) -> None:
        """Delete chunks in one transaction."""
        with self._env.transaction(write=True) as txn:
            for key in keys:
                self._delete(txn, key)

    def quarantine(self, key: ChunkKey) -> None:
        """Move the bytes of a damaged chunk out of the database into a file, for whoever looks into it."""
        with self._env.transaction() as txn:
            damaged = b"".join([txn.get(key, b"", db=self._env.heads), *self._parts(txn, key)])
        try:
            self._keep_damaged(key, damaged)
        except OSError as exc:
            log.warning("the damaged chunk %s could not be kept: %s", key.hex(), exc)
        self.delete([key])

    def close(self) -> None:
        """Close the environment and release the lock."""
        self._env.close()

    def settle(self) -> None:
        """Commit next to nothing: pages that a transaction freed may be used by the next but one."""
        with self._env.transaction(write=True) as txn:
            count = int(txn.get(b"settled", b"0", db=self._env.meta)) + 1
            txn.put(b"settled", b"%d" % count, db=self._env.meta)

    def _read(self, want: Wanted) -> Frame | None:
        # A transaction for each chunk: what is deleted while it lasts cannot be used again before it ends.
        with self._env.transaction() as txn:
            head, payload = self._copy_out(txn, want)
        return _verified(want, head, payload)

    def _keep_damaged(self, key: ChunkKey, damaged: bytes) -> None:
        folder = self._directory / "quarantine"
        folder.mkdir(exist_ok=True)
        kept = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in kept[: max(0, len(kept) - _QUARANTINE_FILES_MAX + 1)]:
            file.unlink()
        (folder / f"{key.hex()}.damaged").write_bytes(damaged)

    def _copy_out(self, txn: "Transaction[memoryview]", want: Wanted) -> tuple[bytes | None, list[memoryview]]:
        head = txn.get(want.key, db=self._env.heads)
        payload = []
        for level, size_bytes in enumerate(want.held.copy.level_bytes[: want.levels]):
            # Nothing is allocated by what a record claims before all of it was found.
            find = partial(_find, txn, self._env.levels, want.key)
            if (found := find_level(find, level, size_bytes)) is None:
                break
            payload.append(joined(found))
        return None if head is None else bytes(head), payload

    def _parts(self, txn: "Transaction[memoryview]", key: ChunkKey) -> Iterator[memoryview]:
        """All parts of a chunk's levels that there are."""
        cursor = txn.cursor(self._env.levels)
        found = cursor.set_range(key)
        while found and bytes(cursor.key()[:KEY_BYTES]) == key:
            yield cursor.value()
            found = cursor.next()

    def _shrink(self, txn: "Transaction[memoryview]", key: ChunkKey, held: Held) -> None:
        self._delete_levels(txn, key, len(held.copy.level_bytes))
        found = unpack_record(self._name, key, txn.get(key, db=self._env.index) or memoryview(b""))
        txn.put(key, pack_record(held, found[1] if found else Origin()), db=self._env.index)

    def _put(self, txn: "Transaction[memoryview]", key: ChunkKey, frame: Frame, origin: Origin) -> None:
        # A frame that is replaced may have had more levels.
        self._delete(txn, key)
        txn.put(key, pack_record(held_from(self._name, frame), origin), db=self._env.index)
        txn.put(key, frame.head.raw, db=self._env.heads)
        for level, view in enumerate(frame.payload):
            for number, part in enumerate(parts(view)):
                txn.put(key + level_suffix(level, number), part, db=self._env.levels)

    def _delete(self, txn: "Transaction[memoryview]", key: ChunkKey) -> None:
        txn.delete(key, db=self._env.index)
        txn.delete(key, db=self._env.heads)
        self._delete_levels(txn, key, 0)

    def _delete_levels(self, txn: "Transaction[memoryview]", key: ChunkKey, level: int) -> None:
        """Delete a chunk's levels from `level` on."""
        cursor = txn.cursor(self._env.levels)
        found = cursor.set_range(key + level_suffix(level))
        while found and bytes(cursor.key()[:KEY_BYTES]) == key:
            # Moves on to the next record.
            cursor.delete()
            found = bool(cursor.key())


def _find(txn: "Transaction[memoryview]", levels: Any, key: ChunkKey, suffix: bytes) -> memoryview | None:
    found: memoryview | None = txn.get(key + suffix, db=levels)
    return found


def _verified(want: Wanted, head: bytes | None, payload: list[memoryview]) -> Frame | None:
    if head is None or len(payload) != want.levels:
        return None
    try:
        frame = Frame(parse_head(head), tuple(payload))
        check_copy(want.key, frame)
    except FrameError:
        return None
    return frame if frame.id == want.held.frame_id else None
