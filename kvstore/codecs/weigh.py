"""Weigh: scale every channel by what an error in it costs, so that one step is right for all."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import PipelineError
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Weigh:
    """Multiplies channels by the root of the diagonal of a metric, the cheap half of what `klt` does with all of it.

    Announces `.k.sigma`, one standard deviation a head, of the weighted values.

    Args:
        artefact: Digest of the calibration artefact with `k.weight` (`[layers, kv_heads, head_dim]`) and `k.spread`
            (`[layers, kv_heads]`, sixteenths of a class).
    """

    artefact: str = ""
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "weigh"
    lossless: ClassVar[bool] = False

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            layers, _, heads, dim = specs[name].shape
            self._data().tensor(self.name, f"{name}.weight", (-1, heads, dim))
            self._data().tensor(self.name, f"{name}.spread", (-1, heads))
            out[name] = replace(specs[name], dtype="float32")
            out[f".{name}.sigma"] = PlaneSpec("int16", (layers, 1, heads, dim))
        return out

    def announce(self, specs: Specs, context: Planes) -> Planes:
        found = {}
        for name in require_floats(self.name, specs):
            spread = self._data().of_layers(self.name, f"{name}.spread", context[".layer"])
            found[f".{name}.sigma"] = spread[:, None, :, None].expand(-1, 1, -1, specs[name].shape[-1])
        return found

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in require_floats(self.name, specs):
            require_finite(self.name, name, planes[name])
            out[name] = planes[name].float() * self._weights(name, planes)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name in require_floats(self.name, like):
            out[name] = planes[name] / self._weights(name, planes)
        return out

    def _weights(self, name: str, planes: Planes) -> torch.Tensor:
        """`[layers, 1, kv_heads, head_dim]` float32."""
        return self._data().of_layers(self.name, f"{name}.weight", planes[".layer"])[:, None].float()

    def _data(self) -> Artefact:
        if self.data is None:
            raise PipelineError("stage 'weigh' needs a calibration artefact: make one with 'kvstore calibrate'")
        return self.data
