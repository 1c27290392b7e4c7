"""Orthonormal mixing of the tokens that repeat one another."""

from functools import lru_cache

import torch


def mixing(ids: torch.Tensor) -> torch.Tensor:
    """`[tokens, tokens]` float32: tokens of equal id become their mean, times the root of their number, and contrasts.

    The contrasts are Helmert's: the mean of the first `i` occurrences against the next one. Each row stands where one
    of the occurrences stood; a token that occurs once stays.

    Args:
        ids: `[tokens]` token ids.
    """
    places: dict[int, list[int]] = {}
    for place, token in enumerate(ids.tolist()):
        places.setdefault(token, []).append(place)
    matrix = torch.eye(len(ids))
    for occurrences in places.values():
        if len(occurrences) > 1:
            at = torch.tensor(occurrences)
            matrix[at[:, None], at[None]] = _helmert(len(occurrences))
    return matrix


@lru_cache(maxsize=256)
def _helmert(count: int) -> torch.Tensor:
    rows = torch.arange(count, dtype=torch.float64)[:, None]
    columns = torch.arange(count, dtype=torch.float64)[None]
    matrix = torch.where(columns < rows, 1.0, torch.where(columns == rows, -rows, 0.0))
    matrix[0] = 1.0
    found: torch.Tensor = (matrix / matrix.square().sum(1, keepdim=True).sqrt()).float()
    return found
