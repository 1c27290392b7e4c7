"""Ways to fetch chunks: what each loses and takes, over the link and with the decoder of the client that fetches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.controller.estimators import DecodeSpeed, LinkState, PrefillSpeed
from kvstore.controller.latency import GB, Link, Rates, Terms, Volume, fetch_terms, overlapped_s
from kvstore.controller.policy import Arm
from kvstore.plan import Context
from kvstore.profile import Profile

_PATIENCE_MIN, _PATIENCE_MAX = 2, 64
"""After how many recomputes in a row a fetch is tried: at first, and where that told nothing new."""
_TRY_MAX = 2.0
"""A fetch is tried where it is expected to take at most so many times as long as computing."""


@dataclass
class Client:
    """What is known of a link and of the client behind it."""

    link: LinkState = field(default_factory=LinkState)
    decode: DecodeSpeed = field(default_factory=DecodeSpeed)
    encode: DecodeSpeed = field(default_factory=DecodeSpeed)
    prefill: PrefillSpeed = field(default_factory=PrefillSpeed)
    reads: bool = False
    """Whether it has asked for anything."""
    computed: int = 0
    """How often in a row it was told to compute."""
    patience: int = _PATIENCE_MIN
    """How often that may be before it is told to fetch, to see."""

    @property
    def due(self) -> bool:
        """Whether it is to fetch, to see: who only computes never finds out that fetching has become faster."""
        return self.computed >= self.patience

    def fetched_well(self) -> None:
        """A fetch was faster than computing would have been: if it was only tried, it is worth trying again soon."""
        self.patience = _PATIENCE_MIN

    def told(self, *, compute: bool) -> None:
        """It was told what to do."""
        if compute:
            self.computed += 1
            return
        if self.due:
            self.patience = min(2 * self.patience, _PATIENCE_MAX)
        self.computed = 0


class Fetching(NamedTuple):
    """A way to fetch.

    Args:
        name: Of the arm.
        level: Quality level to fetch up to; None for all that are held.
        loss_nats: Worst quality loss of its chunks.
        coded_bytes: Bytes to be sent.
        read_s: Seconds to read them from their tiers.
        read_rtt_s: Longest time to the first byte of one of these.
        decode_s: Seconds to decode them, as they were measured.
    """

    name: str
    level: int | None
    loss_nats: float
    coded_bytes: int
    read_s: float
    read_rtt_s: float
    decode_s: float


class Later:
    """What becomes of a copy that is put now.

    Args:
        client: Who will fetch it.
        chunks: Into how many it is cut.
        ends_s: Time to compute it; infinite where nobody knows.
        reads: How often it will be fetched.
    """

    def __init__(self, client: Client, chunks: int, ends_s: float, reads: float) -> None:
        self._decode = client.decode
        self._chunks = chunks
        self._ends_s = ends_s
        self._reads = reads
        self._rtt_s = client.link.rtt.value
        self._now_bytes_per_s = client.link.rate.value
        past = sorted(client.link.past)
        # Five of them stand for all.
        self._past_bytes_per_s = [past[len(past) * (2 * n + 1) // 10] for n in range(5)] if past else []

    def fetch_s(self, way: Fetching) -> float:
        """Expected time of all fetches: the first one over the link as it is now, later ones as requests met it before.

        None takes longer than computing.
        """
        decode_s = way.decode_s * self._decode.factor(way.name)
        now_s = self._over_s(way, decode_s, self._now_bytes_per_s)
        past_s = [self._over_s(way, decode_s, bytes_per_s) for bytes_per_s in self._past_bytes_per_s]
        later_s = sum(past_s) / len(past_s) if past_s else now_s
        return min(1.0, self._reads) * now_s + max(0.0, self._reads - 1) * later_s

    def _over_s(self, way: Fetching, decode_s: float, bytes_per_s: float) -> float:
        fetch_s = self._rtt_s + overlapped_s((way.coded_bytes / bytes_per_s, decode_s), self._chunks)
        return min(self._ends_s, fetch_s)


def ends_s(context: Context) -> float:
    """When computing would be done."""
    return math.inf if context.prefill_s is None else context.prefill_s


def link_of(client: Client) -> Link:
    """A client's link, as it is expected to be."""
    return Link(client.link.rate.value, client.link.rtt.value)


def measured(profile: Profile, level: int, loss_nats: float, raw_bytes: float) -> Fetching:
    """A fetch of what a profile would make, by its measured ratio."""
    found = profile.levels[level]
    decode_s = raw_bytes / GB * found.decode_s_per_gb
    return Fetching(f"{profile.name}/{level}", level, loss_nats, round(raw_bytes / found.ratio), 0.0, 0.0, decode_s)


def terms_of(way: Fetching, raw_bytes: float, chunks: int, link: Link, decode: DecodeSpeed) -> Terms:
    """What a fetch is expected to take."""
    rates = Rates(
        read_bytes_per_s=way.coded_bytes / way.read_s if way.read_s else math.inf,
        read_rtt_s=way.read_rtt_s,
        decode_s_per_gb=way.decode_s * decode.factor(way.name) / (raw_bytes / GB),
    )
    return fetch_terms(Volume(raw_bytes, way.coded_bytes, chunks), link, rates)


def tries(arms: Sequence[Arm], budget_nats: float, compute_s: float, hope: float) -> list[Arm]:
    """Those of some fetches that may be tried though computing is expected to be faster.

    Args:
        arms: The fetches.
        budget_nats: Largest quality loss.
        compute_s: Expected time of computing.
        hope: How much slower the wire may be than expected, below 1, where little is known of it.
    """
    return [
        arm
        for arm in arms
        if arm.loss_nats <= budget_nats and arm.terms.slower("wire", hope).total_s <= _TRY_MAX * compute_s
    ]


def useful(arms: Sequence[Arm], budget_nats: float, *, hurried: bool) -> list[Arm]:
    """The arms that no other one beats, and those beyond the budget, which are refused by name.

    One beats another with no more bytes, no more decoding, and no more loss; where only time counts, with any loss
    that is within the budget.
    """
    kept: list[Arm] = []
    refused: list[Arm] = []
    for arm in sorted(arms, key=lambda one: one.terms.stage_s("wire")):
        if arm.loss_nats > budget_nats:
            refused.append(arm)
        elif not any(
            (hurried or other.loss_nats <= arm.loss_nats)
            and other.terms.stage_s("decode") <= arm.terms.stage_s("decode")
            for other in kept
        ):
            kept.append(arm)
    return kept + refused
