"""Which pipelines kernels decode, and with which stages: the host's first look at a frame."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.context import known_specs
from kvstore.codecs.hadamard import Hadamard
from kvstore.codecs.importance import Importance
from kvstore.codecs.kernels.symbols import UNIT
from kvstore.codecs.klt import Klt
from kvstore.codecs.mean import Mean
from kvstore.codecs.nested import Nested
from kvstore.codecs.pack import Pack
from kvstore.codecs.pipeline import Pipeline
from kvstore.codecs.predict import Predict
from kvstore.codecs.rans import Rans
from kvstore.codecs.raw import Raw
from kvstore.codecs.ref.hadamard import rotation
from kvstore.codecs.rope import UndoRope
from kvstore.codecs.stage import Planes, Specs
from kvstore.codecs.step import Step
from kvstore.codecs.weigh import Weigh
from kvstore.errors import PipelineError
from kvstore.layout import Layout

_ORDER: tuple[tuple[type[Any], ...], ...] = (
    (Importance,),
    (UndoRope,),
    (Mean, Predict),
    (Weigh,),
    (Hadamard, Klt),
    (Step, Nested),
    (Rans,),
    (Pack,),
    (Raw,),
)
_DIM_MIN, _DIM_MAX = 32, 512


@dataclass(frozen=True, eq=False)
class Recipe:
    """The stages of a pipeline that kernels decode, by what they do; None where there is none.

    Args:
        pipeline: All of them.
        layout: What they were checked against.
        stages: By their class.
    """

    pipeline: Pipeline
    layout: Layout
    stages: dict[type[Any], Any]

    @classmethod
    def of(cls, pipeline: Pipeline, layout: Layout) -> "Recipe":
        """Check that kernels decode this pipeline on this layout.

        Raises:
            PipelineError: They do not; `kvstore.codecs.decode` does.
        """
        place = -1
        stages: dict[type[Any], Any] = {}
        for stage in pipeline.stages:
            found = next((n for n, kinds in enumerate(_ORDER) if n > place and isinstance(stage, kinds)), None)
            if found is None:
                raise _refused(f"stage {stage.name!r} where it stands")
            place = found
            stages[type(stage)] = stage
        recipe = cls(pipeline, layout, stages)
        recipe._check()
        return recipe

    @property
    def rope(self) -> bool:
        """Whether K is rotated again."""
        return UndoRope in self.stages

    @property
    def mean(self) -> Mean | None:
        """What adds means."""
        return self.stages.get(Mean)

    @property
    def predict(self) -> Predict | None:
        """What adds predictions from token ids."""
        return self.stages.get(Predict)

    @property
    def weigh(self) -> Weigh | None:
        """What divides by weights."""
        return self.stages.get(Weigh)

    @property
    def hadamard(self) -> Hadamard | None:
        """The rotation, if that is the transform."""
        return self.stages.get(Hadamard)

    @property
    def klt(self) -> Klt | None:
        """The basis, if that is the transform."""
        return self.stages.get(Klt)

    @property
    def step(self) -> Step | None:
        """The quantiser of packed pipelines."""
        return self.stages.get(Step)

    @property
    def nested(self) -> Nested | None:
        """The quantiser of entropy coded pipelines."""
        return self.stages.get(Nested)

    @property
    def packed_from(self) -> int:
        """First level whose digits are packed and not entropy coded, 0 for none."""
        return self.stages[Rans].packed_from if Rans in self.stages else 0

    @property
    def coded(self) -> dict[str, tuple[str, ...]]:
        """Planes that each coded plane holds: itself, or K and V where a basis is joint."""
        names = tuple(self.layout.planes)
        if self.klt and self.klt.data and self.klt.data.card.get("joint"):
            return {"".join(names): names}
        return {name: (name,) for name in names}

    @property
    def heads(self) -> int:
        """Heads of every plane."""
        return next(iter(self.layout.planes.values())).shape[2]

    @property
    def dim(self) -> int:
        """Dimensions of every head."""
        return next(iter(self.layout.planes.values())).shape[3]

    def coder_input(self, layers: int, start: int) -> tuple[Specs, Planes]:
        """Specs of what the coder codes in a layer group, and the classes that are announced for it."""
        context = {".layer": torch.arange(start, start + layers)}
        stages = self.pipeline._announced(context, known_specs(self.layout, layers))
        coder = Rans if self.nested else Pack
        return next((specs, known) for stage, specs, known in stages if isinstance(stage, coder))

    def _check(self) -> None:
        if not (self.hadamard or self.klt) or Raw not in self.stages:
            raise _refused("a pipeline without 'hadamard' or 'klt', or without 'raw'")
        if self.step and (self.klt or Rans in self.stages or Importance in self.stages or Pack not in self.stages):
            raise _refused("'step' with other stages than 'hadamard' and 'pack'")
        if self.nested and (Rans not in self.stages or bool(self.packed_from) != (Pack in self.stages)):
            raise _refused("'nested' without 'rans', or packed digits without 'pack'")
        if not (self.step or self.nested):
            raise _refused("a pipeline without 'step' or 'nested'")
        if len({spec.shape for spec in self.layout.planes.values()}) > 1:
            raise _refused("planes of different shapes")
        if self.dim & (self.dim - 1) or not _DIM_MIN <= self.dim <= _DIM_MAX:
            raise _refused(f"heads of {self.dim} dimensions, which are no power of two from {_DIM_MIN} to {_DIM_MAX}")
        if self.predict and not self.klt:
            raise _refused("'predict' without 'klt'")
        if self.hadamard and self.hadamard.block not in (0, self.dim):
            raise _refused("'hadamard' with blocks")


def _refused(what: str) -> PipelineError:
    return PipelineError(f"kernels do not decode {what}; decode such frames with 'kvstore.codecs.decode'")


@dataclass(frozen=True, eq=False)
class Matrices:
    """Inverse transforms as kernels multiply by them.

    Args:
        data: All of them, float16, each scaled by a power of two (or, Hadamard's, to +-1).
        first: Where the one of a coded plane and a layer group begins.
        scale: `[layers]` float32 by coded plane, what is left to multiply by.
    """

    data: torch.Tensor
    first: dict[tuple[str, int], int]
    scale: dict[str, torch.Tensor]


@lru_cache(maxsize=8)
def hadamard_matrices(dim: int, seed: int, names: tuple[str, ...], layers: int, device: torch.device) -> Matrices:
    """The inverse rotation, `[dim, dim]`, the same for all."""
    inverse = (rotation(dim, seed).T * dim**0.5).round().half().contiguous()
    first = {(name, layer): 0 for name in names for layer in range(layers)}
    return Matrices(inverse.flatten().to(device), first, {name: torch.full((layers,), dim**-0.5) for name in names})


@lru_cache(maxsize=4)
def klt_matrices(artefact: Artefact, names: tuple[str, ...], groups: tuple[int, ...], device: torch.device) -> Matrices:
    """The bases of all layer groups; the artefact stays on the device as long as it is in use.

    Raises:
        PipelineError: A basis is missing.
    """
    parts: list[torch.Tensor] = []
    first: dict[tuple[str, int], int] = {}
    scale = {name: torch.ones(sum(groups)) for name in names}
    at = 0
    for name in names:
        start = 0
        for layers in groups:
            first[name, start] = at
            spans = artefact.group_layers > 1
            for layer in range(start, start + (1 if spans else layers)):
                matrix = artefact.tensor("klt", f"{name}.inverse.{layer}", (-1, -1, -1)).float()
                # A power of two, so that scaling loses nothing.
                exponent = torch.frexp(matrix.abs().max().clamp_min(1e-30)).exponent
                parts.append(torch.ldexp(matrix, -exponent).half().flatten())
                scale[name][layer : start + layers if spans else layer + 1] = torch.ldexp(torch.ones(()), exponent)
                at += len(parts[-1])
            start += layers
    return Matrices(torch.cat(parts).to(device), first, scale)


def matrices_of(recipe: Recipe, groups: tuple[int, ...], device: torch.device) -> Matrices:
    """Inverse transform of a recipe.

    Raises:
        PipelineError: A basis is missing.
    """
    names = tuple(recipe.coded)
    if recipe.hadamard:
        return hadamard_matrices(recipe.dim, recipe.hadamard.seed, names, recipe.layout.layers, device)
    assert recipe.klt is not None
    assert recipe.klt.data is not None
    return klt_matrices(recipe.klt.data, names, groups, device)


def value_unit(recipe: Recipe, held: int) -> float:
    """What the values that kernels reconstruct are to be multiplied by, beside step and matrix."""
    return 1.0 if recipe.step else 1.0 / UNIT / 3 ** (held - 1)
