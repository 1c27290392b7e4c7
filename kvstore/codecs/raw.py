"""Code: the bytes of a plane as they are, little-endian."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.stage import TORCH_DTYPES, Planes, Specs, is_context
from kvstore.errors import FrameCorruptError
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Raw:
    """Turns every plane into `[bytes]` uint8 without changing a bit; planes that are bytes already stay as they are."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True

    def infer(self, specs: Specs) -> Specs:
        return {
            name: spec if is_context(name) else PlaneSpec("uint8", (spec.size_bytes,), spec.level, at_most=spec.at_most)
            for name, spec in specs.items()
        }

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        return {
            name: x if is_context(name) else x.contiguous().view(-1).view(torch.uint8) for name, x in planes.items()
        }

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {name: x if is_context(name) else _as_spec(name, x, like[name]) for name, x in planes.items()}


def _as_spec(name: str, x: torch.Tensor, spec: PlaneSpec) -> torch.Tensor:
    if spec.at_most and len(spec.shape) == 1:
        return x.view(TORCH_DTYPES[spec.dtype])
    if not spec.at_most:
        return x.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
    row = spec.size_bytes // spec.shape[1]
    if x.numel() % row:
        raise FrameCorruptError(f"stage 'raw': plane {name!r} of {x.numel()} bytes does not hold whole tokens")
    return x.view(TORCH_DTYPES[spec.dtype]).view(spec.shape[0], -1, *spec.shape[2:])
