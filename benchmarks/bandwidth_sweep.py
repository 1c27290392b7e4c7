"""Time to usable KV over links of every speed: recomputing, uncompressed, each static profile, and adaptive.

    make bench-bandwidth_sweep ARGS="--model PATH --text FILE"

A server process and a client are on the two sides of a link whose rate the kernel holds (`benchmarks.engine_link`),
which takes root; a quick run goes over loopback. The adaptive client plans its puts and its gets, and learns from both.
"""

import asyncio
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import engine_link
from benchmarks.bandwidth_cache import large_cache
from benchmarks.bandwidth_modelled import modelled_rows
from benchmarks.bandwidth_profiles import measured_set
from benchmarks.bandwidth_rows import aims_of, rows_of
from benchmarks.bandwidth_runner import Runner, Samples, Setting
from benchmarks.engine_hosts import kvstore_server, kvstore_url
from benchmarks.engine_link import FREE_GBIT_PER_S, Link, shaped_link
from benchmarks.harness import Aim, Row, argument_parser, output_path, write_result
from benchmarks.servers import kvstore_server as loopback_server
from kvstore.client import Client
from kvstore.demo.main import DEFAULT_MODEL, DEFAULT_TEXT

NAME = "bandwidth_sweep"
PACKAGES = ("kvstore", "torch", "numba", "aiohttp")
_PROBE_S = 0.5


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        tokens: Length of the prompt.
        chunk_tokens: Tokens of a chunk.
        links_gbit_per_s: Rates at which the link stays.
        schedule_gbit_per_s: Rates of the requests of the changing schedule, by episode: in each a new copy is put.
        rounds: Rounds at a rate; every arm is fetched once in each.
        slow_rounds: As many for arms that take long.
        warm_gets: Fetches of adaptive at a rate before them.
    """

    tokens: int = 1024
    chunk_tokens: int = 256
    links_gbit_per_s: tuple[float, ...] = (0.1, 0.25, 1.0, 2.5, 5.0)
    schedule_gbit_per_s: tuple[tuple[float, ...], ...] = (
        (1.0, 1.2, 1.5, 2.0, 2.5),
        (5.0, 5.0, 5.0, 4.0, 3.0),
        (0.25, 0.3, 0.35, 0.4, 0.5),
        (2.5, 2.2, 1.8, 1.4, 1.0),
        (0.1, 0.1, 0.25, 0.25, 0.25),
        (0.5, 0.7, 1.0, 1.4, 2.0),
        (5.0, 2.5, 5.0, 2.5, 5.0),
        (1.0, 0.5, 0.25, 0.5, 1.0),
    )
    rounds: int = 11
    slow_rounds: int = 2
    warm_gets: int = 4


QUICK = Run(64, 64, (1.0,), ((1.0, 5.0),), rounds=1, slow_rounds=1, warm_gets=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Time to usable KV over links of every speed.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model whose KV cache is dealt out")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="text that nothing was calibrated on")
    args = parser.parse_args(argv)
    if not args.quick and (lacks := engine_link.missing()):
        sys.exit(f"a shaped link needs {lacks}")
    run = QUICK if args.quick else Run()
    # Chunks are decoded side by side; threads of one that wait for each other would only be in each other's way.
    torch.set_num_threads(1)
    cache = large_cache(args.model, args.text, run.tokens, run.chunk_tokens)
    found, rows = measured_set(cache, args.seed)
    setting = Setting(cache, found)
    rows += [setting.row(shaped=not args.quick)]
    with _server(shaped=not args.quick) as (url, link):
        rows += _measure_link(link, run)
        samples = asyncio.run(_measure(url, link, setting, run, random.Random(args.seed)))
    rows += rows_of(samples, setting)
    rows += modelled_rows(setting, random.Random(args.seed))
    aims = aims_of(rows, args.seed)
    write_result(NAME, rows, aims, args.seed, packages=PACKAGES, out=output_path(NAME, args))
    _print(rows, aims)


@contextmanager
def _server(*, shaped: bool) -> Iterator[tuple[str, Link | None]]:
    """A server for as long as the block runs, this thread being on the other side of the link to it."""
    if not shaped:
        with loopback_server() as url:
            yield url, None
        return
    with shaped_link() as link, kvstore_server(link), link.entered():
        yield kvstore_url(), link


def _measure_link(link: Link | None, run: Run) -> list[Row]:
    """What the link gives at every rate, before anything else is measured on it."""
    rows: list[Row] = []
    rates = {*run.links_gbit_per_s, *(rate for episode in run.schedule_gbit_per_s for rate in episode)}
    for gbit_per_s in sorted(rates) if link is not None else ():
        assert link is not None
        link.shape(gbit_per_s)
        measured = link.measured_gbit_per_s(int(gbit_per_s * 1e9 / 8 * _PROBE_S))
        rows.append({"table": "link", "gbit_per_s": gbit_per_s, "measured_gbit_per_s": measured})
    return rows


async def _measure(url: str, link: Link | None, setting: Setting, run: Run, rng: random.Random) -> Samples:
    def shape(gbit_per_s: float) -> None:
        if link is not None:
            link.settle()
            link.shape(gbit_per_s)

    samples = Samples()
    async with Client(url, timeout_s=300.0) as client:
        runner = Runner(client, setting, rng)
        shape(FREE_GBIT_PER_S)
        await runner.prepare()
        for gbit_per_s in run.links_gbit_per_s:
            shape(gbit_per_s)
            samples.fixed[gbit_per_s] = await runner.stay(run.rounds, run.slow_rounds, run.warm_gets)
            print(f"{gbit_per_s:g} Gb/s: done", flush=True)
        samples.schedule = await runner.follow(run.schedule_gbit_per_s, shape)
    return samples


def _print(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    for row in rows:
        print({name: value for name, value in row.items() if not isinstance(value, list | Mapping)})
    for aim in aims:
        print(f"{'met' if aim.met else 'missed'}: {aim.aim}: {aim.value} (target {aim.target:g})")


if __name__ == "__main__":
    main()
