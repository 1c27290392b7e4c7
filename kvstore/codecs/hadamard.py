"""Transform: rotate every head's vector by a randomised Hadamard matrix."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvstore.codecs.options import require_int
from kvstore.codecs.ref.hadamard import hadamard_base, rotate, unrotate
from kvstore.codecs.stage import Planes, Specs, base_planes, require_finite, require_floats
from kvstore.errors import PipelineError

_SEED_MAX = 1 << 32
_BLOCK_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Hadamard:
    """Orthonormal rotation of the last axis; after it the coefficients of any vector look Gaussian.

    Args:
        seed: Names the random signs.
        block: Dimensions that are rotated together, 0 for all of a head; a power of two times 1, 12, 20 or 28 that
            divides the head dimension.
    """

    seed: int = 0
    block: int = 0
    name: ClassVar[str] = "hadamard"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int(self.name, "seed", self.seed, 0, _SEED_MAX - 1)
        require_int(self.name, "block", self.block, 0, _BLOCK_MAX)

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            dim = specs[name].shape[-1]
            if self.block and dim % self.block:
                raise PipelineError(
                    f"stage {self.name!r}: plane {name!r} has {dim} dimensions, no multiple of the block {self.block}"
                )
            if not hadamard_base(self.block or dim):
                raise PipelineError(
                    f"stage {self.name!r}: plane {name!r} has {self.block or dim} dimensions to rotate, "
                    "not a power of two times 1, 12, 20 or 28"
                )
            out[name] = replace(specs[name], dtype="float32")
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in base_planes(specs):
            x = planes[name].float()
            # A rotation would smear one bad value over its whole vector.
            require_finite(self.name, name, x)
            out[name] = rotate(x, self.seed, self.block)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {name: x if "." in name else unrotate(x, self.seed, self.block) for name, x in planes.items()}
