"""Asymmetric min-max quantisation: `levels` equal steps from the least to the greatest value of a group.

step = max(greatest - least, 1e-5) / (levels - 1); q = round((x - least) / step)

Source: KVServe (arXiv 2605.13734) and KIVI (arXiv 2402.02750). Both sides use step and least value as bfloat16 rounds
them, but calculate in float32 where KVServe calculates in bfloat16.
"""

import torch

RANGE_MIN = 1e-5


def pair_of(least: torch.Tensor, greatest: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and least value, bfloat16, from float32 extremes and the number of levels, which broadcast."""
    step: torch.Tensor = (greatest - least).clamp(min=RANGE_MIN) / (levels - 1)
    return step.bfloat16(), least.bfloat16()


def quantise(x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """`[...]` float32 to uint8 from 0 to `levels - 1`; what rounding of the pair left outside is cut."""
    index: torch.Tensor = torch.minimum(((x - low.float()) / step.float()).round().clamp(min=0), levels - 1)
    return index.to(torch.uint8)


def reconstruct(q: torch.Tensor, step: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """`[...]` float32 from codes and pairs."""
    return torch.addcmul(low.float(), q.float(), step.float())


def grouped(x: torch.Tensor, axis: int, group: int) -> torch.Tensor:
    """Split an axis into `[groups, group]`; a last group that is short is filled up with its last value."""
    length = x.shape[axis]
    if length % group:
        index = torch.arange(-(-length // group) * group).clamp(max=length - 1)
        x = x.index_select(axis, index)
    return x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])


def spread(pair: torch.Tensor, axis: int, group: int, length: int) -> torch.Tensor:
    """Repeat what holds for a group for each of its members."""
    return pair.repeat_interleave(group, axis).narrow(axis, 0, length)


def extremes(x: torch.Tensor, axis: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value along an axis, of all of it or (`group` > 0) of every group; the axis stays."""
    if not group:
        return x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    split = grouped(x, axis, group)
    return split.amin(axis + 1), split.amax(axis + 1)


def classes(is_low: torch.Tensor) -> torch.Tensor:
    """Whether a layer has heads of the high class and of the low class: `[layers, heads]` to `[layers, 2]` bool."""
    return torch.stack([(~is_low).any(1), is_low.any(1)], 1)


def extremes_by_class(x: torch.Tensor, is_low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of a token over the heads of a class and all their dimensions.

    Args:
        x: `[layers, tokens, heads, dim]` float32.
        is_low: `[layers, heads]`: whether a head is of the low class.

    Returns:
        `[layers, 2, tokens]` float32 each, the high class first; infinite for a class that a layer does not have.
    """
    least, greatest = x.amin(-1), x.amax(-1)
    found = [(~is_low)[:, None], is_low[:, None]]
    return (
        torch.stack([least.masked_fill(~member, torch.inf).amin(-1) for member in found], 1),
        torch.stack([greatest.masked_fill(~member, -torch.inf).amax(-1) for member in found], 1),
    )


def spread_by_class(pair: torch.Tensor, is_low: torch.Tensor) -> torch.Tensor:
    """Pairs of the classes that there are, in the order of `classes` and token by token, for every head.

    Args:
        pair: `[1, pairs]`.
        is_low: `[layers, heads]`.

    Returns:
        `[layers, tokens, heads, 1]`.
    """
    present = classes(is_low)
    pair = pair.view(int(present.sum()), -1)
    wide = pair.new_zeros(len(is_low), 2, pair.shape[1])
    wide[present] = pair
    index = is_low.long()[:, :, None].expand(-1, -1, pair.shape[1])
    return wide.gather(1, index).transpose(1, 2)[..., None]
