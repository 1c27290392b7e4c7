"""Anchors: tokens as differences to the first one of their group."""

import torch


def anchors(x: torch.Tensor, every: int) -> torch.Tensor:
    """First tokens: `[layers, tokens, heads, dim]` to `[layers, ceil(tokens / every), heads, dim]` bfloat16."""
    return x[:, ::every].bfloat16()


def spread(anchor: torch.Tensor, every: int, tokens: int) -> torch.Tensor:
    """Anchor of every token, `[layers, tokens, heads, dim]` float32."""
    return anchor.float().repeat_interleave(every, 1)[:, :tokens]
