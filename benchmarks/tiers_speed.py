"""Put and get of whole frames, tier by tier: rate and latency, one call or sixteen at a time.

Every tier is the production backend with budgets that nothing is evicted from. Frames have three levels of a third
each, and are verified on every get as always. The cells take turns in an order drawn anew for each round.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.harness import Row, percentile
from benchmarks.servers import kvstore_server, rclone_server
from kvstore.backend import Ack, Backend, Outcome
from kvstore.backends.gpu import GpuBackend
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.s3 import S3Backend, S3Settings
from kvstore.client import Client
from kvstore.frame import Frame, frame_around, padded_bytes
from kvstore.header import Header
from kvstore.keys import ChunkKey
from kvstore.testing import make_key
from kvstore.tiers import TieredBackend

TABLE = "speed"
LEVELS = 3
PUT, GET, GET_LEVEL_0 = "put", "get", "get level 0"

_MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        sizes_bytes: Sizes of the frames' payloads.
        concurrencies: Calls under way at one time.
        calls: Calls of a cell in one round, by size.
        rounds: Rounds.
        held_bytes: Bytes of the frames that gets go round, at least one for each call under way.
        budget_bytes: Budget of every tier.
    """

    sizes_bytes: tuple[int, ...] = (_MIB // 2, 4 * _MIB, 32 * _MIB)
    concurrencies: tuple[int, ...] = (1, 16)
    calls: tuple[int, ...] = (64, 40, 16)
    rounds: int = 3
    held_bytes: int = 128 * _MIB
    budget_bytes: int = 3 << 30


QUICK = Run((64 << 10,), (1, 4), (4,), rounds=1, held_bytes=256 << 10, budget_bytes=32 * _MIB)


class Cell(NamedTuple):
    """What one row measures."""

    tier: str
    operation: str
    payload_bytes: int
    concurrency: int


@dataclass
class Samples:
    """What was measured of a cell: seconds of every call, and of the whole of each round."""

    call_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    moved_bytes: int = 0


@dataclass
class Subject:
    """A tier under test.

    Args:
        backend: What is asked.
        ack: Durability that its puts ask for.
        operations: What is timed.
        before_get: Called with the keys of a round of gets before its clock starts.
    """

    backend: Backend
    ack: Ack = Ack.MEMORY
    operations: tuple[str, ...] = (PUT, GET)
    before_get: Callable[[Sequence[ChunkKey]], object] | None = None


async def measure(run: Run, seed: int, advance: Callable[[], None]) -> list[Row]:
    """A row for every cell.

    Args:
        run: How much is measured.
        seed: Seed of payloads and of the order of the cells.
        advance: Called after each round of each size.
    """
    rng = random.Random(seed)
    samples: dict[Cell, Samples] = {}
    async with _subjects(run) as subjects:
        for size_bytes, calls in zip(run.sizes_bytes, run.calls, strict=True):
            await _measure_size(run, size_bytes, calls, subjects, rng, samples, advance)
        # The order in which they were drawn is nobody's business.
        order = {tier: number for number, tier in enumerate(subjects)}
        cells = sorted(samples, key=lambda cell: (order[cell.tier], cell.operation, cell[2:]))
    return [_row(cell, samples[cell]) for cell in cells] + _copy_rows(run)


async def _measure_size(
    run: Run,
    size_bytes: int,
    calls: int,
    subjects: dict[str, Subject],
    rng: random.Random,
    samples: dict[Cell, Samples],
    advance: Callable[[], None],
) -> None:
    payload = [memoryview(rng.randbytes(padded_bytes(size_bytes // LEVELS))) for _ in range(LEVELS)]
    held = [_frame(key, payload) for key in _fresh(max(run.held_bytes // size_bytes, *run.concurrencies))]
    for subject in subjects.values():
        for frame in held:
            await _put(subject, frame)
    cells = [
        Cell(tier, operation, size_bytes, concurrency)
        for (tier, subject), concurrency in product(subjects.items(), run.concurrencies)
        for operation in subject.operations
    ]
    for number in range(-1, run.rounds):
        for cell in rng.sample(cells, len(cells)):
            found = await _measure_cell(subjects[cell.tier], cell, calls if number >= 0 else 2, held, payload)
            if number >= 0:
                before = samples.setdefault(cell, Samples())
                before.call_s += found.call_s
                before.round_s += found.round_s
                before.moved_bytes += found.moved_bytes
        advance()
    for subject in subjects.values():
        await subject.backend.delete([frame.key for frame in held])


async def _measure_cell(
    subject: Subject, cell: Cell, calls: int, held: Sequence[Frame], payload: Sequence[memoryview]
) -> Samples:
    """Make calls, so many at a time, and time each of them and all of them."""
    if cell.operation == PUT:
        frames = [_frame(key, payload) for key in _fresh(calls)]
    else:
        frames = [held[number % len(held)] for number in range(calls)]
        if subject.before_get is not None:
            await subject.before_get([frame.key for frame in frames])  # type: ignore[misc]
    level = 0 if cell.operation == GET_LEVEL_0 else None
    found = Samples(moved_bytes=sum(frame.truncated(level).size_bytes for frame in frames))
    pending = iter(frames)

    async def work() -> None:
        for frame in pending:
            start_s = time.perf_counter()
            if cell.operation == PUT:
                await _put(subject, frame)
            else:
                [answer] = await subject.backend.get([frame.key], level=level)
                assert isinstance(answer, Frame), answer
            found.call_s.append(time.perf_counter() - start_s)

    start_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(cell.concurrency)))
    found.round_s.append(time.perf_counter() - start_s)
    if cell.operation == PUT:
        await subject.backend.delete([frame.key for frame in frames])
    return found


async def _put(subject: Subject, frame: Frame) -> None:
    [stored] = await subject.backend.put([(frame.key, frame)], ack=subject.ack)
    assert stored.outcome is Outcome.WRITTEN, stored
    assert stored.error is None, stored.error


@asynccontextmanager
async def _subjects(run: Run) -> AsyncIterator[dict[str, Subject]]:
    """Every tier that can be measured here, open."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        device, gpu_name = _device()
        host, below = HostBackend(run.budget_bytes), await LmdbBackend.open(directory / "below", run.budget_bytes)
        subjects = {
            gpu_name: Subject(await GpuBackend.open(run.budget_bytes, device=device)),
            "host": Subject(HostBackend(run.budget_bytes)),
            "lmdb": Subject(
                await LmdbBackend.open(directory / "lmdb", run.budget_bytes), Ack.DISK, (PUT, GET, GET_LEVEL_0)
            ),
            "server, through the client": Subject(
                Client(stack.enter_context(kvstore_server(memory=f"{run.budget_bytes}")))
            ),
            "stack, served by host": Subject(TieredBackend([HostBackend(run.budget_bytes)]), operations=(GET,)),
            "stack, served by lmdb": Subject(
                TieredBackend([host, below]), Ack.DISK, operations=(GET,), before_get=host.delete
            ),
        }
        if (endpoint := stack.enter_context(rclone_server(directory / "bucket"))) is not None:
            s3 = await S3Backend.open(S3Settings(**endpoint, prefix="bench/", deadline_s=120.0))
            subjects["s3 (rclone)"] = Subject(s3, Ack.REMOTE, (PUT, GET, GET_LEVEL_0))
        for subject in subjects.values():
            stack.push_async_callback(subject.backend.aclose)
        yield subjects


def _device() -> tuple[str, str]:
    """Where the gpu tier lives, and its name in the table."""
    import torch

    return ("cuda", "gpu") if torch.cuda.is_available() else ("cpu", "gpu (slab in CPU memory)")


_NUMBERS = count()


def _fresh(number: int) -> list[ChunkKey]:
    return [make_key(next(_NUMBERS)) for _ in range(number)]


def _frame(key: ChunkKey, payload: Sequence[memoryview]) -> Frame:
    """A frame around buffers that all frames of a size share; its checksums are its own."""
    header = Header(
        key=key,
        tokens=256,
        first_position=0,
        groups=(1,),
        planes=tuple((f"k.{level}",) for level in range(len(payload))),
        pipeline=({"stage": "test"},),
    )
    return frame_around(header, payload, [[len(level)] for level in payload])


def _row(cell: Cell, found: Samples) -> Row:
    return {
        "table": TABLE,
        **cell._asdict(),
        "calls": len(found.call_s),
        "gb_per_s": found.moved_bytes / sum(found.round_s) / 1e9,
        "p50_ms": percentile(found.call_s, 50) * 1e3,
        "p99_ms": percentile(found.call_s, 99) * 1e3,
    }


def _copy_rows(run: Run) -> list[Row]:
    """Copies within the process, for scale."""
    rows = []
    for size_bytes, calls in zip(run.sizes_bytes, run.calls, strict=True):
        source, target = memoryview(bytes(size_bytes)), memoryview(bytearray(size_bytes))
        found = Samples(moved_bytes=size_bytes * calls)
        for _ in range(calls):
            start_s = time.perf_counter()
            target[:] = source
            found.call_s.append(time.perf_counter() - start_s)
        found.round_s.append(sum(found.call_s))
        rows.append(_row(Cell("memcpy", "copy", size_bytes, 1), found))
    return rows
