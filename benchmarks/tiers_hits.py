"""Share of a trace's chunks that are hit, against capacity: our eviction, LRU and S3-FIFO; compressed or not.

    python -m benchmarks.tiers_hits --trace FILE

Every request looks up its chunks in order, the leading run that is held is hit, and the chunks behind it that are not
held are put. So with endless room all chunks are hit that were asked for before. Shares are of all chunks looked up.
Capacities are shares of the bytes of all distinct chunks uncompressed.

Bytes and KL of levels are those of `quality.json` for prompts of 512 tokens of text: a chunk takes its bytes in
bfloat16 divided by the ratio at its highest level, containers included. The budget level is the lowest within a KL of
0.01 nats; of a method's settings the one is taken whose budget level takes the fewest bytes.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.eviction import Cache, Lru, Ours, S3Fifo
from benchmarks.harness import RESULTS, Aim, Row, argument_parser, at_least, missed_for, write_result
from benchmarks.traces import CHUNK_TOKENS, Trace, made_trace, read_trace
from kvstore.backends.warmth import ATTENTION_TOKENS

TABLE = "hits"
KL_BUDGET_NATS = 0.01
CAPACITY_SHARES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05)
METHODS = ("ladder", "ladder-tokens")
WHOLE, BUDGET, SHRINK = "all levels", "budget level", "shrink"

_POLICIES: dict[str, type[Ours] | type[Lru]] = {"lru": Lru, "s3-fifo": S3Fifo, "ours": Ours}
_PROMPTS = ("text", CHUNK_TOKENS)
_QUICK_REQUESTS = 300
_QUICK_SEED = 1
# Six layers of two heads of 64 dimensions, K and V in bfloat16: the model that quality.json was measured with.
_RAW_BYTES = CHUNK_TOKENS * 6 * 2 * 64 * 2 * 2
_SMALL_SHARE = 0.005


class Profile(NamedTuple):
    """What a chunk takes and how good it is.

    Args:
        method: Method and setting.
        level_bytes: Bytes of each level.
        kl_nats: KL at each level, those below it included.
        budget_levels: Number of levels up to the budget level.
    """

    method: str
    level_bytes: tuple[int, ...]
    kl_nats: tuple[float, ...]
    budget_levels: int

    def cut(self) -> "Profile":
        """The profile that keeps nothing above the budget level."""
        levels = self.budget_levels
        return Profile(self.method, self.level_bytes[:levels], self.kl_nats[:levels], levels)


RAW = Profile("uncompressed", (_RAW_BYTES,), (0.0,), 1)


class Case(NamedTuple):
    """One cache to be replayed."""

    policy: str
    compression: str
    profile: Profile
    kept: int
    capacity_share: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser("tiers_hits", "Hit ratio against capacity, eviction policies side by side.")
    parser.add_argument("--trace", type=Path, help="JSON lines with hash_ids; a made trace by default")
    args = parser.parse_args(argv)
    rows = measure(args.trace, args.quick)
    found = aims(rows)
    write_result("tiers_hits", rows, found, args.seed, out=args.out)
    for row in rows:
        print(
            f"{row['method']:26} {row['compression']:13} {row['capacity_share']:7.2%} {row['policy']:8}"
            f" {row['hit_share']:7.2%} KL {row['mean_kl_nats']:.5f} cost {row['cost_saved_share']:7.2%}"
        )
    for aim in found:
        print(f"{'met' if aim.met else 'MISSED':6} {aim.value} {aim.aim}")


def measure(trace: Path | None, quick: bool) -> list[Row]:
    """One row for each policy, compression and capacity.

    Args:
        trace: Trace to replay; a made one of conversations and scans where there is none.
        quick: Whether to replay the made trace on few capacities and one method only.
    """
    requests = made_trace(_QUICK_SEED, _QUICK_REQUESTS) if quick or trace is None else read_trace(trace)
    if quick:
        return [_replay(requests, case) for case in cases(METHODS[:1], (0.02, 0.1))]
    found = cases(METHODS, CAPACITY_SHARES)
    with ProcessPoolExecutor(initializer=_load, initargs=(requests,)) as pool:
        return list(pool.map(_replay_loaded, found))


def cases(methods: Sequence[str], capacity_shares: Sequence[float]) -> list[Case]:
    """Every policy with every compression at every capacity."""
    kinds = [("none", RAW, 1)]
    for profile in map(read_profile, methods):
        kinds += [
            (WHOLE, profile, len(profile.level_bytes)),
            (BUDGET, profile.cut(), profile.budget_levels),
            (SHRINK, profile, profile.budget_levels),
        ]
    return [
        Case(policy, compression, profile, kept, share)
        for compression, profile, kept in kinds
        for share in capacity_shares
        for policy in _POLICIES
    ]


def read_profile(method: str, path: Path = RESULTS / "quality.json") -> Profile:
    """A method's setting whose budget level takes the fewest bytes."""
    settings: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text("utf-8"))["rows"]:
        if row["table"] == "points" and (row["workload"], row["prefix_tokens"], row["method"]) == (*_PROMPTS, method):
            settings.setdefault(row["setting"], []).append(row)
    profiles = []
    for setting, rows in settings.items():
        rows.sort(key=lambda row: int(row["level"]))
        ends = [0] + [round(_RAW_BYTES / row["ratio"]) for row in rows]
        good = [row["level"] for row in rows if row["kl_nats"] <= KL_BUDGET_NATS]
        if good:
            level_bytes = tuple(after - before for before, after in pairwise(ends))
            kl_nats = tuple(row["kl_nats"] for row in rows)
            profiles.append(Profile(f"{method}, {setting}", level_bytes, kl_nats, good[0] + 1))
    return min(profiles, key=lambda profile: sum(profile.cut().level_bytes))


