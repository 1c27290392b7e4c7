"""Verifying a disk tier that no server uses, and mending it.

Heads and levels are what counts, because they carry checksums; index records carry none and are made from them again. A
frame that is cut at the end of a level is a valid frame, so of a damaged one the intact levels below are kept. Chunks
are taken in the order of their keys, some at a time: each lot is read in one transaction and mended in another, so
memory is bounded, and a run that is killed leaves every lot as it was or mended.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.backend import check_copy
from kvstore.backends.findings import Damage, Findings, Progress
from kvstore.backends.index import held_from
from kvstore.backends.lmdb_environment import FORMAT, OLD_FORMATS, Environment, Transaction
from kvstore.backends.lmdb_records import (
    find_level,
    is_old_record,
    joined,
    level_suffix,
    old_origin,
    pack_record,
    unpack_record,
)
from kvstore.backends.policies import Origin
from kvstore.errors import ConfigError, FrameCorruptError, FrameError, LayoutMismatchError
from kvstore.frame import Frame, Head, parse_head
from kvstore.keys import KEY_BYTES, ChunkKey

_LOT_CHUNKS = 512
_LOT_BYTES = 64 << 20
_ROOM_BYTES = 64 << 20
"""Room for mending beyond what the file takes now; what mending frees is used before it."""
_SUFFIX_BYTES = {len(level_suffix(0)), len(level_suffix(0, 1))}
_TIER = "lmdb"

Part = tuple[bytes, memoryview]
"""A record of a level: its key behind the chunk's key, and a view that is valid as long as the transaction."""


class Lying(NamedTuple):
    """Everything that lies under one key."""

    key: bytes
    records: list[Part]
    heads: list[Part]
    parts: list[Part]

    @property
    def size_bytes(self) -> int:
        """Bytes of head and levels."""
        return sum(len(value) for _, value in (*self.heads, *self.parts))

    def without_values(self) -> "Lying":
        """The keys alone, which outlive the transaction."""
        nothing = memoryview(b"")
        records, heads, parts = (
            [(suffix, nothing) for suffix, _ in found] for found in (self.records, self.heads, self.parts)
        )
        return Lying(self.key, records, heads, parts)


class Verdict(NamedTuple):
    """What is to be done with a chunk.

    Args:
        damage: What is wrong; empty where it is intact.
        levels: Number of levels that are intact and kept; 0 where nothing of the chunk can be kept.
        record: The index record that it must have.
        kept: What follows the chunk's key in the keys of the level records that are kept.
        quarantine: Whether bytes that may be of use to somebody are taken away.
    """

    damage: Sequence[Damage] = ()
    levels: int = 0
    record: bytes = b""
    kept: Collection[bytes] = ()
    quarantine: bool = False


