"""The controller: decides, remembers what it decided, and learns from what came of it.

It knows nothing of HTTP, tiers or engines; whoever asks brings the arms with their terms. Clients report times, and
clients may lie: a time counts only as far as this process's own clock finds it possible, a client's times correct only
what that client is told, and what all clients have in common is the median over them, one vote each.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any, NamedTuple

from kvstore.controller.bandit import Bandit
from kvstore.controller.policy import RECOMPUTE, Arm, Budgeted, Choice, Policy, Prospect, Wish

_PENDING_MAX = 1 << 14
_PENDING_S = 600.0
"""After this time nobody comes back to a decision any more."""
_CLOCK_SLACK_S = 0.05
"""By how much a client's time may exceed what this process's clock says went by."""
_VOTES_MIN = 2
"""Clients whose outcomes make a prior for others."""


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
            "id": self.id,
            "situation": self.situation._asdict(),
            "budget_nats": self.wish.budget_nats,
            "deadline_s": None if math.isinf(self.wish.deadline_s) else self.wish.deadline_s,
            "arm": self.choice.arm.name,
            "reason": self.choice.reason,
            "arms": [
                {
                    "arm": one.arm.name,
                    "loss_nats": one.arm.loss_nats,
                    "mean_s": one.mean_s,
                    "drawn_s": one.drawn_s,
                    "terms": one.arm.terms.report(),
                }
                for one in self.choice.prospects
            ],
            "refused": list(self.choice.refused),
        }


@dataclass
class Ignored:
    """Reports that taught nothing, by why."""

    unknown: int = 0
    old: int = 0
    implausible: int = 0


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
    ignored: Ignored = field(default_factory=Ignored)

    def __post_init__(self) -> None:
        self.bandit = Bandit(self.random)
        self._pending: OrderedDict[int, Decision] = OrderedDict()
        # Which clients have seen an arm in a shared situation, by what the bandit calls them.
        self._voters: dict[tuple[tuple[str, int, int], str], dict[Situation, None]] = {}

    def decide(
        self, situation: Situation, arms: Sequence[Arm], wish: Wish, *, wire: float = 1.0, hope: float = 1.0
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

        Raises:
            ValueError: No arm is within the budget.
        """
        prospects = [self._prospect(situation, arm, wire) for arm in arms]
        choice = self.policy.choose(prospects, wish)
        if choice.arm.name == RECOMPUTE and hope < min(wire, 1.0):
            prospects = [self._prospect(situation, arm, hope) for arm in arms]
            choice = self.policy.choose(prospects, wish)
        # A number that cannot be guessed: reports are taken from whoever knows it.
        number = self.random.getrandbits(63)
        decision = Decision(number, situation, wish, choice, self.clock())
        self._pending[number] = decision
        while len(self._pending) > _PENDING_MAX:
            self._pending.popitem(last=False)
        return decision

    def observe(self, number: int, took_s: float, *, tenant: str, at_least_s: float = 0.0) -> Decision | None:
        """Learn what came of a decision.

        Args:
            number: Of the decision.
            took_s: Seconds that the client says it took.
            tenant: Who says so; others' decisions are unknown to it.
            at_least_s: Seconds that this server itself was busy with it.

        Returns:
            The decision, or None where nothing was learned; `ignored` counts why.
        """
        decision = self._pending.get(number)
        if decision is None or decision.situation.tenant != tenant:
            self.ignored.unknown += 1
            return None
        del self._pending[number]
        elapsed_s = self.clock() - decision.time_s
        if elapsed_s > _PENDING_S:
            self.ignored.old += 1
            return None
        if not (0 < took_s <= elapsed_s + _CLOCK_SLACK_S) or took_s < at_least_s:
            self.ignored.implausible += 1
            return None
        arm, situation = decision.choice.arm, decision.situation
        self._voters.setdefault((situation.shared, arm.name), {})[situation] = None
        prior = self._prior(situation, arm.name)
        self.bandit.observe(situation, arm.name, arm.terms.total_s, took_s, prior)
        return decision

    def save(self) -> list[dict[str, Any]]:
        """What was learned, as JSON."""
        return self.bandit.save()

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Add what was learned before, or elsewhere."""
        for record in saved:
            situation = Situation(*record["context"])
            self.bandit.restore([{**record, "context": situation}])
            self._voters.setdefault((situation.shared, str(record["arm"])), {})[situation] = None

    def _prospect(self, situation: Situation, arm: Arm, wire: float) -> Prospect:
        expected_s = arm.terms.total_s
        mean, drawn = self.bandit.look(situation, arm.name, self._prior(situation, arm.name))
        if not self.explores:
            return Prospect(arm, mean * expected_s, mean * expected_s)
        return Prospect(arm, mean * expected_s, drawn * arm.terms.slower("wire", wire).total_s)

    def _prior(self, situation: Situation, arm: str) -> float:
        """Log-residual that other clients have seen: the median of theirs."""
        voters = self._voters.get((situation.shared, arm))
        if voters is None or len(voters) < _VOTES_MIN:
            return 0.0
        votes = [
            math.log(self.bandit.look(other, arm)[0])
            for other in voters
            if (other.tenant, other.link) != (situation.tenant, situation.link) and other in self.bandit.known
        ]
        return median(votes) if len(votes) >= _VOTES_MIN else 0.0


def octave(value: float) -> int:
    """The bucket of a size or a load: its logarithm to base 2, rounded down; 0 for what is less than one."""
    return max(0, int(math.log2(value))) if value >= 1 else 0
