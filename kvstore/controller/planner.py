"""The planner: makes arms of what is held and what was measured, has the controller choose, and learns from outcomes.

It knows what is asked, what the tiers hold, the profiles of the namespace, and what the links, tiers and clients were
like so far; of HTTP and torch it knows nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from statistics import median
from typing import NamedTuple

from kvstore.backend import Copy, Held
from kvstore.controller.controller import Controller, Decision, Ignored, Pending, Situation
from kvstore.controller.estimators import Level, LinkState, octave
from kvstore.controller.estimators import Load as LoadState
from kvstore.controller.fetching import Client, Fetching, Later, ends_s, link_of, measured, terms_of, tries, useful
from kvstore.controller.latency import GB, Rates, Volume, compute_terms, put_terms
from kvstore.controller.losses import Losses
from kvstore.controller.policy import EXACT, RECOMPUTE, Arm, Wish
from kvstore.controller.tables import renewed
from kvstore.plan import Context, Outcome
from kvstore.profile import Profile

PUT = "put"
"""The tier of a put, in its situation."""
_LINKS_MAX = 256
_TENANTS_MAX = 1024
_TIERS_MAX = 64
_NEIGHBOURS_MIN = 3
"""So many links of a tenant say what a new one may be like."""
_UNKNOWN_PREFILL_S = 3600.0
"""Where nobody knows what computing takes, it is done where nothing else is allowed."""
_READS = 1.0
"""How often a chunk that is put is expected to be fetched, where nobody says."""
_TIER_BYTES_PER_S = {"gpu": 2e11, "host": 2e10, "lmdb": 1e9, "s3": 2e8}
_TIER_RTT_S = {"gpu": 1e-5, "host": 1e-5, "lmdb": 1e-3, "s3": 0.05}
"""What tiers are expected to be like before anything was read from them."""

_COPY = attrgetter("copy")


class Who(NamedTuple):
    """Who asks.

    Args:
        tenant: Whose chunks.
        link: Which of the tenant's clients: its address, and the name that it gave itself.
    """

    tenant: str
    link: str


class Run(NamedTuple):
    """Chunks that are held alike."""

    copy: Copy
    chunks: int


class Note(NamedTuple):
    """What is needed to learn from an outcome.

    Args:
        codec_s: Seconds of decoding, as they were measured.
        tokens: Tokens that are fetched or computed.
        compute_s: Expected time of computing instead.
    """

    codec_s: float
    tokens: int
    compute_s: float = 0.0


@dataclass
class Planner:
    """Plans transfers of a server's clients.

    Args:
        controller: Decides; its random numbers are drawn on here, too.
        budget_nats: Quality budget of requests that name none.
        load: Requests under way, smoothed.
    """

    controller: Controller
    budget_nats: float = 0.01
    load: LoadState = field(default_factory=LoadState)
    tiers: dict[str, LinkState] = field(default_factory=dict)
    _clients: dict[str, dict[str, Client]] = field(default_factory=dict)

    def plan_get(
        self, who: Who, losses: Losses, held: Sequence[Held], context: Context, asked: int
    ) -> tuple[Decision, int | None]:
        """How to come by chunks, some of which are held.

        Args:
            who: Who asks.
            losses: Of the namespace's profiles.
            held: What the tiers hold of the leading chunks; at least one.
            context: What the request says of itself.
            asked: How many chunks it asks for.

        Returns:
            The decision, and the level to fetch up to, where that is what it says.
        """
        client = self._client(who)
        client.reads = True
        runs = [Run(copy, len(list(same))) for copy, same in groupby(map(_COPY, held))]
        tokens = len(held) * context.chunk_tokens
        ways = list(self._ways(losses, runs, context, tokens))
        raw_bytes = float(len(held) * context.chunk_bytes)
        link = link_of(client)
        fetches = [
            Arm(way.name, way.loss_nats, terms_of(way, raw_bytes, len(held), link, client.decode)) for way in ways
        ]
        budget_nats = self._budget_nats(context)
        fetches = useful(fetches, budget_nats, hurried=context.deadline_s is None)
        compute = _compute(client, context, tokens, asked)
        arms = [*fetches, compute]
        if client.due and context.deadline_s is None:
            rate = client.link.rate
            arms = tries(fetches, budget_nats, compute.terms.total_s, rate.value / rate.hoped) or arms
        situation = self._situation(who, runs[0].copy.tier, raw_bytes)
        by_name = {way.name: way for way in ways}

        def note(arm: str) -> Note:
            decode_s = by_name[arm].decode_s if arm in by_name else 0.0
            return Note(decode_s, tokens, compute.terms.total_s)

        decision = self._decide(situation, arms, context, client, note)
        way = by_name.get(decision.choice.arm.name)
        client.told(compute=way is None)
        return decision, None if way is None else way.level

    def plan_put(self, who: Who, losses: Losses, chunks: int, context: Context) -> tuple[Decision, Profile | None]:
        """How to encode chunks that are about to be put.

        Every profile of the set whose finest level is within the budget is an arm, and so is not to encode at all. An
        arm costs what the put takes, and what the fetches of it would take after that: the first one over the
        link as it is now, later ones as the last requests met it. Whoever can compute sooner than that fetches nothing.

        Returns:
            The decision, and the profile; None for no compression.
        """
        client, reader = self._client(who), self._reader(who)
        link, raw_bytes = link_of(client), float(chunks * context.chunk_bytes)
        later = Later(reader, chunks, ends_s(context), _READS if context.reads is None else context.reads)
        budget_nats = self._budget_nats(context)
        exact = Fetching(EXACT, None, 0.0, round(raw_bytes), 0.0, 0.0, 0.0)
        terms = put_terms(Volume(raw_bytes, raw_bytes, chunks), link, Rates())
        arms = [Arm(EXACT, 0.0, terms, later.fetch_s(exact))]
        profiles = {profile.name: profile for profile in losses.found.profiles}
        for profile in profiles.values():
            lost = losses.of(profile, context.workload, chunks * context.chunk_tokens)
            finest_nats = 0.0 if profile.name in losses.lossless else lost[-1]
            if finest_nats > budget_nats:
                continue
            # The coarsest level that will do has the fewest bytes, and is decoded fastest.
            level = next((number for number, loss_nats in enumerate(lost) if loss_nats <= budget_nats), len(lost) - 1)
            way = measured(profile, level, finest_nats, raw_bytes)
            rates = Rates(encode_s_per_gb=profile.encode_s_per_gb * client.encode.factor(profile.name))
            coded_bytes = raw_bytes / profile.levels[-1].ratio
            terms = put_terms(Volume(raw_bytes, coded_bytes, chunks), link, rates)
            arms.append(Arm(profile.name, finest_nats, terms, later.fetch_s(way)))
        situation = self._situation(who, PUT, raw_bytes)

        def note(arm: str) -> Note:
            seconds_per_gb = profiles[arm].encode_s_per_gb if arm in profiles else 0.0
            return Note(raw_bytes / GB * seconds_per_gb, 0)

        decision = self._decide(situation, arms, context, client, note)
        return decision, profiles.get(decision.choice.arm.name)

    def coarsest(self, losses: Losses, copy: Copy, context: Context, chunks: int) -> int | None:
        """The coarsest level of a copy's profile within the budget, held or not; None where there is none."""
        profile = losses.profile(copy.profile)
        if profile is None:
            return None
        lost = losses.of(profile, context.workload, chunks * context.chunk_tokens)
        budget_nats = self._budget_nats(context)
        return next((level for level, loss_nats in enumerate(lost) if loss_nats <= budget_nats), None)

    def observe(self, tenant: str, number: int, outcome: Outcome) -> Pending | Ignored:
        """Learn what came of a decision.

        Returns:
            What was decided, or why nothing was learned.
        """
        decided = self.controller.observe(number, outcome.took_s, tenant=tenant)
        if isinstance(decided, Ignored):
            return decided
        # Whoever says so, it teaches about the link that the decision was for.
        client, note = self._client(Who(tenant, decided.situation.link)), decided.note
        if decided.arm == RECOMPUTE:
            client.prefill.observe(note.tokens, outcome.took_s)
            client.link.pass_by()
            client.decode.fade()
            return decided
        if outcome.took_s < note.compute_s:
            client.fetched_well()
        if outcome.wire_s:
            wire_s = min(outcome.wire_s, outcome.took_s)
            # Receiving and decoding share the client's cores.
            shared_s = wire_s + (outcome.codec_s or 0.0) - outcome.took_s
            held_up = shared_s > wire_s / 2
            client.link.observe(outcome.size_bytes, wire_s, first_byte_s=outcome.first_byte_s, held_up=held_up)
        codec = client.encode if decided.situation.tier == PUT else client.decode
        if outcome.codec_s and note.codec_s:
            codec.observe(decided.arm, note.codec_s, outcome.codec_s)
        elif not note.codec_s:
            codec.fade()
        return decided

    def observe_read(self, tier: str, size_bytes: int, took_s: float) -> None:
        """Learn how fast a tier is, from a read by this server's own clock."""
        self._tier(tier).observe(size_bytes, took_s)

    def client_report(self, who: Who) -> dict[str, object]:
        """What is known of a client, as JSON."""
        client = self._client(who)
        return {**client.link.report(), "decode_factor": client.decode.common.value}

    def _decide(
        self, situation: Situation, arms: Sequence[Arm], context: Context, client: Client, note: Callable[[str], Note]
    ) -> Decision:
        deadline_s = math.inf if context.deadline_s is None else context.deadline_s
        wish = Wish(self._budget_nats(context), deadline_s)
        rate = client.link.rate
        wire = rate.value / rate.drawn(self.controller.random) if self.controller.explores else 1.0
        return self.controller.decide(situation, arms, wish, wire=wire, hope=rate.value / rate.hoped, note=note)

    def _budget_nats(self, context: Context) -> float:
        return self.budget_nats if context.budget_nats is None else context.budget_nats

    def _situation(self, who: Who, tier: str, raw_bytes: float) -> Situation:
        return Situation(who.tenant, who.link, tier, octave(raw_bytes), octave(self.load.value))

    def _ways(self, losses: Losses, runs: Sequence[Run], context: Context, tokens: int) -> Iterator[Fetching]:
        """All levels that the chunks can be fetched up to; chunks that have fewer come with all that they have."""
        profiles = {run.copy.profile: losses.profile(run.copy.profile) for run in runs}
        named = next(iter(profiles.values())) if len(profiles) == 1 else None
        levels_max = max(len(run.copy.level_bytes) for run in runs)
        for level in range(levels_max):
            parts = [self._part(losses, profiles[run.copy.profile], run, level, context, tokens) for run in runs]
            last = level == levels_max - 1
            lost = max(part.loss_nats for part in parts)
            others = "mixed" if len(profiles) > 1 else "unknown"
            name = f"{named.name}/{level}" if named else EXACT if last and not lost else f"{others}/{level}"
            yield Fetching(
                name,
                None if last else level,
                lost,
                sum(part.coded_bytes for part in parts),
                sum(part.read_s for part in parts),
                max(part.read_rtt_s for part in parts),
                sum(part.decode_s for part in parts),
            )

    def _part(
        self, losses: Losses, profile: Profile | None, run: Run, level: int, context: Context, tokens: int
    ) -> Fetching:
        """What a run of chunks contributes to a fetch up to a level."""
        copy, chunks = run
        level = min(level, len(copy.level_bytes) - 1)
        coded_bytes = chunks * (copy.head_bytes + sum(copy.level_bytes[: level + 1]))
        tier = self._tier(copy.tier)
        exact = copy.lossless and level == copy.levels - 1
        known = profile is not None and level < len(profile.levels)
        loss_nats, decode_s = 0.0 if exact else math.inf, 0.0
        if profile is not None and known:
            decode_s = chunks * context.chunk_bytes / GB * profile.levels[level].decode_s_per_gb
            loss_nats = 0.0 if exact else losses.of(profile, context.workload, tokens)[level]
        # What stands on a lossy prefix is worse than its own level says, and by how much its copy does not tell.
        loss_nats = math.inf if copy.inexact else loss_nats
        return Fetching("", level, loss_nats, coded_bytes, coded_bytes / tier.rate.value, tier.rtt.value, decode_s)

    def _tier(self, name: str) -> LinkState:
        def made() -> LinkState:
            return LinkState(Level(_TIER_BYTES_PER_S.get(name, 1e9)), Level(_TIER_RTT_S.get(name, 1e-3)))

        return renewed(self.tiers, name, _TIERS_MAX, made)

    def _reader(self, who: Who) -> Client:
        """Who is expected to fetch what somebody puts.

        Whoever fetches comes back to what it has put; of others the tenant's client in the middle of those that fetch.
        """
        own = self._client(who)
        readers = [one for one in self._clients.get(who.tenant, {}).values() if one.reads]
        if own.reads or not readers:
            return own
        readers.sort(key=lambda one: one.link.rate.value)
        return readers[(len(readers) - 1) // 2]

    def _client(self, who: Who) -> Client:
        clients = renewed(self._clients, who.tenant, _TENANTS_MAX, dict)

        def made() -> Client:
            known = [one.link.rate.value for one in clients.values() if one.link.rate.seen]
            if len(known) < _NEIGHBOURS_MIN:
                return Client()
            return Client(LinkState(rate=Level(median(known))))

        return renewed(clients, who.link, _LINKS_MAX, made)


def _compute(client: Client, context: Context, tokens: int, asked: int) -> Arm:
    """The arm that computes what is held instead of fetching it."""
    if context.prefill_s is not None:
        # Less than all may be held; computing the rest comes on top of either.
        prefill_s: float | None = context.prefill_s * tokens / max(tokens, asked * context.chunk_tokens)
    else:
        prefill_s = client.prefill.seconds(tokens)
    return Arm(RECOMPUTE, 0.0, compute_terms(_UNKNOWN_PREFILL_S if prefill_s is None else prefill_s))
