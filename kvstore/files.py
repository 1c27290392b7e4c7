"""Files: those that are there whole or not at all, and those that users name."""

import os
from pathlib import Path

from kvstore.errors import ConfigError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in place of the one that may be there; whoever reads meanwhile, or after a crash, finds one of both.

    Raises:
        OSError: It cannot be written; what was there is there still.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_output(path: Path, data: bytes) -> None:
    """`write_whole` for a file that a user has named.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        write_whole(path, data)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror or exc}") from exc


def read_text(path: Path) -> str:
    """The text of a file that a user has named, UTF-8.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
