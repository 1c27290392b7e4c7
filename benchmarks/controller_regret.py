"""What controllers lose to an oracle over a trace of requests whose link drifts and whose profile is wrong.

    python -m benchmarks.controller_regret --trace FILE

A request fetches the cache of its prompt. Every arm's true time comes from the max-plus model with the link of that
moment and decoding three times slower than profiled, times noise. The oracle takes the arm with the least true
time before noise. Times are modelled; the ratios and losses are those of the set of profiles, as measured.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from time import perf_counter

from benchmarks.harness import Aim, Row, argument_parser, at_most, output_path, percentile, write_result
from kvstore.controller.controller import Controller, Situation
from kvstore.controller.estimators import DecodeSpeed, LinkState, octave
from kvstore.controller.latency import Link, Rates, Terms, Volume, compute_terms, fetch_terms
from kvstore.controller.policy import EXACT, RECOMPUTE, Arm, Measured, Wish, undominated
from kvstore.profile import ProfileSet
from kvstore.profile_sets import DEFAULT, read_set

NAME = "controller_regret"
REQUESTS = 10_000
SETTLED = 500
BUDGET_NATS = 0.01
TOKEN_BYTES = 131_072
"""K and V of a token of Llama-3.1-8B in bfloat16."""
CHUNK_TOKENS = 256
PREFILL_TOKENS_PER_S = 8_000.0
DECODE_S_PER_GB = 0.02
"""Of the fastest level of the set, as on a GPU; the others in proportion to what was measured on a CPU."""
SLOWER = 3.0
OWN = 0.2
"""Decoding is three times slower than profiled, and each level by a factor of its own (standard deviation)."""
NOISE = 0.1
OUTLIERS = 0.02
OUTLIER = 4.0
LOW_BYTES_PER_S, HIGH_BYTES_PER_S = 2.5e8, 5e10
"""2 to 400 Gb/s."""
STEP = 0.05
"""Standard deviation of the logarithm of the link's rate from one request to the next."""
LEAP = 0.005
"""Share of requests before which the rate becomes another one at once."""
RTT_S = 0.002