class LmdbFsck:
    """One verification of a disk tier.

    Args:
        directory: Where the tier lives; it must be there.
        dry_run: Whether nothing may be changed.

    Raises:
        ConfigError: There is no disk tier, it is in use, or it cannot be opened.
    """

    def __init__(self, directory: Path, *, dry_run: bool = False) -> None:
        file = directory / "data.mdb"
        if not file.is_file():
            raise ConfigError(f"there is no disk tier in {directory}")
        self.findings = Findings()
        self._dry_run = dry_run
        self._directory = directory
        self._env = Environment(directory, file.stat().st_size + _ROOM_BYTES, _TIER, readonly=dry_run, verify=True)
        try:
            self._env.check_format(FORMAT, *OLD_FORMATS)
            self._env.open_databases()
            self.payload_bytes = self._env.payload_bytes()
        except BaseException:
            self.close()
            raise

    def run(self, progress: Progress) -> Findings:
        """Verify everything and, unless it is a dry run, mend what is wrong.

        Raises:
            BackendError: The database cannot be read or written.
            ConfigError: Damage cannot be kept under `quarantine/`.
        """
        if not self._dry_run and self._env.format != FORMAT:
            # A build of the old format would delete records that it does not know.
            self._env.set_format(OLD_FORMATS[-1] if self._env.format else FORMAT)
        place: bytes | None = b""
        while place is not None:
            place = self._do_lot(place, progress)
        if not self._dry_run and self._env.format != FORMAT:
            self._env.set_format(FORMAT)
        return self.findings

    def close(self) -> None:
        """Close the environment and release the lock."""
        self._env.close()

    def _do_lot(self, place: bytes, progress: Progress) -> bytes | None:
        """Verify and mend the chunks from a key on; the key to go on with, None at the end."""
        damaged: list[tuple[Lying, Verdict]] = []
        next_place = None
        lot_bytes = 0
        with self._env.transaction() as txn:
            for number, lying in enumerate(self._chunks(txn, place)):
                lot_bytes += lying.size_bytes
                if number and (number == _LOT_CHUNKS or lot_bytes > _LOT_BYTES):
                    next_place = lying.key
                    break
                verdict = judge(lying)
                self._count(lying, verdict)
                if verdict.damage:
                    if verdict.quarantine and not self._dry_run:
                        self._keep(lying)
                    damaged.append((lying.without_values(), verdict))
                progress(lying.size_bytes)
        if damaged and not self._dry_run:
            with self._env.transaction(write=True) as txn:
                for lying, verdict in damaged:
                    self._mend(txn, lying, verdict)
        return next_place

    def _chunks(self, txn: "Transaction[memoryview]", place: bytes) -> Iterator[Lying]:
        """What lies under each key, in the order of keys."""
        cursors = [txn.cursor(database) for database in (self._env.index, self._env.heads, self._env.levels)]
        for cursor in cursors:
            cursor.set_range(place) if place else cursor.first()
        while keys := [bytes(cursor.key()[:KEY_BYTES]) for cursor in cursors if cursor.key()]:
            key = min(keys)
            yield Lying(key, *(_take(cursor, key) for cursor in cursors))

    def _count(self, lying: Lying, verdict: Verdict) -> None:
        findings = self.findings
        findings.verified_bytes += lying.size_bytes
        findings.damage.update(verdict.damage)
        findings.quarantined += verdict.quarantine
        if verdict.levels:
            findings.chunks += 1
            findings.levels += verdict.levels

    def _keep(self, lying: Lying) -> None:
        """Write everything that lies under a key into a file, before it is taken out of the database."""
        try:
            folder = self._directory / "quarantine"
            folder.mkdir(exist_ok=True)
            with (folder / f"{lying.key.hex()}.damaged").open("wb") as stream:
                for _, value in (*lying.heads, *lying.parts):
                    stream.write(value)
        except OSError as exc:
            raise ConfigError(f"damage cannot be kept in {self._directory}/quarantine: {exc}") from exc

    def _mend(self, txn: "Transaction[memoryview]", lying: Lying, verdict: Verdict) -> None:
        databases = (self._env.index, self._env.heads, self._env.levels)
        # The record and the head of a chunk have keys without a suffix.
        kept: tuple[Collection[bytes], ...] = ({b""}, {b""}, verdict.kept) if verdict.levels else ((), (), ())
        for database, found, keep in zip(databases, (lying.records, lying.heads, lying.parts), kept, strict=True):
            for suffix, _ in found:
                if suffix not in keep:
                    txn.delete(lying.key + suffix, db=database)
        if verdict.levels:
            txn.put(lying.key, verdict.record, db=self._env.index)


def judge(lying: Lying) -> Verdict:
    """What is wrong with a chunk, and what of it can be kept."""
    verdict = _judge_frame(lying)
    if any(suffix for suffix, _ in (*lying.records, *lying.heads)) and Damage.STRAY not in verdict.damage:
        return verdict._replace(damage=[*verdict.damage, Damage.STRAY])
    return verdict


