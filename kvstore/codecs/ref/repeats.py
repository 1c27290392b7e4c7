"""Orthonormal mixing of the tokens that repeat one another."""

import torch


def mixing(ids: torch.Tensor) -> torch.Tensor:
    """`[tokens, tokens]` float32: tokens of equal id become their mean, times the root of their number, and contrasts.

    The contrasts are Helmert's: the mean of the first `i` occurrences against the next one. Each row stands where one
    of the occurrences stood; a token that occurs once stays.

    Args:
        ids: `[tokens]` token ids.
    """
    matrix = torch.eye(len(ids))
    for token in set(ids.tolist()):
        at = (ids == token).nonzero()[:, 0]
        count = len(at)
        if count > 1:
            matrix[at[:, None], at[None]] = _helmert(count)
    return matrix


def _helmert(count: int) -> torch.Tensor:
    rows = torch.arange(count, dtype=torch.float64)[:, None]
    columns = torch.arange(count, dtype=torch.float64)[None]
    matrix = torch.where(columns < rows, 1.0, torch.where(columns == rows, -rows, 0.0))
    matrix[0] = 1.0
    found: torch.Tensor = (matrix / matrix.square().sum(1, keepdim=True).sqrt()).float()
    return found
