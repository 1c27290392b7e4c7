"""What calibration text tells about a model's KV cache: moments of K and V, what an error costs, typical queries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.calibration.model import Model, planes_of
from kvstore.codecs.ref.rope import rotary_planes, rotate, unrotate
from kvstore.errors import ConfigError
from kvstore.layout import Layout

Planes = dict[str, torch.Tensor]


@dataclass
class Moments:
    """Sums over tokens of one layer group's vectors `[n]`: count, sum, and sum of outer products."""

    n: int
    count: float = 0.0
    total: torch.Tensor = field(init=False)
    outer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.n, dtype=torch.float64)
        self.outer = torch.zeros(self.n, self.n, dtype=torch.float64)

    def add(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add vectors `[tokens, n]`, each with a weight."""
        x = x.double()
        weighted = x if weight is None else x * weight.double()[:, None]
        self.count += len(x) if weight is None else float(weight.sum())
        self.total += weighted.sum(0)
        self.outer += weighted.T @ x

    @property
    def mean(self) -> torch.Tensor:
        """`[n]` float64."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """`[n, n]` float64, about the mean."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)

    @property
    def power(self) -> torch.Tensor:
        """`[n, n]` float64, about zero."""
        return self.outer / self.count


class LinearFit:
    """Least squares of vectors `[outputs]` from features `[inputs]`, the last of which is one."""

    def __init__(self, inputs: int, outputs: int, ridge: float = 1e-4) -> None:
        self._ridge = ridge
        self._count = 0
        self._inputs = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._outputs = torch.zeros(outputs, outputs, dtype=torch.float64)

    def add(self, features: torch.Tensor, x: torch.Tensor) -> None:
        """Add `[tokens, inputs]` and `[tokens, outputs]`."""
        features, x = features.double(), x.double()
        self._count += len(x)
        self._inputs += features.T @ features
        self._cross += features.T @ x
        self._outputs += x.T @ x

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix `[inputs, outputs]` and covariance of what it leaves, `[outputs, outputs]`; float64."""
        ridge = torch.eye(len(self._inputs), dtype=torch.float64) * self._ridge * self._count
        ridge[-1, -1] = 0.0
        matrix = torch.linalg.solve(self._inputs + ridge, self._cross)
        explained = matrix.T @ self._cross
        left = self._outputs - explained - explained.T + matrix.T @ self._inputs @ matrix
        return matrix, left / self._count


@dataclass(frozen=True, slots=True)
class Sample:
    """One calibration prompt.

    Args:
        planes: K and V as the model made them, `[layers, tokens, kv_heads, head_dim]` float32.
        bare: The same with the rotary embedding of K undone.
        queries: Queries without rotary embedding, `[layers, tokens, heads, head_dim]`.
        token_ids: The prompt and what follows it.
    """

    planes: Planes
    bare: Planes
    queries: torch.Tensor
    token_ids: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return self.planes["k"].shape[1]


def take_sample(model: Model, layout: Layout, token_ids: Sequence[int], prefix: int) -> Sample:
    """Prefill a prompt and keep what calibration needs of it."""
    with _captured_queries(model) as captured, torch.inference_mode():
        cache = DynamicCache()
        model.forward(token_ids[:prefix], cache)
    planes = {name: x.float().clone() for name, x in planes_of(cache).items()}
    bare = dict(planes)
    if layout.rope is not None:
        bare["k"] = unrotate(planes["k"], *rotary_planes(layout.rope, torch.arange(prefix)))
    head_dim = planes["k"].shape[-1]
    queries = torch.stack([x.float().view(prefix, -1, head_dim) for x in captured])
    return Sample(planes, bare, queries.clone(), list(token_ids))


def fisher_gradients(model: Model, layout: Layout, sample: Sample, repeats: int) -> Iterator[Planes]:
    """Gradients of the log-likelihood of sampled continuations by K (without rotary embedding) and V.

    The mean of their outer products is the Fisher information: twice the KL divergence that a small error causes.
    """
    positions = torch.arange(sample.tokens)
    rotary = None if layout.rope is None else rotary_planes(layout.rope, positions)
    for _ in range(repeats):
        leaves = {name: x.clone().requires_grad_() for name, x in sample.bare.items()}
        keys = leaves["k"] if rotary is None else rotate(leaves["k"], *rotary)
        log_p = model.log_probabilities({"k": keys, "v": leaves["v"]}, sample.token_ids[sample.tokens :])
        drawn = torch.multinomial(log_p.detach().exp(), 1)
        log_p.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
        yield {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def query_power(samples: Sequence[Sample], kv_heads: int) -> torch.Tensor:
    """Mean square of the queries that read each K channel, `[layers, kv_heads, head_dim]`, equal within rotary pairs.

    An error of K turns with the rotary embedding, so both channels of a pair cost alike.
    """
    power = torch.stack([sample.queries.square().mean(1) for sample in samples]).mean(0)
    layers, heads, dim = power.shape
    power = power.view(layers, kv_heads, heads // kv_heads, dim).mean(2)
    half = (power[..., : dim // 2] + power[..., dim // 2 :]) / 2
    return torch.cat([half, half], -1)


def require_output_projection(attention: Any) -> None:
    """Refuse an attention without a plain `o_proj`.

    Raises:
        ConfigError: It has none.
    """
    if not isinstance(getattr(getattr(attention, "o_proj", None), "weight", None), torch.Tensor):
        raise ConfigError(f"a {type(attention).__name__} has no o_proj for the metric 'power': use 'fisher' or 'none'")


def output_gram(model: Model, kv_heads: int, head_dim: int) -> torch.Tensor:
    """What an error of V costs behind the output projection: `[layers, kv_heads, head_dim, head_dim]`.

    Raises:
        ConfigError: An attention has no output projection.
    """
    grams = []
    for attention in model.attentions:
        require_output_projection(attention)
        weight = attention.o_proj.weight.detach().float().cpu()
        parts = weight.view(len(weight), kv_heads, -1, head_dim).permute(1, 0, 2, 3).reshape(kv_heads, -1, head_dim)
        grams.append(parts.transpose(1, 2) @ parts)
    return torch.stack(grams)


def token_table(model: Model, windows: Sequence[tuple[Sequence[int], int]], dims: int) -> torch.Tensor:
    """A vector for every token, `[vocabulary, dims]` float16: input embeddings, in as many directions as matter."""
    vectors = model.embeddings.float()
    vectors = vectors * vectors.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
    dims = min(dims, vectors.shape[1])
    seen = torch.tensor([token for ids, _ in windows for token in ids])
    counts = torch.bincount(seen, minlength=len(vectors)).double().sqrt()
    weighted = vectors.double() * counts[:, None]
    _, directions = torch.linalg.eigh(weighted.T @ weighted)
    table: torch.Tensor = vectors @ directions.flip(1)[:, :dims].float()
    return table.half()


@contextmanager
def _captured_queries(model: Model) -> Iterator[list[torch.Tensor]]:
    """Outputs of the query projections (behind their norm, where they have one), a tensor a layer."""
    captured: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        captured.append(output.detach().reshape(output.shape[1], -1).cpu())

    hooks: list[Callable[[], None]] = []
    for attention in model.attentions:
        module = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None)
        if module is None:
            raise ConfigError(
                f"a {type(attention).__name__} has no q_proj, whose queries calibration looks at; "
                "models that project queries, keys and values as one cannot be calibrated yet"
            )
        hooks.append(module.register_forward_hook(keep).remove)
    try:
        yield captured
    finally:
        for remove in hooks:
            remove()
