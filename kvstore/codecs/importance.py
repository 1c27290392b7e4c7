"""Weigh: a coarser step for tokens that will receive little attention."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.options import require_bool, require_int
from kvstore.codecs.ref.classes import CLASSES_PER_LEVEL
from kvstore.codecs.ref.rope import rotary_planes, rotate
from kvstore.codecs.stage import Planes, Specs, require_floats, require_new
from kvstore.errors import PipelineError
from kvstore.layout import Layout, PlaneSpec

_SCALE_MAX = 5


@dataclass(frozen=True, slots=True)
class Importance:
    """Side plane `token.scale` (int8, `[1 or layers, tokens, 1, 1]`): the step of a token in classes, `3**(scale / 5)`.

    The importance of a token is the root mean square attention that calibrated probe queries behind the prefix give it;
    see `token_importance`. Its power `-exponent` multiplies the token's step, the same for K and V of a layer group.

    Args:
        artefact: Digest of the calibration artefact with the `probes`.
        exponent: In hundredths; from 30 to 45 the result is nearly the same.
        by_layer: Whether every layer has scales of its own, which a transform over several layers does not allow.
    """

    artefact: str = ""
    exponent: int = 30
    by_layer: bool = False
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "importance"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int(self.name, "exponent", self.exponent, 0, 200)
        require_bool(self.name, "by_layer", self.by_layer)

    def infer(self, specs: Specs) -> Specs:
        require_floats(self.name, specs, ("k",))
        require_new(self.name, specs, "token.scale")
        if self.data is None:
            raise PipelineError("stage 'importance' needs a calibration artefact: make one with 'kvstore calibrate'")
        if ".cos" not in specs:
            raise PipelineError(
                "stage 'importance' needs the rotary embedding, which this layout does not name or this build not know"
            )
        if specs[".cos"].shape[1] > specs["k"].shape[-1]:
            raise PipelineError(f"stage 'importance': the layout rotates {specs['.cos'].shape[1]} dimensions")
        self.data.tensor(self.name, "probes", (-1, -1, -1, specs["k"].shape[-1]))
        return {**specs, "token.scale": PlaneSpec("int8", self._shape(specs), level=0)}

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        known = planes.get(".importance")
        if known is None:
            return {**planes, "token.scale": torch.zeros(self._shape(specs), dtype=torch.int8)}
        if tuple(known.shape) != specs["k"].shape[:2]:
            raise PipelineError(
                f"stage 'importance': the importance is {list(known.shape)}, not {list(specs['k'].shape[:2])}"
            )
        log = known.double().clamp_min(1e-9).log()
        if not self.by_layer:
            log = log.mean(0, keepdim=True)
        classes = log * (-self.exponent / 100 * CLASSES_PER_LEVEL / math.log(3))
        scale = classes.round().clamp(-_SCALE_MAX, _SCALE_MAX).to(torch.int8)
        return {**planes, "token.scale": scale.view(self._shape(specs))}

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {name: planes[name] for name in like}

    def _shape(self, specs: Specs) -> tuple[int, ...]:
        layers, tokens = specs["k"].shape[:2]
        return (layers if self.by_layer else 1, tokens, 1, 1)


def token_importance(keys: torch.Tensor, layout: Layout, artefact: Artefact, first_position: int = 0) -> torch.Tensor:
    """Attention that the tokens of a prefix will receive, relative to their geometric mean in each layer.

    Args:
        keys: K as the model made it, rotary embedding included, `[layers, tokens, kv_heads, head_dim]`.
        layout: Names the rotary embedding.
        artefact: Has `probes`, `[layers, heads, probes, head_dim]` queries without rotary embedding.
        first_position: Position of the first token.

    Returns:
        `[layers, tokens]` float32.

    Raises:
        PipelineError: The layout names no rotary embedding, or the probes are of another model.
    """
    layers, tokens, kv_heads, dim = keys.shape
    probes = artefact.tensor("importance", "probes", (-1, -1, -1, dim)).float()
    if layout.rope is None or len(probes) < layers or probes.shape[1] % kv_heads:
        raise PipelineError("stage 'importance': the probes of the artefact do not belong to this layout")
    heads, count = probes.shape[1:3]
    # Where the questions will come from is not known; a stretch behind the prefix stands for it.
    positions = first_position + tokens + torch.linspace(0, 127, count).long()
    rotary = rotary_planes(layout.rope, positions)
    rows = []
    for layer in range(layers):
        queries = rotate(probes[layer].transpose(0, 1)[None], *rotary)[0].view(count, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("pkgd,tkd->kgpt", queries, keys[layer].float()) * dim**-0.5
        rows.append(scores.softmax(-1).square().mean((0, 1, 2)).sqrt())
    log = torch.stack(rows).clamp_min(1e-20).log()
    relative: torch.Tensor = (log - log.mean(1, keepdim=True)).exp()
    return relative