@dataclass(frozen=True)
class Moment:
    """One request: its tokens, the link's rate, and the noise of its transfer."""

    tokens: int
    bytes_per_s: float
    noise: float

    @property
    def raw_bytes(self) -> float:
        return float(self.tokens * TOKEN_BYTES)

    @property
    def chunks(self) -> int:
        return max(1, self.tokens // CHUNK_TOKENS)


@dataclass(frozen=True)
class World:
    """What is true: levels by name, and by how much each is decoded slower than profiled."""

    levels: Mapping[str, Measured]
    slower: Mapping[str, float]

    def terms(self, name: str, moment: Moment) -> Terms:
        """True terms of an arm."""
        if name == RECOMPUTE:
            return compute_terms(moment.tokens / PREFILL_TOKENS_PER_S)
        return self.fetch(name, moment, Link(moment.bytes_per_s, RTT_S), self.slower[name])

    def fetch(self, name: str, moment: Moment, link: Link, slower: float) -> Terms:
        """Terms of a fetch over some link, with decoding so many times slower than profiled."""
        level = self.levels[name]
        volume = Volume(moment.raw_bytes, moment.raw_bytes / level.ratio, moment.chunks)
        return fetch_terms(volume, link, Rates(decode_s_per_gb=slower * level.decode_s_per_gb))


class Chooser:
    """Names an arm for a request, and is told what came of it."""

    def choose(self, moment: Moment) -> str:
        """The arm. Only the tokens of the moment may be looked at, unless it says otherwise."""
        raise NotImplementedError

    def observe(self, moment: Moment, arm: str, wire_s: float, decode_s: float, took_s: float) -> None:
        """What came of it."""


class Ours(Chooser):
    """kvstore's controller: estimators, latency model, bandit, policy."""

    def __init__(self, world: World, seed: int, *, learns: bool = True) -> None:
        self._world = world
        self._now_s = 0.0
        self._controller = Controller(lambda: self._now_s, Random(seed), explores=learns)
        self._link, self._decode, self._learns = LinkState(), DecodeSpeed(), learns
        self._levels = undominated(world.levels.values(), BUDGET_NATS, hurried=True)
        self._random, self._decision = Random(seed + 1), 0
        self.decide_s: list[float] = []

    def choose(self, moment: Moment) -> str:
        began_s = perf_counter()
        link = Link(self._link.rate.value, self._link.rtt.value)
        arms = [
            Arm(level.name, level.loss_nats, self._world.fetch(level.name, moment, link, self._factor(level.name)))
            for level in self._levels
        ]
        arms.append(Arm(RECOMPUTE, 0.0, compute_terms(moment.tokens / PREFILL_TOKENS_PER_S)))
        situation = Situation("tenant", "link", "host", octave(moment.raw_bytes), 0)
        rate, learns = self._link.rate, self._learns
        wire = rate.value / rate.drawn(self._random) if learns else 1.0
        hope = rate.value / rate.hoped
        decision = self._controller.decide(situation, arms, Wish(BUDGET_NATS), wire=wire, hope=hope)
        self.decide_s.append(perf_counter() - began_s)
        self._decision = decision.id
        return decision.choice.arm.name

    def observe(self, moment: Moment, arm: str, wire_s: float, decode_s: float, took_s: float) -> None:
        self._now_s += took_s
        if self._learns:
            self._controller.observe(self._decision, took_s, tenant="tenant")
        if arm == RECOMPUTE:
            self._link.rate.age()
            return
        level = self._world.levels[arm]
        self._link.observe(moment.raw_bytes / level.ratio, wire_s + RTT_S, first_byte_s=RTT_S)
        if level.decode_s_per_gb:
            self._decode.observe(arm, moment.raw_bytes / 1e9 * level.decode_s_per_gb, decode_s)
        else:
            self._decode.fade()

    def _factor(self, arm: str) -> float:
        return self._decode.factor(arm) if self._learns else 1.0


class KVServe(Chooser):
    """KVServe's online controller as its published code has it, in either of its two versions.

    *A* looks at the best profile by its model in the link's interval and its neighbours, one time in ten at any of
    these, and corrects each by a running mean of the error in that interval. *B* looks at all, never tries another,
    and corrects each by a faster running mean. Neither measures its link: here it is told the true rate before every
    request. Neither knows recomputing; here it recomputes where even the best is expected to take longer.
    """

    def __init__(self, world: World, seed: int, *, version: str) -> None:
        self._world, self._random, self._a = world, Random(seed), version == "A"
        self._error_s: dict[tuple[int, str], float] = {}
        allowed = [one for one in world.levels.values() if one.loss_nats <= BUDGET_NATS and one.name != EXACT]
        self._profiles = undominated(allowed, BUDGET_NATS, hurried=True) if self._a else allowed
        self._limits = {one.name: (1 - 1 / one.ratio) * 1e9 / one.decode_s_per_gb for one in self._profiles}
        self._cuts = sorted(self._limits.values())

    def choose(self, moment: Moment) -> str:
        expected_s, name = self.transfer(moment)
        return RECOMPUTE if expected_s > moment.tokens / PREFILL_TOKENS_PER_S else name

    def transfer(self, moment: Moment) -> tuple[float, str]:
        """How it would transfer: the expected time, 0 where it goes by none, and the profile."""
        rate = moment.bytes_per_s
        arms = range(len(self._profiles))
        if self._a and self._profiles:
            best = min(arms, key=lambda n: self._model_s(self._profiles[n], moment))
            arms = range(max(0, best - 1), min(len(self._profiles), best + 2))
        candidates = [self._profiles[n] for n in arms if rate < self._limits[self._profiles[n].name]]
        if not candidates:
            return 0.0, EXACT
        if self._a and self._random.random() < 0.1:
            return 0.0, self._random.choice(candidates).name
        return min((self.expected_s(one.name, moment), one.name) for one in candidates)

    def expected_s(self, name: str, moment: Moment) -> float:
        """What it expects a profile to take."""
        return self._model_s(self._world.levels[name], moment) + self._error(name, moment.bytes_per_s)

    def observe(self, moment: Moment, arm: str, wire_s: float, decode_s: float, took_s: float) -> None:
        if arm in (EXACT, RECOMPUTE):
            return
        weight = 0.2 if self._a else 0.3
        found_s = took_s - self._model_s(self._world.levels[arm], moment)
        known_s = self._error(arm, moment.bytes_per_s)
        self._error_s[self._interval(moment.bytes_per_s), arm] = (1 - weight) * known_s + weight * found_s

    def _error(self, name: str, bytes_per_s: float) -> float:
        return self._error_s.get((self._interval(bytes_per_s), name), 0.0)

    def _interval(self, bytes_per_s: float) -> int:
        return sum(cut < bytes_per_s for cut in self._cuts) if self._a else 0

    def _model_s(self, level: Measured, moment: Moment) -> float:
        raw_bytes = moment.raw_bytes
        return raw_bytes / 1e9 * level.decode_s_per_gb + raw_bytes / (moment.bytes_per_s * level.ratio)


class Static(Chooser):
    """One arm for every request."""

    def __init__(self, arm: str) -> None:
        self._arm = arm

    def choose(self, moment: Moment) -> str:
        return self._arm


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Regret of controllers over a trace with a drifting link and a wrong profile.")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines with `input_length` (made by the seed)")
    parser.add_argument("--profiles", type=Path, default=Path(DEFAULT), help="set of profiles (%(default)s)")
    args = parser.parse_args(argv)
    found = read_set(args.profiles)
    count = 400 if args.quick else REQUESTS
    world = world_of(found, args.seed)
    moments = list(drifting(lengths(args.trace, count, args.seed), args.seed + 1))
    rows, aims = compare(world, moments, args.seed)
    lengths_of = "made from the seed" if args.trace is None else args.trace.name
    rows.append({"table": "setting", "requests": len(moments), "lengths": lengths_of, "profiles": found.measured.model})
    write_result(NAME, rows, aims, args.seed, out=output_path(NAME, args))
    for row in rows:
        if row["table"] == "controllers":
            print(row)
    for aim in aims:
        print(f"{aim.aim}: {aim.value} of {aim.target} ({'met' if aim.met else 'missed'})")


