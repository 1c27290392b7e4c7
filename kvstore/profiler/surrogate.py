"""A Gaussian process over configurations that predicts quality loss, from what the codec alone tells of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import MixedSingleTaskGP
from botorch.posteriors import Posterior
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import NormalPrior
from torch.nn import Parameter

from kvstore.profiler.objectives import Outcome, Trial
from kvstore.profiler.parameters import Choice
from kvstore.profiler.pareto import KL_FLOOR
from kvstore.profiler.space import Configuration, Space

SCALE = 5.0
"""Logarithms are divided by it, so that columns are of the size of one."""
_LEVELS_MAX = 4
_TINY = 1e-12
_VARIANCE_MIN, _VARIANCE_MAX = 1e-4, 1.0
_SLOPE_SPREAD = 0.1
_STEPS_MAX = 120


class Features:
    """Rows of numbers for the levels of configurations.

    Columns: a number for every choice, 0 where it does not exist; every other parameter, 0 to 1, or a half where it
    does not exist; the level; and logarithms, divided by `SCALE`: ratio, decode speed, weighted error, attention error.
    """

    def __init__(self, space: Space) -> None:
        self._choices: dict[str, list[Any]] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        for parameter in space.parameters:
            if isinstance(parameter, Choice):
                held = self._choices.setdefault(parameter.name, [])
                held += [option for option in parameter.options if option not in held]
            else:
                self._ranges[parameter.name] = (float(parameter.low), float(parameter.high))

    @property
    def categories(self) -> list[int]:
        """Columns without an order."""
        return list(range(len(self._choices)))

    @property
    def ratio(self) -> int:
        """Column of the logarithm of the ratio."""
        return len(self._choices) + len(self._ranges) + 1

    @property
    def speed(self) -> int:
        """Column of the logarithm of the decode speed."""
        return self.ratio + 1

    @property
    def weighted_error(self) -> int:
        """Column of the logarithm of the weighted error."""
        return self.ratio + 2

    def rows(self, configuration: Configuration, trial: Trial) -> torch.Tensor:
        """`[levels, columns]` float64."""
        values = configuration.values
        own = [1.0 + options.index(values[name]) if name in values else 0.0 for name, options in self._choices.items()]
        for name, (low, high) in self._ranges.items():
            own.append((float(values[name]) - low) / (high - low) if name in values else 0.5)
        rows = [
            [
                *own,
                level / (_LEVELS_MAX - 1),
                math.log(trial.ratio[level]) / SCALE,
                -math.log(trial.decode_s_per_gb[level]) / SCALE,
                math.log(max(trial.weighted_error[level], _TINY)) / SCALE,
                math.log(max(trial.attention_error[level], _TINY)) / SCALE,
            ]
            for level in range(configuration.levels)
        ]
        return torch.tensor(rows, dtype=torch.float64)


def observations(outcome: Outcome) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of the quality loss of every level and its variance, `[levels, 1]` float64 each.

    The standard error of a logarithm is the relative one (delta method). Losses below the floor are alike.
    """
    means, variances = [], []
    for level in range(len(outcome.ratio)):
        kl, error = outcome.kl_nats(level), outcome.standard_error(level)
        means.append([math.log(max(kl, KL_FLOOR))])
        variance = (error / kl) ** 2 if kl > KL_FLOOR else 0.0
        variances.append([min(max(variance, _VARIANCE_MIN), _VARIANCE_MAX)])
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


class ProxyMean(Mean):  # type: ignore[misc]
    """A line in the logarithm of the weighted error: where errors are small, quality loss is in proportion to them."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self._column = column
        self.register_parameter("constant", Parameter(torch.zeros((), dtype=torch.float64)))
        self.register_parameter("slope", Parameter(torch.ones((), dtype=torch.float64)))
        self.register_prior("slope_prior", NormalPrior(1.0, _SLOPE_SPREAD), "slope")
        self.register_prior("constant_prior", NormalPrior(0.0, 1.0), "constant")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Prior mean, `[..., n]` of `[..., n, columns]`."""
        line: torch.Tensor = self.constant + self.slope * SCALE * x[..., self._column]
        return line


def fit_quality(
    features: Features, rows: Sequence[torch.Tensor], observed: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> MixedSingleTaskGP:
    """A Gaussian process for the logarithm of the quality loss.

    Args:
        features: What the rows are.
        rows: Of every measured configuration, `[levels, columns]`.
        observed: What was measured of each, see `observations`; its noise is taken as it is.
    """
    y = torch.cat([mean for mean, _ in observed])
    variance = torch.cat([one for _, one in observed])
    model = MixedSingleTaskGP(torch.cat(list(rows)), y, features.categories, variance, outcome_transform=None)
    model.mean_module = ProxyMean(features.weighted_error)
    # Beyond this many steps the fit changes by less than the next measurement will change it.
    limited = {"options": {"maxiter": _STEPS_MAX}}
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs=limited)
    return model


def predict(model: MixedSingleTaskGP, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the logarithm of the quality loss, `[n]` each, for `[n, columns]`."""
    with torch.no_grad():
        posterior: Posterior = model.posterior(rows[:, None])
        return posterior.mean[:, 0, 0], posterior.variance[:, 0, 0].clamp_min(0).sqrt()
