"""What others have seen of an arm: a median over clients, so that one of them cannot move it."""

import math
from dataclasses import dataclass, field
from statistics import median

from kvstore.controller.tables import renewed

_VOTERS_MIN = 3
"""So many must agree on something before others are told: of two, one could lie."""
_VOTERS_MAX = 64
_ARMS_MAX = 4096
_PRIOR_MAX = math.log(2)
"""No prior says more than a factor of two: the rest each client finds out for itself."""

Shared = tuple[str, int, int]
"""Tier, octave of bytes, octave of load."""


@dataclass
class Votes:
    """The newest log-residual of every client, by what is transferred and arm.

    A link is told the median over the other links of its tenant; where those are few, the median over other tenants,
    each of which has one vote, the median over its links. All tables are bounded; the oldest entry is forgotten first.
    """

    _known: dict[tuple[Shared, str], dict[str, dict[str, float]]] = field(default_factory=dict)

    def cast(self, tenant: str, link: str, shared: Shared, arm: str, residual: float) -> None:
        """A client's vote, in place of the one that it had."""
        tenants = renewed(self._known, (shared, arm), _ARMS_MAX, dict)
        links = renewed(tenants, tenant, _VOTERS_MAX, dict)
        renewed(links, link, _VOTERS_MAX, float)
        links[link] = residual

    def prior(self, tenant: str, link: str, shared: Shared, arm: str) -> float:
        """The log-residual that a client is told others have seen; 0 where too few have."""
        tenants = self._known.get((shared, arm))
        if tenants is None:
            return 0.0
        neighbours = [vote for other, vote in tenants.get(tenant, {}).items() if other != link]
        if len(neighbours) < _VOTERS_MIN:
            neighbours = [median(links.values()) for other, links in tenants.items() if other != tenant]
        if len(neighbours) < _VOTERS_MIN:
            return 0.0
        return min(max(median(neighbours), -_PRIOR_MAX), _PRIOR_MAX)
