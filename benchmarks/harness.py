"""What all benchmarks share: arguments, statistics, and the one JSON file that each of them writes."""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

# Writing results must not make the next benchmark of the same commit look as if it had measured something else.
_GENERATED = ("benchmarks/results", "docs/benchmarks.md", "docs/plots")


@dataclass(frozen=True)
class Aim:
    """One aim of a benchmark and what became of it.

    Args:
        aim: What is aimed at, in words, with its unit.
        target: Number to reach.
        value: Number measured; None where it could not be.
        met: Whether it is reached.
        needs: What was missing where `value` is None.
    """

    aim: str
    target: float
    value: float | None
    met: bool
    needs: str | None = None

    def as_json(self) -> Row:
        """Fields as they are written; `needs` only where something was missing."""
        return {name: value for name, value in asdict(self).items() if name != "needs" or value is not None}


class Interval(NamedTuple):
    """An estimate with the 95 % interval around it."""

    value: float
    low: float
    high: float


def at_least(aim: str, target: float, value: float) -> Aim:
    """An aim that is met by `target` or more."""
    return Aim(aim, target, value, value >= target)


def at_most(aim: str, target: float, value: float) -> Aim:
    """An aim that is met by `target` or less."""
    return Aim(aim, target, value, value <= target)


def missed_for(aim: str, target: float, needs: str) -> Aim:
    """An aim that could not be measured."""
    return Aim(aim, target, None, False, needs)


def percentile(samples: Sequence[float], percent: int) -> float:
    """Percentile of samples, interpolated between the two nearest.

    Args:
        samples: At least one number.
        percent: From 1 to 99.
    """
    if len(samples) == 1:
        return samples[0]
    return quantiles(samples, n=100, method="inclusive")[percent - 1]


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], seed: int, *, resamples: int = 2000
) -> Interval:
    """Ratio of two medians with its bootstrap interval.

    Sample `i` of both comes from the same round, so whole rounds are drawn: noise that hits a round hits both alike.
    """
    assert len(numerator) == len(denominator), "both sides have one sample a round"

    def ratio(chosen: Sequence[int]) -> float:
        return median([numerator[i] for i in chosen]) / median([denominator[i] for i in chosen])

    return _bootstrap(ratio, len(numerator), seed, resamples)


def write_result(
    name: str,
    rows: Sequence[Row],
    aims: Sequence[Aim],
    seed: int,
    *,
    packages: Sequence[str] = (),
    programs: Mapping[str, str] | None = None,
    out: Path | None,
) -> None:
    """Write a benchmark's one file; without a path nothing is written.

    Args:
        name: The benchmark.
        rows: The measured table; every row names the `table` it belongs to.
        aims: One for each aim of the benchmark.
        seed: Seed of everything random in it.
        packages: Packages whose versions matter.
        programs: Versions of what is no package of this environment.
        out: Path of the file, as `output_path` gives it.
    """
    if out is None:
        return
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | _versions(packages) | dict(programs or {}),
        "seed": seed,
        "rows": list(rows),
        "aims": [aim.as_json() for aim in aims],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="smoke run: few and small repetitions, nothing is written")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"result file (benchmarks/results/{name}.json)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    return parser


def output_path(name: str, args: argparse.Namespace) -> Path | None:
    """Where the result goes: a smoke run never replaces a committed result unless it is told to."""
    out: Path | None = args.out
    return out if out is not None or args.quick else RESULTS / f"{name}.json"


def _bootstrap(estimate: Callable[[Sequence[int]], float], n: int, seed: int, resamples: int) -> Interval:
    rng = random.Random(seed)
    drawn = [estimate(rng.choices(range(n), k=n)) for _ in range(resamples)]
    cuts = quantiles(drawn, n=40, method="inclusive")
    return Interval(estimate(range(n)), cuts[0], cuts[-1])


def _commit() -> str:
    """Commit that is measured, with `-dirty` where the tree differs from it."""
    commit = _stdout_of("git", "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    excluded = [f":(exclude){path}" for path in _GENERATED]
    return f"{commit}-dirty" if _stdout_of("git", "status", "--porcelain", "--", ".", *excluded) else commit


def _machine() -> Row:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _stdout_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "kernel": platform.release(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _stdout_of(program: str, *args: str) -> str | None:
    """What a program prints, None where it is missing or fails."""
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
