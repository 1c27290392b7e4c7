"""Tokens that are kept as they are: attention sinks at the start of a prompt, a recent window at its end."""

import torch


def split(x: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the first and the last tokens of a plane out.

    Args:
        x: `[layers, tokens, heads, dim]` float.
        first: Tokens at the start.
        last: Tokens at the end; together no more than there are.

    Returns:
        The plane with every such token replaced by the mean of the others (zero where there are none), so that it
        costs little, and the tokens, `[layers, first + last, heads, dim]`. Both of the dtype of `x`.
    """
    tokens = x.shape[1]
    rest = x[:, first : tokens - last]
    kept = torch.cat([x[:, :first], x[:, tokens - last :]], 1)
    # Float64 cannot overflow here, and values that are not finite are for a later stage to refuse, each once.
    finite = rest.double().nan_to_num(0, 0, 0)
    filler = (finite.sum(1, keepdim=True) / max(rest.shape[1], 1)).to(x.dtype)
    return torch.cat([filler.expand_as(x[:, :first]), rest, filler.expand_as(x[:, tokens - last :])], 1), kept


def join(x: torch.Tensor, kept: torch.Tensor, first: int) -> torch.Tensor:
    """Undo `split`, in the dtype of `x`: `first` of the kept tokens are the start, the others the end."""
    last = kept.shape[1] - first
    kept = kept.to(x.dtype)
    return torch.cat([kept[:, :first], x[:, first : x.shape[1] - last], kept[:, first:]], 1)
