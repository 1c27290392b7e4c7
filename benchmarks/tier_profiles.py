"""Levels chosen per tier against the best fixed level per tier, on a trace, while S3 and the link change.

    python -m benchmarks.tier_profiles --trace FILE

A production trace is replayed through the tiers' own `Index`, `Policies` and placement, moved as `TieredBackend` moves
chunks. Sizes and losses of levels are those of a profile of the default set, as measured; times are the latency
model's, because S3 and the link must change on demand. Every conversation belongs to an application that allows a loss
of 0.01 or of 0.001 nats, and asks for the lowest level within it, which the budgeted policy takes. It fetches the part
of its prompt that is held at that level, up to where computing the rest is faster, and computes and puts the rest.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, product
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.harness import Aim, Row, argument_parser, at_most, output_path, write_result
from benchmarks.tier_replay import Stack
from benchmarks.traces import CHUNK_TOKENS, Trace, made_trace, read_trace
from kvstore.backend import Held
from kvstore.backends.policies import Fetched, FetchedChunk, Load, TierRead
from kvstore.backends.warmth import ATTENTION_TOKENS
from kvstore.controller.latency import FETCH, GB, Terms
from kvstore.controller.placement import LearnedPlacement
from kvstore.keys import ChunkKey
from kvstore.profile import Profile
from kvstore.profile_sets import DEFAULT, read_set

NAME = "tier_profiles"
PROFILE = "p08-hadamard"
REQUESTS = 6_000
TOKEN_BYTES = 131_072
"""K and V of a token of Llama-3.1-8B in bfloat16."""
RAW_BYTES = CHUNK_TOKENS * TOKEN_BYTES
BUDGETS_NATS = (0.01, 0.001)
STRICT_SHARE = 0.3
"""Conversations whose application allows the smaller loss."""
PREFILL_TOKENS_PER_S = 5_000.0
DECODE_S_PER_GB = 0.02
"""Of the fastest level of the set, as on a GPU; the others in proportion to what was measured on a CPU."""
RTT_S = 0.002
RATES_GB_PER_S = {"host": 10.0, "lmdb": 2.0}
TIER_RTT_S = {"host": 0.0, "lmdb": 0.0005, "s3": 0.02}
POINTS = ((0.2, 25.0), (1.0, 5.0), (5.0, 25.0), (0.2, 5.0), (5.0, 1.0), (1.0, 25.0), (5.0, 5.0), (0.2, 1.0), (1.0, 1.0))
"""S3 in GB/s and the link in Gb/s, one after the other."""
SETTINGS = (("s3", 16, 64), ("s3", 64, 512), ("", 16, 64), ("", 64, 512))
"""The store below the disk, and GB of memory and disk."""
_QUICK_REQUESTS = 180
_QUICK_SETTINGS = (("s3", 1, 4), ("", 1, 4))

LEARNED = "learned"


@dataclass(frozen=True)
class Fixed:
    """One level for each tier without room."""

    host: int
    disk: int

    def __call__(self, held: Held, tier: str, load: Load) -> int:
        level = self.host if tier == "host" else self.disk
        return held.copy.levels - 1 if load.used_share <= 1 else level


class Case(NamedTuple):
    """One replay: the store below, GB of memory and disk, and the fixed levels, if it has some."""

    store: str
    host_gb: int
    disk_gb: int
    fixed: Fixed | None

    @property
    def placement(self) -> str:
        """Its name."""
        return LEARNED if self.fixed is None else f"host {self.fixed.host}, disk {self.fixed.disk}"

    @property
    def setting(self) -> str:
        """What is the same for the placements that are compared."""
        return f"{self.host_gb} GB, {self.disk_gb} GB, {self.store or 'nothing'}"


class Moment(NamedTuple):
    """One request: its chunks, how many were put before, its level, and the rates of the moment."""

    point: int
    keys: list[ChunkKey]
    known: int
    level: int
    s3_gb_per_s: float
    link_gbit_per_s: float


class Outcome(NamedTuple):
    """What became of a request: chunks fetched, and seconds until all that was put before is there again."""

    fetched: int
    took_s: float


class Replay:
    """One case: a stack, its placement, and the clock of the latency model."""

    def __init__(self, case: Case, profile: Profile, seed: int) -> None:
        self._profile = profile
        ends = [0] + [round(RAW_BYTES / level.ratio) for level in profile.levels]
        level_bytes = [after - before for before, after in pairwise(ends)]
        budgets_bytes = {"host": int(case.host_gb * GB), "lmdb": int(case.disk_gb * GB)}
        self._learned: LearnedPlacement | None = None
        if case.fixed is None:
            names = [*budgets_bytes, *([case.store] if case.store else [])]
            self._learned = LearnedPlacement(names, Random(seed))
            self._learned.know(bytes(16), read_set(Path(DEFAULT)))
        placement = case.fixed or self._learned
        assert placement is not None
        self.stack = Stack(budgets_bytes, case.store, level_bytes, profile.id, placement)

    def request(self, moment: Moment) -> Outcome:
        """Fetch what is worth fetching, compute and put the rest."""
        keys, level = moment.keys, moment.level
        depths = self.stack.depths(keys, level)
        prefill_s = _prefill_s()
        # Computing goes on where fetching ends, so a fetch may end before a slower tier begins.
        ends = [0, *_slower(depths), len(depths)]
        took_s, fetched = min(
            (prefill_s[moment.known] - prefill_s[min(end, moment.known)] + self._fetch_s(depths[:end], moment), end)
            for end in dict.fromkeys(ends)
        )
        self._learn(moment, depths[:fetched], len(depths))
        self.stack.put(keys, fetched)
        return Outcome(fetched, took_s)

    def _learn(self, moment: Moment, depths: Sequence[int], held: int) -> None:
        keys, level, history = moment.keys, moment.level, self.stack.policies.history
        chunks = self.stack.get(keys[: len(depths)], level, depths)
        if self._learned is not None:
            # What is held, but not at the level that the plan had to have.
            unmet = keys[held : len(self.stack.depths(keys, 0))]
            chunks += [FetchedChunk(self._profile.id, level, history.asked(k), "", history.reads(k)) for k in unmet]
            self._learned.fetched(Fetched(chunks, list(self._reads(depths, moment))))
        for key in keys[len(depths) :]:
            history.ask(key, level)

    def _reads(self, depths: Sequence[int], moment: Moment) -> Iterator[TierRead]:
        """What is read of each tier, one after the other, as a stack does."""
        for depth, tier in enumerate(self.stack.names):
            if count := depths.count(depth):
                size_bytes = count * self.stack.sizes_bytes[moment.level]
                rate = RATES_GB_PER_S.get(tier, moment.s3_gb_per_s)
                yield TierRead(tier, size_bytes, TIER_RTT_S[tier] + size_bytes / GB / rate)

    def _fetch_s(self, depths: Sequence[int], moment: Moment) -> float:
        """Tier reads, wire and decoding overlap."""
        if not depths:
            return 0.0
        reads = list(self._reads(depths, moment))
        rtt_s = sum(TIER_RTT_S[read.tier] for read in reads)
        stages = (
            sum(read.took_s for read in reads) - rtt_s,
            sum(read.size_bytes for read in reads) / (moment.link_gbit_per_s * GB / 8),
            0.0,
            len(depths) * RAW_BYTES / GB * _decode_s_per_gb(moment.level),
        )
        return Terms(FETCH, (0.0, RTT_S, rtt_s), stages, len(depths)).total_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Levels chosen per tier against the best fixed ones, while S3 and the link change.")
    parser.add_argument("--trace", type=Path, help="JSON lines with hash_ids; a made trace by default")
    args = parser.parse_args(argv)
    rows = measure(args)
    found = aims(rows)
    write_result(NAME, rows, found, args.seed, out=output_path(NAME, args))
    for row in rows:
        if row["table"] == "whole":
            print(row)
    for aim in found:
        print(f"{'met' if aim.met else 'MISSED':6} {aim.value} {aim.aim}")


def measure(args: argparse.Namespace) -> list[Row]:
    """Rows of all settings."""
    requests = _QUICK_REQUESTS if args.quick else REQUESTS
    trace = made_trace(args.seed, requests) if args.trace is None else read_trace(args.trace)[:requests]
    found = cases(_QUICK_SETTINGS if args.quick else SETTINGS)
    if args.quick:
        outcomes = [_replay(trace, case, args.seed) for case in found]
    else:
        with ProcessPoolExecutor(initializer=_load, initargs=(trace, args.seed)) as pool:
            outcomes = list(pool.map(_replay_loaded, found))
    moments = list(moments_of(trace))
    rows = compared(
        [row for case, outcome in zip(found, outcomes, strict=True) for row in _rows(case, moments, outcome)]
    )
    source = "made from the seed" if args.trace is None else args.trace.name
    levels = [
        {"table": "levels", "level": n, "ratio": level.ratio, "kl_nats": _loss(_profile(), n), "trace": source}
        for n, level in enumerate(_profile().levels)
    ]
    return [*(row for row in rows if row["table"] == "whole"), *(r for r in rows if r["table"] == "points"), *levels]


def cases(settings: Sequence[tuple[str, int, int]]) -> list[Case]:
    """Every setting with the learned placement and with every fixed one that some fetch can use."""
    usable = range(_level_within(BUDGETS_NATS[0]), _level_within(BUDGETS_NATS[-1]) + 1)
    fixed = [None, *(Fixed(host, disk) for host, disk in product(usable, usable))]
    return [Case(*setting, one) for setting in settings for one in fixed]


def moments_of(trace: Trace) -> Iterator[Moment]:
    """Requests with what is true when they come."""
    seen: set[ChunkKey] = set()
    for number, keys in enumerate(trace):
        known = next((n for n, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(keys)
        # The first chunk is what all conversations share.
        strict = Random(keys[min(1, len(keys) - 1)]).random() < STRICT_SHARE
        point = number * len(POINTS) // len(trace)
        yield Moment(point, keys, known, _level_within(BUDGETS_NATS[strict]), *POINTS[point])


def aims(rows: Sequence[Row]) -> list[Aim]:
    """The learned placement against the best fixed one in hindsight: of each point, of each setting, and of all."""
    points = [row["took_share"] for row in rows if row["table"] == "points" and row["placement"] == LEARNED]
    whole = [row for row in rows if row["table"] == "whole"]
    by_placement = {
        name: sum(row["mean_s"] for row in whole if row["placement"] == name)
        for name in dict.fromkeys(row["placement"] for row in whole)
    }
    learned_s = by_placement.pop(LEARNED)
    settings = [row["took_share"] for row in whole if row["placement"] == LEARNED]
    name = "fetch time in that of the best fixed levels"
    hits = [row["hits_share"] for row in whole if row["placement"] == LEARNED]
    over_all = learned_s / min(by_placement.values())
    return [
        at_most(f"{name} of the point, at the worst of {len(points)} points", 1.0, max(points)),
        at_most(f"{name} of the setting, at the worst of {len(settings)} settings", 1.0, max(settings)),
        Aim(f"{name} that are best over the whole: less than", 1.0, round(over_all, 4), over_all < 1),
        Aim(
            "hits within budget in those of the fixed levels with most, at the worst setting",
            1.0,
            min(hits),
            min(hits) >= 1,
        ),
    ]


def compared(rows: Sequence[Row]) -> list[Row]:
    """Rows with their figures in those of the best fixed placement of the same setting and point."""
    found = []
    for row in rows:
        fixed = [
            other
            for other in rows
            if other["placement"] != LEARNED and all(other[name] == row[name] for name in ("setting", "point"))
        ]
        best_s, most = min(other["mean_s"] for other in fixed), max(other["hits"] for other in fixed)
        took_share = round(row["mean_s"] / best_s, 4) if best_s else 1.0
        found.append(row | {"took_share": took_share, "hits_share": round(row["hits"] / max(1, most), 4)})
    return found


def _rows(case: Case, moments: Sequence[Moment], outcomes: Sequence[Outcome]) -> Iterator[Row]:
    for point in (None, *range(len(POINTS))):
        some = [(m, o) for m, o in zip(moments, outcomes, strict=True) if point is None or m.point == point]
        rates = {} if point is None else dict(zip(("s3_gb_per_s", "link_gbit_per_s"), POINTS[point], strict=True))
        hits, known = sum(o.fetched for _, o in some), sum(m.known for m, _ in some)
        yield {
            "table": "whole" if point is None else "points",
            "setting": case.setting,
            "point": point,
            **rates,
            "placement": case.placement,
            "requests": len(some),
            "mean_s": round(sum(o.took_s for _, o in some) / len(some), 5),
            "hits": hits,
            "hit_share": round(hits / max(1, known), 4),
        }


def _slower(depths: Sequence[int]) -> Iterator[int]:
    """Where a run first comes to a slower tier than any before."""
    slowest = 0
    for position, depth in enumerate(depths):
        if depth > slowest:
            slowest = depth
            yield position


@lru_cache
def _profile() -> Profile:
    return next(profile for profile in read_set(Path(DEFAULT)).profiles if profile.name == PROFILE)


def _loss(profile: Profile, level: int) -> float:
    return max(quality.kl_nats for quality in profile.levels[level].quality.values())


@lru_cache
def _level_within(budget_nats: float) -> int:
    return next(level for level in range(len(_profile().levels)) if _loss(_profile(), level) <= budget_nats)


@lru_cache
def _decode_s_per_gb(level: int) -> float:
    found = read_set(Path(DEFAULT))
    fastest = min(one.decode_s_per_gb for profile in found.profiles for one in profile.levels)
    return DECODE_S_PER_GB * _profile().levels[level].decode_s_per_gb / fastest


@lru_cache
def _prefill_s() -> list[float]:
    """Seconds to compute the first chunks of a prompt, by how many they are."""
    tokens = range(0, 1 << 18, CHUNK_TOKENS)
    times_s = (CHUNK_TOKENS / PREFILL_TOKENS_PER_S * (1 + first / ATTENTION_TOKENS) for first in tokens)
    return [0.0, *accumulate(times_s)]


_loaded: list[tuple[Trace, int]] = []


def _load(trace: Trace, seed: int) -> None:
    _loaded[:] = [(trace, seed)]


def _replay_loaded(case: Case) -> list[Outcome]:
    trace, seed = _loaded[0]
    return _replay(trace, case, seed)


def _replay(trace: Trace, case: Case, seed: int) -> list[Outcome]:
    replay = Replay(case, _profile(), seed)
    outcomes = [replay.request(moment) for moment in moments_of(trace)]
    for tier in replay.stack.tiers:
        tier.validate()
    return outcomes


if __name__ == "__main__":
    main()
