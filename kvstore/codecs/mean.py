"""Canonicalise: take out of every channel its mean over the chunk's tokens."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvstore.codecs.stage import Planes, Specs, base_planes, require_finite, require_floats


@dataclass(frozen=True, slots=True)
class Mean:
    """Subtracts the mean over tokens; keeps it as `k.mean`, `[layers, 1, kv_heads, head_dim]` bfloat16.

    K has a few channels that are far from zero and nearly constant; without this they would set the step of all.
    """

    name: ClassVar[str] = "mean"
    lossless: ClassVar[bool] = False

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            layers, _, heads, dim = specs[name].shape
            out[name] = replace(specs[name], dtype="float32")
            out[f"{name}.mean"] = replace(specs[name], dtype="bfloat16", shape=(layers, 1, heads, dim), level=0)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in base_planes(specs):
            x = planes[name].float()
            require_finite(self.name, name, x)
            mean = x.mean(1, keepdim=True).bfloat16()
            require_finite(self.name, name, mean)
            out[name] = x - mean.float()
            out[f"{name}.mean"] = mean
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {
            name: planes[name] + planes[f"{name}.mean"].float() if "." not in name else planes[name] for name in like
        }
