"""Transform: a calibrated basis in which coefficients are uncorrelated and every error costs the same."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import PipelineError
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Klt:
    """Karhunen-Loeve transform in the artefact's metric: per head, over the heads of a layer, or of several layers.

    `[layers, tokens, heads, dim]` becomes `[layers, tokens, blocks, n]`, with one block a head or one for all heads; or
    `[1, tokens, 1, n]` where the basis spans several layers. Coefficients are sorted by falling standard deviation,
    which the stage announces as `.k.sigma` (sixteenths of a class, see `ref/nested.py`).

    Args:
        artefact: Digest of the calibration artefact with `k.forward.LAYER`, `k.inverse.LAYER` and `k.sigma.LAYER`.
    """

    artefact: str = ""
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "klt"
    lossless: ClassVar[bool] = False

    @property
    def group_layers(self) -> int:
        """Layers that a basis spans, 0 where it is one."""
        layers = self._data().group_layers
        return layers if layers > 1 else 0

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            layers, tokens, heads, dim = specs[name].shape
            span = self._data().group_layers
            if span > 1:
                self._check_span(name, layers, heads * dim)
                out[name] = PlaneSpec("float32", (1, tokens, 1, layers * heads * dim))
            else:
                blocks, n = self._matrix(name, "inverse", 0).shape[:2]
                if (blocks, n) not in ((1, heads * dim), (heads, dim)):
                    raise PipelineError(
                        f"stage 'klt': artefact {self.artefact} has {blocks} bases of {n} dimensions, "
                        f"plane {name!r} {heads} heads of {dim}"
                    )
                out[name] = PlaneSpec("float32", (layers, tokens, blocks, n))
            shape = out[name].shape
            out[f".{name}.sigma"] = PlaneSpec("int16", (shape[0], 1, *shape[2:]))
        return out

    def announce(self, specs: Specs, context: Planes) -> Planes:
        found = {}
        for name in require_floats(self.name, specs):
            shape = self.infer(specs)[f".{name}.sigma"].shape
            firsts = context[".layer"].tolist()[: shape[0]]
            sigmas = [self._data().tensor(self.name, f"{name}.sigma.{first}", shape[2:]) for first in firsts]
            found[f".{name}.sigma"] = torch.stack(sigmas)[:, None]
        return found

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in require_floats(self.name, specs):
            require_finite(self.name, name, planes[name])
            out[name] = torch.stack(
                [
                    torch.einsum("tbi,bij->tbj", x, matrix)
                    for x, matrix in self._blocks(name, "forward", planes[name].float(), planes[".layer"])
                ]
            )
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name in require_floats(self.name, like):
            shape = like[name].shape
            parts = [
                torch.einsum("tbj,bji->tbi", x, matrix)
                for x, matrix in self._blocks(name, "inverse", planes[name], planes[".layer"])
            ]
            if len(parts) == shape[0]:
                out[name] = torch.stack([part.reshape(shape[1:]) for part in parts])
            else:
                out[name] = parts[0].view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        return out

    def _blocks(
        self, name: str, kind: str, x: torch.Tensor, layers: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Vectors `[tokens, blocks, n]` and their matrices `[blocks, n, n]`: a pair a layer, or one for all layers."""
        firsts: list[int] = layers.tolist()
        tokens = x.shape[1]
        if len(firsts) > 1 and self._data().group_layers > 1:
            matrix = self._matrix(name, kind, firsts[0])
            return [(x.transpose(0, 1).reshape(tokens, 1, -1) if kind == "forward" else x[0], matrix)]
        matrices = [self._matrix(name, kind, first) for first in firsts]
        return [(x[i].reshape(tokens, *matrix.shape[:2]), matrix) for i, matrix in enumerate(matrices)]

    def _matrix(self, name: str, kind: str, first: int) -> torch.Tensor:
        found = self._data().tensor(self.name, f"{name}.{kind}.{first}", (-1, -1, -1))
        return found.float()

    def _check_span(self, name: str, layers: int, width: int) -> None:
        data = self._data()
        sizes = {x.shape[-1] for tensor, x in data.tensors.items() if tensor.startswith(f"{name}.inverse.")}
        if layers * width not in sizes:
            raise PipelineError(
                f"stage 'klt': artefact {self.artefact} spans {data.group_layers} layers; it has no basis for "
                f"{layers} layers of {width} dimensions in plane {name!r}"
            )

    def _data(self) -> Artefact:
        if self.data is None:
            raise PipelineError("stage 'klt' needs a calibration artefact: make one with 'kvstore calibrate'")
        return self.data
