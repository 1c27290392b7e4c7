"""Symmetric bins on the largest magnitude of a token: `2 C + 1` codes with `C = bins // 2 - 1`.

q = round(x * C / maxabs + C)

Source: CacheGen (arXiv 2310.07240), as its authors' and KVServe's code have it.
"""

import torch


def centre_of(bins: int) -> int:
    """Code of zero, which is also the number of codes on either side of it."""
    return bins // 2 - 1


def scale_of(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of every token: `[layers, tokens, heads, dim]` float32 to `[layers, tokens, 1, 1]` bfloat16."""
    return x.abs().amax((2, 3), keepdim=True).bfloat16()


def quantise(x: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Codes, uint8 from 0 to `2 * centre`.

    Args:
        x: `[layers, tokens, heads, dim]` float32.
        scale: What `scale_of` made of it.
        centre: `[layers, 1, 1, 1]` float32.
    """
    wide = scale.float()
    # Dividing first: the product may overflow where the quotient does not.
    index: torch.Tensor = (torch.where(wide > 0, x / wide, 0.0).clamp(-1, 1) * centre).round() + centre
    return index.to(torch.uint8)


def reconstruct(q: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Values from codes, `[layers, tokens, heads, dim]` float32."""
    return (q.float() - centre) * (scale.float() / centre)
