"""Sets of points in (log ratio, log decode speed, log quality), all to be maximised: hypervolume, fronts, covers."""

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from botorch.utils.multi_objective.pareto import is_non_dominated

KL_FLOOR = 1e-4
"""Quality losses below this many nats are alike: no one can use the difference, and noise is as large."""


def point(ratio: float, decode_s_per_gb: float, kl_nats: float) -> tuple[float, float, float]:
    """A level as a point; every coordinate is better the larger it is."""
    return (math.log(ratio), -math.log(decode_s_per_gb), -math.log(max(kl_nats, KL_FLOOR)))


def hypervolume(points: torch.Tensor, reference: torch.Tensor) -> float:
    """Volume that points dominate beyond a reference.

    Searches ask for it thousands of times, of few points each; partitions into boxes take a hundred times as long.

    Args:
        points: `[n, 3]` float64.
        reference: `[3]`.
    """
    better = (points - reference)[(points > reference).all(-1)]
    # A plane falls along the last axis; points that it has passed bound a staircase on it, whose area the volume gains.
    xs: list[float] = []
    ys: list[float] = []
    volume = area = height = 0.0
    for x, y, z in sorted(better.tolist(), key=lambda one: one[2], reverse=True):
        volume += area * (height - z)
        height = z
        end = bisect_left(xs, x)
        if end < len(xs) and ys[end] >= y:
            continue
        end += end < len(xs) and xs[end] == x
        start = end
        while start and ys[start - 1] <= y:
            start -= 1
        xs[start:end], ys[start:end] = [x], [y]
        area = sum((right - left) * up for left, right, up in zip([0.0, *xs], xs, ys, strict=False))
    return volume + area * height


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
