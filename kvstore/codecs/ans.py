"""Code: order-0 rANS with the frequencies of every segment in front of it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.fast.ans import COMPILED
from kvstore.codecs.options import require_choice
from kvstore.codecs.ref.ans import bound_bytes, decode, encode, plan_of
from kvstore.codecs.stage import Planes, Specs
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.layout import PlaneSpec

_DIMENSIONS_MIN = {"plane": 1, "layer": 2, "channel": 3}


@dataclass(frozen=True, slots=True)
class Ans:
    """Codes every plane whose spec names an alphabet; `[...]` uint8 becomes at most `bound_bytes` bytes.

    Args:
        tables: What has a table of its own: the whole `plane` of a layer group, each `layer`, or each `channel` of
            each layer (of planes `[layers, tokens, ...]`).
    """

    tables: str = "layer"
    name: ClassVar[str] = "ans"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice(self.name, "tables", self.tables, tuple(_DIMENSIONS_MIN))

    def infer(self, specs: Specs) -> Specs:
        return {name: self._coded(name, spec) if spec.symbols else spec for name, spec in specs.items()}

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        return {
            name: self._encode(name, x, spec) if (spec := specs.get(name)) and spec.symbols else x
            for name, x in planes.items()
        }

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {
            name: self._decode(name, planes[name], spec) if spec.symbols else planes[name]
            for name, spec in like.items()
        }

    def _coded(self, name: str, spec: PlaneSpec) -> PlaneSpec:
        if spec.dtype != "uint8" or spec.at_most or len(spec.shape) < _DIMENSIONS_MIN[self.tables]:
            raise PipelineError(
                f"stage {self.name!r}: plane {name!r} of {spec.dtype}{list(spec.shape)} has no tables by {self.tables}"
            )
        return PlaneSpec(
            "uint8", (bound_bytes(plan_of(spec.shape, self.tables), spec.symbols),), spec.level, at_most=True
        )

    def _encode(self, name: str, x: torch.Tensor, spec: PlaneSpec) -> torch.Tensor:
        q = x.contiguous().view(-1).numpy()
        if int(q.max()) >= spec.symbols:
            raise PipelineError(
                f"stage {self.name!r}: plane {name!r} has symbols beyond its alphabet of {spec.symbols}"
            )
        return torch.from_numpy(encode(q, spec.symbols, plan_of(spec.shape, self.tables), COMPILED))

    def _decode(self, name: str, x: torch.Tensor, spec: PlaneSpec) -> torch.Tensor:
        try:
            q = decode(x.contiguous().numpy(), spec.symbols, plan_of(spec.shape, self.tables), COMPILED)
        except ValueError as exc:
            raise FrameCorruptError(f"stage {self.name!r}: plane {name!r} cannot be decoded: {exc}") from exc
        return torch.from_numpy(q).view(spec.shape)
