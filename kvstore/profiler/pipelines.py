"""Between the values of a configuration and the JSON of its pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from kvstore.codecs.registry import STAGES
from kvstore.errors import ConfigError
from kvstore.header import StageSpec
from kvstore.profiler.parameters import Value

_CENTRES = {"hadamard": 48, "weighted": -320, "klt-head": -280, "klt": -280, "klt-joint": -280}
"""Step of the stage `nested` that the parameter `step` counts from: relative to values, or absolute in the metric."""
_RANKS = 8
"""Parts in which `rank` counts the coefficients of a basis."""

_CODERS: Mapping[str, tuple[StageSpec, ...]] = {
    "rans": ({"stage": "rans"},),
    "rans-pack-1": ({"stage": "rans", "packed_from": 1}, {"stage": "pack"}),
    "rans-pack-2": ({"stage": "rans", "packed_from": 2}, {"stage": "pack"}),
    "ans-layer": ({"stage": "ans"},),
    "ans-channel": ({"stage": "ans", "tables": "channel"},),
    "pack": ({"stage": "pack"},),
    "exponent-pack": ({"stage": "exponent"}, {"stage": "pack"}),
    "exponent-ans": ({"stage": "exponent"}, {"stage": "ans"}),
    "zstd": ({"stage": "zstd", "shuffle": True},),
    "raw": (),
}


def write_pipeline(values: Mapping[str, Value], artefact: str, coefficients: int) -> tuple[StageSpec, ...]:
    """JSON of a pipeline.

    Args:
        values: Of a configuration.
        artefact: Digest of the artefact it needs, or nothing.
        coefficients: Coefficients of its basis.
    """
    quantiser = values["quantiser"]
    kept = {name: values[name] for name in ("sinks", "recent") if values.get(name)}
    front: tuple[StageSpec, ...] = ({"stage": "keep", **kept},) if kept else ()
    coder = (*_CODERS[str(values["coder"])], {"stage": "raw"})
    if quantiser == "nested":
        return (*front, *_nested(values, artefact, coefficients), *coder)
    if quantiser == "minmax":
        rotation: tuple[StageSpec, ...] = ({"stage": "hadamard"},) if values["transform"] == "hadamard" else ()
        group = {"group": values["group"]} if values["group"] else {}
        k = {"stage": "minmax", "planes": ["k"], "levels": values["k_levels"], **group}
        v = {"stage": "minmax", "planes": ["v"], "levels": values["v_levels"], "per": "token", **group}
        return (*front, *rotation, plain(k), plain(v), *coder)
    if quantiser == "absmax":
        planes = (("k", values["k_bins"]), ("v", values["v_bins"]))
        bins = [plain({"stage": "absmax", "planes": [name], "bins": n}) for name, n in planes]
        return (*front, *bins, *coder)
    if quantiser == "codebook":
        codebook = plain({"stage": "codebook", "bits": values["bits"]})
        return (*front, {"stage": "hadamard"}, codebook, *coder)
    if quantiser == "step":
        step = plain({"stage": "step", "levels": values["levels"]})
        return (*front, {"stage": "mean"}, {"stage": "hadamard"}, step, *coder)
    return ({"stage": "fp8"}, *coder) if quantiser == "fp8" else coder


def _nested(values: Mapping[str, Value], artefact: str, coefficients: int) -> tuple[StageSpec, ...]:
    transform = str(values["transform"])
    bound = {"artefact": artefact}
    exponent = round(float(values.get("importance", 0.0)))
    by_layer = {"by_layer": True} if transform == "weighted" or _alone(values) else {}
    importance = plain({"stage": "importance", **bound, "exponent": exponent, **by_layer})
    stages: list[StageSpec] = [importance] if exponent else []
    stages.append({"stage": "rope"})
    if values.get("prediction") == "predict":
        stages.append({"stage": "predict", **bound})
    elif transform == "hadamard":
        stages.append({"stage": "mean", "coarse": True})
    else:
        stages.append({"stage": "mean", **bound})
    if values.get("prediction") == "repeats":
        stages.append({"stage": "repeats"})
    if transform == "weighted":
        stages.append({"stage": "weigh", **bound})
    if transform in ("hadamard", "weighted"):
        stages.append({"stage": "hadamard"})
    else:
        rank = coefficients * int(values["rank"]) // _RANKS
        stages.append(plain({"stage": "klt", **bound, "rank": rank % coefficients}))
    step = _CENTRES[transform] + round(float(values["step"]))
    value_step = round(float(values.get("value_step", 0.0)))
    grid = {"stage": "nested", "levels": values["levels"], "step": step, "value_step": value_step}
    return (*stages, plain(grid))


def _alone(values: Mapping[str, Value]) -> bool:
    """Whether every layer is coded by itself, so that its tokens can have steps of their own."""
    return values["transform"] == "klt-head" or (values["transform"] != "hadamard" and values.get("group_layers") == 1)


def plain(stage: StageSpec) -> StageSpec:
    """A stage as a pipeline itself says it: without options at their defaults."""
    known = STAGES.get(str(stage["stage"]))
    defaults = {field.name: field.default for field in fields(known)} if known else {}
    return {name: value for name, value in stage.items() if name not in defaults or value != defaults[name]}


def read_pipeline(pipeline: Sequence[StageSpec], coefficients: int) -> dict[str, Value]:
    """Undo `write_pipeline`, but for what the artefact of a basis says; `transform` is `klt` for every basis.

    Raises:
        ConfigError: It has a stage that no configuration has.
    """
    stages = [dict(stage) for stage in pipeline]
    by_name = {str(stage["stage"]): stage for stage in stages}
    values: dict[str, Value] = {}
    quantiser = next(
        (name for name in ("nested", "minmax", "absmax", "codebook", "step", "fp8") if name in by_name), ""
    )
    values["quantiser"] = quantiser or "exact"
    names = [str(stage["stage"]) for stage in stages]
    coder = stages[names.index(quantiser) + 1 + names.count(quantiser) - 1 : -1] if quantiser else stages[:-1]
    values["coder"] = _coder(coder)
    if quantiser not in ("", "fp8"):
        kept = by_name.get("keep", {})
        values |= {name: int(kept.get(name, 0)) for name in ("sinks", "recent")}
    match quantiser:
        case "nested":
            values |= _read_nested(by_name, coefficients)
        case "minmax":
            k, v = (stage for stage in stages if stage["stage"] == "minmax")
            values["transform"] = "hadamard" if "hadamard" in by_name else "none"
            values |= {"k_levels": k.get("levels", 16), "v_levels": v.get("levels", 16), "group": k.get("group", 0)}
        case "absmax":
            k, v = (stage for stage in stages if stage["stage"] == "absmax")
            values |= {"k_bins": k.get("bins", 16), "v_bins": v.get("bins", 16)}
        case "codebook":
            values["bits"] = by_name["codebook"].get("bits", 4)
        case "step":
            values["levels"] = by_name["step"].get("levels", 3)
    return values


def _read_nested(stages: Mapping[str, StageSpec], coefficients: int) -> dict[str, Value]:
    nested = stages["nested"]
    transform = "klt" if "klt" in stages else "weighted" if "weigh" in stages else "hadamard"
    values: dict[str, Value] = {"transform": transform, "levels": nested.get("levels", 3)}
    values["step"] = float(nested.get("step", 48) - _CENTRES[transform])
    values["value_step"] = float(nested.get("value_step", 0))
    values["prediction"] = next((name for name in ("repeats", "predict") if name in stages), "none")
    if transform != "hadamard":
        values["importance"] = float(stages["importance"].get("exponent", 30)) if "importance" in stages else 0.0
    if transform == "klt":
        rank = stages["klt"].get("rank", 0)
        values["rank"] = (rank or coefficients) * _RANKS // coefficients
    return values


def _coder(stages: Sequence[StageSpec]) -> str:
    for name, known in _CODERS.items():
        if tuple(stages) == known:
            return name
    raise ConfigError(f"no configuration codes with {', '.join(str(stage['stage']) for stage in stages)}")
