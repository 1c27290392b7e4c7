"""Nested mid-tread quantisation: every level divides the step of the one before by three.

With `n` levels a value becomes an integer from 0 to `3**n - 1` (zero in the middle) on a grid that just covers the
largest magnitude of its vector. Its base-3 digits, most significant first, are the levels: a cell of one level is
exactly three cells of the next, so a prefix of the digits is the coarser quantisation, not an approximation of it.
"""

import torch


def scale_of(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Finest step of each vector: `[..., dim]` float32 to `[..., 1]` bfloat16, rounded up so that nothing is cut."""
    step = x.abs().amax(-1, keepdim=True) / (3**levels / 2)
    # Four parts in a thousand are one unit in the last place of bfloat16.
    rounded = step.bfloat16()
    return torch.where(rounded.float() < step, (step * 1.008).bfloat16(), rounded)


def quantise(x: torch.Tensor, scale: torch.Tensor, levels: int) -> torch.Tensor:
    """Cell of each value: `[..., dim]` float32 and `[..., 1]` to `[..., dim]` uint8, 0 to `3**levels - 1`."""
    half = (3**levels - 1) // 2
    step = scale.float()
    index: torch.Tensor = torch.where(step > 0, x / step, 0.0).round().clamp(-half, half) + half
    return index.to(torch.uint8)


def digit(index: torch.Tensor, level: int, levels: int) -> torch.Tensor:
    """Base-3 digit of a level, uint8: level 0 is the most significant."""
    found: torch.Tensor = index // 3 ** (levels - 1 - level) % 3
    return found


def centroids(x: torch.Tensor, scale: torch.Tensor, index: torch.Tensor, level: int, levels: int) -> torch.Tensor:
    """Mean magnitude in every cell of a level, in steps of that level.

    Returns:
        `[(3**(level + 1) - 1) // 2]` float16 for the cells at distance 1, 2, ... from zero; a cell that holds nothing
        gets its middle.
    """
    cells = (3 ** (level + 1) - 1) // 2
    step = scale.float() * 3 ** (levels - 1 - level)
    distance = ((index // 3 ** (levels - 1 - level)).long() - cells).abs().flatten()
    magnitude = torch.where(step > 0, x.abs() / step, 0.0).flatten()
    count = torch.bincount(distance, minlength=cells + 1)[1:]
    total = torch.bincount(distance, magnitude.double(), minlength=cells + 1)[1:]
    middle = torch.arange(1, cells + 1, dtype=torch.float64)
    # A value outside of its cell (a scale that underflowed) must not pull the centroid out of it.
    mean = torch.where(count > 0, total / count.clamp(min=1), middle)
    return mean.clamp(middle - 0.5, middle + 0.5).half()


def reconstruct(digits: list[torch.Tensor], scale: torch.Tensor, centre: torch.Tensor, levels: int) -> torch.Tensor:
    """Values from the digits of the levels that are there.

    Args:
        digits: `[..., dim]` uint8 for level 0, 1, ...; at least one.
        scale: Finest step, `[..., 1]`.
        centre: Centroids of the last of these levels.
        levels: Number of levels that were written.

    Returns:
        `[..., dim]` float32.
    """
    index = digits[0]
    for finer in digits[1:]:
        # Five digits, the most there are, still fit into eight bits.
        index = index * 3 + finer
    # Digits beyond 2, which no encoder writes, must not look beyond the table.
    index = index.clamp(max=2 * len(centre))
    table = torch.cat([-centre.float().flip(0), torch.zeros(1), centre.float()])
    values = table.index_select(0, index.flatten().int()).view(index.shape)
    return values.mul_(scale.float() * 3 ** (levels - len(digits)))
