"""Features of a token and its predecessors."""

import torch

HISTORY = 3
"""Tokens before a chunk that its prediction may look at."""


def features(table: torch.Tensor, ids: torch.Tensor, tokens: int, window: int) -> torch.Tensor:
    """Inputs of a linear prediction.

    Args:
        table: `[vocabulary, r]`, a vector for every token.
        ids: `[HISTORY + tokens]` token ids; negative ones, before a prompt's first token, count as zero vectors.
        tokens: Number of tokens to predict.
        window: Tokens that each prediction looks at, 1 to `HISTORY + 1`.

    Returns:
        `[tokens, window * r + 1]` float32; the last column is one.
    """
    vectors = table.index_select(0, ids.clamp_min(0)).float() * (ids >= 0)[:, None]
    last = len(ids) - tokens
    shifted = [vectors[last - back : last - back + tokens] for back in range(window)]
    return torch.cat([*shifted, torch.ones(tokens, 1)], 1)
