"""The controller: decides, remembers what it decided, and learns from what came of it.

It knows nothing of HTTP, tiers or engines; whoever asks brings the arms with their terms. Clients report times, and
clients may lie: a time counts only as far as this process's own clock finds it possible, a client's times correct only
what that client is told, and what all clients have in common is the median over them, one vote each.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from secrets import randbits
from typing import Any, NamedTuple

from kvstore.controller.bandit import Bandit, Residuals
from kvstore.controller.policy import RECOMPUTE, Arm, Budgeted, Choice, Policy, Prospect, Wish
from kvstore.controller.tables import renewed
from kvstore.controller.votes import Votes

_TENANTS_MAX = 1024
_PENDING_MAX = 4096
"""Of one tenant."""
_PENDING_S = 600.0
"""After this time nobody comes back to a decision any more."""
_CLOCK_SLACK_S = 0.05
"""By how much a client's time may exceed what this process's clock says went by."""


class Situation(NamedTuple):
    """What outcomes are learned by.

    Args:
        tenant: Whose request.
        link: The client's link.
        tier: The tier that is read, or `put`.
        size: Octave of the exact cache's bytes.
        load: Octave of the requests under way.
    """

    tenant: str
    link: str
    tier: str
    size: int
    load: int

    @property
    def shared(self) -> tuple[str, int, int]:
        """What is left of it without the client."""
        return self.tier, self.size, self.load


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice with its number.

    Args:
        id: What `observe` is told.
        situation: What it will be learned by.
        wish: What was asked.
        choice: What was chosen, and why.
        time_s: When, by the clock that the controller was given.
    """

    id: int
    situation: Situation
    wish: Wish
    choice: Choice
    time_s: float

    def report(self) -> dict[str, Any]:
        """As JSON, terms included."""
        return {
            "id": f"{self.id:016x}",
            "situation": self.situation._asdict(),
            "budget_nats": _finite(self.wish.budget_nats),
            "deadline_s": _finite(self.wish.deadline_s),
            "arm": self.choice.arm.name,
            "reason": self.choice.reason,
            "arms": [
                {
                    "arm": one.arm.name,
                    "loss_nats": one.arm.loss_nats,
                    "mean_s": one.mean_s,
                    "drawn_s": one.drawn_s,
                    "later_s": one.arm.later_s,
                    "terms": one.arm.terms.report(),
                }
                for one in self.choice.prospects
            ],
            "refused": list(self.choice.refused),
        }


class Ignored(StrEnum):
    """Why a report taught nothing."""

    UNKNOWN = "unknown"
    """There is no such decision, it was reported on before, or it was another tenant's."""
    OLD = "old"
    IMPLAUSIBLE = "implausible"
    """It took longer than the decision is old, or less than this server was busy with it."""


class Pending(NamedTuple):
    """A decision that was not reported on yet.

    Args:
        situation: What it will be learned by.
        arm: The arm that was taken.
        expected_s: What the model said of it.
        time_s: When.
        note: What whoever asked wanted to be told again.
    """

    situation: Situation
    arm: str
    expected_s: float
    time_s: float
    note: Any = None


@dataclass
class _Tenant:
    """What belongs to one tenant, bounded so that it takes nothing from others."""

    bandit: Bandit
    pending: OrderedDict[int, Pending] = field(default_factory=OrderedDict)


