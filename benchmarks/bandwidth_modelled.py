"""Links that two cores cannot carry: the latency model with measured ratios and an accelerator's published times.

The real planner decides and learns; what its decisions take is the model's time by the true link and decoder, which
the planner is not told, with some noise.
"""

import math
from collections import Counter
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import NamedTuple

from benchmarks.bandwidth_profiles import Speeds, with_speeds
from benchmarks.bandwidth_runner import BUDGET_NATS, READS, RECOMPUTE, Setting, profile_named
from benchmarks.harness import Row
from kvstore.backend import Copy, Held
from kvstore.controller.controller import Controller
from kvstore.controller.latency import Link, Rates, Terms, Volume, fetch_terms, put_terms
from kvstore.controller.losses import Losses
from kvstore.controller.planner import Planner, Who
from kvstore.plan import Context, Outcome
from kvstore.profile import Profile, ProfileSet

LINKS_GBIT_PER_S = (10.0, 25.0, 100.0)
TOKENS = 12_032
PREFILL_S = 0.7
"""Of these tokens, on an H100."""
_GIB_IN_GB = (1 << 30) / 1e9
_TRANSFORM_MS, _QUANTISER_MS, _CODER_MS = (7.5, 5.6), (14.2, 6.5), (1.9, 2.0)
"""Milliseconds to encode and to decode 1 GiB of cache, as KVServe published them for an H100: Hadamard transform,
quantiser, ANS. Nobody has measured ours on an H200 yet."""
_STEPS = {
    "raw": (),
    "splitzip": (_CODER_MS,),
    "p02-fp8": (_QUANTISER_MS, _CODER_MS),
    "p06-step": (_TRANSFORM_MS, _QUANTISER_MS),
}
_RTT_S = 0.001
_WARM_GETS, _GETS = 10, 200
_NOISE = 0.05


@dataclass
class _Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class _Way(NamedTuple):
    """A profile and a level, or computing, with the time that it really takes."""

    name: str
    terms: Terms | None
    coded_bytes: float = 0.0

    @property
    def total_s(self) -> float:
        return PREFILL_S if self.terms is None else self.terms.total_s


def modelled_rows(setting: Setting, rng: Random) -> list[Row]:
    """A row for every link: the best arm, and adaptive."""
    return [_row(gbit_per_s, setting, rng) for gbit_per_s in LINKS_GBIT_PER_S]


def _row(gbit_per_s: float, setting: Setting, rng: Random) -> Row:
    model = _Model(gbit_per_s, setting, rng)
    ways = [model.way(arm.profile, arm.level) for arm in setting.statics] + [_Way(RECOMPUTE, None)]
    best = min(ways, key=lambda way: way.total_s)
    cold_put = model.put()
    cold = [model.get(cold_put) for _ in range(_WARM_GETS)]
    put = model.put()
    warm = [model.get(put) for _ in range(_GETS)]
    return {
        "table": "modelled",
        "modelled": True,
        "gbit_per_s": gbit_per_s,
        "best": best.name,
        "best_ms": 1e3 * best.total_s,
        "adaptive_ms": 1e3 * fmean(way.total_s for way in warm),
        "ratio": fmean(way.total_s for way in warm) / best.total_s,
        "took": ", ".join(f"{arm} {count}" for arm, count in Counter(way.name for way in warm).most_common()),
        "put": f"{cold_put.name}, {put.name}",
        "cold_ms": 1e3 * fmean(way.total_s for way in cold),
        "arms_ms": {way.name: 1e3 * way.total_s for way in ways},
    }


class _Model:
    """A link with a client, and the server that plans for it."""

    def __init__(self, gbit_per_s: float, setting: Setting, rng: Random) -> None:
        self._setting = setting
        self._rng = rng
        self._clock = _Clock()
        self._planner = Planner(Controller(self._clock, Random(rng.random())), BUDGET_NATS)
        self._found = with_speeds(setting.found, _speeds(setting.found))
        self._losses = Losses(self._found)
        self._link = Link(gbit_per_s * 1e9 / 8, _RTT_S)
        layout = setting.cache.layout
        self._chunks = TOKENS // layout.chunk_tokens
        self._raw_bytes = float(self._chunks * layout.chunk_bytes)
        self._context = Context(layout.chunk_bytes, layout.chunk_tokens, prefill_s=PREFILL_S)
        self._who = Who("", "modelled")

    def way(self, name: str, level: int | None) -> _Way:
        """What a fetch really takes."""
        profile = profile_named(self._found, name)
        number = len(profile.levels) - 1 if level is None else level
        found = profile.levels[number]
        coded_bytes = self._raw_bytes / found.ratio
        rates = Rates(decode_s_per_gb=found.decode_s_per_gb)
        terms = fetch_terms(Volume(self._raw_bytes, coded_bytes, self._chunks), self._link, rates)
        return _Way(f"{name}/{number}", terms, coded_bytes)

    def put(self) -> Profile:
        """A planned put, done and observed; the profile."""
        context = self._context._replace(reads=READS)
        decision, profile = self._planner.plan_put(self._who, self._losses, self._chunks, context)
        profile = profile or profile_named(self._found, "raw")
        coded_bytes = self._raw_bytes / profile.levels[-1].ratio
        rates = Rates(encode_s_per_gb=profile.encode_s_per_gb)
        terms = put_terms(Volume(self._raw_bytes, coded_bytes, self._chunks), self._link, rates)
        self._observe(decision.id, terms, coded_bytes, "encode")
        return profile

    def get(self, profile: Profile) -> _Way:
        """A planned get, done and observed; what was done."""
        held = [Held(None, self._copy(profile))] * self._chunks
        decision, level = self._planner.plan_get(self._who, self._losses, held, self._context, self._chunks)
        if decision.choice.arm.name == RECOMPUTE:
            self._clock.now_s += PREFILL_S
            self._planner.observe("", decision.id, Outcome(PREFILL_S))
            return _Way(RECOMPUTE, None)
        way = self.way(profile.name, level)
        assert way.terms is not None
        self._observe(decision.id, way.terms, way.coded_bytes, "decode")
        return way

    def _copy(self, profile: Profile) -> Copy:
        ends = [round(self._setting.cache.layout.chunk_bytes / level.ratio) for level in profile.levels]
        sizes = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        return Copy("host", 0, sizes, len(sizes), lossless=profile.lossless, profile=profile.id)

    def _observe(self, number: int, terms: Terms, coded_bytes: float, codec: str) -> None:
        noise = math.exp(self._rng.gauss(0.0, _NOISE))
        took_s = noise * terms.total_s
        self._clock.now_s += took_s
        outcome = Outcome(took_s, round(coded_bytes), noise * terms.stage_s("wire"), None, noise * terms.stage_s(codec))
        self._planner.observe("", number, outcome)


def _speeds(found: ProfileSet) -> dict[str, Speeds]:
    """Of the accelerator, by profile."""
    return {
        profile.name: Speeds(
            sum(encode_ms for encode_ms, _ in _STEPS[profile.name]) / 1e3 / _GIB_IN_GB,
            (sum(decode_ms for _, decode_ms in _STEPS[profile.name]) / 1e3 / _GIB_IN_GB,) * len(profile.levels),
        )
        for profile in found.profiles
    }
