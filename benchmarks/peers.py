"""kvstore beside what its users would take instead: Redis, LMCache's server and Mooncake Store, in one run over TCP.

`python -m benchmarks.peers` times put, get, exists and a get of 32 values at once, by one client and by sixteen, the
stores taking turns in an order drawn anew for every round. `make bench-peers` installs the two that need environments
of their own.
"""

import argparse
import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import peer_servers
from benchmarks.harness import (
    Aim,
    Row,
    argument_parser,
    at_least,
    missed_for,
    output_path,
    percentile,
    ratio_interval,
    write_result,
)
from benchmarks.peer_drive import BATCH, BATCH_CHUNKS, EXISTS, OPERATIONS, Work
from benchmarks.peer_stores import KvstoreStore, Store
from benchmarks.wire import size_name

NAME = "peers"
PACKAGES = ("kvstore", "aiohttp", "xxhash", "redis", "hiredis")
OURS = KvstoreStore.name

_MIB = 1 << 20
_CLOCK_HZ = os.sysconf("SC_CLK_TCK")
_OPENERS = {
    "redis": peer_servers.redis_stores,
    "lmcache": peer_servers.lmcache_store,
    "mooncake": peer_servers.mooncake_store,
}


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        sizes_bytes: Sizes of the values.
        clients: Clients that call at one time.
        moved_bytes: Bytes that the calls of one cell move in one round, about.
        calls_max: Most calls of one cell in one round.
        exists_calls: Calls of a cell of `exists` in one round.
        batch_bytes_max: Bytes that all clients together may hold of batches; fewer of them call where more would,
            and a cell that would be left with one is not measured.
        rounds: Rounds.
        memory_bytes: Memory that stores are given.
    """

    sizes_bytes: tuple[int, ...] = (_MIB // 2, 4 * _MIB, 32 * _MIB)
    clients: tuple[int, ...] = (1, 16)
    moved_bytes: int = 512 * _MIB
    calls_max: int = 256
    exists_calls: int = 600
    batch_bytes_max: int = 1 << 30
    rounds: int = 4
    memory_bytes: int = 5 << 29

    def fits(self, operation: str, value_bytes: int, clients: int) -> bool:
        """Whether more clients than one can hold their batches, where more than one are asked for."""
        return operation != BATCH or clients == 1 or 2 * value_bytes * BATCH_CHUNKS <= self.batch_bytes_max


QUICK = Run((64 << 10,), (1, 2), moved_bytes=_MIB, calls_max=4, exists_calls=8, rounds=2, memory_bytes=64 * _MIB)


class Cell(NamedTuple):
    """What one row measures; `clients` is what was asked for."""

    store: str
    operation: str
    value_bytes: int
    clients: int


@dataclass
class Samples:
    """What was measured of a cell: of every call, and of each round.

    Args:
        clients: Clients that called.
        call_s: Seconds of every call.
        round_s: Seconds of each round.
        calls: Calls of one round.
        moved_bytes: Bytes of one round.
        server_s: Processor time of the server, all rounds together.
    """

    clients: int
    call_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    calls: int = 0
    moved_bytes: int = 0
    server_s: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    args = argument_parser(NAME, "kvstore beside Redis, LMCache's server and Mooncake Store.").parse_args(argv)
    run = QUICK if args.quick else Run()
    samples = asyncio.run(measure(run, args))
    rows = [_row(cell, found) for cell, found in samples.items()]
    missing = peer_servers.missing()
    rows += [{"table": "missing", "store": store, "needs": needs} for store, needs in missing.items()]
    ratios, aims = _compare(run, samples, missing, args.seed)
    programs = peer_servers.versions()
    write_result(
        NAME, rows + ratios, aims, args.seed, packages=PACKAGES, programs=programs, out=output_path(NAME, args)
    )
    _print_tables(ratios, samples, aims)


async def measure(run: Run, args: argparse.Namespace) -> dict[Cell, Samples]:
    """Samples of every cell, store by store in the order of the stores."""
    rng = random.Random(args.seed)
    samples: dict[Cell, Samples] = {}
    numbers = count(0, 1 << 20)
    with _progress(run, args) as advance:
        async with _stores(run) as stores:
            for value_bytes in run.sizes_bytes:
                value = rng.randbytes(value_bytes)
                for store in stores:
                    await store.hold(value)
                cells = [
                    (store, Cell(store.name, operation, value_bytes, clients))
                    for store, operation, clients in product(stores, OPERATIONS, run.clients)
                    if run.fits(operation, value_bytes, clients)
                ]
                for number in range(-1, run.rounds):
                    for store, cell in rng.sample(cells, len(cells)):
                        await _measure_cell(run, store, cell, next(numbers), None if number < 0 else samples)
                    advance()
                for store in stores:
                    await store.release(value_bytes)
            order = [store.name for store in stores]
    cells_in_order = sorted(samples, key=lambda cell: (OPERATIONS.index(cell[1]), *cell[2:], order.index(cell[0])))
    return {cell: samples[cell] for cell in cells_in_order}


async def _measure_cell(run: Run, store: Store, cell: Cell, first: int, samples: dict[Cell, Samples] | None) -> None:
    """One round of a cell; without `samples` it warms up, with two calls a client."""
    work = _work(run, cell, first)
    if samples is None:
        work = work._replace(calls=min(work.calls, 2 * work.clients))
    before_s = _processor_s(store.pids)
    taken = await store.measure(work)
    if samples is None:
        return
    found = samples.setdefault(cell, Samples(work.clients))
    found.server_s += _processor_s(store.pids) - before_s
    found.call_s += taken.call_s
    found.round_s.append(taken.all_s)
    found.calls, found.moved_bytes = work.calls, work.moved_bytes


def _work(run: Run, cell: Cell, first: int) -> Work:
    clients = cell.clients
    if cell.operation == EXISTS:
        return Work(EXISTS, cell.value_bytes, clients, run.exists_calls, first)
    call_bytes = cell.value_bytes * (BATCH_CHUNKS if cell.operation == BATCH else 1)
    if cell.operation == BATCH:
        clients = max(1, min(clients, run.batch_bytes_max // call_bytes))
    calls = max(clients, min(run.calls_max, run.moved_bytes // call_bytes))
    return Work(cell.operation, cell.value_bytes, clients, calls, first)


@asynccontextmanager
async def _stores(run: Run) -> AsyncIterator[list[Store]]:
    """Every store that is here, its server running and its clients connected."""
    async with AsyncExitStack() as stack:
        stores = stack.enter_context(peer_servers.kvstore_store(run.memory_bytes))
        absent = peer_servers.missing()
        for peer, opener in _OPENERS.items():
            if peer not in absent:
                stores += stack.enter_context(opener(run.memory_bytes))
        for store in stores:
            stack.push_async_callback(store.aclose)
            await store.open(max(run.clients))
        yield stores


def _processor_s(pids: Sequence[int]) -> float:
    """Processor time that processes have taken, of users and kernel."""
    fields = [Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / _CLOCK_HZ


def _row(cell: Cell, found: Samples) -> Row:
    rounds = len(found.round_s)
    middle_s = percentile(found.round_s, 50)
    moved_gb = found.moved_bytes / 1e9
    return {
        "table": "peers",
        **cell._asdict(),
        "clients": found.clients,
        "asked_clients": cell.clients,
        "gb_per_s": moved_gb / middle_s if moved_gb else None,
        "calls_per_s": found.calls / middle_s,
        "p50_ms": percentile(found.call_s, 50) * 1e3,
        "p99_ms": percentile(found.call_s, 99) * 1e3,
        "server_s_per_gb": found.server_s / (moved_gb * rounds) if moved_gb else None,
        "n": len(found.call_s),
        "round_s": found.round_s,
    }


def _compare(run: Run, samples: dict[Cell, Samples], missing: dict[str, str], seed: int) -> tuple[list[Row], list[Aim]]:
    """Ratios of kvstore's rate to the best of the others, cell by cell, and the aims on them."""
    rows: list[Row] = []
    aims: list[Aim] = []
    for operation, value_bytes, clients in product(OPERATIONS, run.sizes_bytes, run.clients):
        words = f"{operation} of {size_name(value_bytes)}, {clients} client{'s' if clients > 1 else ''}"
        aim = f"{words}: rate of kvstore / the fastest other"
        others = {
            cell.store: percentile(found.round_s, 50)
            for cell, found in samples.items()
            if cell.store != OURS and cell[1:] == (operation, value_bytes, clients)
        }
        if not run.fits(operation, value_bytes, clients):
            needs = clients * value_bytes * BATCH_CHUNKS >> 30
            aims.append(missed_for(aim, 1.0, f"{needs} GiB for what the clients hold, and as much for each server"))
            continue
        if not others:
            aims.append(missed_for(aim, 1.0, ", ".join(missing.values())))
            continue
        best = min(others, key=others.__getitem__)
        ours, theirs = (samples[Cell(name, operation, value_bytes, clients)] for name in (OURS, best))
        ratio = ratio_interval(theirs.round_s, ours.round_s, seed)
        rows.append(
            {
                "table": "ratio",
                "operation": operation,
                "value_bytes": value_bytes,
                "clients": ours.clients,
                "against": best,
                "ratio": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
                "n": len(ours.round_s),
            }
        )
        aims.append(at_least(aim, 1.0, ratio.value))
    aims += [missed_for(f"faster than {peer} in every cell", 1.0, needs) for peer, needs in missing.items()]
    return rows, aims


