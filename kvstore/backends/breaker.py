"""A circuit breaker: pure state that says whether a call may be made, and learns what became of it.

Closed, every call passes. A run of failures opens it, and calls are refused until a cool-down is over; then exactly one
call, the probe, passes. Its success closes the breaker, its failure opens it again for twice as long, up to a limit.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Permit:
    """Leave to make one call, to be given back by `succeeded`, `failed` or `unused`; only the first counts.

    Args:
        probe: Whether this call decides if an open breaker closes.
        opened: How often the breaker had opened when the permit was given.
    """

    probe: bool
    opened: int


class Breaker:
    """Keeps calls away from a service that fails. Not thread-safe: one event loop owns it.

    Args:
        failures_max: Failures in a row that open it.
        cooldown_s: First time that it stays open.
        cooldown_max_s: Longest time that it stays open.
        clock: Seconds that never go back.

    Attributes:
        opened: How often it has opened.
        reason: Why it opened last; empty while it is closed.
    """

    def __init__(
        self,
        *,
        failures_max: int = 5,
        cooldown_s: float = 1.0,
        cooldown_max_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.opened = 0
        self.reason = ""
        self._failures_max = failures_max
        self._first_cooldown_s = cooldown_s
        self._cooldown_max_s = cooldown_max_s
        self._clock = clock
        self._failures = 0
        self._cooldown_s = cooldown_s
        self._open_until_s: float | None = None
        self._probe: Permit | None = None

    @property
    def closed(self) -> bool:
        """Whether calls pass freely."""
        return self._open_until_s is None

    @property
    def retry_after_s(self) -> float:
        """Time until a probe may pass; 0 where it may now or none is needed."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - self._clock())

    def admit(self) -> Permit | None:
        """Leave to make a call, or None while the breaker is open or its probe is under way."""
        if self.closed:
            return Permit(False, self.opened)
        if self._probe is not None or self.retry_after_s > 0:
            return None
        self._probe = Permit(True, self.opened)
        return self._probe

    def succeeded(self, permit: Permit) -> None:
        """The service answered."""
        if permit is self._probe:
            self._probe = None
            self._open_until_s = None
            self.reason = ""
            self._failures = 0
        elif self._counts(permit):
            # A probe may be a cheap call that says little, so only a usual one ends the doubling.
            self._cooldown_s = self._first_cooldown_s
            self._failures = 0

    def failed(self, permit: Permit, reason: str) -> None:
        """The service did not do what it should."""
        if permit is self._probe:
            self._open(reason)
        elif self._counts(permit):
            self._failures += 1
            if self._failures >= self._failures_max:
                self._open(reason)

    def unused(self, permit: Permit) -> None:
        """The call ended without telling anything about the service."""
        if permit is self._probe:
            self._probe = None

    def trip(self, reason: str) -> None:
        """Open it at once."""
        self._open(reason)

    def _open(self, reason: str) -> None:
        self.opened += 1
        self.reason = reason
        self._failures = 0
        self._probe = None
        self._open_until_s = self._clock() + self._cooldown_s
        self._cooldown_s = min(2 * self._cooldown_s, self._cooldown_max_s)

    def _counts(self, permit: Permit) -> bool:
        """Whether it is a usual call's; those from before the breaker opened say nothing of the service as it is."""
        return self.closed and not permit.probe and permit.opened == self.opened
