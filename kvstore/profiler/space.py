"""The space of compression strategies: what a pipeline may be made of, as typed, conditional parameters.

A `Configuration` is a point of it. It maps to the JSON of a pipeline and back; what cannot be built cannot be made.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from kvstore.calibration.settings import Settings
from kvstore.errors import ConfigError
from kvstore.header import StageSpec
from kvstore.profiler.parameters import Choice, Parameter, Real, Value, Whole
from kvstore.profiler.pipelines import plain, read_pipeline, write_pipeline

_GROUPS_MAX = 4
_STEP = 0.15
"""Standard deviation of a number's move to a near point, in parts of its range."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What a configuration needs to have been calibrated.

    Args:
        span: A basis for each head, or over all of them.
        group_layers: Layers that a basis spans.
        joint: Whether one basis covers K and V.
        window: Tokens from which K and V are predicted, 0 for none.
    """

    span: Literal["head", "heads"] = "heads"
    group_layers: int = 1
    joint: bool = False
    window: int = 0

    def settings(self, base: Settings) -> Settings:
        """How to calibrate it, all else as in `base`."""
        changed = {"span": self.span, "group_layers": self.group_layers, "joint": self.joint, "window": self.window}
        return Settings(**{**{name: getattr(base, name) for name in Settings.__slots__}, **changed})

    @property
    def name(self) -> str:
        """What files and reports call it."""
        kind = "head" if self.span == "head" else f"{'joint' if self.joint else 'heads'}-{self.group_layers}"
        return f"{kind}-predicted" if self.window else kind


@dataclass(frozen=True)
class Configuration:
    """A point of a space: the values of the parameters that exist there, in the space's order. Made by a `Space`."""

    values: Mapping[str, Value]

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits that are the same wherever the values are."""
        text = json.dumps(dict(self.values), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def basis(self) -> Basis | None:
        """What has to be calibrated for it, None for nothing."""
        window = 2 if self.values.get("prediction") == "predict" else 0
        match self.values.get("transform"):
            case "weighted":
                return Basis()
            case "klt-head":
                return Basis("head", window=window)
            case "klt" | "klt-joint" as kind:
                return Basis("heads", int(self.values["group_layers"]), kind == "klt-joint", window)
        return None

    @property
    def levels(self) -> int:
        """Quality levels that one encoded copy has."""
        return int(self.values.get("levels", 1))

    @property
    def label(self) -> str:
        """A few words for people."""
        return " ".join(
            f"{name}={value}" if not isinstance(value, str) else value for name, value in self.values.items()
        )


@dataclass(frozen=True)
class Space:
    """Which strategies there are for a model.

    Args:
        layers: Layers of the model.
        kv_heads: Its KV heads.
        head_dim: Dimensions of each.
        calibrated: Whether strategies that need calibration belong to it.
        token_ids: Whether readers know the token ids of what they decode, as engines do.
    """

    layers: int
    kv_heads: int
    head_dim: int
    calibrated: bool = True
    token_ids: bool = True

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All of them; those that another one's conditions name come before it."""
        return tuple(_parameters(self.layers, self.calibrated, self.token_ids))

    @cached_property
    def bases(self) -> tuple[Basis, ...]:
        """Everything that any of its points needs to have been calibrated."""
        if not self.calibrated:
            return ()
        groups = next(one.options for one in self.parameters if one.name == "group_layers" and isinstance(one, Choice))
        windows = (0, 2) if self.token_ids else (0,)
        spanning = [(int(layers), joint) for layers in groups for joint in (False, True)]
        return tuple(
            basis
            for window in windows
            for basis in (
                Basis("head", window=window),
                *(Basis("heads", layers, joint, window) for layers, joint in spanning),
            )
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, each once."""
        return tuple(dict.fromkeys(parameter.name for parameter in self.parameters))

    def configuration(self, values: Mapping[str, Value]) -> Configuration:
        """A point from the values of its parameters.

        Raises:
            ConfigError: A parameter is missing, does not exist beside the others, or has a value out of its range.
        """
        found: dict[str, Value] = {}
        for parameter in self._existing(values):
            name = parameter.name
            if name not in values:
                raise ConfigError(f"a configuration with {_said(found)} needs {name!r}: {parameter.says}")
            if not parameter.holds(values[name]):
                raise ConfigError(f"{name} is {parameter.says} here, not {values[name]!r}")
            found[name] = values[name]
        unknown = [name for name in values if name not in found]
        if unknown:
            raise ConfigError(f"a configuration with {_said(found)} has no {unknown[0]!r}")
        return Configuration(found)

    def at(self, shares: Sequence[float]) -> Configuration:
        """The point at a place of the unit cube, a side for every name; sides that do not exist there are ignored."""
        place = dict(zip(self.names, shares, strict=True))
        found: dict[str, Value] = {}
        for parameter in self._existing(found):
            found[parameter.name] = parameter.at(place[parameter.name])
        return Configuration(found)

    def near(self, origin: Configuration, generator: torch.Generator) -> Configuration:
        """A point near another one: one to three of its parameters moved, and what follows from it drawn anew."""
        names = list(origin.values)
        count = 1 + int(torch.randint(0, min(3, len(names)), (), generator=generator))
        moved = {names[n] for n in torch.randperm(len(names), generator=generator)[:count].tolist()}
        found: dict[str, Value] = {}
        for parameter in self._existing(found):
            name = parameter.name
            old = origin.values.get(name)
            if old is not None and parameter.holds(old) and name not in moved:
                found[name] = old
            elif old is not None and not isinstance(parameter, Choice) and parameter.holds(old):
                step = float(torch.randn((), generator=generator)) * _STEP
                found[name] = parameter.at(min(max(parameter.share(float(old)) + step, 0.0), 1.0))
            else:
                found[name] = parameter.at(float(torch.rand((), generator=generator)))
        return Configuration(found)

    def grid(self, only: Mapping[str, Sequence[Value]] | None = None) -> Iterator[Configuration]:
        """Every combination of the values that stand for the parameters' ranges.

        Args:
            only: By name, the values to keep of those.
        """
        yield from self._grid({}, 0, only or {})

    def pipeline(self, configuration: Configuration, artefact: str = "") -> tuple[StageSpec, ...]:
        """JSON of the pipeline of a point.

        Args:
            configuration: The point.
            artefact: Digest of the artefact of its `basis`.
        """
        return write_pipeline(configuration.values, artefact, self._coefficients(configuration.basis))

    def configuration_of(self, pipeline: Sequence[StageSpec], basis: Basis | None = None) -> Configuration:
        """Undo `pipeline`.

        Args:
            pipeline: The JSON.
            basis: What its artefact holds.

        Raises:
            ConfigError: No point of this space maps to it.
        """
        try:
            values = read_pipeline(pipeline, self._coefficients(basis))
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"no point of the space maps to this pipeline: {exc!r}") from exc
        if basis is not None and values.get("transform") == "klt":
            values["transform"] = "klt-head" if basis.span == "head" else "klt-joint" if basis.joint else "klt"
            if basis.span == "heads":
                values["group_layers"] = basis.group_layers
        existing = [parameter.name for parameter in self._existing(values)]
        found = self.configuration({name: values[name] for name in existing if name in values})
        said = [plain(stage) for stage in self.pipeline(found, _artefact_of(pipeline))]
        if said != [plain(stage) for stage in pipeline]:
            raise ConfigError("no point of the space maps to this pipeline")
        return found

    def _coefficients(self, basis: Basis | None) -> int:
        """Coefficients of a basis."""
        if basis is None or basis.span == "head":
            return self.head_dim
        return self.kv_heads * self.head_dim * basis.group_layers * (2 if basis.joint else 1)

    def _existing(self, values: Mapping[str, Value]) -> Iterator[Parameter]:
        """Parameters whose conditions hold; `values` may grow between one and the next."""
        for parameter in self.parameters:
            if all(values.get(name) in allowed for name, allowed in parameter.when.items()):
                yield parameter

    def _grid(
        self, values: dict[str, Value], start: int, only: Mapping[str, Sequence[Value]]
    ) -> Iterator[Configuration]:
        for number in range(start, len(self.parameters)):
            parameter = self.parameters[number]
            if all(values.get(name) in allowed for name, allowed in parameter.when.items()):
                for value in parameter.grid:
                    if value in only.get(parameter.name, (value,)):
                        yield from self._grid({**values, parameter.name: value}, number + 1, only)
                return
        yield Configuration(values)


def _parameters(layers: int, calibrated: bool, token_ids: bool) -> Iterator[Parameter]:
    groups = tuple(n for n in range(1, layers + 1) if layers % n == 0)
    groups = groups if len(groups) <= _GROUPS_MAX else groups[: _GROUPS_MAX - 1] + groups[-1:]
    klt = ("klt-head", "klt", "klt-joint") if calibrated else ()
    nested = {"quantiser": ("nested",)}
    lossy = {"quantiser": ("nested", "minmax", "absmax", "codebook", "step")}
    yield Choice("quantiser", ("nested", "minmax", "absmax", "codebook", "step", "fp8", "exact"), {}, _SHARES)
    yield Choice("transform", ("hadamard", *(("weighted",) if calibrated else ()), *klt), nested)
    yield Choice("transform", ("none", "hadamard"), {"quantiser": ("minmax",)})
    yield Choice("group_layers", groups, {"transform": ("klt", "klt-joint")})
    if token_ids:
        yield Choice("prediction", ("none", "repeats"), {**nested, "transform": ("hadamard",)})
        yield Choice("prediction", ("none", "predict"), {**nested, "transform": klt})
    yield Whole("levels", 1, 4, (1, 2, 3, 4), {"quantiser": ("nested", "step")})
    yield Real("step", -72.0, 72.0, (-72.0, -48.0, -24.0, 0.0, 24.0, 48.0, 72.0), nested)
    yield Real("value_step", -32.0, 48.0, (-32.0, 0.0, 24.0, 48.0), {**nested, "transform": _BALANCED})
    yield Real("importance", 0.0, 60.0, (0.0, 30.0, 45.0), {**nested, "transform": ("weighted", *klt)})
    yield Whole("rank", 2, 8, (2, 4, 8), {"transform": klt})
    yield Whole("k_levels", 3, 48, (4, 8, 12, 16, 24), {"quantiser": ("minmax",)})
    yield Whole("v_levels", 3, 48, (3, 4, 6, 8, 12), {"quantiser": ("minmax",)})
    yield Choice("group", (0, 32, 64), {"quantiser": ("minmax",)})
    yield Whole("k_bins", 4, 64, (6, 8, 12, 16, 24, 32), {"quantiser": ("absmax",)})
    yield Whole("v_bins", 4, 64, (6, 8, 12, 16, 24, 32), {"quantiser": ("absmax",)})
    yield Whole("bits", 1, 5, (1, 2, 3, 4, 5), {"quantiser": ("codebook",)})
    yield Whole("sinks", 0, 8, (0, 4), lossy)
    yield Whole("recent", 0, 64, (0, 16), lossy)
    yield Choice("coder", ("rans",), {**nested, "levels": (1,)})
    yield Choice("coder", ("rans", "rans-pack-1"), {**nested, "levels": (2,)})
    yield Choice("coder", ("rans", "rans-pack-1", "rans-pack-2"), {**nested, "levels": (3, 4)})
    yield Choice("coder", ("ans-layer", "ans-channel", "pack"), {"quantiser": ("minmax",)})
    yield Choice("coder", ("ans-layer", "ans-channel"), {"quantiser": ("absmax",)})
    yield Choice("coder", ("ans-layer", "pack"), {"quantiser": ("codebook",), "bits": (1, 2, 4)})
    yield Choice("coder", ("ans-layer",), {"quantiser": ("codebook",), "bits": (3, 5)})
    yield Choice("coder", ("pack", "ans-layer"), {"quantiser": ("step",)})
    yield Choice("coder", ("raw", "zstd"), {"quantiser": ("fp8",)})
    yield Choice("coder", ("raw", "exponent-pack", "exponent-ans", "zstd"), {"quantiser": ("exact",)})


_SHARES = (0.72, 0.12, 0.05, 0.03, 0.03, 0.02, 0.03)
"""Of the quantisers when points are drawn: about as many as there is to find out about each."""

_BALANCED = ("hadamard", "weighted", "klt-head", "klt")
"""Transforms that leave K and V apart, so that their steps can differ."""


def _artefact_of(pipeline: Sequence[StageSpec]) -> str:
    return next((str(stage["artefact"]) for stage in pipeline if "artefact" in stage), "")


def _said(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "nothing yet"
