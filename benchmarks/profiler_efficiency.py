"""How much hypervolume a search finds with how many model runs, over a grid whose objectives are all known.

    make bench-profiler_efficiency

The grid is `results/profiler_grid.jsonl`, measured by `benchmarks.profiler_grid`. A seed of ours takes a core for
some minutes, so what a seed has found is kept, and a run that was stopped goes on behind it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import median_high
from typing import Any

import torch

from benchmarks import profiler_searchers
from benchmarks.harness import (
    Aim,
    Row,
    argument_parser,
    at_least,
    output_path,
    percentile,
    write_result,
)
from benchmarks.profiler_grid import GRID
from benchmarks.profiler_searchers import Grid, at_random, curve, kvserve, ours
from kvstore.profiler import search, surrogate
from kvstore.profiler.objectives import Outcome, Trial
from kvstore.profiler.pareto import best_cover, front, hypervolume, point
from kvstore.profiler.space import Space

NAME = "profiler_efficiency"
KEPT = Path(__file__).parent.parent / "build" / "profiler_efficiency.jsonl"
LOSS_MAX = 0.3
SHARE = 0.99
SHOWN = (10, 20)
"""Budgets whose shares stand in the table."""
_START = 8
"""Start points of the searchers; budgets count from there on."""

Searcher = Callable[[Grid, int, int], Iterator[int]]
SEARCHERS: Mapping[str, tuple[Searcher, int]] = {
    "kvstore": (ours, 10),
    "random": (at_random, 40),
    "kvserve": (kvserve, 10),
}
"""By name: how it searches, and with how many seeds."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Hypervolume against model runs.")
    parser.add_argument("--grid", type=Path, default=GRID, help="file of the grid (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of what seeds have found (%(default)s)")
    args = parser.parse_args(argv)
    grid = read_grid(args.grid, every=40 if args.quick else 1)
    budget = max(_START + 2, 3 * len(grid.configurations) // 100) if not args.quick else _START + 2
    kept = Kept(None if args.quick else args.kept, args.grid)
    rows, aims = compare(grid, budget, args.seed, args.jobs, kept, seeds_max=2 if args.quick else None)
    packages = ("torch", "botorch", "gpytorch", "scikit-learn")
    write_result(NAME, rows, aims, args.seed, packages=packages, out=output_path(NAME, args))
    _show(rows, aims)


def read_grid(path: Path, *, every: int = 1) -> Grid:
    """The configurations of which everything is known; with `every`, one of so many."""
    with path.open() as stream:
        records = [json.loads(line) for line in stream]
    space = space_of(records)
    trials: dict[Any, Trial] = {}
    outcomes: dict[Any, Outcome] = {}
    for record in records:
        if record["kind"] in ("trial", "outcome") and "reason" not in record:
            configuration = space.configuration(record["values"])
            if record["kind"] == "trial":
                trials[configuration] = Trial.read({k: v for k, v in record.items() if k not in ("kind", "values")})
            else:
                outcomes[configuration] = Outcome.read(record)
    # Sorted, because the file is in the order in which processes finished.
    known = sorted((one for one in outcomes if one in trials), key=lambda one: one.id)[::every]
    found = tuple(known), tuple(trials[one] for one in known), tuple(outcomes[one] for one in known)
    return Grid(space, *found, reference_of(*found[1:]))


def space_of(records: Sequence[Mapping[str, Any]]) -> Space:
    """The space that the grid is of."""
    return Space(*records[0]["space"])


def reference_of(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """The worst feasible value on each axis."""
    feasible = [
        (ratio, trial.decode_s_per_gb[level], outcome.kl_nats(level))
        for trial, outcome in zip(trials, outcomes, strict=True)
        for level, ratio in enumerate(outcome.ratio)
        if outcome.kl_nats(level) <= LOSS_MAX
    ]
    return min(one[0] for one in feasible), max(one[1] for one in feasible), max(one[2] for one in feasible)


class Kept:
    """What seeds have found, in a file that every one of them adds a line to.

    Args:
        path: The file; None keeps nothing.
        grid: File of the grid: what was found on another one does not count, nor what other searchers found.
    """

    def __init__(self, path: Path | None, grid: Path) -> None:
        self._path = path
        code = b"".join(Path(module.__file__ or "").read_bytes() for module in (search, surrogate, profiler_searchers))
        self._digest = hashlib.sha256(grid.read_bytes() + code).hexdigest()
        self._found: dict[tuple[str, int, int], list[float]] = {}
        for line in path.read_text().splitlines() if path is not None and path.exists() else ():
            record = json.loads(line)
            if record["digest"] == self._digest:
                self._found[record["searcher"], record["budget"], record["seed"]] = record["volumes"]

    def get(self, name: str, budget: int, seed: int) -> list[float] | None:
        """What a seed has found."""
        return self._found.get((name, budget, seed))

    def add(self, name: str, budget: int, seed: int, volumes: list[float]) -> None:
        """A seed has ended."""
        self._found[name, budget, seed] = volumes
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            record = {"digest": self._digest, "searcher": name, "budget": budget, "seed": seed, "volumes": volumes}
            with self._path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")


def compare(
    grid: Grid, budget: int, seed: int, jobs: int, kept: Kept, *, seeds_max: int | None = None
) -> tuple[list[Row], list[Aim]]:
    """Curves of all searchers, the greedy ceiling, and the aims."""
    reference = torch.tensor(point(*grid.reference), dtype=torch.float64)
    every = [grid.points(number) for number in range(len(grid.configurations))]
    everything = torch.cat(every)
    whole = hypervolume(everything[front(everything)], reference)
    cover = [volume / whole for _, volume in best_cover(every, reference, budget)]
    shares: dict[str, list[list[float]]] = {"greedy": [cover + [cover[-1]] * (budget - len(cover))]}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for name, (_, count) in SEARCHERS.items():
            seeds = range(seed, seed + min(count, seeds_max or count))
            running = {
                pool.submit(_one, grid, budget, name, number): number
                for number in seeds
                if kept.get(name, budget, number) is None
            }
            for done in as_completed(running):
                kept.add(name, budget, running[done], done.result())
                print(f"{name}, seed {running[done]}: {done.result()[-1] / whole:.4f} after {budget}", flush=True)
            shares[name] = [[volume / whole for volume in kept.get(name, budget, one) or []] for one in seeds]
    few = max(1, len(grid.configurations) // 50)
    rows: list[Row] = [
        {
            "table": "grid",
            "configurations": len(grid.configurations),
            "levels": len(everything),
            "on_front": int(front(everything).sum()),
            "hypervolume": round(whole, 4),
            "reference_ratio": grid.reference[0],
            "reference_decode_s_per_gb": grid.reference[1],
            "reference_kl_nats": grid.reference[2],
        }
    ]
    for name, curves in shares.items():
        needed = [next((n + 1 for n, share in enumerate(one) if share >= SHARE), math.inf) for one in curves]
        median = percentile(needed, 50) if all(math.isfinite(one) for one in needed) else median_high(needed)
        row: Row = {"table": "searchers", "searcher": name, "seeds": len(curves), "budget": budget}
        row["evaluations"] = median if math.isfinite(median) else None
        for percent in (50, 10, 90):
            row[f"p{percent}"] = [round(percentile([one[n] for one in curves], percent), 5) for n in range(budget)]
        row |= {f"after_{n}": row["p50"][n - 1] for n in SHOWN if n <= budget}
        row["after_1_in_50"] = row["p50"][few - 1]
        rows.append(row)
    return rows, _aims(rows, grid)


def _one(grid: Grid, budget: int, name: str, seed: int) -> list[float]:
    torch.set_num_threads(1)
    reference = torch.tensor(point(*grid.reference), dtype=torch.float64)
    chosen = list(SEARCHERS[name][0](grid, budget, seed))
    return curve(grid, chosen, budget, lambda points: hypervolume(points, reference))


def _aims(rows: Sequence[Row], grid: Grid) -> list[Aim]:
    found = {row["searcher"]: row for row in rows if row["table"] == "searchers"}
    ours, others = found["kvstore"]["p50"], [found[name]["p50"] for name in ("random", "kvserve")]
    behind = min(mine - max(theirs) for mine, *theirs in list(zip(ours, *others, strict=True))[_START - 1 :])
    few = f"share of the exhaustive hypervolume after {len(grid.configurations) // 50} evaluations, a fiftieth (median)"
    return [
        at_least(few, SHARE, found["kvstore"]["after_1_in_50"]),
        at_least("least lead over random search and KVServe's at any budget, share of the hypervolume", 0.0, behind),
    ]


def _show(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    for row in rows:
        print({name: value for name, value in row.items() if not isinstance(value, list)})
    for aim in aims:
        print(f"{aim.aim}: {aim.value} of {aim.target} ({'met' if aim.met else 'missed'})")


if __name__ == "__main__":
    main()
