"""Quantise: nested mid-tread steps, a plane of base-3 digits for every quality level."""

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs.ref.step import centroids, digit, quantise, reconstruct, scale_of
from kvstore.codecs.stage import Planes, Specs, base_planes, require_finite, require_floats
from kvstore.errors import PipelineError
from kvstore.layout import PlaneSpec

_LEVELS_MAX = 5


@dataclass(frozen=True, slots=True)
class Step:
    """Digits `k.0`, `k.1`, ... on a grid that fits the largest magnitude of each head's vector.

    Side planes: `k.scale` (finest step, `[layers, tokens, kv_heads, 1]` bfloat16) at level 0, and for every level the
    centroids of its cells, `k.0.centroids`.

    Args:
        levels: Number of quality levels, 1 to 5; each costs 1.6 bits an element and gains 9.5 dB.
    """

    levels: int = 3
    name: ClassVar[str] = "step"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.levels) is not int or not 1 <= self.levels <= _LEVELS_MAX:
            raise PipelineError(f"stage {self.name!r}: levels must be an integer from 1 to {_LEVELS_MAX}")

    def infer(self, specs: Specs) -> Specs:
        out = {name: spec for name, spec in specs.items() if "." in name}
        for name in require_floats(self.name, specs):
            shape = specs[name].shape
            out[f"{name}.scale"] = PlaneSpec("bfloat16", (*shape[:-1], 1), level=0)
            for level in range(self.levels):
                cells = (3 ** (level + 1) - 1) // 2
                out[f"{name}.{level}.centroids"] = PlaneSpec("float16", (cells,), level=level)
                out[f"{name}.{level}"] = PlaneSpec("uint8", shape, level=level, symbols=3)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = {name: x for name, x in planes.items() if "." in name}
        for name in base_planes(specs):
            x = planes[name].float()
            require_finite(self.name, name, x)
            scale = scale_of(x, self.levels)
            require_finite(self.name, name, scale)
            index = quantise(x, scale, self.levels)
            out[f"{name}.scale"] = scale
            for level in range(self.levels):
                out[f"{name}.{level}.centroids"] = centroids(x, scale, index, level, self.levels)
                out[f"{name}.{level}"] = digit(index, level, self.levels)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {}
        for name in like:
            if "." in name:
                out[name] = planes[name]
                continue
            digits = [planes[plane] for level in range(self.levels) if (plane := f"{name}.{level}") in planes]
            centre = planes[f"{name}.{len(digits) - 1}.centroids"]
            out[name] = reconstruct(digits, planes[f"{name}.scale"], centre, self.levels)
        return out
