"""From collected statistics to metrics, bases and sigmas."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvstore.codecs.ref.nested import sigma_units

_RIDGE = 0.02
_SIGMA_MIN = 1e-6


class Root(NamedTuple):
    """Square root of a metric, its inverse (`[n, n]` float64, symmetric), and the root of its diagonal, `[n]`."""

    root: torch.Tensor
    inverse: torch.Tensor
    diagonal: torch.Tensor


class Basis(NamedTuple):
    """A transform `x @ forward` into uncorrelated coefficients, and back.

    Args:
        forward: `[n, n]` float64.
        inverse: Its inverse.
        sigma: Standard deviations of the coefficients, falling, `[n]`.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    sigma: torch.Tensor


def metric_root(metric: torch.Tensor, ridge: float = _RIDGE) -> Root:
    """Root of a positive semidefinite `[n, n]`; a ridge, in parts of its mean eigenvalue, lets no error be free."""
    values, vectors = torch.linalg.eigh(metric.double())
    values = values.clamp_min(0) + values.mean().clamp_min(1e-30) * ridge
    return Root(
        vectors @ torch.diag(values.sqrt()) @ vectors.T,
        vectors @ torch.diag(values.rsqrt()) @ vectors.T,
        (vectors.square() @ values).sqrt(),
    )


def klt(covariance: torch.Tensor, root: Root) -> Basis:
    """Karhunen-Loeve basis of vectors with a covariance `[n, n]`, in the metric whose root is given."""
    values, vectors = torch.linalg.eigh(root.root @ covariance.double() @ root.root)
    values, vectors = values.flip(0), vectors.flip(1)
    return Basis(root.root @ vectors, vectors.T @ root.inverse, values.clamp_min(0).sqrt().clamp_min(_SIGMA_MIN))


def block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """One matrix of square blocks."""
    found: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return found


def basis_tensors(name: str, first_layer: int, bases: list[Basis]) -> dict[str, torch.Tensor]:
    """Tensors of an artefact: `[blocks, n, n]` float32 and sigmas `[blocks, n]` int16."""
    return {
        f"{name}.forward.{first_layer}": torch.stack([basis.forward for basis in bases]).float(),
        f"{name}.inverse.{first_layer}": torch.stack([basis.inverse for basis in bases]).float(),
        f"{name}.sigma.{first_layer}": torch.stack([sigma_units(basis.sigma) for basis in bases]),
    }