def aims(rows: Sequence[Row]) -> list[Aim]:
    """What the policy is meant to reach, at the worst of all capacities and methods."""
    ours = {(row["method"], row["compression"], row["capacity_share"]): row for row in rows if row["policy"] == "ours"}
    found = []
    for policy in ("lru", "s3-fifo"):
        others = [row for row in rows if row["policy"] == policy]
        worst = min(_ratio(ours[row["method"], row["compression"], row["capacity_share"]], row) for row in others)
        found.append(at_least(f"hits of our eviction in those of {policy}, at equal compression", 1.0, worst))
    shrunk = [row for row in ours.values() if row["compression"] == SHRINK]

    def beside(row: Row, compression: str) -> Row:
        return ours[row["method"], compression, row["capacity_share"]]

    worst = min(_ratio(row, beside(row, BUDGET)) for row in shrunk)
    found.append(at_least("hits with shrinking in those of the budget level alone", 0.99, worst))
    small = [_ratio(row, beside(row, WHOLE)) for row in shrunk if row["capacity_share"] <= _SMALL_SHARE]
    name = "hits with shrinking in those with all levels, capacities up to 0.5 %: more than"
    found.append(
        Aim(name, 1.0, min(small), min(small) > 1) if small else missed_for(name, 1.0, "capacities up to 0.5 %")
    )
    roomy = [
        row["mean_kl_nats"] / fixed["mean_kl_nats"]
        for row in shrunk
        if (fixed := beside(row, BUDGET))["hits"] and fixed["evictions"] == 0
    ]
    name = "mean KL of hits with shrinking in that of the budget level alone, where that evicts nothing: less than"
    found.append(
        Aim(name, 1.0, max(roomy), max(roomy) < 1) if roomy else missed_for(name, 1.0, "capacities with room left")
    )
    return found


def _ratio(row: Row, other: Row) -> float:
    return float(row["hits"] / max(1, other["hits"]))


_requests: Trace = []


def _load(requests: Trace) -> None:
    _requests[:] = requests


def _replay_loaded(case: Case) -> Row:
    return _replay(_requests, case)


def _replay(requests: Trace, case: Case) -> Row:
    """Replay a trace through one cache."""
    profile = case.profile
    distinct = len({key for keys in requests for key in keys})
    capacity_bytes = int(case.capacity_share * distinct * _RAW_BYTES)
    cache: Cache = _POLICIES[case.policy](capacity_bytes, profile.level_bytes, case.kept)
    hits_at = [0] * (len(profile.level_bytes) + 1)
    saved = cost = 0
    for keys in requests:
        run = cache.read(keys)
        for levels in run:
            hits_at[levels] += 1
        saved += _cost(len(run))
        cost += _cost(len(keys))
        cache.put(keys, len(run))
    if isinstance(cache, Ours):
        cache.validate()
    lookups = sum(map(len, requests))
    below = sum(hits_at[: profile.budget_levels])
    hits = sum(hits_at) - below
    kl_nats = sum(hits * kl for hits, kl in zip(hits_at[1:], profile.kl_nats, strict=True))
    return {
        "table": TABLE,
        "method": profile.method,
        "compression": case.compression,
        "policy": case.policy,
        "capacity_share": case.capacity_share,
        "capacity_bytes": capacity_bytes,
        "requests": len(requests),
        "lookups": lookups,
        "hits": hits,
        "hit_share": hits / lookups,
        "hits_below_budget": below,
        "mean_kl_nats": kl_nats / max(1, hits + below),
        "cost_saved_share": saved / cost,
        "evictions": cache.evictions,
        "used_bytes": cache.used_bytes,
    }


def _cost(chunks: int) -> int:
    """What it takes to compute so many chunks of a prompt, in units that cancel out."""
    return chunks * ATTENTION_TOKENS + CHUNK_TOKENS * (chunks * (chunks - 1) // 2)


if __name__ == "__main__":
    main()
