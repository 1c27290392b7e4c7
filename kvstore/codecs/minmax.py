"""Quantise: asymmetric min-max with any number of levels, per channel, token or group, heads in two classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.options import require_choice, require_int, require_names, require_numbers
from kvstore.codecs.ref.minmax import (
    classes,
    extremes,
    extremes_by_class,
    pair_of,
    quantise,
    reconstruct,
    spread,
    spread_by_class,
)
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats, require_layers
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.layout import PlaneSpec

_LEVELS_MAX = 256
_GROUP_MAX = 1 << 16
_HEAD_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class MinMax:
    """Codes `k.0` of `levels` symbols; side planes `k.step` and `k.low`, bfloat16, all at level 0.

    Shape of the side planes, for `[layers, tokens, heads, dim]`:
    per channel `[layers, 1, heads, dim]`, in groups `[layers, groups, heads, dim]`;
    per token in groups `[layers, tokens, heads, groups]`;
    per token without groups one pair for all heads of a class and their dimensions, `[1, pairs]`, ordered by layer,
    class (high first) and token; classes that a layer does not have are left out.

    Args:
        planes: Planes to quantise, all by default.
        levels: Number of levels (not bits), 2 to 256.
        per: `channel` or `token`.
        group: Tokens (per channel) or dimensions (per token) that share a pair; 0 for all.
        low_levels: Levels of the low class of heads, 0 where all heads are alike.
        low_heads: Heads of the low class: `layer * heads + head`, layers counted over the whole model.
    """

    planes: tuple[str, ...] = ()
    levels: int = 16
    per: str = "channel"
    group: int = 0
    low_levels: int = 0
    low_heads: tuple[int, ...] = ()
    name: ClassVar[str] = "minmax"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_names(self.name, "planes", self.planes)
        require_int(self.name, "levels", self.levels, 2, _LEVELS_MAX)
        require_choice(self.name, "per", self.per, ("channel", "token"))
        require_int(self.name, "group", self.group, 0, _GROUP_MAX)
        require_int(self.name, "low_levels", self.low_levels, 0, _LEVELS_MAX)
        require_numbers(self.name, "low_heads", self.low_heads, _HEAD_MAX)
        if self.low_levels == 1 or bool(self.low_levels) != bool(self.low_heads):
            raise PipelineError(f"stage {self.name!r}: low_levels (2 to {_LEVELS_MAX}) and low_heads go together")

    def infer(self, specs: Specs) -> Specs:
        names = require_floats(self.name, specs, self.planes)
        out = {name: spec for name, spec in specs.items() if name not in names}
        for name in names:
            if self.low_heads:
                require_layers(self.name, "low_heads", specs, name)
            shape = specs[name].shape
            pairs = PlaneSpec(
                "bfloat16", self._pairs_shape(shape), level=0, at_most=self._merged and bool(self.low_heads)
            )
            out[f"{name}.step"] = out[f"{name}.low"] = pairs
            out[f"{name}.0"] = PlaneSpec("uint8", shape, level=0, symbols=max(self.levels, self.low_levels))
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        names = require_floats(self.name, specs, self.planes)
        out = {name: x for name, x in planes.items() if name not in names}
        for name in names:
            x = planes[name].float()
            require_finite(self.name, name, x)
            is_low = self._is_low(planes, x.shape)
            step, low = self._pairs(x, is_low)
            require_finite(self.name, name, step)
            require_finite(self.name, name, low)
            wide = [self._wide(name, pair, x.shape, is_low) for pair in (step, low)]
            q = quantise(x, wide[0], wide[1], self._levels(is_low))
            out |= {f"{name}.step": step, f"{name}.low": low, f"{name}.0": q}
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        names = require_floats(self.name, like, self.planes)
        out = {name: planes[name] for name in like if name not in names}
        for name in names:
            q = planes[f"{name}.0"]
            is_low = self._is_low(planes, q.shape)
            step, low = (self._wide(name, planes[f"{name}.{side}"], q.shape, is_low) for side in ("step", "low"))
            out[name] = reconstruct(q, step, low)
        return out

    @property
    def _merged(self) -> bool:
        return self.per == "token" and not self.group

    @property
    def _axis(self) -> int:
        return 1 if self.per == "channel" else 3

    def _pairs_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        layers, tokens, heads, dim = shape
        if self._merged:
            return (1, layers * tokens * (2 if self.low_heads else 1))
        if self.per == "channel":
            return (layers, -(-tokens // (self.group or tokens)), heads, dim)
        return (layers, tokens, heads, -(-dim // self.group))

    def _is_low(self, planes: Planes, shape: Sequence[int]) -> torch.Tensor:
        """Whether each head is of the low class, `[layers, heads]`."""
        if not self.low_heads:
            return torch.zeros(shape[0], shape[2], dtype=torch.bool)
        number = planes[".layer"][:, None] * shape[2] + torch.arange(shape[2])
        return torch.isin(number, torch.tensor(self.low_heads))

    def _levels(self, is_low: torch.Tensor) -> torch.Tensor:
        """Levels of each head, `[layers, 1, heads, 1]` float32."""
        return torch.where(is_low, float(self.low_levels), float(self.levels))[:, None, :, None]

    def _pairs(self, x: torch.Tensor, is_low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Side planes of a plane."""
        if not self._merged:
            return pair_of(*extremes(x, self._axis, self.group), self._levels(is_low))
        present = classes(is_low)
        levels = torch.tensor([float(self.levels), float(self.low_levels or self.levels)])[:, None]
        step, low = pair_of(*extremes_by_class(x, is_low), levels)
        return step[present].view(1, -1), low[present].view(1, -1)

    def _wide(self, name: str, pair: torch.Tensor, shape: Sequence[int], is_low: torch.Tensor) -> torch.Tensor:
        """A side plane as it broadcasts to the plane."""
        if not self._merged:
            return spread(pair, self._axis, self.group, shape[self._axis]) if self.group else pair
        wanted = int(classes(is_low).sum()) * shape[1]
        if pair.numel() != wanted:
            raise FrameCorruptError(f"stage {self.name!r}: plane {name!r} has {pair.numel()} pairs, not {wanted}")
        return spread_by_class(pair, is_low)
