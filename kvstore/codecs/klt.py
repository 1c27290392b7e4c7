"""Transform: a calibrated basis in which coefficients are uncorrelated and every error costs the same."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.options import require_int
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import PipelineError
from kvstore.layout import PlaneSpec

_RANK_MAX = 1 << 20
_NO_SIGMA = -30000
"""So far below any step that the class is below zero: nothing is coded."""


class _Span(NamedTuple):
    """What one basis covers: planes that become one, and layers that become one."""

    out: str
    planes: tuple[str, ...]
    layers: int


@dataclass(frozen=True, slots=True)
class Klt:
    """Karhunen-Loeve transform in the artefact's metric: per head, over the heads of a layer, or of several layers.

    `[layers, tokens, heads, dim]` becomes `[layers, tokens, blocks, n]`, with one block a head or one for all heads; or
    `[1, tokens, 1, n]` where a basis spans several layers. A joint basis makes one plane `kv` of K and V. Coefficients
    are sorted by falling standard deviation, which the stage announces as `.k.sigma` (sixteenths of a class, see
    `ref/nested.py`).

    Args:
        artefact: Digest of the calibration artefact with `k.forward.LAYER`, `k.inverse.LAYER` and `k.sigma.LAYER`, the
            layer being the first of a group; `kv.` instead of `k.` and `v.` where it is joint.
        rank: Coefficients of each basis that are kept, 0 for all. Those behind it are announced as certainly zero, so
            they cost neither bytes nor multiplications.
    """

    artefact: str = ""
    rank: int = 0
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "klt"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int(self.name, "rank", self.rank, 0, _RANK_MAX)

    @property
    def group_layers(self) -> int:
        """Layers that a basis spans, 0 where it is one."""
        layers = self._data().group_layers
        return layers if layers > 1 else 0

    def infer(self, specs: Specs) -> Specs:
        out = {name: spec for name, spec in specs.items() if "." in name}
        for span in self._spans(specs):
            layers, tokens, heads, dim = specs[span.planes[0]].shape
            width = heads * dim * len(span.planes)
            if span.layers > 1:
                self._check_group(span, layers * width)
                shape = (1, tokens, 1, layers * width)
            else:
                blocks, n = self._data().tensor(self.name, f"{span.out}.inverse.0", (-1, -1, -1)).shape[:2]
                if (blocks, n) not in ((1, width), (heads, dim)) or blocks * n != width:
                    raise PipelineError(
                        f"stage 'klt': artefact {self.artefact} has {blocks} bases of {n} dimensions, "
                        f"plane {span.out!r} needs {width} in all"
                    )
                shape = (layers, tokens, blocks, n)
            out[span.out] = PlaneSpec("float32", shape)
            out[f".{span.out}.sigma"] = PlaneSpec("int16", (shape[0], 1, *shape[2:]))
        return out

    def announce(self, specs: Specs, context: Planes) -> Planes:
        found, inferred = {}, self.infer(specs)
        for span in self._spans(specs):
            shape = inferred[f".{span.out}.sigma"].shape
            firsts = context[".layer"].tolist()[: shape[0]]
            sigmas = [self._data().tensor(self.name, f"{span.out}.sigma.{first}", shape[2:]) for first in firsts]
            announced = torch.stack(sigmas)[:, None]
            if self.rank:
                announced[..., self.rank :] = _NO_SIGMA
            found[f".{span.out}.sigma"] = announced
        return found

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = {name: x for name, x in planes.items() if "." in name}
        for span in self._spans(specs):
            for name in span.planes:
                require_finite(self.name, name, planes[name])
            x = torch.cat([planes[name].float().flatten(2) for name in span.planes], 2)
            if span.layers > 1:
                x = x.transpose(0, 1).reshape(1, x.shape[1], -1)
            matrices = self._matrices(span, "forward", planes[".layer"], self.infer(specs)[span.out].shape)
            products = [
                _multiply(vectors.view(len(vectors), *matrix.shape[:2]), matrix)
                for vectors, matrix in zip(x, matrices, strict=True)
            ]
            out[span.out] = torch.stack(products)
            if self.rank:
                out[span.out][..., self.rank :] = 0.0
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like if "." in name}
        for span in self._spans(like):
            layers, tokens, heads, dim = like[span.planes[0]].shape
            coefficients = planes[span.out]
            matrices = self._matrices(span, "inverse", planes[".layer"], tuple(coefficients.shape))
            rank = _rank(coefficients)
            parts = [
                _multiply(vectors[..., :rank], matrix[:, :rank]).reshape(tokens, -1)
                for vectors, matrix in zip(coefficients, matrices, strict=True)
            ]
            x = torch.stack(parts)
            if span.layers > 1:
                x = x.view(tokens, layers, -1).transpose(0, 1)
            for name, part in zip(span.planes, x.chunk(len(span.planes), 2), strict=True):
                out[name] = part.reshape(layers, tokens, heads, dim)
        return out

    def _spans(self, specs: Specs) -> list[_Span]:
        names = require_floats(self.name, specs)
        layers = self._data().group_layers
        if not names:
            raise PipelineError("stage 'klt' transforms K and V, and another stage has turned them into codes")
        if self._data().card.get("joint"):
            if len({specs[name].shape for name in names}) > 1:
                raise PipelineError("stage 'klt': a joint basis needs K and V of the same shape")
            return [_Span("".join(names), tuple(names), layers)]
        return [_Span(name, (name,), layers) for name in names]

    def _matrices(self, span: _Span, kind: str, layers: torch.Tensor, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Bases `[blocks, n, n]` of coefficients of a shape: one a layer, or one for all layers of the group."""
        firsts: list[int] = layers.tolist()
        return [
            self._data().matrix(self.name, f"{span.out}.{kind}.{first}", (*shape[2:], shape[-1]))
            for first in (firsts[:1] if span.layers > 1 else firsts)
        ]

    def _check_group(self, span: _Span, width: int) -> None:
        prefix = f"{span.out}.inverse."
        sizes = {x.shape[-1] for name, x in self._data().tensors.items() if name.startswith(prefix)}
        if width not in sizes:
            raise PipelineError(
                f"stage 'klt': artefact {self.artefact} spans {span.layers} layers; it has no basis for "
                f"{width} dimensions of plane {span.out!r}"
            )

    def _data(self) -> Artefact:
        if self.data is None:
            raise PipelineError("stage 'klt' needs a calibration artefact: make one with 'kvstore calibrate'")
        return self.data


def _multiply(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """`[tokens, blocks, n]` by `[blocks, n, m]`."""
    if len(matrices) == 1:
        return (x[:, 0] @ matrices[0])[:, None]
    return torch.bmm(x.transpose(0, 1), matrices).transpose(0, 1)


def _rank(coefficients: torch.Tensor) -> int:
    """Leading columns that are not zero throughout: sorted by sigma, few are left at a coarse level."""
    used = coefficients.flatten(0, -2).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1