@contextmanager
def _progress(run: Run, args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    with Progress(console=Console(stderr=True), disable=args.quick) as progress:
        task = progress.add_task(NAME, total=len(run.sizes_bytes) * (run.rounds + 1))
        yield lambda: progress.advance(task)


def _print_tables(ratios: Sequence[Row], samples: dict[Cell, Samples], aims: Sequence[Aim]) -> None:
    stores = list(dict.fromkeys(cell.store for cell in samples))
    table = Table("operation", "value", "clients", *stores, "ratio", "interval", title="GB/s (exists: calls/s)")
    for row in ratios:
        rates = []
        for store in stores:
            found = next(
                found
                for cell, found in samples.items()
                if (cell.store, cell.operation, cell.value_bytes, found.clients)
                == (store, row["operation"], row["value_bytes"], row["clients"])
            )
            shown = _row(Cell(store, row["operation"], row["value_bytes"], row["clients"]), found)
            rates.append(f"{shown['gb_per_s'] or shown['calls_per_s']:.4g}")
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(
            row["operation"],
            size_name(row["value_bytes"]),
            str(row["clients"]),
            *rates,
            f"{row['ratio']:.2f}",
            interval,
        )
    console = Console()
    console.print(table)
    console.print(f"{sum(aim.met for aim in aims)} of {len(aims)} aims met")


if __name__ == "__main__":
    main()
