"""What the latency model gets wrong, learned: Thompson sampling on the logarithm of observed over expected time.

Every arm in every context has a Normal-Gamma posterior of that logarithm, discounted, so that it follows drift. With
nothing seen it is centred on zero, which is the model as it stands. Sums are all that is kept, so posteriors of several
servers can be added.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from kvstore.controller.tables import renewed

_DISCOUNT = 0.97
"""What an observation counts after the next one: some 33 of them are remembered."""
_WEIGHT_MAX = 1 / (1 - _DISCOUNT)
_FADING = 0.998
"""What is kept of one arm at each outcome of another: what is not tried for long may have changed."""
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
        strikes: Outcomes outside the band in a row; below zero where they were too fast.
        cooling: Outcomes for which the model alone is still trusted.
        seen: Outcomes of the context, of whatever arm, up to this arm's last one.
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    strikes: int = 0
    cooling: int = 0
    seen: int = 0

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Residuals":
        """From JSON.

        Raises:
            ValueError, KeyError, TypeError: It is not what `save` makes.
        """
        weight, total, squares = (float(record[name]) for name in ("weight", "total", "squares"))
        cooling = int(record["cooling"])
        if not (0 <= weight <= _WEIGHT_MAX and abs(total) < math.inf and 0 <= squares < math.inf):
            raise ValueError("sums of residuals are out of range")
        return cls(weight, total, squares, cooling=min(max(cooling, 0), _COOLING))

    def add(self, residual: float) -> None:
        """One more."""
        self.scale(_DISCOUNT)
        self.weight += 1
        self.total += residual
        self.squares += residual**2

    def posterior(self, prior_mean: float = 0.0, kept: float = 1.0) -> Posterior:
        """What they say, on top of a prior; with `kept`, as if a share of them were forgotten."""
        weight, total = kept * self.weight, kept * self.total
        mean = total / weight if weight else 0.0
        spread = max(0.0, kept * self.squares - weight * mean**2)
        count = _PRIOR_COUNT + weight
        shift = _PRIOR_COUNT * weight * (mean - prior_mean) ** 2 / count
        return Posterior(
            (_PRIOR_COUNT * prior_mean + total) / count,
            count,
            _PRIOR_SHAPE + weight / 2,
            _PRIOR_SHAPE * _PRIOR_DEVIATION**2 + 0.5 * (spread + shift),
        )

    def merged(self, other: "Residuals") -> "Residuals":
        """Of two servers; together they count no more than what one remembers at most."""
        found = Residuals(
            self.weight + other.weight,
            self.total + other.total,
            self.squares + other.squares,
            cooling=max(self.cooling, other.cooling),
            seen=self.seen,
        )
        found.scale(min(1.0, _WEIGHT_MAX / found.weight) if found.weight else 1.0)
        return found

    def scale(self, factor: float) -> None:
        """Keep a share of what is remembered."""
        self.weight *= factor
        self.total *= factor
        self.squares *= factor


@dataclass
class _Arms:
    """What was seen in one context: outcomes in all, and of each arm."""

    outcomes: int = 0
    by_name: dict[str, Residuals] = field(default_factory=dict)

    def kept(self, held: Residuals) -> float:
        """The share of an arm's sums that still counts."""
        return float(_FADING ** (self.outcomes - held.seen))


