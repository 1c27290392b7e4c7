"""The one protocol of everything that transforms planes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch

from kvstore.errors import PipelineError
from kvstore.layout import PlaneSpec

Planes = Mapping[str, torch.Tensor]
"""Tensors by plane name.

Names with a dot are side planes that a stage made: `k.mean`, `k.0`. Names that start with a dot are context: writer and
reader know them without a byte of the frame (`.position`, `.cos`), or only the writer has them (`.importance`).
"""

Specs = Mapping[str, PlaneSpec]
"""The same without data."""

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        name: getattr(torch, name)
        for name in (
            "uint8",
            "int8",
            "float8_e4m3fn",
            "float8_e5m2",
            "int16",
            "int32",
            "float16",
            "bfloat16",
            "float32",
        )
    }
)
FLOATS = frozenset({"float16", "bfloat16", "float32"})


class Stage(Protocol):
    """Planes to planes and back; synchronous, deterministic, without state. A frozen dataclass is its configuration.

    Planes that a stage does not transform pass through it unchanged.
    """

    @property
    def name(self) -> str:
        """What pipelines call it."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        ...

    def infer(self, specs: Specs) -> Specs:
        """Specs of the planes that `encode` makes of planes with these specs.

        Raises:
            PipelineError: The stage cannot handle such planes.
        """
        ...

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        """Transform planes with the given specs.

        Raises:
            PipelineError: The values cannot be encoded.
        """
        ...

    def decode(self, planes: Planes, like: Specs) -> Planes:
        """Undo `encode`, as far as the levels that are there allow.

        Args:
            planes: What `encode` made; planes of the upper levels may be missing.
            like: Specs of the planes to return.
        """
        ...


@runtime_checkable
class Announcing(Protocol):
    """A stage that tells the stages behind it what writer and reader know alike."""

    def announce(self, specs: Specs, context: Planes) -> Planes:
        """Context planes to add, from the specs of its input and the context so far."""
        ...


def is_context(name: str) -> bool:
    """Whether a plane is context and never part of a frame."""
    return name.startswith(".")


def base_planes(specs: Specs) -> list[str]:
    """Names of the planes that hold the cache itself, side planes left out."""
    return [name for name in specs if "." not in name]


def require_floats(stage: str, specs: Specs, only: Sequence[str] = ()) -> list[str]:
    """Names of the base planes, all of which are `[layers, tokens, kv_heads, head_dim]` of a float dtype.

    Args:
        stage: Who asks.
        specs: The planes.
        only: The stage's option `planes`: which of them it transforms, all by default.

    Raises:
        PipelineError: A base plane is something else, or one that is asked for is not there.
    """
    names = base_planes(specs)
    for name in only:
        if name not in names:
            raise PipelineError(f"stage {stage!r}: there is no plane {name!r} here, only {', '.join(names) or 'none'}")
    names = [name for name in names if name in only or not only]
    for name in names:
        spec = specs[name]
        if spec.dtype not in FLOATS or len(spec.shape) != 4:
            raise PipelineError(
                f"stage {stage!r}: plane {name!r} of {spec.dtype}{list(spec.shape)} is not a float plane"
            )
    return names


def require_new(stage: str, specs: Specs, name: str) -> None:
    """Refuse to write over a side plane that another stage needs for decoding.

    Raises:
        PipelineError: There is a plane of that name.
    """
    if name in specs:
        raise PipelineError(f"stage {stage!r}: an earlier stage has made a plane {name!r} already")


def require_layers(stage: str, option: str, specs: Specs, name: str) -> None:
    """Refuse an option that goes by the numbers of layers where a plane has not one row for each of them.

    Raises:
        PipelineError: The numbers are not known, or a transform has joined the layers.
    """
    if ".layer" not in specs:
        raise PipelineError(f"stage {stage!r}: {option} need the numbers of the layers, '.layer'")
    if specs[".layer"].shape[0] != specs[name].shape[0]:
        raise PipelineError(f"stage {stage!r}: {option} need layers of their own, plane {name!r} spans several")


def require_finite(stage: str, name: str, values: torch.Tensor) -> None:
    """Refuse values that no lossy stage can encode.

    Raises:
        PipelineError: A value is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        count = int((~torch.isfinite(values)).sum())
        raise PipelineError(
            f"stage {stage!r}: plane {name!r} has {count} values that are NaN, infinite or too large for float32 "
            "arithmetic; only a lossless pipeline such as 'raw' can store them"
        )
