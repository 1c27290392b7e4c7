"""Code: bfloat16 without loss, a nibble for each of the 16 most frequent exponents."""

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs.ref.exponent import NAMED, escape_bytes, exponents, frequent, join, name, split
from kvstore.codecs.stage import Planes, Specs, base_planes
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Exponent:
    """Splits every plane in four, all at level 0 and without changing a bit, NaN payloads included.

    `k.0`, nibbles, uint8 of the plane's shape with 16 symbols; `k.mantissa`, signs and mantissas, uint8 of that shape;
    `k.exponents`, `[16]` uint8; `k.escapes`, `[bytes]` uint8, at most one more than the plane has elements.
    """

    name: ClassVar[str] = "exponent"
    lossless: ClassVar[bool] = True

    def infer(self, specs: Specs) -> Specs:
        out = {plane: spec for plane, spec in specs.items() if "." in plane}
        for plane in base_planes(specs):
            spec = specs[plane]
            if spec.dtype != "bfloat16" or spec.at_most:
                raise PipelineError(f"stage {self.name!r}: plane {plane!r} of {spec.dtype} is not a bfloat16 plane")
            out[f"{plane}.0"] = PlaneSpec("uint8", spec.shape, level=0, symbols=NAMED)
            out[f"{plane}.mantissa"] = PlaneSpec("uint8", spec.shape, level=0)
            out[f"{plane}.exponents"] = PlaneSpec("uint8", (NAMED,), level=0)
            out[f"{plane}.escapes"] = PlaneSpec("uint8", (spec.elements + 1,), level=0, at_most=True)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = {plane: x for plane, x in planes.items() if "." in plane}
        for plane in base_planes(specs):
            out[f"{plane}.mantissa"], exponent = split(planes[plane])
            table = frequent(exponent)
            out[f"{plane}.0"], escaped = name(exponent, table)
            out[f"{plane}.exponents"] = table
            out[f"{plane}.escapes"] = escape_bytes(exponent, escaped)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {plane: planes[plane] for plane in like if "." in plane}
        for plane in base_planes(like):
            side = [planes[f"{plane}.{kind}"] for kind in ("0", "exponents", "escapes")]
            try:
                exponent = exponents(*side)
            except ValueError as exc:
                raise FrameCorruptError(f"stage {self.name!r}: plane {plane!r}: {exc}") from exc
            out[plane] = join(planes[f"{plane}.mantissa"], exponent)
        return out
