"""Canonicalise: say once what tokens have in common that occur several times in a chunk."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvstore.codecs.ref.repeats import mixing
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import PipelineError


@dataclass(frozen=True, slots=True)
class Repeats:
    """Mixes, by an orthonormal matrix, the vectors of tokens that have the same id.

    K and V of a token depend first of all on the token, so of several occurrences one vector is large and the others,
    the contrasts, are small. The matrix follows from the token ids, which writer and reader both know; nothing was
    calibrated and no byte is spent. Needs the token ids in the context, for encoding as for decoding.
    """

    name: ClassVar[str] = "repeats"
    lossless: ClassVar[bool] = False

    def infer(self, specs: Specs) -> Specs:
        names = require_floats(self.name, specs)
        return {name: replace(spec, dtype="float32") if name in names else spec for name, spec in specs.items()}

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        names = require_floats(self.name, specs)
        matrix = self._matrix(planes, names, specs)
        for name in names:
            require_finite(self.name, name, planes[name])
            out[name] = _mix(matrix, planes[name].float())
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        names = require_floats(self.name, like)
        matrix = self._matrix(planes, names, like).T
        for name in names:
            out[name] = _mix(matrix, planes[name])
        return out

    def _matrix(self, planes: Planes, names: list[str], specs: Specs) -> torch.Tensor:
        """The mixing of all these planes: their tokens are the same. Behind a quantiser there may be none."""
        tokens = specs[names[0]].shape[1] if names else 1
        if ".token" not in planes:
            raise PipelineError("stage 'repeats' needs the token ids of the chunk: give them with the context")
        return mixing(planes[".token"][-tokens:])


def _mix(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Along the tokens of `[layers, tokens, heads, dim]`."""
    return (matrix @ x.flatten(2)).view(x.shape)
