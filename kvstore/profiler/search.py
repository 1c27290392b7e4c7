"""Bayesian search for configurations on the Pareto front: asked what to measure next, and told what came of it.

Ratio and decode speed need no model run, so they are known of every candidate; quality loss is modelled, by a Gaussian
process on top of what the codec alone tells. The acquisition function is the logarithm of the noisy expected
hypervolume improvement (qLogNEHVI; Daulton, Balandat and Bakshy, 2021; Ament et al., 2023) of all levels of a
configuration together, with a constraint on quality.
"""

import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist

import torch
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.exceptions import BotorchWarning
from botorch.models import MixedSingleTaskGP
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning
from linear_operator.utils.warnings import NumericalWarning

from kvstore.profiler.objectives import Outcome, Trial
from kvstore.profiler.pareto import KL_FLOOR, best_cover, hypervolume, point
from kvstore.profiler.space import Configuration, Space
from kvstore.profiler.surrogate import SCALE, Features, fit_quality, observations, predict

_SCREENED = 48
"""Candidates whose levels are looked at together; the others are told apart by their levels one by one."""
_SAMPLES = 32
_DRAWS = 8
"""How many are drawn for each that is wanted, because some are drawn twice."""
_DRAWN = tuple(NormalDist().inv_cdf((number + 0.5) / 16) for number in range(16))
"""Of a standard normal distribution, evenly by probability."""
_CHUNK = 512
_RUNS_MIN = 4
"""Measured configurations below which the proxy alone chooses."""


class Search:
    """Chooses which candidates to measure with the model.

    Args:
        space: The strategies.
        reference: Worst (ratio, decode seconds per GB, quality loss in nats) that counts; the last is the constraint.
        seed: Of everything random.
    """

    def __init__(self, space: Space, reference: tuple[float, float, float], seed: int) -> None:
        self._features = Features(space)
        self._reference = torch.tensor(point(*reference), dtype=torch.float64)
        self._kl_max = reference[2]
        self._seed = seed
        self._candidates: dict[str, tuple[Configuration, torch.Tensor]] = {}
        self._measured: dict[str, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._points: dict[str, torch.Tensor] = {}

    def add(self, configuration: Configuration, trial: Trial) -> None:
        """A candidate was tried without the model."""
        self._candidates.setdefault(configuration.id, (configuration, self._features.rows(configuration, trial)))

    def drop(self, configuration: Configuration) -> None:
        """A candidate cannot be measured."""
        self._candidates.pop(configuration.id, None)

    def tell(self, configuration: Configuration, trial: Trial, outcome: Outcome) -> None:
        """A candidate was measured with the model."""
        self.drop(configuration)
        rows = self._features.rows(configuration, trial)
        # The ratio over all prompts is the better one.
        rows[:, self._features.ratio] = torch.tensor([math.log(ratio) / SCALE for ratio in outcome.ratio])
        self._measured[configuration.id] = (rows, observations(outcome))
        self._points[configuration.id] = points_of(trial, outcome)

    @property
    def candidates(self) -> int:
        """Number of those that were tried and not measured."""
        return len(self._candidates)

    @property
    def volume(self) -> float:
        """Hypervolume of what was measured."""
        if not self._points:
            return 0.0
        return hypervolume(torch.cat(list(self._points.values())), self._reference)

    def ask(self, count: int) -> list[Configuration]:
        """The candidates to measure next, at most `count`, the most promising first."""
        if len(self._measured) < _RUNS_MIN:
            return self._cover(count)
        with warnings.catch_warnings():
            # A little jitter is all that rows which are nearly alike take.
            warnings.simplefilter("ignore", NumericalWarning)
            warnings.simplefilter("ignore", BotorchWarning)
            model = fit_quality(self._features, *zip(*self._measured.values(), strict=True))
            return self._improve(model, count)

    def _cover(self, count: int) -> list[Configuration]:
        """Those that would cover most if quality loss were what the proxy says."""
        candidates = list(self._candidates.values())
        held = list(self._points.values())
        expected = [self._expected(rows, SCALE * rows[:, self._features.weighted_error]) for _, rows in candidates]
        if not held:
            return [candidates[number][0] for number, _ in best_cover(expected, self._reference, count)]
        known = torch.cat(held)
        joined = [torch.cat([known, points]) for points in expected]
        return [candidates[number][0] for number, _ in best_cover(joined, self._reference, count)]

    def _expected(self, rows: torch.Tensor, log_kl: torch.Tensor) -> torch.Tensor:
        """Points of rows at given logarithms of quality loss."""
        quality = -log_kl.clamp_min(math.log(KL_FLOOR))
        ratio, speed = (SCALE * rows[..., column] for column in (self._features.ratio, self._features.speed))
        return torch.stack([ratio.expand_as(quality), speed.expand_as(quality), quality], -1)

    def _improve(self, model: MixedSingleTaskGP, count: int) -> list[Configuration]:
        """Those that are expected to add most hypervolume, each given those before it."""
        screened = self._screen(model)
        if not screened:
            return self._cover(count)
        levels = max(len(rows) for _, rows in screened)
        # Configurations with fewer levels say their last one again, which adds nothing.
        stacked = torch.stack([rows[[min(n, len(rows) - 1) for n in range(levels)]] for _, rows in screened])
        baseline = torch.cat([rows for rows, _ in self._measured.values()])
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model,
            self._reference,
            baseline,
            sampler=SobolQMCNormalSampler(torch.Size([_SAMPLES]), seed=self._seed + len(self._measured)),
            objective=GenericMCMultiOutputObjective(lambda y, X: self._expected(X, y[..., 0])),  # noqa: N803 (its name there)
            constraints=[lambda y: y[..., 0] - math.log(self._kl_max)],
            prune_baseline=True,
        )
        chosen: list[int] = []
        with torch.no_grad():
            for _ in range(min(count, len(screened))):
                if chosen:
                    acquisition.set_X_pending(torch.cat([stacked[number] for number in chosen]))
                values = acquisition(stacked)
                values[chosen] = -math.inf
                chosen.append(int(values.argmax()))
        return [screened[number][0] for number in chosen]

    def _screen(self, model: MixedSingleTaskGP) -> list[tuple[Configuration, torch.Tensor]]:
        """The candidates with the largest expected improvement, level by level, over what was measured."""
        candidates = list(self._candidates.values())
        if not candidates:
            return []
        rows = torch.cat([rows for _, rows in candidates])
        owners = torch.tensor([number for number, (_, own) in enumerate(candidates) for _ in own])
        mean, deviation = predict(model, rows)
        points = torch.cat(list(self._points.values()))
        boxes = FastNondominatedPartitioning(self._reference, points).get_hypercell_bounds()
        gains = torch.zeros(len(rows), dtype=torch.float64)
        for draw in _DRAWN:
            found = self._expected(rows, mean + draw * deviation)
            found = torch.where(found[:, 2:] > -math.log(self._kl_max), found, self._reference)
            for start in range(0, len(rows), _CHUNK):
                part = found[start : start + _CHUNK, None]
                sides = (torch.minimum(part, boxes[1]) - boxes[0]).clamp_min(0)
                gains[start : start + _CHUNK] += sides.prod(-1).sum(-1)
        best = torch.zeros(len(candidates), dtype=torch.float64).scatter_reduce(0, owners, gains, "sum")
        order = best.argsort(descending=True)[:_SCREENED].tolist()
        return [candidates[number] for number in order if best[number] > 0]