@dataclass
class Bandit:
    """Posteriors by context and arm.

    Args:
        random: Where samples come from.
        contexts_max: Contexts that are remembered; the one without an outcome for longest is forgotten first.
    """

    random: Random
    contexts_max: int = 1024
    given_up: int = 0
    _known: dict[tuple[Any, ...], _Arms] = field(default_factory=dict)

    @property
    def contexts(self) -> list[tuple[Any, ...]]:
        """Contexts with outcomes, the newest last."""
        return list(self._known)

    def look(self, context: tuple[Any, ...], arm: str, prior_mean: float = 0.0) -> tuple[float, float]:
        """By what factor an arm is expected to take longer than the model says, and one drawn from what is known of it.

        Args:
            context: Whose posterior.
            arm: Whose.
            prior_mean: Log-residual that others have seen.
        """
        arms = self._known.get(context)
        held = _NOTHING if arms is None else arms.by_name.get(arm, _NOTHING)
        if held.cooling:
            return 1.0, 1.0
        found = held.posterior(prior_mean, 1.0 if arms is None else arms.kept(held))
        gauss = self.random.gauss
        # Precision is Gamma distributed; its cube root is nearly normal (Wilson and Hilferty, 1931).
        spread = 1 / (9 * found.shape)
        precision = found.shape / found.rate * max(1 - spread + math.sqrt(spread) * gauss(0.0, 1.0), 0.1) ** 3
        drawn = found.mean + gauss(0.0, 1.0) / math.sqrt(found.weight * precision)
        return math.exp(found.mean), math.exp(min(max(drawn, -_RESIDUAL_MAX), _RESIDUAL_MAX))

    def observe(
        self, context: tuple[Any, ...], arm: str, expected_s: float, took_s: float, prior_mean: float = 0.0
    ) -> float | None:
        """Learn from an outcome; times that are no positive numbers tell nothing.

        Returns:
            The log-residual that is expected of the arm now; None where nothing was learned.
        """
        if not (0 < took_s < math.inf and 0 < expected_s < math.inf):
            return None
        residual = min(max(math.log(took_s / expected_s), -_RESIDUAL_MAX), _RESIDUAL_MAX)
        arms = renewed(self._known, context, self.contexts_max, _Arms)
        held = arms.by_name.get(arm)
        if held is None:
            held = arms.by_name[arm] = Residuals()
        held.scale(arms.kept(held))
        arms.outcomes += 1
        if self._learn(held, residual, prior_mean):
            arms.by_name[arm] = held = Residuals(cooling=_COOLING)
            held.add(residual)
        held.seen = arms.outcomes
        return 0.0 if held.cooling else held.posterior(prior_mean).mean

    def _learn(self, held: Residuals, residual: float, prior_mean: float) -> bool:
        """Add an outcome; whether what was learned does not hold any more."""
        if held.cooling:
            held.cooling -= 1
            held.add(residual)
            return False
        posterior = held.posterior(prior_mean)
        if held.weight < _PRIOR_COUNT:
            # There is no band yet to leave; one outcome alone is not taken at its word all the same.
            held.add(posterior.mean + min(max(residual - posterior.mean, -_FIRST_MAX), _FIRST_MAX))
            return False
        distance = (residual - posterior.mean) / posterior.deviation
        if abs(distance) <= _BAND:
            held.strikes = 0
            held.add(residual)
            return False
        # One outcome outside the band may have waited for something; some in a row say that the band is wrong.
        side = 1 if distance > 0 else -1
        held.add(posterior.mean + side * _BAND * posterior.deviation)
        held.strikes = held.strikes + side if held.strikes * side > 0 else side
        if abs(held.strikes) < _STRIKES:
            return False
        # Back to the model, until there is enough to learn from again.
        self.given_up += 1
        return True

    def save(self) -> list[dict[str, Any]]:
        """Everything, as JSON; contexts are tuples of strings and numbers."""
        return [
            {
                "context": list(context),
                "arm": arm,
                **{name: getattr(held, name) for name in ("weight", "total", "squares", "cooling")},
            }
            for context, arms in self._known.items()
            for arm, held in arms.by_name.items()
        ]

    def restore(self, context: tuple[Any, ...], arm: str, found: Residuals) -> None:
        """Add what was saved, here or by another server."""
        arms = renewed(self._known, context, self.contexts_max, _Arms)
        known = arms.by_name.get(arm)
        arms.by_name[arm] = found if known is None else known.merged(found)
        arms.by_name[arm].seen = arms.outcomes


_NOTHING = Residuals()
