"""Quantise: eight-bit floats, one scale a head."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvstore.codecs.options import require_bool, require_names
from kvstore.codecs.ref.fp8 import quantise, reconstruct, scale_of
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Fp8:
    """Codes `k.0` of float8_e4m3fn; `k.scale`, `[layers, 1, heads, 1]` float32; level 0.

    Args:
        planes: Planes to quantise, all by default.
        scaled: Whether every head of every layer is scaled to its largest magnitude; else values beyond +-448 are cut,
            which is what engines do whose cache is in this format.
    """

    planes: tuple[str, ...] = ()
    scaled: bool = True
    name: ClassVar[str] = "fp8"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_names(self.name, "planes", self.planes)
        require_bool(self.name, "scaled", self.scaled)

    def infer(self, specs: Specs) -> Specs:
        names = require_floats(self.name, specs, self.planes)
        out = {name: spec for name, spec in specs.items() if name not in names}
        for name in names:
            layers, _, heads, _ = specs[name].shape
            if self.scaled:
                out[f"{name}.scale"] = PlaneSpec("float32", (layers, 1, heads, 1), level=0)
            out[f"{name}.0"] = replace(specs[name], dtype="float8_e4m3fn", level=0)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        names = require_floats(self.name, specs, self.planes)
        out = {name: x for name, x in planes.items() if name not in names}
        for name in names:
            x = planes[name].float()
            require_finite(self.name, name, x)
            scale = scale_of(x) if self.scaled else 1.0
            if not isinstance(scale, float):
                out[f"{name}.scale"] = scale
            out[f"{name}.0"] = quantise(x, scale)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        names = require_floats(self.name, like, self.planes)
        return {
            name: reconstruct(planes[f"{name}.0"], planes[f"{name}.scale"] if self.scaled else 1.0)
            if name in names
            else planes[name]
            for name in like
        }
