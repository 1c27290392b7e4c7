"""The LMDB environment of the disk tier as files: opened for one process, checked before anything is read from it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from kvstore.backends.lmdb_pages import check_pages
from kvstore.errors import BackendError, BackendFullError, ConfigError

FORMAT = b"kvstore lmdb 3"
OLD_FORMATS = (b"kvstore lmdb 1", b"kvstore lmdb 1 to 2", b"kvstore lmdb 2", b"kvstore lmdb to 3")
"""What `kvstore fsck` brings up to `FORMAT`; the last one stands there while it does so."""

Transaction = lmdb.Transaction

# A disk that fills up in the middle of a write is a short write, which LMDB reports as EIO.
_FULL_ERRNOS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO}


class MapFullError(BackendFullError):
    """LMDB found no run of free pages in its map that is long enough."""


class Environment:
    """One LMDB environment, locked against other processes.

    Args:
        directory: Where it lives; created if need be.
        map_bytes: Most bytes that its file may take.
        name: Name of the tier, for errors.
        readonly: Whether nothing may be changed; the directory must hold an environment then.
        verify: Whether all pages of its trees are checked first, which takes seconds for a million chunks.

    Attributes:
        format: What was found; None in a new environment.

    Raises:
        ConfigError: The directory cannot be used, is in use, or holds something else.
    """

    def __init__(
        self, directory: Path, map_bytes: int, name: str, *, readonly: bool = False, verify: bool = False
    ) -> None:
        self.directory = directory
        self._name = name
        self._readonly = readonly
        self._map_bytes = map_bytes
        self._lock_fd = _lock(directory)
        try:
            if verify:
                check_pages(directory / "data.mdb")
            # The kernel reads ahead: nearly all that is read are long runs of pages.
            self._env = lmdb.open(str(directory), map_size=map_bytes, max_dbs=4, readonly=readonly, create=not readonly)
        except (lmdb.Error, OverflowError, OSError) as exc:
            os.close(self._lock_fd)
            raise self._unusable(exc) from exc
        except ConfigError:
            os.close(self._lock_fd)
            raise
        try:
            self._check_file()
            self.format = self._found_format()
        except lmdb.Error as exc:
            self.close()
            raise self._unusable(exc) from exc
        except ConfigError:
            self.close()
            raise

    def check_format(self, *known: bytes) -> None:
        """Refuse an environment of a format that the caller does not know; a new one has none.

        Raises:
            ConfigError: It has another format.
        """
        if self.format is None or self.format in known:
            return
        if self.format in OLD_FORMATS:
            raise ConfigError(
                f"{self.directory} has an older format, {self.format!r}: "
                f"bring it up to date by 'kvstore fsck --data-dir {self.directory.parent}'"
            )
        raise ConfigError(
            f"{self.directory} has the format {self.format!r}, this build knows {FORMAT!r}: "
            "use another data directory or the version that wrote it"
        )

    def open_databases(self) -> None:
        """Open the databases, and create those that are missing; sets `meta`, `index`, `heads` and `levels`.

        Raises:
            ConfigError: They cannot be opened; one is missing and nothing may be written.
        """
        try:
            self.meta, self.index, self.heads, self.levels = (
                self._env.open_db(database, create=not self._readonly)
                for database in (b"meta", b"index", b"heads", b"levels")
            )
        except lmdb.Error as exc:
            raise self._unusable(exc) from exc

    def set_format(self, found: bytes) -> None:
        """Note which format the environment has from now on."""
        with self.transaction(write=True) as txn:
            txn.put(b"format", found, db=self.meta)
        self.format = found

    def payload_bytes(self) -> int:
        """About how many bytes heads and levels take."""
        with self.transaction() as txn:
            stats = [txn.stat(database) for database in (self.heads, self.levels)]
        return sum(stat["psize"] * (stat["overflow_pages"] + stat["leaf_pages"]) for stat in stats)

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator["Transaction[memoryview]"]:
        """A transaction whose LMDB errors come out as ours.

        Raises:
            BackendFullError: The map or the disk is full; nothing was changed.
        """
        try:
            with self._env.begin(write=write, buffers=True) as txn:
                yield txn
        except lmdb.MapFullError as exc:
            raise MapFullError(self._name, "the LMDB map is full") from exc
        except (lmdb.Error, OSError) as exc:
            if _is_full(exc):
                raise BackendFullError(self._name, f"the disk is full or failing: {exc}") from exc
            raise BackendError(self._name, str(exc)) from exc

    def close(self) -> None:
        """Close the environment and release the lock."""
        self._env.close()
        os.close(self._lock_fd)

    def _check_file(self) -> None:
        """Refuse a file that was cut short: reading a page behind its end would kill the process."""
        needed_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        found_bytes = (self.directory / "data.mdb").stat().st_size
        if needed_bytes > found_bytes:
            raise ConfigError(
                f"{self.directory}/data.mdb has {found_bytes} bytes of the {needed_bytes} that it must have: "
                "it was cut; use another data directory or a copy of the whole file"
            )

    def _found_format(self) -> bytes | None:
        """The format of what is there, before anything is written to it."""
        try:
            meta = self._env.open_db(b"meta", create=False)
        except lmdb.NotFoundError:
            found = None
        else:
            with self._env.begin() as txn:
                found = txn.get(b"format", db=meta)
        if found is None and self._env.stat()["entries"]:
            raise ConfigError(f"{self.directory} holds another program's LMDB environment")
        return found

    def _unusable(self, exc: Exception) -> ConfigError:
        hint = ""
        if os.strerror(errno.ENOMEM) in str(exc):
            hint = f"; there are no {self._map_bytes} bytes of address space for its map: set a smaller --disk"
        return ConfigError(f"cannot open the disk tier in {self.directory}: {exc}{hint}")


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
        raise ConfigError(f"the data directory {directory} is in use by another process") from exc
    return lock_fd


def _is_full(exc: Exception) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in _FULL_ERRNOS
    return any(os.strerror(number) in str(exc) for number in _FULL_ERRNOS)
