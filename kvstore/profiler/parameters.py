"""Parameters of a search space: typed, with the conditions under which they exist."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

Value = str | int | float
Conditions = Mapping[str, tuple[Value, ...]]
"""For each parameter named, the values of it that allow this one; all of them must hold."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few options without an order.

    Args:
        name: What it is called; parameters that never exist together may share a name.
        options: What there is to choose from.
        when: The conditions.
        shares: Parts of the range that belong to each option, all alike by default; they sum to one.
    """

    name: str
    options: tuple[Value, ...]
    when: Conditions
    shares: tuple[float, ...] = ()

    @property
    def grid(self) -> tuple[Value, ...]:
        """Values that stand for all when the space is gridded."""
        return self.options

    def at(self, share: float) -> Value:
        """The value at a share of the range, 0 to 1."""
        if not self.shares:
            return self.options[min(int(share * len(self.options)), len(self.options) - 1)]
        ends = accumulate(self.shares)
        return next((option for option, end in zip(self.options, ends, strict=True) if share < end), self.options[-1])

    def holds(self, value: object) -> bool:
        """Whether a value is in the range."""
        return any(type(value) is type(option) and value == option for option in self.options)

    @property
    def says(self) -> str:
        """The range in words."""
        return f"one of {', '.join(str(option) for option in self.options)}"


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer of a range.

    Args:
        name: As in `Choice`.
        low: Least value.
        high: Largest value.
        grid: Values that stand for all when the space is gridded.
        when: The conditions.
    """

    name: str
    low: int
    high: int
    grid: tuple[int, ...]
    when: Conditions

    def at(self, share: float) -> int:
        """The value at a share of the range, 0 to 1."""
        return min(self.low + int(share * (self.high - self.low + 1)), self.high)

    def share(self, value: float) -> float:
        """Undo `at`, as far as it goes."""
        return (value - self.low + 0.5) / (self.high - self.low + 1)

    def holds(self, value: object) -> bool:
        """Whether a value is in the range."""
        return type(value) is int and self.low <= value <= self.high

    @property
    def says(self) -> str:
        """The range in words."""
        return f"an integer from {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Real:
    """A number of a range, as finely as a pipeline can say it: a whole one.

    Args:
        name: As in `Choice`.
        low: Least value.
        high: Largest value.
        grid: Values that stand for all when the space is gridded.
        when: The conditions.
    """

    name: str
    low: float
    high: float
    grid: tuple[float, ...]
    when: Conditions

    def at(self, share: float) -> float:
        """The value at a share of the range, 0 to 1."""
        return float(round(self.low + min(max(share, 0.0), 1.0) * (self.high - self.low)))

    def share(self, value: float) -> float:
        """Undo `at`."""
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: object) -> bool:
        """Whether a value is in the range."""
        return type(value) is float and self.low <= value <= self.high and value.is_integer()

    @property
    def says(self) -> str:
        """The range in words."""
        return f"a whole number from {self.low:g} to {self.high:g}"


Parameter = Choice | Whole | Real
