"""Values over loopback: kvstore against Redis, against a bare socket and against memcpy, in one run.

`python -m benchmarks.wire` times put and get of whole values, the ways to do it taking turns in an order drawn anew for
every round, and `match` over many keys. Both cores are free for client and server; nothing is pinned.
"""

import argparse
import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

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
from benchmarks.match import WARM_UPS as MATCH_WARM_UPS
from benchmarks.match import match_aims, match_rows, put_keys
from benchmarks.servers import kvstore_server, redis_server
from benchmarks.wire_peers import (
    BareSocketPeer,
    ClientPeer,
    MemcpyPeer,
    Peer,
    RedisPeer,
    SyncRedisPeer,
    memcpy_peers,
)

NAME = "wire"
PACKAGES = ("kvstore", "aiohttp", "xxhash", "redis", "hiredis", "uvloop")
DIRECTIONS = ("put", "get")

_HELD_SLOTS = 2
_FRESH_SLOTS = 2
_WARM_UPS = 3
_AGAINST = (
    ("the faster redis-py client", (RedisPeer.name, SyncRedisPeer.name), 1.0),
    ("bare socket", (BareSocketPeer.name,), 0.5),
)

Samples = dict["Case", list[float]]


class Case(NamedTuple):
    """What one row measures: who, which direction, and how large the values are."""

    peer: str
    direction: str
    value_bytes: int


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        sizes_bytes: Sizes of the values.
        rounds: Repetitions of every case.
        match_keys: Keys of one `match`.
        match_repetitions: Repetitions of `match`.
    """

    sizes_bytes: tuple[int, ...] = (4 << 20, 32 << 20)
    rounds: int = 50
    match_keys: int = 10_000
    match_repetitions: int = 200


QUICK = Run((64 << 10, 256 << 10), rounds=3, match_keys=500, match_repetitions=5)


def main(argv: Sequence[str] | None = None) -> None:
    args = argument_parser(NAME, "Put, get and match over loopback, beside Redis and a bare socket.").parse_args(argv)
    run = QUICK if args.quick else Run()
    rows, aims = asyncio.run(measure(run, args))
    write_result(NAME, rows, aims, args.seed, packages=PACKAGES, out=output_path(NAME, args))
    _print_tables(rows, aims)


async def measure(run: Run, args: argparse.Namespace) -> tuple[list[Row], list[Aim]]:
    """Rows and aims of a whole run."""
    with _progress(run, args) as advance, kvstore_server() as url:
        async with _peers(url, run, args.seed) as peers:
            samples = await _time_rounds(peers, run.rounds, random.Random(args.seed), advance)
        matches = match_rows(url, await put_keys(url, run.match_keys), run.match_repetitions, advance)
    compared, aims = _compare(samples, run.sizes_bytes, args.seed)
    rows = [_row(case, taken) for case, taken in samples.items()]
    return rows + compared + matches, aims + match_aims(matches)


@asynccontextmanager
async def _peers(url: str, run: Run, seed: int) -> AsyncIterator[dict[int, list[Peer]]]:
    """Peers by the size of their values, open and with their held slots filled and checked."""
    rng = random.Random(seed)
    async with AsyncExitStack() as stack:
        port = stack.enter_context(redis_server()) if _has_redis() else None
        peers: dict[int, list[Peer]] = {}
        for size_bytes in run.sizes_bytes:
            values = [rng.randbytes(size_bytes) for _ in range(_HELD_SLOTS + _FRESH_SLOTS)]
            peers[size_bytes] = _make_peers(url, port)
            for peer in peers[size_bytes]:
                stack.push_async_callback(peer.aclose)
                await _prepare(peer, values)
        yield peers


def _make_peers(url: str, redis_port: int | None) -> list[Peer]:
    redis: list[Peer] = [] if redis_port is None else [RedisPeer(redis_port), SyncRedisPeer(redis_port)]
    return [ClientPeer(url), *redis, BareSocketPeer(url), *memcpy_peers()]


async def _prepare(peer: Peer, values: Sequence[bytes]) -> None:
    """Open a peer, fill its held slots, and check once that every value comes back as it was."""
    await peer.open(values)
    for slot, value in enumerate(values):
        await peer.put(slot)
        assert await peer.get(slot) == value, f"{peer.name} gave other bytes back"
        if slot >= _HELD_SLOTS:
            await peer.delete(slot)


async def _time_rounds(
    peers: dict[int, list[Peer]], rounds: int, rng: random.Random, advance: Callable[[], None]
) -> Samples:
    """Seconds of every case, one sample a round, the cases of each round in an order of its own."""
    tasks = {
        Case(peer.name, direction, size_bytes): peer
        for size_bytes, some in peers.items()
        for peer in some
        for direction in (("copy",) if isinstance(peer, MemcpyPeer) else DIRECTIONS)
    }
    samples: Samples = {case: [] for case in tasks}
    for number in range(-_WARM_UPS, rounds):
        for case in rng.sample(list(tasks), len(tasks)):
            taken_s = await (_time_get if case.direction == "get" else _time_put)(tasks[case], number)
            if number >= 0:
                samples[case].append(taken_s)
        advance()
    return samples


async def _time_put(peer: Peer, number: int) -> float:
    slot = _HELD_SLOTS + number % _FRESH_SLOTS
    start_s = time.perf_counter()
    await peer.put(slot)
    taken_s = time.perf_counter() - start_s
    await peer.delete(slot)
    return taken_s


async def _time_get(peer: Peer, number: int) -> float:
    start_s = time.perf_counter()
    value = await peer.get(number % _HELD_SLOTS)
    taken_s = time.perf_counter() - start_s
    # Giving the memory back is not part of a get, so the value lives until the clock has stopped.
    del value
    return taken_s


def _compare(samples: Samples, sizes_bytes: Sequence[int], seed: int) -> tuple[list[Row], list[Aim]]:
    """Ratios of kvstore's throughput to those of its peers, and the aims on them."""
    rows: list[Row] = []
    aims: list[Aim] = []
    for (words, names, target), size_bytes, direction in product(_AGAINST, sizes_bytes, DIRECTIONS):
        aim = f"{direction} of {size_name(size_bytes)}: GB/s of the kvstore client / {words}"
        against = _fastest(names, samples, direction, size_bytes)
        if against is None:
            aims.append(missed_for(aim, target, "redis-server"))
            continue
        rows.append(_ratio_row(samples, direction, size_bytes, against, seed))
        aims.append(at_least(aim, target, rows[-1]["ratio"]))
    return rows, aims


