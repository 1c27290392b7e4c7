"""Scalar quantisation with the codebook that is best for a Gaussian (Lloyd-Max), on vectors of unit root mean square.

A rotated vector divided by its norm has coefficients that are close to Gaussian of variance `1 / dim` whatever it was
before, so one codebook a bit width serves all. Source: TurboQuant (arXiv 2504.19874), its codec for the mean squared
error; Max (1960), table I, for the codebooks, which are computed here to float64's precision.
"""

import torch

_POSITIVE: dict[int, tuple[float, ...]] = {
    1: (0.79788456,),
    2: (0.45278003, 1.51041761),
    3: (0.24509418, 0.75600528, 1.34390928, 2.1519457),
    4: (0.12839503, 0.3880483, 0.65675912, 0.94234046, 1.2562312, 1.61804639, 2.06901723, 2.73258957),
    5: (
        *(0.06588966, 0.19805183, 0.33137831, 0.46669952, 0.60493362, 0.7471357, 0.89456512, 1.04878332),
        *(1.21180438, 1.38634034, 1.57622808, 1.78723322, 2.0287284, 2.3177394, 2.69111958, 3.26073249),
    ),
}
"""Positive half of the codebook of a unit Gaussian by bits: each value is the mean of its cell, each bound a middle."""

BITS_MAX = max(_POSITIVE)


def codebook(bits: int) -> torch.Tensor:
    """Values of the codes, ascending: `[2**bits]` float32."""
    half = torch.tensor(_POSITIVE[bits])
    return torch.cat([-half.flip(0), half])


def norm_of(x: torch.Tensor) -> torch.Tensor:
    """Norm of each vector: `[..., dim]` float32 to `[..., 1]` bfloat16."""
    # In float64, for the squares of large values overflow float32.
    norm: torch.Tensor = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
    return norm.bfloat16()


def quantise(x: torch.Tensor, norm: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., dim]` uint8, 0 to `2**bits - 1`, from values and norms."""
    values = codebook(bits)
    scale = norm.float()
    unit = torch.where(scale > 0, x / scale, 0.0) * x.shape[-1] ** 0.5
    return torch.bucketize(unit, (values[1:] + values[:-1]) / 2).to(torch.uint8)


def reconstruct(q: torch.Tensor, norm: torch.Tensor, bits: int) -> torch.Tensor:
    """Values `[..., dim]` float32; codes that no encoder writes count as if their upper bits were not there."""
    index = q.flatten().bitwise_and(2**bits - 1).int()
    unit = codebook(bits).index_select(0, index).view(q.shape)
    values: torch.Tensor = unit * (norm.float() / q.shape[-1] ** 0.5)
    return values
