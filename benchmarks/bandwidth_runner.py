"""The arms of the bandwidth sweep at work: one request after the other, each by the clock of its client."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import NamedTuple

from benchmarks.bandwidth_cache import LargeCache
from benchmarks.bandwidth_profiles import Static, statics
from benchmarks.harness import Row
from kvstore.client import Client
from kvstore.codecs import build_pipeline
from kvstore.controller.losses import Losses
from kvstore.keys import chunk_keys, namespace_of
from kvstore.plan import Outcome, Plan
from kvstore.planned import PlannedPrefixes, Wish
from kvstore.prefix import get_prefix, put_prefix
from kvstore.profile import Profile, ProfileSet

ADAPTIVE = "adaptive"
RECOMPUTE = "recompute"
BUDGET_NATS = 0.01
PREFILL_TOKENS_PER_S = 500.0
"""An accelerator prefills some thirty times faster, and decodes that much faster than the two cores do that decode
here: so computing is scaled to the decoder."""
READS = 100.0
"""What adaptive says of its puts: the prompt is one that many requests share, some of which are made here."""
_WORKLOAD = "text"
_SLOW_S = 3.0


@dataclass(frozen=True)
class Setting:
    """What is fetched, and as what.

    Args:
        cache: The cache.
        found: The profiles.
    """

    cache: LargeCache
    found: ProfileSet

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return len(self.cache.token_ids)

    @property
    def prefill_s(self) -> float:
        """Time to compute the prompt."""
        return self.tokens / PREFILL_TOKENS_PER_S

    @cached_property
    def losses(self) -> dict[str, tuple[float, ...]]:
        """Of every level of every profile, on prompts of this length; beyond the mean by a standard error."""
        known = Losses(self.found)
        return {
            one.name: (*known.of(one, _WORKLOAD, self.tokens)[:-1], 0.0)
            if one.lossless
            else known.of(one, _WORKLOAD, self.tokens)
            for one in self.found.profiles
        }

    @property
    def statics(self) -> list[Static]:
        """The static arms."""
        return list(statics(self.found, lambda profile: self.losses[profile.name], BUDGET_NATS))

    @property
    def wish(self) -> Wish:
        """What adaptive asks for."""
        return Wish(_WORKLOAD, BUDGET_NATS, prefill_s=self.prefill_s, reads=READS)

    def row(self, *, shaped: bool) -> Row:
        """What it is, for the result."""
        return {
            "table": "setting",
            "tokens": self.tokens,
            "raw_mb": self.cache.raw_bytes / 1e6,
            "prefill_tokens_per_s": PREFILL_TOKENS_PER_S,
            "budget_nats": BUDGET_NATS,
            "reads": READS,
            "link": "shaped by htb" if shaped else "loopback, not shaped: a smoke run",
        }


class Get(NamedTuple):
    """One request.

    Args:
        arm: What was done.
        took_s: Until the cache was usable.
        loss_nats: What it lost.
    """

    arm: str
    took_s: float
    loss_nats: float = 0.0


@dataclass
class Stay:
    """What was measured at one rate.

    Args:
        times: By arm.
        cold: Requests of adaptive before its second put.
        puts: Profiles that adaptive put with, and the time of each put.
    """

    times: dict[str, list[Get]] = field(default_factory=dict)
    cold: list[Get] = field(default_factory=list)
    puts: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Schedule(Stay):
    """The same along a schedule, and the rates of its requests."""

    links_gbit_per_s: list[float] = field(default_factory=list)


@dataclass
class Samples:
    """All that was measured."""

    fixed: dict[float, Stay] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)


class Copy(NamedTuple):
    """A copy that adaptive put.

    Args:
        salt: Of its keys.
        arm: Profile that it was made with.
    """

    salt: bytes
    arm: str


class Runner:
    """Asks all arms.

    Args:
        client: Talks to the server.
        setting: What is fetched.
        rng: Order of the arms.
    """

    def __init__(self, client: Client, setting: Setting, rng: random.Random) -> None:
        self._client = client
        self._setting = setting
        self._rng = rng
        self._numbers = count()
        self._prefill_s = setting.prefill_s

    async def prepare(self) -> None:
        """Push the profiles, and put a copy with each."""
        cache = self._setting.cache
        await self._client.push_profiles(namespace_of(cache.layout), self._setting.found, {})
        for profile in self._setting.found.profiles:
            pipeline = build_pipeline(profile.pipeline)
            salt = profile.name.encode()
            await put_prefix(self._client, cache.layout, cache.token_ids, cache.planes, pipeline, salt=salt)
        for arm in self._setting.statics:
            # Once, so that connections and code are warm.
            await self._static(arm)

    async def stay(self, rounds: int, slow_rounds: int, warm_gets: int) -> Stay:
        """All arms at one rate, by a client that the server has not seen."""
        prefixes, found = self._prefixes(), Stay()
        cold = await self._put(prefixes, found)
        found.cold = [await self._adaptive(prefixes, cold) for _ in range(max(1, warm_gets // 2))]
        await self._drop(cold)
        copy = await self._put(prefixes, found)
        found.cold += [await self._adaptive(prefixes, copy) for _ in range(warm_gets // 2)]
        for number in range(rounds):
            for arm in self._order(found.times, number >= slow_rounds):
                got = await (self._static(arm) if isinstance(arm, Static) else self._adaptive(prefixes, copy))
                found.times.setdefault(_name(arm), []).append(got)
            found.times.setdefault(RECOMPUTE, []).append(Get(RECOMPUTE, self._prefill_s))
        await self._drop(copy)
        return found

    async def follow(self, episodes: Sequence[Sequence[float]], shape: Callable[[float], None]) -> Schedule:
        """All arms along a schedule; adaptive puts a copy in every episode and begins by knowing nothing."""
        prefixes, found = self._prefixes(), Schedule()
        for episode in episodes:
            shape(episode[0])
            copy = await self._put(prefixes, found)
            for gbit_per_s in episode:
                shape(gbit_per_s)
                found.links_gbit_per_s.append(gbit_per_s)
                for arm in self._order({}, False):
                    got = await (self._static(arm) if isinstance(arm, Static) else self._adaptive(prefixes, copy))
                    found.times.setdefault(_name(arm), []).append(got)
                found.times.setdefault(RECOMPUTE, []).append(Get(RECOMPUTE, self._prefill_s))
            await self._drop(copy)
            print(f"schedule: {len(found.links_gbit_per_s)} requests", flush=True)
        return found

    def _order(self, times: Mapping[str, Sequence[Get]], late: bool) -> list[Static | None]:
        """The arms of a round in an order drawn anew, `None` being adaptive; later on without slow ones."""
        slow = {name for name, got in times.items() if late and got[0].took_s > _SLOW_S and name != ADAPTIVE}
        arms = [None, *(arm for arm in self._setting.statics if arm.name not in slow)]
        return self._rng.sample(arms, len(arms))

    def _prefixes(self) -> PlannedPrefixes:
        return PlannedPrefixes(self._client, self._setting.cache.layout)

    async def _static(self, arm: Static) -> Get:
        cache = self._setting.cache
        started_s = time.monotonic()
        prefix = await get_prefix(
            self._client, cache.layout, cache.token_ids, level=arm.level, salt=arm.profile.encode()
        )
        took_s = time.monotonic() - started_s
        if prefix.tokens != self._setting.tokens:
            raise RuntimeError(f"{arm.name}: {prefix.tokens} tokens came, {prefix.miss}")
        return Get(arm.name, took_s, arm.loss_nats)

    async def _adaptive(self, prefixes: PlannedPrefixes, copy: Copy) -> Get:
        """A planned get; where the plan says to compute, time passes as if it were done."""
        cache, wish = self._setting.cache, self._setting.wish
        started_s = time.monotonic()
        planned = await prefixes.get(cache.token_ids, wish, salt=copy.salt)
        if planned.prefix is None:
            await asyncio.sleep(self._prefill_s)
            took_s = time.monotonic() - started_s
            await prefixes.service.observe(planned.plan, Outcome(self._prefill_s))
            return Get(RECOMPUTE, took_s)
        tokens = planned.prefix.tokens
        if tokens != self._setting.tokens:
            raise RuntimeError(f"{planned.plan}: {tokens} tokens came, {planned.prefix.miss}")
        # What it lost is judged by the levels that came, not by what the plan says.
        lost = self._setting.losses[copy.arm]
        loss_nats = max(lost[levels - 1] for levels in planned.prefix.levels)
        return Get(_arm(planned.plan), planned.took_s, loss_nats)

    async def _put(self, prefixes: PlannedPrefixes, found: Stay) -> Copy:
        cache = self._setting.cache
        salt = f"adaptive {next(self._numbers)}".encode()
        started_s = time.monotonic()
        plan, _ = await prefixes.put(cache.token_ids, cache.planes, self._setting.wish, salt=salt)
        # To put nothing but raw bytes is what the built-in arm does as well.
        arm = "raw" if plan.pipeline is None else _arm(plan)
        found.puts.append((arm, time.monotonic() - started_s))
        return Copy(salt, arm)

    async def _drop(self, copy: Copy) -> None:
        cache = self._setting.cache
        await self._client.delete(chunk_keys(cache.layout, cache.token_ids, salt=copy.salt))


def _name(arm: Static | None) -> str:
    return ADAPTIVE if arm is None else arm.name


def _arm(plan: Plan) -> str:
    assert plan.arm is not None, "profiles were pushed"
    return plan.arm


def profile_named(found: ProfileSet, name: str) -> Profile:
    """A profile of a set."""
    return next(profile for profile in found.profiles if profile.name == name)
