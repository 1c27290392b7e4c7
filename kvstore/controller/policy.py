"""Which arm a transfer takes: the quality budget first, then the deadline, then quality, then time.

Pure: everything comes in as arguments, so that a recorded decision can be made again, by this policy or by another.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from kvstore.controller.latency import Terms

EXACT = "exact"
"""The arm that transfers without loss and without coding."""
RECOMPUTE = "recompute"
"""The arm that computes what could be fetched."""


class Arm(NamedTuple):
    """One way to come by a cache.

    Args:
        name: `exact`, `recompute`, or a profile and a level, such as `p03-klt/1`.
        loss_nats: Quality loss on prompts of this length and kind; infinite where nobody has measured it.
        terms: What it is expected to take.
        later_s: What it is expected to make later transfers take, as a put does; chosen by, but never observed.
    """

    name: str
    loss_nats: float
    terms: Terms
    later_s: float = 0.0


class Wish(NamedTuple):
    """What a request asks of its cache.

    Args:
        budget_nats: Largest quality loss.
        deadline_s: When it should be there; infinite where it is only wanted soon.
    """

    budget_nats: float
    deadline_s: float = math.inf


class Prospect(NamedTuple):
    """An arm with the times that are expected of it.

    Args:
        arm: The arm.
        mean_s: Without chance.
        drawn_s: As drawn from what is known, to explore by; the same without exploration.
    """

    arm: Arm
    mean_s: float
    drawn_s: float


class Choice(NamedTuple):
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


class Measured(NamedTuple):
    """A level of a profile, as measured.

    Args:
        name: What its arm is called.
        ratio: Bytes of the exact cache in those that are sent.
        decode_s_per_gb: Seconds to decode a GB of exact cache.
        loss_nats: Quality loss on prompts of the length and kind at hand; infinite where nobody has measured it.
    """

    name: str
    ratio: float
    decode_s_per_gb: float
    loss_nats: float


def undominated(levels: Iterable[Measured], budget_nats: float, *, hurried: bool) -> list[Measured]:
    """The levels within a budget that are the best choice somewhere; the others need not be looked at, nor tried.

    Args:
        levels: All there are.
        budget_nats: Largest quality loss.
        hurried: Whether only time counts. Where a deadline leaves room for quality, less loss is worth something too.
    """
    within = sorted((one for one in levels if _within(one.loss_nats, budget_nats)), key=lambda one: -one.ratio)
    kept: list[Measured] = []
    for one in within:
        if not any(
            other.decode_s_per_gb <= one.decode_s_per_gb and (hurried or other.loss_nats <= one.loss_nats)
            for other in kept
        ):
            kept.append(one)
    return kept


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
        within = tuple(one for one in prospects if _within(one.arm.loss_nats, wish.budget_nats))
        refused = tuple(one.arm.name for one in prospects if one not in within)
        if not within:
            raise ValueError("no arm is within the quality budget, not even an exact one")
        timely = [one for one in within if max(one.mean_s, one.drawn_s) <= wish.deadline_s < math.inf]
        if timely:
            # Two exact arms are as good as one another: then the faster one.
            best = min(timely, key=lambda one: (max(one.arm.loss_nats, 0.0), one.drawn_s))
            return Choice(best.arm, "quality", within, refused)
        best = min(within, key=lambda one: one.drawn_s)
        return Choice(best.arm, "fastest", within, refused)


def _within(loss_nats: float, budget_nats: float) -> bool:
    """Whether a loss is within a budget; what nobody measured is beyond any."""
    return loss_nats <= budget_nats and loss_nats < math.inf
