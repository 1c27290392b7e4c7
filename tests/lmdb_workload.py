"""A disk tier at work, as a process that may be killed at any time: what it writes down first, it does then.

The journal has a line for each step, flushed before the step is taken: `I number levels` for what a transaction is
about to make of a chunk (0: it goes), `D` once it is committed, `F` if it failed, `A number` for a put that was
acknowledged as on disk. Standard output gets a line of JSON for every tenth of the run.
"""

import asyncio
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.backend import Ack, Outcome
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.lmdb_store import LmdbStore
from kvstore.frame import Frame, pack_frame
from kvstore.header import Header
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key
from kvstore.metrics import Metrics

_NAMESPACE = bytes(NAMESPACE_BYTES)
_SHARES = (0.3, 0.33, 0.37)
_POOL_BYTES = 1 << 20
_POOL = random.Random(1).randbytes(_POOL_BYTES)


class Workload(NamedTuple):
    """What is done, the same for the same values.

    Args:
        directory: Directory of the tier.
        journal: File that is appended to.
        budget_bytes: Budget of the tier.
        first: Number of the first chunk.
        operations: Number of chunks that are put; the process goes on in silence until it is killed.
        size_bytes_min: Smallest payload.
        size_bytes_max: Largest payload.
    """

    directory: Path
    journal: Path
    budget_bytes: int
    first: int
    operations: int
    size_bytes_min: int
    size_bytes_max: int


def workload_key(number: int) -> ChunkKey:
    """Key of a chunk."""
    return chunk_key(_NAMESPACE, number.to_bytes(DIGEST_BYTES, "big"))


def workload_number(key: bytes) -> int:
    """Number of a chunk from its key."""
    return int.from_bytes(key[NAMESPACE_BYTES:], "big")


def workload_frame(work: Workload, number: int) -> Frame:
    """A frame of three levels whose size and bytes follow from its number."""
    rng = random.Random(number)
    spread = math.log(work.size_bytes_max / work.size_bytes_min)
    size_bytes = work.size_bytes_min * math.exp(rng.random() * spread)
    header = Header(
        key=workload_key(number),
        tokens=256,
        first_position=0,
        groups=(1,),
        planes=tuple((f"k.{level}",) for level in range(len(_SHARES))),
        pipeline=({"stage": "test"},),
    )
    return pack_frame(header, [_bytes(rng, int(size_bytes * share)) for share in _SHARES])


def _bytes(rng: random.Random, size_bytes: int) -> bytes:
    start = rng.randrange(_POOL_BYTES)
    return (_POOL[start:] + _POOL * (size_bytes // _POOL_BYTES + 1))[:size_bytes]


class Journal:
    """Appends lines that outlive the process."""

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, text: str) -> None:
        """Append a text in one call."""
        os.write(self._fd, text.encode())

    def follow(self, name: str, intents: Callable[..., Iterable[tuple[bytes, int]]]) -> None:
        """Let a method of the store say what it is about to do, and then what became of it."""
        method = getattr(LmdbStore, name)

        @wraps(method)
        def followed(store: LmdbStore, *args: Any) -> Any:
            self.write("".join(f"I {workload_number(key)} {levels}\n" for key, levels in intents(*args)))
            try:
                result = method(store, *args)
            except BaseException:
                self.write("F\n")
                raise
            self.write("D\n")
            return result

        setattr(LmdbStore, name, followed)


def _written(items: Iterable[Any], moves: Iterable[Any]) -> Iterable[tuple[bytes, int]]:
    for move in moves:
        yield move.key, len(move.after.copy.level_bytes) if move.after else 0
    for key, frame, _ in items:
        yield key, frame.levels


async def run(work: Workload) -> None:
    """Put, read, trim and delete, and say how it goes."""
    journal = Journal(work.journal)
    journal.follow("write", _written)
    journal.follow("trim", lambda shorter: [(key, len(held.copy.level_bytes)) for key, held in shorter.items()])
    journal.follow("delete", lambda keys: [(key, 0) for key in keys])
    metrics = Metrics()
    backend = await LmdbBackend.open(work.directory, work.budget_bytes, metrics=metrics)
    rng = random.Random(work.first)
    step = Step(work, backend, metrics)
    for number in range(work.first, sys.maxsize):
        frame = workload_frame(work, number)
        [stored] = await backend.put([(frame.key, frame)], ack=Ack.DISK)
        assert (stored.outcome, stored.ack) == (Outcome.WRITTEN, Ack.DISK), stored
        journal.write(f"A {number}\n")
        step.done_bytes += frame.size_bytes
        other = workload_key(rng.randrange(max(0, number - 400), number + 1))
        chance = rng.random()
        if chance < 0.02:
            await backend.delete([other])
        elif chance < 0.04:
            await backend.trim([other], level=rng.randrange(2))
        elif chance < 0.14:
            await backend.get([other])
        step.show(number - work.first + 1)


class Step:
    """A tenth of the run, in figures."""

    def __init__(self, work: Workload, backend: LmdbBackend, metrics: Metrics) -> None:
        self.done_bytes = 0
        self._work = work
        self._backend = backend
        self._metrics = metrics
        self._begin()

    def show(self, operations: int) -> None:
        """Print the figures of a tenth that has just ended."""
        if operations > self._work.operations or operations % (self._work.operations // 10):
            return
        seconds = time.perf_counter() - self._started_s
        figures = {
            "operations": operations,
            "put_bytes": self.done_bytes,
            "written_bytes": _written_bytes() - self._written_bytes,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(time.process_time() - self._started_cpu_s, 2),
            "put_mb_per_s": round(self.done_bytes / 1e6 / seconds, 1),
            "map_full": self._backend.map_full,
            "used_share": round(self._tier("bytes") / self._work.budget_bytes, 4),
            "chunks": int(self._tier("chunks")),
            "evictions": int(self._total("evictions")),
            "shrinks": int(self._total("shrinks")),
            "file_bytes": (self._work.directory / "data.mdb").stat().st_size,
        }
        print(json.dumps(figures), flush=True)
        self._begin()

    def _begin(self) -> None:
        self.done_bytes = 0
        self._started_s = time.perf_counter()
        self._started_cpu_s = time.process_time()
        self._written_bytes = _written_bytes()

    def _tier(self, name: str) -> float:
        return self._metrics.registry.get_sample_value(f"kvstore_tier_{name}", {"tier": "lmdb"}) or 0.0

    def _total(self, name: str) -> float:
        return self._metrics.registry.get_sample_value(f"kvstore_{name}_total", {"tier": "lmdb"}) or 0.0


def _written_bytes() -> int:
    """Bytes that this process has passed to the kernel to write."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("wchar:")[1].split()[0])


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    paths = {name: Path(values[name]) for name in ("directory", "journal")}
    asyncio.run(run(Workload(**values | paths)))
