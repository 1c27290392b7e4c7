"""Quantise: symmetric bins on the largest magnitude of each token, finer in the first layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.options import require_int, require_names
from kvstore.codecs.ref.absmax import centre_of, quantise, reconstruct, scale_of
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats, require_layers
from kvstore.errors import PipelineError
from kvstore.layout import PlaneSpec

_BINS_MIN, _BINS_MAX = 4, 256
_LAYERS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class AbsMax:
    """Codes `k.0` of `2 (bins // 2 - 1) + 1` symbols; `k.maxabs`, `[layers, tokens, 1, 1]` bfloat16; level 0.

    Args:
        planes: Planes to quantise, all by default.
        bins: Bins, 4 to 256.
        first_bins: Bins of the first layers, 0 where all layers are alike.
        first_layers: Number of those layers, counted over the whole model.
    """

    planes: tuple[str, ...] = ()
    bins: int = 16
    first_bins: int = 0
    first_layers: int = 0
    name: ClassVar[str] = "absmax"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_names(self.name, "planes", self.planes)
        require_int(self.name, "bins", self.bins, _BINS_MIN, _BINS_MAX)
        require_int(self.name, "first_bins", self.first_bins, 0, _BINS_MAX)
        require_int(self.name, "first_layers", self.first_layers, 0, _LAYERS_MAX)
        if 0 < self.first_bins < _BINS_MIN or bool(self.first_bins) != bool(self.first_layers):
            raise PipelineError(
                f"stage {self.name!r}: first_bins ({_BINS_MIN} to {_BINS_MAX}) and first_layers go together"
            )

    def infer(self, specs: Specs) -> Specs:
        names = require_floats(self.name, specs, self.planes)
        out = {name: spec for name, spec in specs.items() if name not in names}
        for name in names:
            if self.first_layers:
                require_layers(self.name, "first_layers", specs, name)
            shape = specs[name].shape
            symbols = 2 * centre_of(max(self.bins, self.first_bins)) + 1
            out[f"{name}.maxabs"] = PlaneSpec("bfloat16", (*shape[:2], 1, 1), level=0)
            out[f"{name}.0"] = PlaneSpec("uint8", shape, level=0, symbols=symbols)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        names = require_floats(self.name, specs, self.planes)
        out = {name: x for name, x in planes.items() if name not in names}
        for name in names:
            x = planes[name].float()
            require_finite(self.name, name, x)
            scale = scale_of(x)
            require_finite(self.name, name, scale)
            out[f"{name}.maxabs"] = scale
            out[f"{name}.0"] = quantise(x, scale, self._centre(planes))
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        names = require_floats(self.name, like, self.planes)
        centre = self._centre(planes)
        return {
            name: reconstruct(planes[f"{name}.0"], planes[f"{name}.maxabs"], centre) if name in names else planes[name]
            for name in like
        }

    def _centre(self, planes: Planes) -> torch.Tensor:
        """Code of zero in each layer, `[layers or 1, 1, 1, 1]` float32."""
        rest = float(centre_of(self.bins))
        if not self.first_layers:
            return torch.full((1, 1, 1, 1), rest)
        first = float(centre_of(self.first_bins))
        return torch.where(planes[".layer"] < self.first_layers, first, rest)[:, None, None, None]
