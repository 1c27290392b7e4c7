"""Canonicalise: tokens as differences to an anchor token a few places before them."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvstore.codecs.options import require_int
from kvstore.codecs.ref.anchor import anchors, spread
from kvstore.codecs.stage import Planes, Specs, base_planes, require_finite, require_floats, require_new

_EVERY_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Anchor:
    """Subtracts from every token the first one of its group; `k.anchor` holds those in bfloat16, at level 0.

    The anchors themselves become what rounding them to bfloat16 left over. Source: CacheGen (arXiv 2310.07240),
    section 5.1, whose groups are of ten tokens.

    Args:
        every: Tokens of a group.
    """

    every: int = 10
    name: ClassVar[str] = "anchor"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int(self.name, "every", self.every, 1, _EVERY_MAX)

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            require_new(self.name, specs, f"{name}.anchor")
            layers, tokens, heads, dim = specs[name].shape
            out[name] = replace(specs[name], dtype="float32")
            shape = (layers, -(-tokens // self.every), heads, dim)
            out[f"{name}.anchor"] = replace(specs[name], dtype="bfloat16", shape=shape, level=0)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in base_planes(specs):
            x = planes[name].float()
            require_finite(self.name, name, x)
            anchor = anchors(x, self.every)
            require_finite(self.name, name, anchor)
            out[name] = x - spread(anchor, self.every, x.shape[1])
            out[f"{name}.anchor"] = anchor
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name in base_planes(like):
            x = planes[name]
            out[name] = x + spread(planes[f"{name}.anchor"], self.every, x.shape[1])
        return out
