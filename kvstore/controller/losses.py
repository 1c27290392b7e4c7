"""What measured levels lose on prompts of a length and kind: the buckets of a set of profiles, looked up.

A length between two buckets counts as the worse of both; one beyond them as the nearest. A kind of text that nobody
measured counts as the worst one that somebody did. Each loss is taken a standard error above its mean.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.profile import Level, Profile, ProfileSet


@dataclass
class Losses:
    """Of one set of profiles.

    Args:
        found: The set.
    """

    found: ProfileSet
    lossless: frozenset[str] = field(init=False)
    """Names of the profiles whose finest level loses nothing."""
    _profiles: dict[bytes, Profile] = field(init=False)
    _lengths: dict[str, tuple[int, ...]] = field(init=False)
    _known: dict[tuple[str, tuple[int, ...]], dict[str, tuple[float, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lossless = frozenset(profile.name for profile in self.found.profiles if profile.lossless)
        self._profiles = {profile.id: profile for profile in self.found.profiles}
        lengths: dict[str, set[int]] = {}
        for profile in self.found.profiles:
            for level in profile.levels:
                for kind, tokens in _buckets(level):
                    lengths.setdefault(kind, set()).add(tokens)
        self._lengths = {kind: tuple(sorted(known)) for kind, known in lengths.items()}

    def profile(self, identity: bytes) -> Profile | None:
        """The profile of the set with this id."""
        return self._profiles.get(identity)

    def of(self, profile: Profile, workload: str, tokens: int) -> tuple[float, ...]:
        """Loss of every level of a profile of the set, in nats; infinite where nobody measured it.

        Args:
            profile: The profile.
            workload: Kind of text.
            tokens: Length of the prompt.
        """
        if workload not in self._lengths:
            every = [self.of(profile, kind, tokens) for kind in self._lengths]
            return tuple(map(max, zip(*every, strict=True))) if every else (math.inf,) * len(profile.levels)
        near = _nearest(self._lengths[workload], tokens)
        if (table := self._known.get((workload, near))) is None:
            table = self._known[workload, near] = {
                one.name: tuple(_loss(level, workload, near) for level in one.levels) for one in self.found.profiles
            }
        return table[profile.name]


def _nearest(lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The length that was measured, else those below and above it."""
    after = bisect_left(lengths, tokens)
    if after == len(lengths) or lengths[after] == tokens:
        return (lengths[min(after, len(lengths) - 1)],)
    return tuple(lengths[max(0, after - 1) : after + 1])


def _loss(level: Level, kind: str, lengths: Sequence[int]) -> float:
    found = [level.quality.get(f"{kind}-{tokens}") for tokens in lengths]
    return max(math.inf if one is None else max(one.kl_nats, 0.0) + one.standard_error for one in found)


def _buckets(level: Level) -> Iterator[tuple[str, int]]:
    """Kind and length of every bucket; one that is not named so says nothing."""
    for name in level.quality:
        kind, _, tokens = name.rpartition("-")
        if kind and tokens.isdigit():
            yield kind, int(tokens)
