"""Canonicalise: take out of every channel its mean, over the chunk's tokens or over calibration text."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.options import require_bool
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats, require_new
from kvstore.layout import PlaneSpec

_PARTS = 4
_INT8_MAX = 127
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Mean:
    """Subtracts the mean over tokens; keeps it as `k.mean`, `[layers, 1, kv_heads, head_dim]` bfloat16.

    K has a few channels that are far from zero and nearly constant; without this they would set the step of all.

    Args:
        artefact: Digest of the calibration artefact whose means are subtracted instead; nothing is kept then.
        coarse: Whether `k.mean` is int8, in units of `k.mean_step` (`[layers, 1, kv_heads, 1]` bfloat16, a quarter of
            the standard deviation). What it misses stays in the values, so nothing is lost by it.
    """

    artefact: str = ""
    coarse: bool = False
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "mean"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_bool(self.name, "coarse", self.coarse)

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            layers, _, heads, dim = specs[name].shape
            out[name] = replace(specs[name], dtype="float32")
            if self.data:
                self.data.tensor(self.name, f"{name}.mean", (-1, heads, dim))
            else:
                require_new(self.name, specs, f"{name}.mean")
                dtype = "int8" if self.coarse else "bfloat16"
                out[f"{name}.mean"] = PlaneSpec(dtype, (layers, 1, heads, dim), level=0)
                if self.coarse:
                    out[f"{name}.mean_step"] = PlaneSpec("bfloat16", (layers, 1, heads, 1), level=0)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in require_floats(self.name, specs):
            x = planes[name].float()
            require_finite(self.name, name, x)
            if self.data:
                out[name] = x - self._calibrated(self.data, name, planes)
                continue
            mean = x.mean(1, keepdim=True)
            kept = self._coarse(name, x, mean) if self.coarse else {f"{name}.mean": mean.bfloat16()}
            for side, value in kept.items():
                require_finite(self.name, side, value)
            out |= kept
            out[name] = x - self._kept(name, kept)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name in require_floats(self.name, like):
            mean = self._calibrated(self.data, name, planes) if self.data else self._kept(name, planes)
            out[name] = planes[name] + mean
        return out

    def _kept(self, name: str, planes: Planes) -> torch.Tensor:
        """The mean that decoding adds, float32."""
        mean = planes[f"{name}.mean"].float()
        return mean * planes[f"{name}.mean_step"].float() if self.coarse else mean

    def _coarse(self, name: str, x: torch.Tensor, mean: torch.Tensor) -> dict[str, torch.Tensor]:
        # In float64, for the squares of large values overflow float32.
        spread = (x - mean).double().square().mean((1, 3), keepdim=True).sqrt().float() / _PARTS
        step = torch.maximum(spread, mean.abs().amax(-1, keepdim=True) / _INT8_MAX).clamp_min(_TINY).bfloat16()
        whole = (mean / step.float()).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
        return {f"{name}.mean": whole, f"{name}.mean_step": step}

    def _calibrated(self, data: Artefact, name: str, planes: Planes) -> torch.Tensor:
        """`[layers, 1, kv_heads, head_dim]` float32 of the layers at hand."""
        return data.of_layers(self.name, f"{name}.mean", planes[".layer"])[:, None].float()
