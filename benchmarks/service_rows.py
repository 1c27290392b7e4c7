"""Rows and aims of benchmarks.service, from its samples."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Aim, Row, at_least, at_most, percentile, ratio_interval
from benchmarks.kvserve_server import loss_nats
from benchmarks.service_hosts import ADAPTIVE, ARMS, KVSERVE, RECOMPUTE, UNCOMPRESSED, Arm
from benchmarks.service_profiles import Sets
from kvstore.profile import Profile

REMOTE = "remote prefix"
APART = "prefill apart"
BUDGET_NATS = 0.01
METRICS = ("ttft", "jct")

_ORDER = {arm.name: number for number, arm in enumerate((*ARMS, RECOMPUTE))}
_EXACT = ("exact", "recompute")


class Point(NamedTuple):
    """Where an arm is measured."""

    setting: str
    link_gbit_per_s: float
    arm: Arm


@dataclass
class Samples:
    """Requests of one point, in the order of the rounds.

    Args:
        tokens: Of the prefix.
        ttft_s: Seconds from handing the request over to its first token.
        jct_s: Seconds to its last one.
        cached_tokens: Tokens that the engine took for fetched.
        link_bytes: Bytes that came over the link.
        used: What the server chose, of arms that it plans.
    """

    tokens: list[int] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    jct_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    link_bytes: list[int] = field(default_factory=list)
    used: list[str] = field(default_factory=list)

    def add(self, tokens: int, found: Mapping[str, Any]) -> None:
        """One more."""
        self.tokens.append(tokens)
        self.ttft_s.append(found["first_s"])
        self.jct_s.append(found["jct_s"])
        self.cached_tokens.append(found["cached"])
        self.link_bytes.append(found["link_bytes"])
        fetched = [arm for arm in found["used"] if not arm.startswith("put ")]
        # The answer decides: what was planned may have been left out by the connector before it asked.
        self.used.append(fetched[-1] if fetched and found["cached"] else "recompute")

    def of(self, metric: str) -> list[float]:
        """Seconds by the name of a metric."""
        return self.ttft_s if metric == "ttft" else self.jct_s


Measured = Mapping[Point, Samples]


def report_rows(samples: Measured, sets: Sets, seed: int) -> tuple[list[Row], list[Aim]]:
    """Rows of the result, and its aims computed from them.

    Args:
        samples: What was measured.
        sets: What was pushed.
        seed: Seed of the intervals.
    """
    losses = _losses(sets)
    points = sorted(samples, key=lambda point: (point.setting, point.link_gbit_per_s, _ORDER[point.arm.name]))
    rows = [_row(point, samples, losses, seed) for point in points]
    firsts = list(_firsts(samples, seed))
    rows += firsts
    rows += _profile_rows(sets)
    chunk = sets.chunks
    rows.append(
        {
            "table": "setup",
            "model": chunk.model,
            "token_bytes": chunk.chunk_bytes // chunk.chunk_tokens,
            "chunk_tokens": chunk.chunk_tokens,
            "prefixes_tokens": ", ".join(map(str, sorted({n for found in samples.values() for n in found.tokens}))),
            "budget_nats": BUDGET_NATS,
        }
    )
    return rows, _aims(firsts)


def _row(point: Point, samples: Measured, losses: Mapping[str, float], seed: int) -> Row:
    found = samples[point]
    row: Row = {
        "table": "service",
        "setting": point.setting,
        "link_gbit_per_s": point.link_gbit_per_s,
        "arm": point.arm.name,
        "n": len(found.tokens),
    }
    for metric in METRICS:
        times_s = found.of(metric)
        row |= {f"{metric}_ms": percentile(times_s, 50) * 1e3, f"{metric}_p10_ms": percentile(times_s, 10) * 1e3}
        row[f"{metric}_p90_ms"] = percentile(times_s, 90) * 1e3
        for other in (UNCOMPRESSED, KVSERVE):
            theirs = samples.get(point._replace(arm=other))
            if theirs is not None:
                ratio = ratio_interval(theirs.of(metric), times_s, seed)
                row |= dict(zip(_factor_names(metric, other), ratio, strict=True))
    used = Counter(found.used if point.arm.planned else [_static_name(point.arm)] * len(found.used))
    row |= {
        "used": ", ".join(f"{name} {count}" for name, count in used.most_common()),
        "loss_nats": max(0.0 if name in _EXACT else losses[name] for name in used),
        "link_bytes": percentile(found.link_bytes, 50),
        "tokens": found.tokens,
        "ttft_s": found.ttft_s,
        "jct_s": found.jct_s,
    }
    return row


def _factor_names(metric: str, other: Arm) -> tuple[str, str, str]:
    start = f"{metric}_of_{other.name}"
    return start, f"{start}_low", f"{start}_high"


def _firsts(samples: Measured, seed: int) -> Iterator[Row]:
    """In each row of the aim: the arm that is the fastest of the others, and how adaptive does beside it."""
    for setting, link in sorted({(point.setting, point.link_gbit_per_s) for point in samples}):
        here = {arm: samples[Point(setting, link, arm)] for arm in ARMS if Point(setting, link, arm) in samples}
        for metric in METRICS:
            others = {arm: found for arm, found in here.items() if arm != ADAPTIVE}
            best = min(others, key=lambda arm: percentile(others[arm].of(metric), 50))
            ratio = ratio_interval(here[ADAPTIVE].of(metric), others[best].of(metric), seed)
            yield {
                "table": "first",
                "setting": setting,
                "link_gbit_per_s": link,
                "metric": metric.upper(),
                "other": best.name,
                "ratio": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
            }


def _aims(firsts: Sequence[Row]) -> list[Aim]:
    first = sum(row["ratio"] < 1 for row in firsts)
    worst = max(row["ratio"] for row in firsts)
    return [
        at_least(f"rows (setting, rate, TTFT or JCT) in which adaptive is first, of {len(firsts)}", len(firsts), first),
        at_most("median of adaptive / that of the fastest other arm, in the worst row", 1.0, worst),
    ]


def _losses(sets: Sets) -> dict[str, float]:
    """Loss of every level by the name of its arm, in the worst bucket."""
    every = [*sets.adaptive.profiles, *sets.static.profiles]
    return {f"{one.name}/{number}": loss_nats(level) for one in every for number, level in enumerate(one.levels)}


def _static_name(arm: Arm) -> str:
    if arm == RECOMPUTE:
        return "recompute"
    return "exact" if arm == UNCOMPRESSED else f"{arm.pipeline}/{arm.level or 0}"


def _profile_rows(sets: Sets) -> Iterator[Row]:
    theirs = {profile.name for profile in sets.kvserve.profiles}
    ours = [profile for profile in sets.adaptive.profiles if profile.name not in theirs]
    groups: Mapping[str, Sequence[Profile]] = {
        "static": sets.static.profiles,
        "kvserve and adaptive": sets.kvserve.profiles,
        "adaptive": ours,
    }
    for pushed, profiles in groups.items():
        for profile in profiles:
            for number, level in enumerate(profile.levels):
                yield {
                    "table": "profiles",
                    "pushed": pushed,
                    "profile": f"{profile.name}/{number}",
                    "ratio": level.ratio,
                    "encode_s_per_gb": profile.encode_s_per_gb,
                    "decode_s_per_gb": level.decode_s_per_gb,
                    "loss_nats": loss_nats(level),
                    "prompts": min(quality.prompts for quality in level.quality.values()),
                }


def print_tables(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    """What people want to see at once."""
    console = Console(width=200)
    table = Table("setting", "Gb/s", "arm", "TTFT ms", "JCT ms", "TTFT factor", "JCT factor", "KB", "used", "nats")
    for row in rows:
        if row["table"] == "service":
            factors = [f"{row[f'{metric}_of_{UNCOMPRESSED.name}']:.2f}" for metric in METRICS]
            times = [f"{row[f'{metric}_ms']:.1f}" for metric in METRICS]
            where = (row["setting"], f"{row['link_gbit_per_s']:g}", row["arm"])
            table.add_row(
                *where, *times, *factors, f"{row['link_bytes'] / 1e3:.0f}", row["used"], f"{row['loss_nats']:.4f}"
            )
    console.print(table)
    for row in rows:
        if row["table"] == "first":
            ratio = f"{row['ratio']:.3f} ({row['low']:.2f} to {row['high']:.2f})"
            console.print(row["setting"], row["link_gbit_per_s"], row["metric"], "against", row["other"], ratio)
    for aim in aims:
        console.print(f"{'met' if aim.met else 'missed'}: {aim.aim}: {aim.value:.3f} (target {aim.target:g})")
