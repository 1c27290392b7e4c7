"""Eight-bit floats with four bits of exponent and three of mantissa (e4m3fn), scaled to the largest magnitude."""

import torch

LARGEST = 448.0
"""Largest finite value; the format has no infinity."""


def scale_of(x: torch.Tensor) -> torch.Tensor:
    """Scale of every head: `[layers, tokens, heads, dim]` float32 to `[layers, 1, heads, 1]` float32, never zero."""
    # The least normal number keeps a quotient of subnormal ones finite.
    return (x.abs().amax((1, 3), keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)


def quantise(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Nearest float8_e4m3fn of `x / scale`; what lies outside is cut."""
    # Whether a cast saturates or gives NaN differs between versions of torch.
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def reconstruct(q: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Values, float32."""
    return q.float() * scale
