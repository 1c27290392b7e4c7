"""How many levels a chunk keeps in a tier without room, learned from the fetches that follow.

Room in a tier has a price: what the bytes are worth that it gives up next. A chunk keeps the levels whose worth exceeds
their price by most:

    sum over the levels j that are kept of  P(level j is asked for) * (seconds below - seconds here)  -  price * bytes

*Below* is where a fetch of level j that comes to this tier finds it otherwise: in a slower one, or nowhere, so that it
is computed again. The price is the same sum for the chunks that the tier gives up, of which a share is asked for again,
over their bytes. Bytes are those that the profile's levels take of the exact cache, as measured.

What fetches ask for is learned in discounted Beta posteriors, by profile, by how often the chunk was read and by what
was last asked of it: an application that asked for a level once mostly asks for it again, and what all applications
share is asked for at every level. Levels that look useless are still tried now and then, because what decides is drawn
from the posteriors (Thompson sampling).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from random import Random
from typing import NamedTuple

from kvstore.backend import Held
from kvstore.backends.policies import Fetched, FetchedChunk, Load, Placement, StaticPlacement, TierRead
from kvstore.profile import Profile, ProfileSet

BUDGET_NATS = 0.01
"""Quality loss that fetches allow where nothing else is said."""

_NAMESPACES_MAX = 4096
"""Those beyond are left to the fallback."""
_CHUNK_KEPT = 1 - 1 / 32768
"""What a fetch of a chunk counts after the next one. Chunks stay for long, so what is asked lately is not enough."""
_READ_KEPT = 1 - 1 / 256
"""What a read of a tier counts after the next one."""
_REDRAWN_CHUNKS = 256
"""Chunks fetched after which all is decided anew; until then a decision is a look into a table."""
_READS_MAX = 7
_PRIOR_GB = 1.0
"""So many GB were read, as it were, at the rates that tiers are expected to have."""
_PRIOR_CHUNKS = 0.5
"""So many chunks were found, as it were, in every tier and in the one below it."""
_S_PER_GB = {"gpu": 0.01, "host": 0.1, "lmdb": 0.5, "s3": 3.0}
_S_PER_GB_UNKNOWN = 1.0
_NOWHERE = ""


@dataclass(slots=True)
class Demand:
    """Whether fetches that ask for a level ask for the next one, too: a discounted Beta posterior.

    Args:
        more: Fetches that did.
        rest: Fetches that did not.
    """

    more: float = 0.5
    rest: float = 0.5

    def observe(self, more: bool) -> None:
        """One more fetch."""
        self.more = _CHUNK_KEPT * self.more + more
        self.rest = _CHUNK_KEPT * self.rest + (not more)

    def drawn(self, random: Random) -> float:
        """A share drawn from what is known."""
        return random.betavariate(self.more + 0.5, self.rest + 0.5)


class Levels(NamedTuple):
    """What a set says of the levels of a profile.

    Args:
        sizes: Bytes of each, those below it included, for a byte of exact cache.
        floor: The lowest one within the quality budget.
    """

    sizes: tuple[float, ...]
    floor: int


class _Class(NamedTuple):
    """Chunks that are alike, as far as demand is concerned."""

    asked: int | None
    reads: int


_ALL = _Class(None, -1)


@dataclass
class _Profile:
    """A profile of some namespace, and what fetches taught of it."""

    levels: Levels
    asks: dict[tuple[_Class, int], Demand] = field(default_factory=dict)
    found: dict[tuple[int, str], float] = field(default_factory=dict)

    def observe(self, chunk: FetchedChunk, tiers: Sequence[str]) -> None:
        """Learn from a fetch of a chunk."""
        floor, top = self.levels.floor, len(self.levels.sizes) - 1
        level = min(max(chunk.level, floor), top)
        for above in range(floor + 1, min(level + 1, top) + 1):
            for alike in (_Class(chunk.asked, min(chunk.reads, _READS_MAX)), _ALL):
                self.asks.setdefault((alike, above), Demand()).observe(level >= above)
        for tier in (*tiers, _NOWHERE):
            self.found[level, tier] = _CHUNK_KEPT * self.found.get((level, tier), 0.0) + (tier == chunk.tier)

    def shares(self, alike: _Class, random: Random) -> list[float]:
        """Shares of fetches that ask for each level; those that ask for less than the floor get the floor."""
        floor, top = self.levels.floor, len(self.levels.sizes) - 1
        shares = [0.0] * (top + 1)
        shares[floor] = 1.0
        for above in range(floor + 1, top + 1):
            demand = self.asks.get((alike, above)) or self.asks.get((_ALL, above)) or Demand()
            shares[above] = shares[above - 1] * demand.drawn(random)
            shares[above - 1] -= shares[above]
        return shares


class LearnedPlacement:
    """Satisfies `Placement` for chunks of profiles that it knows; the others are left to another rule.

    Args:
        tiers: Names of the tiers, the fastest first.
        random: Where exploration comes from.
        fallback: Decides on blobs, lossless frames and unknown profiles.
        budget_nats: Quality loss that fetches allow. Levels of a known profile are never cut below it.
        full_share: Share of a tier's budget from which on there is no room.
        compute_s_per_gb: Seconds to compute a GB of exact cache again.
        decided: Told of every decision: tier and level.
    """

    def __init__(
        self,
        tiers: Sequence[str],
        random: Random,
        *,
        fallback: Placement | None = None,
        budget_nats: float = BUDGET_NATS,
        full_share: float = 1.0,
        compute_s_per_gb: float = 1.0,
        decided: Callable[[str, int], None] | None = None,
    ) -> None:
        self._tiers = tuple(tiers)
        self._random = random
        self._fallback = fallback or StaticPlacement()
        self._budget_nats = budget_nats
        self._full_share = full_share
        self._compute_s_per_gb = compute_s_per_gb
        self._tell = decided
        self._sets: dict[bytes, Mapping[bytes, Levels]] = {}
        self._profiles: dict[bytes, _Profile] = {}
        self._paces = {tier: _Pace(_S_PER_GB.get(tier, _S_PER_GB_UNKNOWN)) for tier in tiers}
        self._decided: dict[tuple[bytes, str, _Class], int] = {}
        self._chunks = 0

    def know(self, namespace: bytes, found: ProfileSet | None) -> None:
        """Use a namespace's set of profiles from now on, or none any more; what fetches taught is kept.

        Frames do not name their namespace to a placement. Where sets of two namespaces say different things of one
        pipeline, the higher floor counts.
        """
        before = self._sets.pop(namespace, {})
        after = {} if found is None else levels_of(found, self._budget_nats)
        if after and len(self._sets) < _NAMESPACES_MAX:
            self._sets[namespace] = after
        for profile in {*before, *after}:
            self._update(profile)
        self._decided.clear()

    def knows(self, profile: bytes) -> bool:
        """Whether a set says something of the profile with this id."""
        return profile in self._profiles

    def __call__(self, held: Held, tier: str, load: Load) -> int:
        copy = held.copy
        known = self._profiles.get(copy.profile)
        if known is None or copy.levels != len(known.levels.sizes) or tier not in self._paces:
            return self._fallback(held, tier, load)
        if load.used_share <= self._full_share:
            return len(copy.level_bytes) - 1
        alike = _Class(load.asked, min(load.reads, _READS_MAX))
        level = self._decided.get((copy.profile, tier, alike))
        if level is None:
            level = self._decided[copy.profile, tier, alike] = self._decide(known, tier, load, alike)
        return min(level, len(copy.level_bytes) - 1)

    def fetched(self, fetch: Fetched) -> None:
        """Learn from a fetch."""
        for read in fetch.reads:
            if read.tier in self._paces:
                self._paces[read.tier].observe(read)
        for chunk in fetch.chunks:
            if (known := self._profiles.get(chunk.profile)) is not None:
                known.observe(chunk, self._tiers)
                self._chunks += 1
        if self._chunks >= _REDRAWN_CHUNKS:
            self._chunks = 0
            self._decided.clear()

    def _update(self, profile: bytes) -> None:
        said = [known[profile] for known in self._sets.values() if profile in known]
        if not said:
            self._profiles.pop(profile, None)
            return
        levels = max(said, key=lambda one: one.floor)
        held = self._profiles.get(profile)
        if held is None or len(held.levels.sizes) != len(levels.sizes) or held.levels.floor != levels.floor:
            self._profiles[profile] = _Profile(levels)
        else:
            held.levels = levels

    def _decide(self, known: _Profile, tier: str, load: Load, alike: _Class) -> int:
        """The levels that are worth most beyond their price."""
        sizes, floor = known.levels
        saved_s = self._saved_s(known, tier)
        shares = known.shares(_ALL, self._random)
        worth = list(accumulate(map(mul, shares, saved_s)))
        price = load.lost * max(worth[level] / sizes[level] for level in range(floor, len(sizes)))
        asked = [_ever(load.again, share) for share in known.shares(alike, self._random)]
        worth = list(accumulate(map(mul, asked, saved_s)))
        best = max(range(floor, len(sizes)), key=lambda level: worth[level] - price * sizes[level])
        if self._tell is not None:
            self._tell(tier, best)
        return best

    def _saved_s(self, known: _Profile, tier: str) -> list[float]:
        """Seconds for a GB of exact cache that a fetch of each level saves where it finds it in a tier.

        They are weighted with the share of these fetches that come to the tier, because none above it has the level.
        """
        depth = self._tiers.index(tier)
        places = (*self._tiers, _NOWHERE)
        saved_s = []
        for level, size in enumerate(known.levels.sizes):
            found = [known.found.get((level, place), 0.0) for place in places]
            found[depth] += _PRIOR_CHUNKS
            found[depth + 1] += _PRIOR_CHUNKS
            below = sum(found[depth + 1 :])
            below_s = sum(n * self._seconds(places[at], size) for at, n in enumerate(found) if at > depth) / below
            share = sum(found[depth:]) / sum(found)
            saved_s.append(share * max(0.0, below_s - self._seconds(tier, size)))
        return saved_s

    def _seconds(self, place: str, size: float) -> float:
        return size * self._paces[place].s_per_gb if place else self._compute_s_per_gb


@dataclass(slots=True)
class _Pace:
    """Seconds that a tier takes for a GB, round trips included: a discounted mean.

    Not an estimate of what the tier is like now, as `estimators.Level` is: a chunk that is placed now is fetched while
    the tier is like it has been on average, and one slow hour costs more than three fast ones save.
    """

    took_s: float
    gb: float = _PRIOR_GB

    def observe(self, read: TierRead) -> None:
        """Learn from a read."""
        if read.took_s > 0 and read.size_bytes > 0:
            self.took_s = _READ_KEPT * self.took_s + read.took_s
            self.gb = _READ_KEPT * self.gb + read.size_bytes / 1e9

    @property
    def s_per_gb(self) -> float:
        """The mean."""
        return self.took_s / self.gb


def levels_of(found: ProfileSet, budget_nats: float) -> dict[bytes, Levels]:
    """Levels of the profiles of a set that there is a choice of: lossy ones with some level within the budget."""
    known = {}
    for profile in found.profiles:
        floor = next((n for n, loss in enumerate(_losses(profile)) if loss <= budget_nats), None)
        if floor is not None and len(profile.levels) > 1 and not profile.lossless:
            known[profile.id] = Levels(tuple(1 / level.ratio for level in profile.levels), floor)
    return known


def _losses(profile: Profile) -> list[float]:
    """The loss of each level on the prompts on which it is worst."""
    return [max(quality.kl_nats for quality in level.quality.values()) for level in profile.levels]


def _ever(again: float, share: float) -> float:
    """Probability that a level is asked for before a chunk is asked for no more.

    Args:
        again: Probability of each further fetch of the chunk.
        share: Share of fetches that ask for the level.
    """
    never = 1 - again * (1 - share)
    return again * share / never if never > 0 else 1.0