def world_of(found: ProfileSet, seed: int) -> World:
    """The levels of a set, with decoding as fast as on a GPU, and the uncompressed arm; each its own bit slower."""
    fastest = min(level.decode_s_per_gb for profile in found.profiles for level in profile.levels)
    levels = [
        Measured(
            f"{profile.name}/{number}",
            level.ratio,
            DECODE_S_PER_GB * level.decode_s_per_gb / fastest,
            max(quality.kl_nats for quality in level.quality.values()),
        )
        for profile in found.profiles
        for number, level in enumerate(profile.levels)
    ]
    rng = Random(seed)
    slower = {level.name: SLOWER * math.exp(rng.gauss(0, OWN)) for level in levels}
    exact = Measured(EXACT, 1.0, 0.0, 0.0)
    return World({level.name: level for level in [*levels, exact]}, slower | {EXACT: 1.0})


def lengths(trace: Path | None, count: int, seed: int) -> list[int]:
    """Prompt lengths of requests, tokens."""
    if trace is None:
        rng = Random(seed)
        return [max(CHUNK_TOKENS, int(rng.lognormvariate(8.7, 0.9))) for _ in range(count)]
    with trace.open() as stream:
        return [max(CHUNK_TOKENS, int(json.loads(line)["input_length"])) for line in islice(stream, count)]


