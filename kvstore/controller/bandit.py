"""What the latency model gets wrong, learned: Thompson sampling on the logarithm of observed over expected time.

Every arm in every context has a Normal-Gamma posterior of that logarithm, discounted, so that it follows drift. With
nothing seen it is centred on zero, which is the model as it stands. Sums are all that is kept, so posteriors of several
servers can be added.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

_DISCOUNT = 0.97
"""What an observation counts after the next one: some 33 of them are remembered."""
_PRIOR_COUNT = 2.0
"""How many observations the prior mean counts as."""
_PRIOR_SHAPE = 2.0
_PRIOR_DEVIATION = 0.25
"""Prior standard deviation of a logarithm: 28 % either way."""
_RESIDUAL_MAX = math.log(8)
"""Residuals count as no larger: what took a hundred times too long does not say that everything will."""
_BAND = 3.0
"""Standard deviations within which outcomes are expected."""
_STRIKES = 3
"""So many outcomes in a row outside the band, on one side, and the posterior is given up."""
_COOLING = 16
"""Outcomes that the model alone is trusted for after that."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """Of a log-residual: Normal-Gamma parameters.

    Args:
        mean: Of the mean.
        count: Observations that the mean counts as.
        shape: Of the Gamma distribution of the precision.
        rate: Of the same.
    """

    mean: float
    count: float
    shape: float
    rate: float

    @property
    def deviation(self) -> float:
        """Standard deviation of the next log-residual."""
        variance = self.rate / self.shape * (1 + 1 / self.count)
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

    def sample(self, context: Hashable, arm: str, expected_s: float, prior_mean: float = 0.0) -> float:
        """A time drawn from what is known of an arm; `expected_s` is what the model says.

        Args:
            context: Whose posterior.
            arm: Whose.
            expected_s: The model's time.
            prior_mean: Log-residual that others have seen.
        """
        held = self._held(context, arm)
        if held is not None and held.cooling:
            return expected_s
        found = (held or Residuals()).posterior(prior_mean)
        precision = self.random.gammavariate(found.shape, 1 / found.rate)
        return expected_s * math.exp(self.random.gauss(found.mean, 1 / math.sqrt(found.count * precision)))

    def mean_s(self, context: Hashable, arm: str, expected_s: float, prior_mean: float = 0.0) -> float:
        """The time that is expected of an arm, without chance."""
        held = self._held(context, arm)
        if held is not None and held.cooling:
            return expected_s
        return expected_s * math.exp((held or Residuals()).posterior(prior_mean).mean)

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
        if held.weight <= _PRIOR_COUNT or abs(distance) <= _BAND:
            held.strikes = 0
            held.add(residual)
            return
        # One outcome outside the band may have waited for something; some in a row say that the band is wrong.
        side = 1 if distance > 0 else -1
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

    def _held(self, context: Hashable, arm: str) -> Residuals | None:
        arms = self.known.get(context)
        return None if arms is None else arms.get(arm)
