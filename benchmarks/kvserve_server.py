"""A kvstore server that plans as KVServe's published controller would: for benchmarks.service.

    python -m benchmarks.kvserve_server --profiles SET --rate FILE --chunk-bytes N [arguments of kvstore serve]

KVServe is not told what its link carries: its code takes that from the configuration. Here a file says it, which the
benchmark writes whenever it sets the rate.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.controller_regret import KVServe, Moment, World
from kvstore.cli import main as kvstore_main
from kvstore.controller.controller import Controller, Ignored, Pending
from kvstore.controller.latency import PUT
from kvstore.controller.policy import EXACT, RECOMPUTE, Choice, Measured, Prospect, Wish
from kvstore.profile import Level, Profile, ProfileSet
from kvstore.profile_sets import read_set
from kvstore.server import plan

VERSION = "A"
"""Of the two published versions the one that loses less to an oracle; see benchmarks.controller_regret."""


@dataclass(frozen=True)
class Transfer(Moment):
    """A transfer of so many bytes of exact cache."""

    exact_bytes: float = 0.0

    @property
    def raw_bytes(self) -> float:
        return self.exact_bytes


@dataclass
class Published:
    """KVServe's controller as a policy of the planner's.

    It chooses a profile when chunks are put, by the time that it expects of the whole transfer; when they are fetched,
    it only chooses between fetching and computing. What it corrects itself by is the put and the fetch together.

    Args:
        found: Its profiles, of one level each.
        rate: File that says the link's rate, Gb/s.
        chunk_bytes: Bytes of the exact cache of a chunk.
        seed: Of its random tries.
    """

    found: ProfileSet
    rate: Path
    chunk_bytes: int
    seed: int = 0
    _theirs: KVServe = field(init=False)
    _put_s: dict[tuple[str, int], float] = field(default_factory=dict)
    _chunks: int = 0

    def __post_init__(self) -> None:
        levels = {profile.name: _measured(profile) for profile in self.found.profiles}
        levels[EXACT] = Measured(EXACT, 1.0, 0.0, 0.0)
        self._theirs = KVServe(World(levels, {}), self.seed, version=VERSION)

    def choose(self, prospects: Sequence[Prospect], wish: Wish) -> Choice:
        """As the protocol `Policy` asks."""
        within = tuple(one for one in prospects if one.arm.loss_nats <= wish.budget_nats)
        refused = tuple(one.arm.name for one in prospects if one not in within)
        by_name = {one.arm.name.partition("/")[0]: one for one in within}
        others = [one for name, one in by_name.items() if name != RECOMPUTE]
        if not others:
            return Choice(by_name[RECOMPUTE].arm, "fastest", within, refused)
        # One request after the other: what comes of it is told before the next one.
        self._chunks = others[0].arm.terms.chunks
        moment = self._moment(self._chunks)
        if others[0].arm.terms.names is PUT:
            name = self._theirs.transfer(moment)[1]
        else:
            name = self._fetched(others[0], by_name.get(RECOMPUTE), moment)
        return Choice(by_name.get(name, by_name[next(iter(by_name))]).arm, "fastest", within, refused)

    def learn(self, decided: Pending, took_s: float) -> None:
        """What came of a decision."""
        arm, _, level = decided.arm.partition("/")
        if not level:
            self._put_s[arm, self._chunks] = took_s
            return
        whole_s = self._put_s.get((arm, self._chunks), 0.0) + took_s
        self._theirs.observe(self._moment(self._chunks), arm, 0.0, 0.0, whole_s)

    def _fetched(self, held: Prospect, computed: Prospect | None, moment: Transfer) -> str:
        """Fetching what is held, or computing it where even that is expected to be faster."""
        name = held.arm.name.partition("/")[0]
        known = name in {profile.name for profile in self.found.profiles}
        expected_s = self._theirs.expected_s(name, moment) if known else moment.raw_bytes / moment.bytes_per_s
        return RECOMPUTE if computed is not None and computed.mean_s < expected_s else name

    def _moment(self, chunks: int) -> Transfer:
        bytes_per_s = float(self.rate.read_text("utf-8")) * 1e9 / 8
        return Transfer(chunks, bytes_per_s, 1.0, float(chunks * self.chunk_bytes))


@dataclass
class PublishedController(Controller):
    """A controller that tells its policy what came of decisions."""

    def observe(self, number: int, took_s: float, *, tenant: str, at_least_s: float = 0.0) -> Pending | Ignored:
        decided = super().observe(number, took_s, tenant=tenant, at_least_s=at_least_s)
        if isinstance(decided, Pending) and isinstance(self.policy, Published):
            self.policy.learn(decided, took_s)
        return decided


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kvserve_server")
    parser.add_argument("--profiles", type=Path, required=True, help="set that it chooses from")
    parser.add_argument("--rate", type=Path, required=True, help="file with the link's rate, Gb/s")
    parser.add_argument("--chunk-bytes", type=int, required=True, help="bytes of the exact cache of a chunk")
    args, rest = parser.parse_known_args(argv)
    policy = Published(read_set(args.profiles), args.rate, args.chunk_bytes)
    # No setting of a server chooses a policy: this one is for comparison only.
    plan.Controller = partial(PublishedController, policy=policy, explores=False)  # type: ignore[attr-defined, assignment]
    return kvstore_main(["serve", *rest])


def loss_nats(level: Level) -> float:
    """What a level loses in the worst bucket, a standard error above the mean."""
    return max(one.kl_nats + one.standard_error for one in level.quality.values())


def _measured(profile: Profile) -> Measured:
    """As KVServe sees a profile: of its codec it charges the mean of encoding and decoding."""
    level = profile.levels[-1]
    codec_s_per_gb = (profile.encode_s_per_gb + level.decode_s_per_gb) / 2
    return Measured(profile.name, level.ratio, codec_s_per_gb, loss_nats(level))


if __name__ == "__main__":
    raise SystemExit(main())
