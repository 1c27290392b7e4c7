"""What the latency model gets wrong, learned: Thompson sampling on the logarithm of observed over expected time.

Every arm in every context has a Normal-Gamma posterior of that logarithm, discounted, so that it follows drift. With
nothing seen it is centred on zero, which is the model as it stands. Sums are all that is kept, so posteriors of several
servers can be added.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

_DISCOUNT = 0.97
"""What an observation counts after the next one: some 33 of them are remembered."""
_PRIOR_COUNT = 2.0
"""How many observations the prior mean counts as."""
_PRIOR_SHAPE = 2.0
_PRIOR_DEVIATION = 0.12
"""Prior standard deviation of a logarithm: the estimators know the rest."""
_RESIDUAL_MAX = math.log(8)
"""Residuals count as no larger: what took a hundred times too long does not say that everything will."""
_FIRST_MAX = 0.7
"""The first outcomes of an arm count as no farther from what was expected: a factor of two."""
_BAND = 2.5
"""Standard deviations within which outcomes are expected."""
_STRIKES = 3
"""So many outcomes in a row outside the band, on one side, and the posterior is given up."""
_COOLING = 16
"""Outcomes that the model alone is trusted for after that."""


class Posterior(NamedTuple):
    """Of a log-residual: Normal-Gamma parameters.

    Args:
        mean: Of the mean.
        weight: Observations that the mean counts as.
        shape: Of the Gamma distribution of the precision.
        rate: Of the same.
    """

    mean: float
    weight: float
    shape: float
    rate: float

    @property
    def deviation(self) -> float:
        """Standard deviation of the next log-residual."""
        variance = self.rate / self.shape * (1 + 1 / self.weight)
        return math.sqrt(variance)


@dataclass
class Residuals:
    """Discounted sums of log-residuals of one arm in one context.

    Args:
        weight: Sum of weights.
        total: Weighted sum.
        squares: Weighted sum of squares.
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    strikes: int = 0
    cooling: int = 0

    def add(self, residual: float) -> None:
        """One more."""
        self.weight = _DISCOUNT * self.weight + 1
        self.total = _DISCOUNT * self.total + residual
        self.squares = _DISCOUNT * self.squares + residual**2

    def posterior(self, prior_mean: float = 0.0) -> Posterior:
        """What they say, on top of a prior."""
        mean = self.total / self.weight if self.weight else 0.0
        spread = max(0.0, self.squares - self.weight * mean**2)
        count = _PRIOR_COUNT + self.weight
        return Posterior(
            (_PRIOR_COUNT * prior_mean + self.total) / count,
            count,
            _PRIOR_SHAPE + self.weight / 2,
            _PRIOR_SHAPE * _PRIOR_DEVIATION**2
            + 0.5 * (spread + _PRIOR_COUNT * self.weight * (mean - prior_mean) ** 2 / count),
        )

    def merged(self, other: "Residuals") -> "Residuals":
        """Of two servers."""
        return Residuals(self.weight + other.weight, self.total + other.total, self.squares + other.squares)


@dataclass
class Bandit:
    """Posteriors by context and arm.

    Args:
        random: Where samples come from.
        contexts_max: Contexts that are remembered; the one unused for longest is forgotten first.
    """

    random: Random
    contexts_max: int = 4096
    known: dict[Hashable, dict[str, Residuals]] = field(default_factory=dict)
    given_up: int = 0

    def look(self, context: Hashable, arm: str, prior_mean: float = 0.0) -> tuple[float, float]:
        """By what factor an arm is expected to take longer than the model says, and one drawn from what is known of it.

        Args:
            context: Whose posterior.
            arm: Whose.
            prior_mean: Log-residual that others have seen.
        """
        arms = self.known.get(context)
        held = _NOTHING if arms is None else arms.get(arm, _NOTHING)
        if held.cooling:
            return 1.0, 1.0
        found = held.posterior(prior_mean)
        gauss = self.random.gauss
        # Precision is Gamma distributed; its cube root is nearly normal (Wilson and Hilferty, 1931).
        spread = 1 / (9 * found.shape)
        precision = found.shape / found.rate * max(1 - spread + math.sqrt(spread) * gauss(0.0, 1.0), 0.1) ** 3
        drawn = found.mean + gauss(0.0, 1.0) / math.sqrt(found.weight * precision)
        return math.exp(found.mean), math.exp(min(max(drawn, -_RESIDUAL_MAX), _RESIDUAL_MAX))

    def observe(self, context: Hashable, arm: str, expected_s: float, took_s: float, prior_mean: float = 0.0) -> None:
        """Learn from an outcome; times that are no positive numbers tell nothing."""
        if not (0 < took_s < math.inf and 0 < expected_s < math.inf):
            return
        residual = min(max(math.log(took_s / expected_s), -_RESIDUAL_MAX), _RESIDUAL_MAX)
        arms = self.known.pop(context, None) or {}
        # The newest context is the last one.
        self.known[context] = arms
        if len(self.known) > self.contexts_max:
            del self.known[next(iter(self.known))]
        held = arms.setdefault(arm, Residuals())
        if held.cooling:
            held.cooling -= 1
            held.add(residual)
            return
        posterior = held.posterior(prior_mean)
        distance = (residual - posterior.mean) / posterior.deviation
        if held.weight < _PRIOR_COUNT:
            # There is no band yet to leave; one outcome alone is not taken at its word all the same.
            held.add(posterior.mean + min(max(residual - posterior.mean, -_FIRST_MAX), _FIRST_MAX))
            return
        if abs(distance) <= _BAND:
            held.strikes = 0
            held.add(residual)
            return
        # One outcome outside the band may have waited for something; some in a row say that the band is wrong.
        side = 1 if distance > 0 else -1
        held.add(posterior.mean + side * _BAND * posterior.deviation)
        held.strikes = held.strikes + side if held.strikes * side > 0 else side
        if abs(held.strikes) >= _STRIKES:
            # What was learned does not hold any more: back to the model, until there is enough to learn from again.
            self.given_up += 1
            arms[arm] = Residuals(cooling=_COOLING)
            arms[arm].add(residual)

    def save(self) -> list[dict[str, Any]]:
        """Everything, as JSON; contexts are tuples of strings and numbers."""
        return [
            {"context": list(context) if isinstance(context, tuple) else [context], "arm": arm, **vars(held)}
            for context, arms in self.known.items()
            for arm, held in arms.items()
        ]

    def restore(self, saved: list[Mapping[str, Any]]) -> None:
        """Add what was saved, here or by another server."""
        for record in saved:
            context, arm = tuple(record["context"]), str(record["arm"])
            found = Residuals(float(record["weight"]), float(record["total"]), float(record["squares"]))
            arms = self.known.setdefault(context, {})
            arms[arm] = arms[arm].merged(found) if arm in arms else found


_NOTHING = Residuals()
