"""Statistics of calibration prompts, and the tensors of an artefact that follow from them."""

from collections.abc import Iterator, Sequence

import torch

from kvstore.calibration.collect import LinearFit, Moments, Planes, Sample, output_gram, query_power
from kvstore.calibration.fit import basis_tensors, block_diagonal, klt, metric_root
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.codecs.ref.nested import sigma_units
from kvstore.codecs.ref.predict import HISTORY, features
from kvstore.layout import Layout


class Statistics:
    """Moments of every layer group, of K and V in one vector: what a basis needs is a part of them.

    Args:
        layout: Of the model's caches.
        group_layers: Layers in a group.
        windows: Every number of tokens from which K and V are to be predicted, 0 for a mean alone.
        table: A vector for every token, where one of them is not 0.
    """

    def __init__(self, layout: Layout, group_layers: int, windows: Sequence[int], table: torch.Tensor | None) -> None:
        self._table = table
        self._heads, self._dim = layout.planes["k"].shape[2:]
        self._groups = [range(i, min(i + group_layers, layout.layers)) for i in range(0, layout.layers, group_layers)]
        self._values = {group[0]: Moments(2 * len(group) * self._width) for group in self._groups}
        self._costs = {group[0]: Moments(2 * len(group) * self._width) for group in self._groups}
        self._fits = {window: self._fit_from(window) for window in windows}

    @property
    def _width(self) -> int:
        return self._heads * self._dim

    def _fit_from(self, window: int) -> dict[int, LinearFit]:
        """A fit for every group, by its first layer."""
        inputs = 1 if not window or self._table is None else window * self._table.shape[1] + 1
        return {group[0]: LinearFit(inputs, 2 * len(group) * self._width) for group in self._groups}

    def add(self, sample: Sample) -> None:
        """Add a prompt's K and V."""
        vectors = dict(self._vectors(sample.bare))
        for first, x in vectors.items():
            self._values[first].add(x)
        for window, fits in self._fits.items():
            inputs = torch.ones(sample.tokens, 1)
            if window and self._table is not None:
                ids = torch.tensor([-1] * HISTORY + sample.token_ids[: sample.tokens])
                inputs = features(self._table, ids, sample.tokens, window)
            for first, x in vectors.items():
                fits[first].add(inputs, x)

    def add_gradients(self, gradients: Planes) -> None:
        """Add gradients of a log-likelihood by them."""
        for first, x in self._vectors(gradients):
            self._costs[first].add(x)

    def _vectors(self, planes: Planes) -> Iterator[tuple[int, torch.Tensor]]:
        """First layer and vectors `[tokens, n]` of every group."""
        both = torch.cat([planes[name].flatten(2) for name in ("k", "v")], 2)
        for group in self._groups:
            yield group[0], both[group[0] : group[-1] + 1].transpose(0, 1).flatten(1)

    def fit(self, model: Model, samples: Sequence[Sample], settings: Settings) -> dict[str, torch.Tensor]:
        """Tensors of the artefact, but the probes and the table of tokens.

        Args:
            model: For what the metric `power` looks at.
            samples: The prompts, for the same.
            settings: Of the artefact; its group and window are among those of these statistics.
        """
        tensors: dict[str, torch.Tensor] = {}
        metrics = self._metrics(model, samples, settings.metric)
        for group in self._groups:
            matrix, covariance = self._fits[settings.window][group[0]].solve()
            metric = metrics[group[0]]
            if settings.window:
                tensors |= self._predictions(group, matrix)
            for name, at in self._parts(len(group), settings.joint).items():
                parts = torch.split(at, self._dim) if settings.span == "head" else (at,)
                bases = [klt(covariance[p][:, p], metric_root(metric[p][:, p])) for p in parts]
                tensors |= basis_tensors(name, group[0], bases)
        return tensors | self._by_layer(metrics)

    def _predictions(self, group: range, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        by_layer = matrix.view(len(matrix), len(group), 2, self._width).half()
        return {
            f"{name}.predict.{layer}": by_layer[:, i, n]
            for i, layer in enumerate(group)
            for n, name in enumerate(("k", "v"))
        }

    def _parts(self, layers: int, joint: bool) -> dict[str, torch.Tensor]:
        """Where the dimensions of each basis lie in a group's vector `[layers, K|V, heads, dim]`."""
        at = torch.arange(2 * layers * self._width).view(layers, 2, self._width)
        if joint:
            return {"kv": at.flatten()}
        return {"k": at[:, 0].flatten(), "v": at[:, 1].flatten()}

    def _by_layer(self, metrics: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Means, and the weights and spreads of the stage `weigh`."""
        firsts = [group[0] for group in self._groups]
        shape = (-1, 2, self._heads, self._dim)
        mean = torch.cat([self._values[first].mean for first in firsts]).view(shape)
        variance = torch.cat([self._values[first].covariance.diagonal() for first in firsts]).view(shape)
        weight = torch.cat([metric_root(metrics[first]).diagonal for first in firsts]).view(shape)
        spread = (variance * weight.square()).mean(-1).sqrt()
        tensors: dict[str, torch.Tensor] = {}
        for n, name in enumerate(("k", "v")):
            tensors[f"{name}.mean"] = mean[:, n].float()
            tensors[f"{name}.weight"] = weight[:, n].float()
            tensors[f"{name}.spread"] = sigma_units(spread[:, n])
        return tensors

    def _metrics(self, model: Model, samples: Sequence[Sample], metric: str) -> dict[int, torch.Tensor]:
        if metric == "fisher":
            return {first: moments.power for first, moments in self._costs.items()}
        if metric == "none":
            # One unit of error costs the same everywhere in a plane; K and V each by their own variance.
            return {first: self._own_variance(moments.covariance) for first, moments in self._values.items()}
        power = query_power(samples, self._heads)
        gram = output_gram(model, self._heads, self._dim)
        found = {}
        for group in self._groups:
            blocks = [b for i in group for b in (torch.diag(power[i].flatten()), *gram[i])]
            found[group[0]] = block_diagonal(blocks)
        return found

    def _own_variance(self, covariance: torch.Tensor) -> torch.Tensor:
        variance = covariance.diagonal().view(-1, 2, self._width)
        unit = variance.sum((0, 2), keepdim=True).expand_as(variance)
        return torch.diag(1 / unit.flatten())
