"""Pipelines: short lists of stages, built from JSON and checked without data. A pipeline is itself a stage."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

from kvstore.codecs.hadamard import Hadamard
from kvstore.codecs.mean import Mean
from kvstore.codecs.pack import Pack
from kvstore.codecs.raw import Raw
from kvstore.codecs.stage import Planes, Specs, Stage
from kvstore.codecs.step import Step
from kvstore.errors import PipelineError
from kvstore.header import StageSpec

STAGES: Mapping[str, type[Any]] = MappingProxyType({stage.name: stage for stage in (Mean, Hadamard, Step, Pack, Raw)})
"""Every stage by the name that pipelines call it."""

NAMED: Mapping[str, tuple[StageSpec, ...]] = MappingProxyType(
    {
        "raw": ({"stage": "raw"},),
        "ladder-packed": (
            {"stage": "mean"},
            {"stage": "hadamard", "seed": 0},
            {"stage": "step", "levels": 3},
            {"stage": "pack"},
            {"stage": "raw"},
        ),
    }
)
"""Pipelines that have a name: bit-exact, and three nested levels without calibration."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages in the order in which they encode."""

    stages: tuple[Stage, ...]
    name: ClassVar[str] = "pipeline"

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        return all(stage.lossless for stage in self.stages)

    @property
    def spec(self) -> tuple[StageSpec, ...]:
        """The JSON from which `build_pipeline` makes this pipeline again."""
        return tuple({"stage": stage.name, **asdict(stage)} for stage in self.stages)  # type: ignore[call-overload]

    def infer(self, specs: Specs) -> Specs:
        for stage in self.stages:
            specs = stage.infer(specs)
        return specs

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        for stage in self.stages:
            planes = stage.encode(planes, specs)
            specs = stage.infer(specs)
        return planes

    def decode(self, planes: Planes, like: Specs) -> Planes:
        inputs = [like]
        for stage in self.stages[:-1]:
            inputs.append(stage.infer(inputs[-1]))
        for stage, specs in zip(reversed(self.stages), reversed(inputs), strict=True):
            # Planes of levels that were not fetched are not there to be decoded.
            missing = {name for name, spec in stage.infer(specs).items() if name not in planes and spec.level}
            planes = stage.decode(planes, {name: spec for name, spec in specs.items() if name not in missing})
        return planes


def named_pipeline(name: str) -> Pipeline:
    """A pipeline by its name in `NAMED`.

    Raises:
        PipelineError: There is no such name.
    """
    if name not in NAMED:
        raise PipelineError(f"no pipeline is called {name!r}; known: {', '.join(NAMED)}")
    return build_pipeline(NAMED[name])


def build_pipeline(specs: Sequence[StageSpec]) -> Pipeline:
    """Pipeline from its JSON.

    Raises:
        PipelineError: A stage is unknown or its configuration is not one that it has.
    """
    return Pipeline(tuple(_build_stage(spec) for spec in specs))


def _build_stage(spec: StageSpec) -> Stage:
    name = spec.get("stage")
    stage_class = STAGES.get(name) if isinstance(name, str) else None
    if stage_class is None:
        raise PipelineError(f"unknown stage {name!r}; this build knows {', '.join(STAGES)}")
    options = {option: value for option, value in spec.items() if option != "stage"}
    unknown = options.keys() - {field.name for field in fields(stage_class)}
    if unknown:
        raise PipelineError(f"stage {name!r} has no option {min(unknown)!r}")
    stage: Stage = stage_class(**options)
    return stage
