"""Canonicalise: take out of every channel its mean, over the chunk's tokens or over calibration text."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats


@dataclass(frozen=True, slots=True)
class Mean:
    """Subtracts the mean over tokens; keeps it as `k.mean`, `[layers, 1, kv_heads, head_dim]` bfloat16.

    K has a few channels that are far from zero and nearly constant; without this they would set the step of all.

    Args:
        artefact: Digest of the calibration artefact whose means are subtracted instead; nothing is kept then.
    """

    artefact: str = ""
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "mean"
    lossless: ClassVar[bool] = False

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            layers, _, heads, dim = specs[name].shape
            out[name] = replace(specs[name], dtype="float32")
            if self.data:
                self.data.tensor(self.name, f"{name}.mean", (-1, heads, dim))
            else:
                out[f"{name}.mean"] = replace(specs[name], dtype="bfloat16", shape=(layers, 1, heads, dim), level=0)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in require_floats(self.name, specs):
            x = planes[name].float()
            require_finite(self.name, name, x)
            if self.data:
                out[name] = x - self._calibrated(self.data, name, planes)
                continue
            mean = x.mean(1, keepdim=True).bfloat16()
            require_finite(self.name, name, mean)
            out[name] = x - mean.float()
            out[f"{name}.mean"] = mean
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name in require_floats(self.name, like):
            mean = self._calibrated(self.data, name, planes) if self.data else planes[f"{name}.mean"].float()
            out[name] = planes[name] + mean
        return out

    def _calibrated(self, data: Artefact, name: str, planes: Planes) -> torch.Tensor:
        """`[layers, 1, kv_heads, head_dim]` float32 of the layers at hand."""
        return data.of_layers(self.name, f"{name}.mean", planes[".layer"])[:, None].float()
