"""Randomised Hadamard rotation: spreads every coefficient over all of a vector, so that none sticks out."""

import hashlib
from functools import lru_cache

import torch

_PALEY = {12: 11, 20: 19, 28: 13}
"""Primes of the Paley constructions by order: `q + 1` for those that leave 3 when divided by 4, else `2 (q + 1)`."""


def hadamard_base(dim: int) -> int:
    """The factor of `dim` that doubling does not make: 1, 12, 20 or 28; 0 where there is no such factorisation."""
    if dim < 1:
        return 0
    odd = dim // (dim & -dim)
    base = {1: 1, 3: 12, 5: 20, 7: 28}.get(odd, 0)
    return base if base and dim % base == 0 else 0


def hadamard_matrix(dim: int) -> torch.Tensor:
    """Sylvester's doubling of a Paley matrix of order 1, 12, 20 or 28: `[dim, dim]` float32 of +-1.

    Args:
        dim: One that `hadamard_base` knows a factorisation of.
    """
    base = hadamard_base(dim)
    matrix = torch.ones(1, 1) if base == 1 else _paley(base)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def _paley(order: int) -> torch.Tensor:
    """Hadamard matrix by Paley's constructions I (prime 3 modulo 4) and II (1 modulo 4), `[order, order]` float32."""
    prime = _PALEY[order]
    squares = {n * n % prime for n in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, prime)])
    # Jacobsthal's matrix: the quadratic character of the difference of row and column.
    column = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1)
    core[1:, 1:] = character[(column[:, None] - column) % prime]
    core[0, 1:] = 1
    if prime % 4 == 3:
        core[1:, 0] = -1
        return core + torch.eye(prime + 1)
    core[1:, 0] = 1
    unit = torch.eye(prime + 1)
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        unit, torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )


@lru_cache(maxsize=32)
def rotation(dim: int, seed: int) -> torch.Tensor:
    """Orthonormal `[dim, dim]` float32 matrix: random signs, then a Hadamard matrix in Sylvester's order.

    Args:
        dim: A power of two times 1, 12, 20 or 28.
        seed: Names the signs: bit `i` of SHAKE-256 over `kvstore signs 1 SEED DIM` (little-endian bits, 1 is minus).
    """
    matrix = hadamard_matrix(dim)
    bits = hashlib.shake_256(f"kvstore signs 1 {seed} {dim}".encode()).digest(-(-dim // 8))
    signs = torch.tensor([1.0 - 2.0 * (bits[i // 8] >> (i % 8) & 1) for i in range(dim)])
    rotated: torch.Tensor = signs[:, None] * matrix / dim**0.5
    return rotated


def rotate(x: torch.Tensor, seed: int, block: int = 0) -> torch.Tensor:
    """Rotate the last axis: `[..., dim]` float32 to the same; `block` dimensions at a time, 0 for all."""
    return _by_block(x, rotation(block or x.shape[-1], seed))


def unrotate(y: torch.Tensor, seed: int, block: int = 0) -> torch.Tensor:
    """Undo `rotate`."""
    return _by_block(y, rotation(block or y.shape[-1], seed).T)


def _by_block(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    size = len(matrix)
    if size == x.shape[-1]:
        return x @ matrix
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix).flatten(-2)
