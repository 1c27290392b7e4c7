"""Randomised Hadamard rotation: spreads every coefficient over all of a vector, so that none sticks out."""

import hashlib
from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def rotation(dim: int, seed: int) -> torch.Tensor:
    """Orthonormal `[dim, dim]` float32 matrix: random signs, then a Hadamard matrix in Sylvester's order.

    Args:
        dim: A power of two.
        seed: Names the signs: bit `i` of SHAKE-256 over `kvstore signs 1 SEED DIM` (little-endian bits, 1 is minus).
    """
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    bits = hashlib.shake_256(f"kvstore signs 1 {seed} {dim}".encode()).digest(-(-dim // 8))
    signs = torch.tensor([1.0 - 2.0 * (bits[i // 8] >> (i % 8) & 1) for i in range(dim)])
    rotated: torch.Tensor = signs[:, None] * matrix / dim**0.5
    return rotated


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Rotate the last axis: `[..., dim]` float32 to the same."""
    return x @ rotation(x.shape[-1], seed)


def unrotate(y: torch.Tensor, seed: int) -> torch.Tensor:
    """Undo `rotate`."""
    return y @ rotation(y.shape[-1], seed).T