def points_of(trial: Trial, outcome: Outcome) -> torch.Tensor:
    """Points of the levels of a measured configuration, `[levels, 3]` float64."""
    found = [
        point(ratio, trial.decode_s_per_gb[level], outcome.kl_nats(level)) for level, ratio in enumerate(outcome.ratio)
    ]
    return torch.tensor(found, dtype=torch.float64)


def start_pool(space: Space, count: int, seed: int) -> list[Configuration]:
    """Different points that fill the space evenly, from a scrambled Sobol sequence.

    Where the space has fewer of them, all that were found.
    """
    engine = torch.quasirandom.SobolEngine(len(space.names), scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    found: dict[str, Configuration] = {}
    for _ in range(_DRAWS * count):
        configuration = space.at(engine.draw(1, dtype=torch.float64)[0].tolist())
        found.setdefault(configuration.id, configuration)
        if len(found) == count:
            break
    return list(found.values())


def neighbours(space: Space, front: Sequence[Configuration], count: int, seed: int) -> list[Configuration]:
    """Different points near those of a front: one to three of their parameters moved.

    Args:
        space: The strategies.
        front: The points.
        count: How many; fewer where there are not so many.
        seed: Of what is moved where.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Configuration] = {}
    known = {configuration.id for configuration in front}
    for number in range(_DRAWS * count if front else 0):
        origin = front[number % len(front)]
        moved = space.near(origin, generator)
        if moved.id not in known:
            found.setdefault(moved.id, moved)
        if len(found) == count:
            break
    return list(found.values())