@dataclass
class Controller:
    """Decides and learns.

    Args:
        clock: Seconds, never going backwards.
        random: Where exploration comes from.
        policy: Chooses among arms.
        explores: Whether arms are drawn from what is known, or judged by their means.
    """

    clock: Callable[[], float]
    random: Random = field(default_factory=Random)
    policy: Policy = field(default_factory=Budgeted)
    explores: bool = True
    ignored: Counter[Ignored] = field(default_factory=Counter)
    _votes: Votes = field(default_factory=Votes)
    _tenants: dict[str, _Tenant] = field(default_factory=dict)

    def decide(
        self,
        situation: Situation,
        arms: Sequence[Arm],
        wish: Wish,
        *,
        wire: float = 1.0,
        hope: float = 1.0,
        note: Callable[[str], Any] | None = None,
    ) -> Decision:
        """Choose among arms.

        Args:
            situation: What the outcome will be learned by.
            arms: With their expected terms.
            wish: What the request asks.
            wire: How much slower the wire is drawn than expected, from what is known of the link; the same for all
                arms.
            hope: How much slower it may be, below 1, where little is known of it. Who computes finds out nothing of
                the link, so that is only done where a fetch would not pay even then.
            note: Makes of the arm that is taken what `observe` gives back with it.

        Raises:
            ValueError: No arm is within the budget.
        """
        tenant = self._tenant(situation.tenant)
        prospects = [self._prospect(tenant, situation, arm, wire) for arm in arms]
        choice = self.policy.choose(prospects, wish)
        if choice.arm.name == RECOMPUTE and hope < min(wire, 1.0):
            prospects = [self._prospect(tenant, situation, arm, hope) for arm in arms]
            choice = self.policy.choose(prospects, wish)
        # A number that cannot be guessed: a report is taken from whoever knows it.
        decision = Decision(randbits(63), situation, wish, choice, self.clock())
        arm = choice.arm
        noted = None if note is None else note(arm.name)
        tenant.pending[decision.id] = Pending(situation, arm.name, arm.terms.total_s, decision.time_s, noted)
        self._forget(tenant, decision.time_s)
        return decision

    def observe(self, number: int, took_s: float, *, tenant: str, at_least_s: float = 0.0) -> Pending | Ignored:
        """Learn what came of a decision.

        Args:
            number: Of the decision.
            took_s: Seconds that the client says it took.
            tenant: Who says so; others' decisions are unknown to it.
            at_least_s: Seconds that this server itself was busy with it.

        Returns:
            What was decided, or why nothing was learned; `ignored` counts that.
        """
        held = self._tenants.get(tenant)
        decided = None if held is None else held.pending.pop(number, None)
        if held is None or decided is None:
            return self._ignore(Ignored.UNKNOWN)
        elapsed_s = self.clock() - decided.time_s
        if elapsed_s > _PENDING_S:
            return self._ignore(Ignored.OLD)
        if not (0 < took_s <= elapsed_s + _CLOCK_SLACK_S) or took_s < at_least_s:
            return self._ignore(Ignored.IMPLAUSIBLE)
        situation, arm = decided.situation, decided.arm
        prior = self._prior(situation, arm)
        residual = held.bandit.observe(situation, arm, decided.expected_s, took_s, prior)
        if residual is not None:
            self._votes.cast(tenant, situation.link, situation.shared, arm, residual)
        return decided

    @property
    def given_up(self) -> int:
        """How often what was learned of an arm was given up for the model."""
        return sum(tenant.bandit.given_up for tenant in self._tenants.values())

    @property
    def pending(self) -> int:
        """Decisions that were not reported on yet."""
        return sum(len(tenant.pending) for tenant in self._tenants.values())

    def save(self) -> list[dict[str, Any]]:
        """What was learned, as JSON."""
        return [record for tenant in self._tenants.values() for record in tenant.bandit.save()]

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Add what was learned before, or elsewhere.

        Raises:
            ValueError, KeyError, TypeError: A record is not what `save` makes; those before it were added.
        """
        for record in saved:
            tenant, link, tier, size, load = record["context"]
            situation = Situation(str(tenant), str(link), str(tier), int(size), int(load))
            arm, found = str(record["arm"]), Residuals.of_record(record)
            self._tenant(situation.tenant).bandit.restore(situation, arm, found)
            if not found.cooling:
                mean = found.posterior().mean
                self._votes.cast(situation.tenant, situation.link, situation.shared, arm, mean)

    def _ignore(self, why: Ignored) -> Ignored:
        self.ignored[why] += 1
        return why

    def _tenant(self, name: str) -> _Tenant:
        return renewed(self._tenants, name, _TENANTS_MAX, lambda: _Tenant(Bandit(self.random)))

    def _forget(self, tenant: _Tenant, now_s: float) -> None:
        """Decisions that nobody will report on any more."""
        pending = tenant.pending
        while len(pending) > _PENDING_MAX or now_s - next(iter(pending.values())).time_s > _PENDING_S:
            pending.popitem(last=False)

    def _prospect(self, tenant: _Tenant, situation: Situation, arm: Arm, wire: float) -> Prospect:
        mean, drawn = tenant.bandit.look(situation, arm.name, self._prior(situation, arm.name))
        mean_s = mean * arm.terms.total_s + arm.later_s
        factor = drawn if self.explores else mean
        return Prospect(arm, mean_s, factor * arm.terms.slower("wire", wire).total_s + arm.later_s)

    def _prior(self, situation: Situation, arm: str) -> float:
        """Log-residual that other clients have seen."""
        return self._votes.prior(situation.tenant, situation.link, situation.shared, arm)


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
