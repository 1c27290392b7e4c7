"""Which arm a transfer takes: the quality budget first, then the deadline, then quality, then time.

Pure: everything comes in as arguments, so that a recorded decision can be made again, by this policy or by another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.controller.latency import Terms

EXACT = "exact"
"""The arm that transfers without loss and without coding."""
RECOMPUTE = "recompute"
"""The arm that computes what could be fetched."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to come by a cache.

    Args:
        name: `exact`, `recompute`, or a profile and a level, such as `p03-klt/1`.
        loss_nats: Quality loss on prompts of this length and kind; infinite where nobody has measured it.
        terms: What it is expected to take.
    """

    name: str
    loss_nats: float
    terms: Terms


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks of its cache.

    Args:
        budget_nats: Largest quality loss.
        deadline_s: When it should be there; infinite where it is only wanted soon.
    """

    budget_nats: float
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Prospect:
    """An arm with the times that are expected of it.

    Args:
        arm: The arm.
        mean_s: Without chance.
        drawn_s: As drawn from what is known, to explore by; the same without exploration.
    """

    arm: Arm
    mean_s: float
    drawn_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why.

    Args:
        arm: The arm.
        reason: `quality` (the least loss that meets the deadline) or `fastest`.
        prospects: All arms within the budget.
        refused: Names of the others.
    """

    arm: Arm
    reason: str
    prospects: tuple[Prospect, ...]
    refused: tuple[str, ...]


class Policy(Protocol):
    """Chooses among arms."""

    def choose(self, prospects: Sequence[Prospect], wish: Wish) -> Choice:
        """The arm to take.

        Raises:
            ValueError: No arm is within the budget.
        """
        ...


class Budgeted:
    """Arms beyond the budget are never taken; of the others the least loss that meets the deadline, else the fastest.

    Exploration never breaks a deadline knowingly: what is drawn and what is expected must both meet it.
    """

    def choose(self, prospects: Sequence[Prospect], wish: Wish) -> Choice:
        within = tuple(one for one in prospects if one.arm.loss_nats <= wish.budget_nats)
        refused = tuple(one.arm.name for one in prospects if one.arm.loss_nats > wish.budget_nats)
        if not within:
            raise ValueError("no arm is within the quality budget, not even an exact one")
        timely = [one for one in within if max(one.mean_s, one.drawn_s) <= wish.deadline_s < math.inf]
        if timely:
            # Two exact arms are as good as one another: then the faster one.
            best = min(timely, key=lambda one: (max(one.arm.loss_nats, 0.0), one.drawn_s))
            return Choice(best.arm, "quality", within, refused)
        best = min(within, key=lambda one: one.drawn_s)
        return Choice(best.arm, "fastest", within, refused)