def _judge_frame(lying: Lying) -> Verdict:
    head_bytes = _value(lying.heads)
    if len(lying.key) != KEY_BYTES:
        return Verdict([Damage.STRAY], quarantine=lying.size_bytes > 0)
    if head_bytes is None and lying.parts:
        return Verdict([Damage.HEAD_MISSING], quarantine=True)
    if head_bytes is None:
        return Verdict([Damage.RECORD_ALONE] if _value(lying.records) is not None else [])
    try:
        head = parse_head(bytes(head_bytes))
    except FrameError:
        return Verdict([Damage.HEAD_DAMAGED], quarantine=True)
    if not lying.parts:
        return Verdict([Damage.LEVELS_MISSING], quarantine=True)
    try:
        return _judge_levels(lying, head)
    except LayoutMismatchError:
        return Verdict([Damage.KEY_WRONG], quarantine=True)


def _judge_levels(lying: Lying, head: Head) -> Verdict:
    parts = dict(lying.parts)
    levels = list(_complete_levels(parts, head))
    frame = _intact(ChunkKey(lying.key), head, [found[0] if len(found) == 1 else joined(found) for found in levels])
    held = frame.levels if frame else 0
    kept = {level_suffix(level, part) for level in range(held) for part in range(len(levels[level]))}
    damage = list(_level_damage(parts.keys() - kept, held))
    if frame is None:
        return Verdict(damage, quarantine=True)
    record = _value(lying.records)
    key = ChunkKey(lying.key)
    found = None if record is None else unpack_record(_TIER, key, record)
    known = found[1] if found else old_origin(key, record) if record is not None else None
    origin = Origin(head.header.tokens, head.header.first_position, known.parent if known else None)
    expected = pack_record(held_from(_TIER, frame), origin)
    if record is None:
        damage.append(Damage.RECORD_MISSING)
    elif is_old_record(record):
        damage.append(Damage.RECORD_OLD)
    elif record != expected and not damage:
        fewer = found is not None and len(found[0].copy.level_bytes) > held
        damage.append(Damage.LEVELS_CUT if fewer else Damage.RECORD_WRONG)
    return Verdict(damage, held, expected, kept, quarantine=len(kept) < len(parts))


def _complete_levels(parts: Mapping[bytes, memoryview], head: Head) -> Iterator[list[memoryview]]:
    """The parts of every level up to the first that is not there in its full length."""
    for level, size_bytes in enumerate(head.level_bytes):
        if (found := find_level(parts.get, level, size_bytes)) is None:
            return
        yield found


def _intact(key: ChunkKey, head: Head, payload: Sequence[memoryview]) -> Frame | None:
    """The frame with as many levels as match their checksums.

    Raises:
        LayoutMismatchError: It belongs under another key.
    """
    for levels in range(len(payload), 0, -1):
        frame = Frame(head, tuple(payload[:levels]))
        try:
            check_copy(key, frame)
        except FrameCorruptError:
            continue
        return frame
    return None


def _level_damage(beyond: Collection[bytes], held: int) -> Iterator[Damage]:
    """What level records mean that are no part of the levels held."""
    numbers = [suffix[0] if len(suffix) in _SUFFIX_BYTES else -1 for suffix in beyond]
    if held in numbers:
        yield Damage.LEVEL_DAMAGED
    elif any(number > held for number in numbers):
        yield Damage.LEVELS_CUT
    elif numbers or not held:
        yield Damage.STRAY


def _take(cursor: Any, key: bytes) -> list[Part]:
    """The records of a database that lie under a chunk's key."""
    found = []
    while (record_key := bytes(cursor.key()))[:KEY_BYTES] == key and record_key:
        found.append((record_key[KEY_BYTES:], cursor.value()))
        cursor.next()
    return found


def _value(found: Sequence[Part]) -> memoryview | None:
    """The value that lies under the chunk's key itself."""
    return next((value for suffix, value in found if not suffix), None)
