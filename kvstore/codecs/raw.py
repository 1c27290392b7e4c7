"""Code: the bytes of a plane as they are, little-endian."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.stage import TORCH_DTYPES, Planes, Specs
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Raw:
    """Turns every plane into `[bytes]` uint8 without changing a bit; planes that are bytes already stay as they are."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True

    def infer(self, specs: Specs) -> Specs:
        return {name: PlaneSpec("uint8", (spec.size_bytes,), spec.level) for name, spec in specs.items()}

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        return {name: x.contiguous().view(-1).view(torch.uint8) for name, x in planes.items()}

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {name: x.view(TORCH_DTYPES[like[name].dtype]).view(like[name].shape) for name, x in planes.items()}
