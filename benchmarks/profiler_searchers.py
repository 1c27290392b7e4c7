"""What the profiler's search is held against: random search, and the search of KVServe (arXiv 2605.13734).

All of them search a grid whose objectives are known, and are charged for every configuration whose quality they ask
for; asking tells all its levels.
"""

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

from kvstore.profiler.objectives import Outcome, Trial
from kvstore.profiler.parameters import Choice
from kvstore.profiler.search import Search, points_of
from kvstore.profiler.space import Configuration, Space

BATCH = 2
"""Configurations that ours asks for at once, as on a machine with two cores."""
_START = 8
_TOLERANCE = 3.0
_EPSILON = 0.2


@dataclass(frozen=True)
class Grid:
    """Configurations with their true objectives.

    Args:
        space: What they are points of.
        configurations: In a fixed order.
        trials: What the codec alone tells of each.
        outcomes: What the model tells.
        reference: Worst feasible ratio, decode seconds per GB and quality loss.
    """

    space: Space
    configurations: tuple[Configuration, ...]
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    reference: tuple[float, float, float]

    def points(self, number: int) -> torch.Tensor:
        """Points of the levels of a configuration, `[levels, 3]`."""
        return points_of(self.trials[number], self.outcomes[number])


def ours(grid: Grid, budget: int, seed: int) -> Iterator[int]:
    """Numbers of the configurations that `kvstore.profiler.search` asks for; every trial is known to it."""
    search = Search(grid.space, grid.reference, seed)
    numbers = {configuration: number for number, configuration in enumerate(grid.configurations)}
    for configuration, trial in zip(grid.configurations, grid.trials, strict=True):
        search.add(configuration, trial)
    asked = 0
    while asked < budget and (batch := search.ask(min(BATCH, budget - asked))):
        for configuration in batch:
            number = numbers[configuration]
            search.tell(configuration, grid.trials[number], grid.outcomes[number])
            asked += 1
            yield number


def at_random(grid: Grid, budget: int, seed: int) -> Iterator[int]:
    """Numbers drawn without replacement."""
    yield from random.Random(seed).sample(range(len(grid.configurations)), min(budget, len(grid.configurations)))


def kvserve(grid: Grid, budget: int, seed: int) -> Iterator[int]:
    """Numbers that the search of KVServe's published code asks for.

    It knows every ratio, models accuracy alone with one Gaussian process, and looks for the largest ratio whose
    accuracy is within three points. Accuracy is `100 exp(-KL)` here. It knows no levels: each is a configuration of its
    own to it, and what is told of the others of an encoded copy is given to it for nothing.
    """
    arms = [(number, level) for number, outcome in enumerate(grid.outcomes) for level in range(len(outcome.ratio))]
    ratio = np.array([grid.outcomes[number].ratio[level] for number, level in arms])
    features = np.array([_features(grid.space, grid.configurations[number], level) for number, level in arms])
    accuracy = np.array([100 * math.exp(-max(0.0, grid.outcomes[n].kl_nats(level))) for n, level in arms])
    owner = np.array([number for number, _ in arms])
    alive, known = np.ones(len(arms), dtype=bool), np.zeros(len(arms), dtype=bool)
    threshold, failures = 100 - _TOLERANCE, 0
    ranked = np.argsort(-ratio, kind="stable")
    start = [int(ranked[round(n * (len(arms) - 1) / (_START - 1))]) for n in range(_START)]
    asked: set[int] = set()
    generator = np.random.RandomState(seed)
    while len(asked) < budget:
        i = len(asked)
        if start:
            arm = start.pop(0)
        else:
            left = np.flatnonzero(alive & ~known)
            span = np.ptp(ratio[left]) if len(left) else 0.0
            if not len(left) or (span <= 2.5 * _EPSILON and i > budget / 2 and failures > budget / 10):
                return
            arm = int(left[_acquire(features, ratio, accuracy, known, left, threshold, i, budget, generator)])
        number = int(owner[arm])
        known[arm] = True
        if number in asked:
            continue
        known |= owner == number
        asked.add(number)
        yield number
        feasible = accuracy[arm] >= threshold
        failures = 0 if feasible else failures + (i > budget / 2)
        if feasible and i > budget / 5:
            alive &= ratio > ratio[arm] - _EPSILON / 2
        level_spread = 0 if len(grid.outcomes[number].ratio) == 1 else 8
        if accuracy[arm] <= threshold - _TOLERANCE and i >= budget / 5 and (level_spread < 8 or i > budget / 2):
            alive &= ratio < ratio[arm] + 2 * _EPSILON


def _acquire(
    features: Any,
    ratio: Any,
    accuracy: Any,
    known: Any,
    left: Any,
    threshold: float,
    i: int,
    budget: int,
    generator: np.random.RandomState,
) -> int:
    """Which of the arms that are left its acquisition function likes best."""
    kernel = Matern(length_scale=1.0, nu=1.5) + WhiteKernel(1e-4)
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=5, random_state=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[known], accuracy[known])
    mean, deviation = model.predict(features[left], return_std=True)
    deviation = np.maximum(deviation, 1e-9)
    weight = max(0.1, 0.99**i / (2 if i >= budget / 5 else 1))
    likely = 0.5 * (1 + np.vectorize(math.erf)((mean - threshold) / deviation / math.sqrt(2)))
    return int(np.argmax(ratio[left] * likely + weight * deviation / deviation.max() * ratio[left].mean()))


def _features(space: Space, configuration: Configuration, level: int) -> list[float]:
    """Numbers from 0 to 1, and a column for each option of each choice."""
    columns: dict[tuple[str, Any], float] = {}
    for parameter in space.parameters:
        value = configuration.values.get(parameter.name)
        if isinstance(parameter, Choice):
            for option in parameter.options:
                columns[parameter.name, option] = float(value == option)
        elif value is None or isinstance(value, str):
            columns.setdefault((parameter.name, None), 0.0)
        else:
            columns[parameter.name, None] = parameter.share(value)
    return [*columns.values(), level / 3]


def curve(grid: Grid, chosen: Sequence[int], budget: int, volume: Any) -> list[float]:
    """Hypervolume after every evaluation up to the budget; a searcher that stopped stays where it was."""
    held = torch.empty(0, 3, dtype=torch.float64)
    found: list[float] = []
    for number in chosen:
        held = torch.cat([held, grid.points(number)])
        found.append(volume(held))
    return found + [found[-1]] * (budget - len(found))
