"""Sets of points in (log ratio, log decode speed, log quality), all to be maximised: hypervolume, fronts, covers."""

import heapq
import math
from collections.abc import Sequence

import torch
from botorch.utils.multi_objective.box_decompositions import DominatedPartitioning
from botorch.utils.multi_objective.pareto import is_non_dominated

KL_FLOOR = 1e-4
"""Quality losses below this many nats are alike: no one can use the difference, and noise is as large."""


def point(ratio: float, decode_s_per_gb: float, kl_nats: float) -> tuple[float, float, float]:
    """A level as a point; every coordinate is better the larger it is."""
    return (math.log(ratio), -math.log(decode_s_per_gb), -math.log(max(kl_nats, KL_FLOOR)))


def hypervolume(points: torch.Tensor, reference: torch.Tensor) -> float:
    """Volume that points dominate beyond a reference.

    Args:
        points: `[n, 3]` float64.
        reference: `[3]`.
    """
    better = points[(points > reference).all(-1)]
    if not len(better):
        return 0.0
    return float(DominatedPartitioning(ref_point=reference, Y=better).compute_hypervolume())


def front(points: torch.Tensor) -> torch.Tensor:
    """Which of `[n, 3]` points no other one dominates, `[n]` bool."""
    found: torch.Tensor = is_non_dominated(points)
    return found


def best_cover(groups: Sequence[torch.Tensor], reference: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """Choose groups of points greedily, each time the one that adds most hypervolume.

    The gain of a group only falls as others are chosen, so a bound from before is still one: most need not be
    computed again. The greedy choice is within 1 - 1/e of the best one (Nemhauser, Wolsey and Fisher, 1978).

    Args:
        groups: `[levels, 3]` points of each.
        reference: `[3]`.
        count: How many to choose at most; fewer are chosen where no other one adds anything.

    Returns:
        Number of each group chosen, and the hypervolume with it.
    """
    chosen: list[tuple[int, float]] = []
    held, volume = torch.empty(0, 3, dtype=torch.float64), 0.0
    bounds = [(-hypervolume(group, reference), number) for number, group in enumerate(groups)]
    heapq.heapify(bounds)
    while bounds and len(chosen) < count:
        _, number = heapq.heappop(bounds)
        together = torch.cat([held, groups[number]])
        gain = hypervolume(together, reference) - volume
        if gain <= _NOTHING:
            continue
        if bounds and gain < -bounds[0][0] - _NOTHING:
            heapq.heappush(bounds, (-gain, number))
            continue
        held, volume = together[front(together)], volume + gain
        chosen.append((number, volume))
    return chosen


_NOTHING = 1e-9
