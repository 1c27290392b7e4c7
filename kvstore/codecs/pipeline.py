"""Pipelines: short lists of stages, built from JSON and checked without data. A pipeline is itself a stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from kvstore.codecs.artefact import Artefact, load_artefact
from kvstore.codecs.importance import Importance
from kvstore.codecs.registry import STAGES
from kvstore.codecs.stage import Announcing, Planes, Specs, Stage, is_context
from kvstore.errors import PipelineError
from kvstore.header import StageSpec


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
    def group_layers(self) -> int:
        """Layers in a layer group that the stages ask for, 0 where any number will do."""
        return max((getattr(stage, "group_layers", 0) for stage in self.stages), default=0)

    def split(self) -> tuple["Pipeline", "Pipeline"]:
        """The stages up to the last lossy one, and the lossless coders behind them."""
        lossy = max((n for n, stage in enumerate(self.stages) if not stage.lossless), default=-1) + 1
        return Pipeline(self.stages[:lossy]), Pipeline(self.stages[lossy:])

    @property
    def importance(self) -> Artefact | None:
        """The artefact whose probes the encoder needs to estimate token importance, if a stage asks for it."""
        return next((stage.data for stage in self.stages if isinstance(stage, Importance)), None)

    @property
    def artefacts(self) -> tuple[str, ...]:
        """Digests of the calibration artefacts that decoding needs, each once."""
        return tuple(dict.fromkeys(stage["artefact"] for stage in self.spec if "artefact" in stage))

    @property
    def spec(self) -> tuple[StageSpec, ...]:
        """The JSON from which `build_pipeline` makes this pipeline again; options at their defaults are left out."""
        return tuple({"stage": stage.name, **_options(stage)} for stage in self.stages)

    def infer(self, specs: Specs) -> Specs:
        for stage in self.stages:
            specs = _with_context(stage.infer(specs), specs)
        return specs

    def announce(self, specs: Specs, context: Planes) -> Planes:
        found = self._announced(context, specs)
        return found[-1][2] if found else dict(context)

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        for stage, inputs, context in self._announced(planes, specs):
            planes = stage.encode({**planes, **context}, inputs)
        return {name: x for name, x in planes.items() if not is_context(name)}

    def decode(self, planes: Planes, like: Specs) -> Planes:
        for stage, specs, context in reversed(self._announced(planes, like)):
            # Planes of levels that were not fetched are not there to be decoded.
            missing = {name for name, spec in stage.infer(specs).items() if name not in planes and spec.level}
            wanted = {name: spec for name, spec in specs.items() if name not in missing and not is_context(name)}
            planes = stage.decode({**planes, **context}, wanted)
        return {name: x for name, x in planes.items() if not is_context(name)}

    def _announced(self, planes: Planes, specs: Specs) -> list[tuple[Stage, Specs, Planes]]:
        """Every stage with the specs of its input and the context that it and the stages before it know."""
        context = {name: x for name, x in planes.items() if is_context(name)}
        found: list[tuple[Stage, Specs, Planes]] = []
        for stage in self.stages:
            if isinstance(stage, Announcing):
                context = {**context, **stage.announce(specs, context)}
            found.append((stage, specs, context))
            specs = _with_context(stage.infer(specs), specs)
        return found


def _with_context(specs: Specs, before: Specs) -> Specs:
    return {**specs, **{name: spec for name, spec in before.items() if is_context(name)}}


def _options(stage: Stage) -> dict[str, Any]:
    """Options that are not at their defaults, as JSON; `data` is what an artefact's digest was bound to."""
    found = {field.name: (getattr(stage, field.name), field.default) for field in fields(cast(Any, stage))}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in found.items()
        if name != "data" and value != default
    }


def build_pipeline(specs: Sequence[StageSpec], artefacts: Mapping[str, bytes] | None = None) -> Pipeline:
    """Pipeline from its JSON.

    Args:
        specs: A stage's name and options each.
        artefacts: Calibration artefacts by digest.

    Raises:
        PipelineError: A stage is unknown, its configuration is not one that it has, or an artefact is not here.
    """
    return Pipeline(tuple(_build_stage(spec, artefacts or {}) for spec in specs))


def _build_stage(spec: StageSpec, artefacts: Mapping[str, bytes]) -> Stage:
    name = spec.get("stage")
    stage_class = STAGES.get(name) if isinstance(name, str) else None
    if stage_class is None:
        raise PipelineError(f"unknown stage {name!r}; this build knows {', '.join(STAGES)}")
    options = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in spec.items()
        if option != "stage"
    }
    unknown = options.keys() - {field.name for field in fields(stage_class)} | options.keys() & {"data"}
    if unknown:
        raise PipelineError(f"stage {name!r} has no option {min(unknown)!r}")
    digest = spec.get("artefact")
    if digest:
        if not isinstance(digest, str) or digest not in artefacts:
            raise PipelineError(f"stage {name!r} needs the calibration artefact {digest}, which is not here")
        options["data"] = load_artefact(artefacts[digest], digest)
    stage: Stage = stage_class(**options)
    return stage
