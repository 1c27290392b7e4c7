"""`kvstore calibrate`: means, metrics, probes, bases and sigmas of a model, from text, as one artefact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

import kvstore
from kvstore.calibration.collect import (
    Moments,
    Planes,
    Sample,
    fisher_gradients,
    output_gram,
    query_power,
    take_sample,
)
from kvstore.calibration.fit import basis_tensors, block_diagonal, klt, metric_root
from kvstore.calibration.model import Model
from kvstore.codecs.artefact import save_artefact
from kvstore.codecs.ref.nested import sigma_units
from kvstore.errors import ConfigError
from kvstore.layout import Layout

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to calibrate.

    Args:
        prompts: Number of prompts.
        prefix_tokens: Their lengths; prompts take turns.
        continuation_tokens: Tokens behind each over which an error is charged.
        group_layers: Layers that a basis spans.
        span: One basis a head, or one over all heads (of all layers of the group).
        metric: What an error costs: `fisher`, `power` (queries and output projection, no gradients) or `none`.
        repeats: Continuations that are sampled for each prompt.
        probes: Queries kept a head, which stand for those to come.
        seed: Of everything random.
    """

    prompts: int = 64
    prefix_tokens: tuple[int, ...] = (256, 512, 1024)
    continuation_tokens: int = 128
    group_layers: int = 1
    span: Literal["head", "heads"] = "heads"
    metric: Literal["fisher", "power", "none"] = "fisher"
    repeats: int = 4
    probes: int = 48
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: A setting is out of range.
        """
        numbers = (self.prompts, *self.prefix_tokens, self.continuation_tokens, self.group_layers, self.repeats)
        if min(numbers) < 1 or self.probes < 1:
            raise ConfigError("calibration needs at least one prompt, token, layer, repeat and probe")
        if self.span == "head" and self.group_layers > 1:
            raise ConfigError("a basis for each head spans one layer: use group_layers 1, or span 'heads'")


def calibrate(model: Model, texts: Sequence[Path], settings: Settings, progress: Progress = lambda _: None) -> bytes:
    """Calibrate a model on text.

    Args:
        model: Loaded in float32.
        texts: Text files of the kind that will be served.
        settings: How.
        progress: Told the share that is done, 0 to 1.

    Returns:
        The artefact's bytes.

    Raises:
        ConfigError: The text is too short, or the model is not one that can be calibrated.
    """
    settings.check()
    model.freeze()
    torch.manual_seed(settings.seed)
    windows = _windows(model, texts, settings)
    layout = model.layout_of(windows[0][0][:2])
    statistics = _Statistics(layout, settings)
    samples: list[Sample] = []
    for number, (token_ids, prefix) in enumerate(windows):
        sample = take_sample(model, layout, token_ids, prefix)
        statistics.add(sample)
        if settings.metric == "fisher":
            for gradients in fisher_gradients(model, layout, sample, settings.repeats):
                statistics.add_gradients(gradients)
        samples.append(sample)
        progress((number + 1) / len(windows))
    tensors = statistics.fit(model, samples)
    tensors["probes"] = _probes(samples, settings)
    return save_artefact(tensors, _card(model, layout, texts, settings, sum(len(ids) for ids, _ in windows)))


class _Statistics:
    """Moments of every layer group."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._settings = settings
        self._heads, self._dim = layout.planes["k"].shape[2:]
        step = settings.group_layers
        self._groups = [range(i, min(i + step, layout.layers)) for i in range(0, layout.layers, step)]
        width = self._heads * self._dim
        parts = [(name, group) for group in self._groups for name in layout.planes]
        self._values = {(name, group[0]): Moments(len(group) * width) for name, group in parts}
        self._costs = {(name, group[0]): Moments(len(group) * width) for name, group in parts}

    def add(self, sample: Sample) -> None:
        self._add(self._values, sample.bare)

    def add_gradients(self, gradients: Planes) -> None:
        self._add(self._costs, gradients)

    def _add(self, moments: dict[tuple[str, int], Moments], planes: Planes) -> None:
        for group in self._groups:
            for name, x in planes.items():
                moments[name, group[0]].add(x[group[0] : group[-1] + 1].transpose(0, 1).flatten(1))

    def fit(self, model: Model, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Tensors of the artefact, but the probes."""
        tensors: dict[str, torch.Tensor] = {}
        metrics = self._metrics(model, samples)
        for (name, first), moments in self._values.items():
            covariance, metric = moments.covariance, metrics[name, first]
            if self._settings.span == "head":
                parts = [slice(h * self._dim, (h + 1) * self._dim) for h in range(self._heads)]
                bases = [klt(covariance[p, p], metric_root(metric[p, p])) for p in parts]
            else:
                bases = [klt(covariance, metric_root(metric))]
            tensors |= basis_tensors(name, first, bases)
        for name in ("k", "v"):
            firsts = [group[0] for group in self._groups]
            mean = torch.cat([self._values[name, first].mean for first in firsts])
            variance = torch.cat([self._values[name, first].covariance.diagonal() for first in firsts])
            weight = torch.cat([metric_root(metrics[name, first]).diagonal for first in firsts])
            shape = (-1, self._heads, self._dim)
            spread = (variance * weight.square()).view(shape).mean(-1).sqrt()
            tensors[f"{name}.mean"] = mean.view(shape).float()
            tensors[f"{name}.weight"] = weight.view(shape).float()
            tensors[f"{name}.spread"] = sigma_units(spread)
        return tensors

    def _metrics(self, model: Model, samples: Sequence[Sample]) -> dict[tuple[str, int], torch.Tensor]:
        if self._settings.metric == "fisher":
            return {part: moments.power for part, moments in self._costs.items()}
        if self._settings.metric == "none":
            # One unit of error costs the same everywhere in a plane; K and V each by their own variance.
            return {part: torch.eye(moments.n) / moments.covariance.trace() for part, moments in self._values.items()}
        power = query_power(samples, self._heads)
        gram = output_gram(model, self._heads, self._dim)
        metrics = {}
        for group in self._groups:
            layers = slice(group[0], group[-1] + 1)
            metrics["k", group[0]] = torch.diag(power[layers].flatten())
            metrics["v", group[0]] = block_diagonal(gram[layers].flatten(0, 1))
        return metrics


def _windows(model: Model, texts: Sequence[Path], settings: Settings) -> list[tuple[list[int], int]]:
    """Token ids of every prompt with its continuation, and the length of its prefix."""
    ids: list[int] = []
    for text in texts:
        try:
            ids += model.tokenize(text.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cannot read {text}: {exc}") from exc
    generator = torch.Generator().manual_seed(settings.seed)
    windows = []
    for number in range(settings.prompts):
        prefix = settings.prefix_tokens[number % len(settings.prefix_tokens)]
        length = prefix + settings.continuation_tokens
        if length > model.positions:
            raise ConfigError(f"prompts of {length} tokens are longer than the model's context of {model.positions}")
        if length >= len(ids):
            raise ConfigError(f"the text has {len(ids)} tokens, a prompt needs {length}: give more text")
        start = int(torch.randint(0, len(ids) - length, (1,), generator=generator))
        windows.append((ids[start : start + length], prefix))
    return windows


def _probes(samples: Sequence[Sample], settings: Settings) -> torch.Tensor:
    """`[layers, heads, probes, head_dim]` float16: queries drawn from all prompts."""
    queries = torch.cat([sample.queries for sample in samples], 1)
    layers, tokens = queries.shape[:2]
    drawn = [queries[i, torch.randint(0, tokens, (settings.probes,))].transpose(0, 1) for i in range(layers)]
    return torch.stack(drawn).half()


def _card(model: Model, layout: Layout, texts: Sequence[Path], settings: Settings, tokens: int) -> dict[str, object]:
    return {
        "model": layout.model,
        "revision": layout.revision,
        "texts": [text.name for text in texts],
        "tokens": tokens,
        "prompts": settings.prompts,
        "prefix_tokens": list(settings.prefix_tokens),
        "continuation_tokens": settings.continuation_tokens,
        "group_layers": settings.group_layers,
        "span": settings.span,
        "metric": settings.metric,
        "seed": settings.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kvstore": kvstore.__version__,
    }
