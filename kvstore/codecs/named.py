"""Pipelines that have a name: ours here, published methods in `recompositions.py`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvstore.codecs.pipeline import Pipeline, build_pipeline
from kvstore.codecs.recompositions import RECOMPOSITIONS, Spec
from kvstore.errors import PipelineError

_CODED: Spec = ({"stage": "rans"}, {"stage": "raw"})


def ladder(levels: int = 3, step: int = 48, value_step: int = 24) -> Spec:
    """Nested levels without calibration; see the stage `nested` for the steps. Needs a layout with rotary embedding."""
    grid = {"stage": "nested", "levels": levels, "step": step, "value_step": value_step}
    return ({"stage": "rope"}, {"stage": "mean", "coarse": True}, {"stage": "hadamard"}, grid, *_CODED)


def ladder_repeats(levels: int = 3, step: int = 32, value_step: int = 24) -> Spec:
    """`ladder` that says once what repeated tokens have in common: for readers that know the token ids."""
    rope, mean, *rest = ladder(levels, step, value_step)
    return (rope, mean, {"stage": "repeats"}, *rest)


def ladder_weighted(artefact: str, levels: int = 3, step: int = -320) -> Spec:
    """`ladder` with calibrated channel weights and token importance: no matrix product more than the Hadamard one."""
    return (
        {"stage": "importance", "artefact": artefact, "by_layer": True},
        {"stage": "rope"},
        {"stage": "mean", "artefact": artefact},
        {"stage": "weigh", "artefact": artefact},
        {"stage": "hadamard"},
        {"stage": "nested", "levels": levels, "step": step},
        *_CODED,
    )


def ladder_klt(artefact: str, levels: int = 3, step: int = -280) -> Spec:
    """Nested levels in a calibrated basis: the smallest frames."""
    return (
        {"stage": "importance", "artefact": artefact},
        {"stage": "rope"},
        {"stage": "mean", "artefact": artefact},
        {"stage": "klt", "artefact": artefact},
        {"stage": "nested", "levels": levels, "step": step},
        *_CODED,
    )


def ladder_tokens(artefact: str, levels: int = 3, step: int = -280) -> Spec:
    """`ladder_klt` of what the token ids do not predict: for readers that know them when they decode."""
    importance, rope, _, *rest = ladder_klt(artefact, levels, step)
    return (importance, rope, {"stage": "predict", "artefact": artefact}, *rest)


def kvtc(artefact: str, step: int = 0) -> Spec:
    """KVTC-like: rotary embedding undone, a KLT that knows no metric, one constant step, an entropy coder."""
    return (
        {"stage": "rope"},
        {"stage": "mean", "artefact": artefact},
        {"stage": "klt", "artefact": artefact},
        {"stage": "nested", "levels": 1, "step": step},
        *_CODED,
    )


NAMED: Mapping[str, Spec] = MappingProxyType(
    {
        "raw": ({"stage": "raw"},),
        "ladder-packed": (
            {"stage": "mean"},
            {"stage": "hadamard"},
            {"stage": "step", "levels": 3},
            {"stage": "pack"},
            {"stage": "raw"},
        ),
        "ladder": ladder(),
        "ladder-repeats": ladder_repeats(),
        **RECOMPOSITIONS,
    }
)
"""Pipelines that need no calibration, by name."""

CALIBRATED: Mapping[str, Callable[[str], Spec]] = MappingProxyType(
    {
        "ladder-weighted": ladder_weighted,
        "ladder-klt": ladder_klt,
        "ladder-tokens": ladder_tokens,
        "kvtc": kvtc,
    }
)
"""Pipelines that need an artefact: from its digest (and settings) to a spec."""


def named_pipeline(name: str, artefacts: Mapping[str, bytes] | None = None) -> Pipeline:
    """A pipeline by its name.

    Args:
        name: In `NAMED` or `CALIBRATED`.
        artefacts: For a calibrated one, its artefact by digest; exactly one.

    Raises:
        PipelineError: There is no such name, or it needs an artefact.
    """
    if name in NAMED:
        return build_pipeline(NAMED[name])
    if name not in CALIBRATED:
        raise PipelineError(f"no pipeline is called {name!r}; known: {', '.join([*NAMED, *CALIBRATED])}")
    if artefacts is None or len(artefacts) != 1:
        raise PipelineError(f"pipeline {name!r} needs one calibration artefact: make it with 'kvstore calibrate'")
    return build_pipeline(CALIBRATED[name](next(iter(artefacts))), artefacts)
