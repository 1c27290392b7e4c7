"""Transform: rotate every head's vector by a randomised Hadamard matrix."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvstore.codecs.ref.hadamard import rotate, unrotate
from kvstore.codecs.stage import Planes, Specs, require_floats
from kvstore.errors import PipelineError

_SEED_MAX = 1 << 32


@dataclass(frozen=True, slots=True)
class Hadamard:
    """Orthonormal rotation of the last axis; after it the coefficients of any vector look Gaussian.

    Args:
        seed: Names the random signs.
    """

    seed: int = 0
    name: ClassVar[str] = "hadamard"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < _SEED_MAX:
            raise PipelineError(f"stage {self.name!r}: seed must be an integer from 0 to {_SEED_MAX - 1}")

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            dim = specs[name].shape[-1]
            if dim & (dim - 1):
                raise PipelineError(f"stage {self.name!r}: plane {name!r} has {dim} dimensions, not a power of two")
            out[name] = replace(specs[name], dtype="float32")
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        return {name: x if "." in name else rotate(x.float(), self.seed) for name, x in planes.items()}

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {name: x if "." in name else unrotate(x, self.seed) for name, x in planes.items()}
