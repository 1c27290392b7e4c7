"""The command `kvstore fsck`: everything that a server without work would find out about its data, and mend.

docs/fsck.md says what is looked for and what becomes of it.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kvstore.backend import Backend, Held, Miss, Reason, state_of
from kvstore.backends import findings
from kvstore.backends.findings import Damage, Findings
from kvstore.backends.index import copy_bytes
from kvstore.backends.lmdb_fsck import LmdbFsck
from kvstore.config import ServerConfig
from kvstore.errors import BackendError, ConfigError
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.tiers import open_s3

Report = dict[str, Any]

_BATCH_CHUNKS = 64
_BATCH_BYTES = 64 << 20
_LISTING_S = 0.05


def run_fsck(data_dir: Path, *, dry_run: bool) -> Report:
    """Verify the disk tier of a data directory and, unless it is a dry run, mend it.

    Args:
        data_dir: Data directory of a server that does not run, or the directory of its disk tier.
        dry_run: Whether nothing may be changed.

    Returns:
        What was found, see `report`; `path` names the directory of the tier.

    Raises:
        ConfigError: There is no disk tier that could be verified, or damage cannot be kept.
    """
    directory = _tier_directory(data_dir)
    started_s = time.monotonic()
    fsck = LmdbFsck(directory, dry_run=dry_run)
    try:
        with showing_progress(fsck.payload_bytes) as progress:
            found = fsck.run(progress)
    except BackendError as exc:
        advice = "nothing more was changed; if it is no matter of the disk, use another data directory"
        raise ConfigError(f"cannot verify {directory}: {exc}; {advice}") from exc
    finally:
        fsck.close()
    found.seconds = time.monotonic() - started_s
    return report(found, dry_run=dry_run) | {"path": str(directory)}


async def run_s3_fsck(config: ServerConfig) -> Report:
    """Read and verify every chunk in the bucket of a configuration; what is damaged goes to quarantine there.

    Returns:
        What was found, see `report`; `path` names bucket and prefix.

    Raises:
        ConfigError: No bucket is configured, or it cannot be read.
    """
    if config.s3_bucket is None:
        raise ConfigError("no bucket is configured: set s3_bucket, in the file of --config or in the environment")
    path = f"s3://{config.s3_bucket}/{config.s3_prefix}"
    s3 = await open_s3(config, Metrics())
    try:
        while (state := state_of(s3)).detail:
            if not state.up:
                raise ConfigError(f"cannot read {path}: {state.detail}")
            await asyncio.sleep(_LISTING_S)
        total_bytes = sum([copy_bytes(held.copy) async for _, held in s3.scan()])
        with showing_progress(total_bytes) as progress:
            found = await verify_backend(s3, progress)
    finally:
        await s3.aclose()
    return report(found, dry_run=False) | {"path": path}


async def verify_backend(backend: Backend, progress: findings.Progress) -> Findings:
    """Verify everything that a backend holds, by reading it as anybody reads.

    The backend takes away what is damaged, as it does on every read.

    Args:
        backend: Any backend; it stays open.
        progress: Called with the bytes that were read.

    Raises:
        BackendError: The backend cannot answer.
    """
    found = Findings()
    started_s = time.monotonic()
    batch: dict[ChunkKey, Held] = {}
    async for key, held in backend.scan():
        batch[key] = held
        if len(batch) == _BATCH_CHUNKS or sum(copy_bytes(one.copy) for one in batch.values()) >= _BATCH_BYTES:
            await _verify_batch(backend, batch, found, progress)
            batch = {}
    if batch:
        await _verify_batch(backend, batch, found, progress)
    found.seconds = time.monotonic() - started_s
    return found


@contextmanager
def showing_progress(total_bytes: int) -> Iterator[findings.Progress]:
    """Bytes verified, rate and time left, where standard error is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        # rich ends a bar with an empty line even where it never showed it.
        yield lambda _: None
        return
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), "left:")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("verifying", total=total_bytes)
        yield lambda read_bytes: progress.advance(bar, read_bytes)


def report(found: Findings, *, dry_run: bool) -> Report:
    """Findings as JSON: `status` is `clean`, `mended`, `damaged` (in a dry run) or `incomplete`."""
    damaged = "damaged" if dry_run else "mended"
    return {
        "status": "incomplete" if found.unread else damaged if found.damage else "clean",
        "chunks": found.chunks,
        "levels": found.levels,
        "verified_bytes": found.verified_bytes,
        "damage": {damage.value: number for damage, number in sorted(found.damage.items())},
        "quarantined": found.quarantined,
        "unread": found.unread,
        "seconds": round(found.seconds, 3),
    }


def exit_status(*reports: Report) -> int:
    """Exit status of the command: 0 clean or mended, 1 damage was found and left, 2 not all could be verified."""
    statuses = {found["status"] for found in reports}
    return 2 if "incomplete" in statuses else 1 if "damaged" in statuses else 0


def tables(found: Report) -> Sequence[Table]:
    """A report as people read it."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    rate_bytes_per_s = found["verified_bytes"] / max(found["seconds"], 1e-3)
    facts.add_row("status", found["status"])
    facts.add_row("path", found["path"])
    facts.add_row("chunks", f"{found['chunks']:,} with {found['levels']:,} levels")
    facts.add_row("verified", f"{found['verified_bytes']:,} bytes")
    facts.add_row("quarantined", f"{found['quarantined']:,} chunks")
    facts.add_row("seconds", f"{found['seconds']:.1f} ({rate_bytes_per_s / 1e6:,.0f} MB/s)")
    if not found["damage"]:
        return [facts]
    damage = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    damage.add_column("damage")
    damage.add_column("chunks", justify="right")
    for kind, number in found["damage"].items():
        damage.add_row(kind, f"{number:,}")
    return [facts, damage]


async def _verify_batch(
    backend: Backend, batch: dict[ChunkKey, Held], found: Findings, progress: findings.Progress
) -> None:
    for answer in await backend.get(list(batch)):
        if isinstance(answer, Miss):
            _count_miss(answer, found)
            continue
        found.chunks += 1
        found.levels += answer.levels
        found.verified_bytes += answer.size_bytes
        progress(answer.size_bytes)


def _count_miss(miss: Miss, found: Findings) -> None:
    if miss.reason is Reason.CORRUPT:
        found.damage[Damage.FRAME_DAMAGED] += 1
        found.quarantined += 1
    elif miss.reason in (Reason.BREAKER, Reason.DEADLINE):
        found.unread += 1
    elif miss.reason is Reason.ABSENT:
        found.damage[Damage.FRAME_MISSING] += 1


def _tier_directory(data_dir: Path) -> Path:
    """The directory of the disk tier; it may be named itself."""
    named = (data_dir / "data.mdb").is_file() and not (data_dir / "lmdb").exists()
    return data_dir if named else data_dir / "lmdb"