def drifting(tokens: Sequence[int], seed: int) -> Iterator[Moment]:
    """Requests with the link's rate as it wanders and leaps."""
    rng = Random(seed)
    low, high = math.log(LOW_BYTES_PER_S), math.log(HIGH_BYTES_PER_S)
    rate = rng.uniform(low, high)
    for count in tokens:
        rate = rng.uniform(low, high) if rng.random() < LEAP else rate + rng.gauss(0, STEP)
        # Reflected at its bounds.
        rate = min(max(rate, 2 * low - rate), 2 * high - rate)
        noise = math.exp(rng.gauss(0, NOISE)) * (OUTLIER if rng.random() < OUTLIERS else 1.0)
        yield Moment(count, math.exp(rate), noise)


def run(world: World, moments: Sequence[Moment], chooser: Chooser) -> tuple[list[float], list[float]]:
    """Seconds beyond the oracle's and the oracle's own, request by request."""
    names = [*within(world), RECOMPUTE]
    lost, best = [], []
    for moment in moments:
        arm = chooser.choose(moment)
        assert arm in names, f"{arm} breaks the budget"
        true_s = {name: world.terms(name, moment).total_s for name in names}
        terms = world.terms(arm, moment)
        wire_s, decode_s = (moment.noise * terms.stage_s(stage) for stage in ("wire", "decode"))
        chooser.observe(moment, arm, wire_s, decode_s, moment.noise * terms.total_s)
        best.append(min(true_s.values()))
        lost.append(true_s[arm] - best[-1])
    return lost, best


def within(world: World) -> list[str]:
    """Arms within the budget."""
    return [level.name for level in world.levels.values() if level.loss_nats <= BUDGET_NATS]


def compare(world: World, moments: Sequence[Moment], seed: int) -> tuple[list[Row], list[Aim]]:
    """Rows and aims."""
    ours = Ours(world, seed)
    choosers: dict[str, Callable[[], Chooser]] = {
        "kvstore": lambda: ours,
        "kvserve A": lambda: KVServe(world, seed, version="A"),
        "kvserve B": lambda: KVServe(world, seed, version="B"),
        "analytical only": lambda: Ours(world, seed, learns=False),
    }
    found = {name: run(world, moments, make()) for name, make in choosers.items()}
    statics = {name: run(world, moments, Static(name)) for name in [*within(world), RECOMPUTE]}
    best_static = min(statics, key=lambda name: sum(statics[name][0]))
    found[f"best static ({best_static})"] = statics[best_static]
    rows: list[Row] = []
    late: dict[str, float] = {}
    settled = min(SETTLED, len(moments) // 2)
    for name, (lost, best) in found.items():
        late[name] = sum(lost[settled:]) / sum(best[settled:])
        rows.append(
            {
                "table": "controllers",
                "controller": name,
                "lost_s": round(sum(lost), 3),
                "lost_share": round(sum(lost) / sum(best), 4),
                "lost_share_settled": round(late[name], 4),
                "oracle_s": round(sum(best), 1),
            }
        )
        every = max(1, len(lost) // 200)
        total = 0.0
        for number, one in enumerate(lost, 1):
            total += one
            if number % every == 0:
                rows.append({"table": "curve", "controller": name, "requests": number, "lost_s": round(total, 3)})
    theirs = min(sum(found[name][0]) for name in ("kvserve A", "kvserve B"))
    decide_us = 1e6 * percentile(ours.decide_s, 99)
    rows.append(
        {
            "table": "decision",
            "levels": len(world.levels),
            "arms": len(undominated(world.levels.values(), BUDGET_NATS, hurried=True)) + 1,
            "p99_us": round(decide_us, 1),
        }
    )
    aims = [
        at_most(f"share of the oracle's time lost after {SETTLED} requests", 0.05, round(late["kvstore"], 4)),
        at_most("regret in that of KVServe's better version", 0.5, round(sum(found["kvstore"][0]) / theirs, 4)),
        at_most("a decision, us (p99)", 200.0, round(decide_us, 1)),
    ]
    return rows, aims


if __name__ == "__main__":
    main()
