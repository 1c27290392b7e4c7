"""Quantise: every vector by its norm, its coefficients by the Lloyd-Max codebook of a Gaussian."""

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs.options import require_int, require_names
from kvstore.codecs.ref.codebook import BITS_MAX, norm_of, quantise, reconstruct
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Codebook:
    """Codes `k.0` of `2**bits` symbols; `k.norm`, `[layers, tokens, heads, 1]` bfloat16; level 0.

    It belongs behind a rotation, which makes the coefficients of any vector look Gaussian.

    Args:
        bits: Bits of a code, 1 to 5: a relative squared error of 0.363, 0.117, 0.0345, 0.0095, 0.0025.
        planes: Planes to quantise, all by default.
    """

    bits: int = 4
    planes: tuple[str, ...] = ()
    name: ClassVar[str] = "codebook"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int(self.name, "bits", self.bits, 1, BITS_MAX)
        require_names(self.name, "planes", self.planes)

    def infer(self, specs: Specs) -> Specs:
        names = require_floats(self.name, specs, self.planes)
        out = {name: spec for name, spec in specs.items() if name not in names}
        for name in names:
            shape = specs[name].shape
            out[f"{name}.norm"] = PlaneSpec("bfloat16", (*shape[:-1], 1), level=0)
            out[f"{name}.0"] = PlaneSpec("uint8", shape, level=0, symbols=1 << self.bits)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        names = require_floats(self.name, specs, self.planes)
        out = {name: x for name, x in planes.items() if name not in names}
        for name in names:
            x = planes[name].float()
            require_finite(self.name, name, x)
            norm = norm_of(x)
            require_finite(self.name, name, norm)
            out[f"{name}.norm"] = norm
            out[f"{name}.0"] = quantise(x, norm, self.bits)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        names = require_floats(self.name, like, self.planes)
        return {
            name: reconstruct(planes[f"{name}.0"], planes[f"{name}.norm"], self.bits) if name in names else planes[name]
            for name in like
        }