def _fastest(names: Sequence[str], samples: Samples, direction: str, size_bytes: int) -> str | None:
    """The peer among those named with the smallest median, None where none of them took part."""
    medians = {
        name: percentile(taken, 50) for name in names if (taken := samples.get(Case(name, direction, size_bytes)))
    }
    return min(medians, key=medians.__getitem__, default=None)


def _ratio_row(samples: Samples, direction: str, size_bytes: int, against: str, seed: int) -> Row:
    ours = samples[Case(ClientPeer.name, direction, size_bytes)]
    theirs = samples[Case(against, direction, size_bytes)]
    # Throughputs are as the inverse of times, so their ratio has the other's times on top.
    interval = ratio_interval(theirs, ours, seed)
    return {
        "table": "ratio",
        "case": ClientPeer.name,
        "against": against,
        "direction": direction,
        "value_bytes": size_bytes,
        "ratio": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": len(ours),
    }


def _row(case: Case, samples: Sequence[float]) -> Row:
    def gb_per_s(percent: int) -> float:
        return case.value_bytes / percentile(samples, percent) / 1e9

    return {
        "table": "throughput",
        "case": case.peer,
        "direction": case.direction,
        "value_bytes": case.value_bytes,
        "gb_per_s_median": gb_per_s(50),
        "gb_per_s_p10": gb_per_s(90),
        "gb_per_s_p90": gb_per_s(10),
        "n": len(samples),
        "samples_s": list(samples),
    }


def size_name(size_bytes: int) -> str:
    """`4 MiB` for 4194304."""
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def _has_redis() -> bool:
    return shutil.which("redis-server") is not None and find_spec("redis") is not None


@contextmanager
def _progress(run: Run, args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """A function to call after every step; a smoke run shows nothing."""
    steps = _WARM_UPS + run.rounds + MATCH_WARM_UPS + run.match_repetitions
    with Progress(console=Console(stderr=True), disable=args.quick) as progress:
        task = progress.add_task(NAME, total=steps)
        yield lambda: progress.advance(task)


def _print_tables(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    console = Console()
    throughput = Table("case", "direction", "value", "GB/s", "p10", "p90", title="Throughput")
    matches = Table("case", "keys", "median ms", "p90", "p99", title="Match")
    for row in rows:
        if row["table"] == "throughput":
            figures = [f"{row[name]:.2f}" for name in ("gb_per_s_median", "gb_per_s_p10", "gb_per_s_p90")]
            throughput.add_row(row["case"], row["direction"], size_name(row["value_bytes"]), *figures)
        elif row["table"] == "match":
            figures = [f"{row[name] * 1e3:.2f}" for name in ("median_s", "p90_s", "p99_s")]
            matches.add_row(row["case"], str(row["keys"]), *figures)
    console.print(throughput, matches, _aim_table(aims))


def _aim_table(aims: Sequence[Aim]) -> Table:
    table = Table("aim", "target", "value", "met", title="Aims")
    for aim in aims:
        value = f"needs {aim.needs}" if aim.value is None else f"{aim.value:.4g}"
        table.add_row(aim.aim, f"{aim.target:g}", value, "yes" if aim.met else "no")
    return table


if __name__ == "__main__":
    main()
