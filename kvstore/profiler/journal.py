"""What a run has found out, kept as it goes: an append-only file of JSON lines that survives a kill at any point."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from kvstore.errors import ConfigError

Record = dict[str, Any]


class Journal:
    """An append-only file. The first record says what the run is; others follow in the order in which they happened.

    Args:
        path: The file.
        run: What the run is: model, text, settings. A file of another run is refused.
        resume: Whether to go on with a file that is there.

    Raises:
        ConfigError: There is a file and `resume` is not set, it belongs to another run, or it cannot be used.
    """

    def __init__(self, path: Path, run: Record, *, resume: bool) -> None:
        self._path = path
        self.records: list[Record] = []
        try:
            if path.exists() and path.stat().st_size:
                self._read(run, resume=resume)
            self._stream = path.open("ab")
        except OSError as exc:
            raise ConfigError(f"cannot use the journal {path}: {exc}") from exc
        if not self.records:
            self.append({"kind": "run", **run})

    def append(self, record: Record) -> None:
        """Write a record so that it is there after a crash.

        Raises:
            ConfigError: There is no room for it; all before it is safe.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        end = self._stream.tell()
        try:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as exc:
            self._cut(end)
            raise ConfigError(
                f"cannot write to {self._path}: {exc}; what was measured before is kept, go on with --resume"
            ) from exc
        self.records.append(record)

    def of(self, kind: str) -> Iterator[Record]:
        """Records of a kind, in order."""
        return (record for record in self.records if record["kind"] == kind)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, run: Record, *, resume: bool) -> None:
        if not resume:
            raise ConfigError(f"{self._path} holds a run already: go on with --resume, or name another folder")
        whole = 0
        with self._path.open("rb") as stream:
            for line in stream:
                record = _parse(line)
                if record is None:
                    break
                whole += len(line)
                self.records.append(record)
            if stream.read(1):
                # A kill tears the last line only.
                raise ConfigError(f"{self._path} is damaged behind record {len(self.records)}: name another folder")
        if self._path.stat().st_size > whole:
            os.truncate(self._path, whole)
        # What JSON makes of it, such as lists of tuples, is what was written.
        expected = json.loads(json.dumps({"kind": "run", **run}))
        if self.records and self.records[0] != expected:
            different = [name for name in expected if self.records[0].get(name) != expected[name]]
            raise ConfigError(
                f"{self._path} is of another run ({', '.join(different) or 'it says more'} differs): "
                "name another folder, or use the same settings"
            )

    def _cut(self, end: int) -> None:
        """Take back what a full disk let through of a line."""
        with suppress(OSError):
            # Where even that fails, reading it again cuts it off.
            os.truncate(self._path, end)


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("kind"), str) else None
