"""The JSON header of a frame: what the frame says about itself, checked field by field.

Nothing here is trusted: every field has a type and a bound, and no field chooses the size of an allocation.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from kvstore.errors import FrameCorruptError, KeyFormatError
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key, parse_hex, split_key

HEADER_BYTES_MAX = 1 << 16
LEVELS_MAX = 16
PLANES_MAX = 64
GROUPS_MAX = 1024
STAGES_MAX = 32
POSITION_MAX = 1 << 40

StageSpec = Mapping[str, Any]
"""One stage of a pipeline as JSON: `stage` names it, the other fields configure it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Behind:
    """What a derived chunk stands on: it was computed behind a lossy prefix.

    Args:
        level: Worst quality level among the chunks before it.
        kl_nats: Bound on the KL divergence they cause, nats a token.
    """

    level: int
    kl_nats: float


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself.

    Args:
        key: Key of the chunk.
        tokens: Tokens of the chunk, 0 for an opaque blob.
        first_position: Position of the first token in its prompt.
        groups: Number of layers in each layer group; `(1,)` for an opaque blob.
        planes: Names of the coded planes of every level, in the order of their segments.
        pipeline: Stages that made the frame, first to last.
        artefacts: SHA-256 of the calibration artefacts that decoding needs, hexadecimal.
        distortion: Relative squared error of every plane after each level.
        behind: Set where the chunk is inexact because it stands on a lossy prefix.
    """

    key: ChunkKey
    tokens: int
    first_position: int
    groups: tuple[int, ...]
    planes: tuple[tuple[str, ...], ...]
    pipeline: tuple[StageSpec, ...]
    artefacts: tuple[str, ...] = ()
    distortion: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: MappingProxyType({}))
    behind: Behind | None = None

    @property
    def levels(self) -> int:
        """Number of quality levels of the whole frame."""
        return len(self.planes)

    def segment_counts(self) -> list[int]:
        """Number of segments of each level: layer groups times planes."""
        return [len(self.groups) * len(names) for names in self.planes]


def dump_header(header: Header) -> bytes:
    """JSON text of a header, ASCII, without padding."""
    namespace, digest = split_key(header.key)
    fields = {
        "namespace": namespace.hex(),
        "digest": digest.hex(),
        "tokens": header.tokens,
        "first_position": header.first_position,
        "groups": header.groups,
        "planes": header.planes,
        "pipeline": [dict(stage) for stage in header.pipeline],
        "artefacts": header.artefacts,
        "distortion": dict(header.distortion),
        "behind": None if header.behind is None else {"level": header.behind.level, "kl_nats": header.behind.kl_nats},
    }
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def load_header(text: bytes) -> Header:
    """Header from its JSON text.

    Raises:
        FrameCorruptError: The text is no JSON object, or a field is missing, of a wrong type or out of range.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FrameCorruptError(f"header is not JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise FrameCorruptError("header is not a JSON object")
    return Header(
        key=_key(fields),
        tokens=_integer(fields, "tokens", 1 << 16),
        first_position=_integer(fields, "first_position", POSITION_MAX),
        groups=tuple(_list(fields, "groups", 1, GROUPS_MAX, _layer_count)),
        planes=tuple(_list(fields, "planes", 1, LEVELS_MAX, _plane_names)),
        pipeline=tuple(_list(fields, "pipeline", 1, STAGES_MAX, _stage)),
        artefacts=tuple(_list(fields, "artefacts", 0, STAGES_MAX, _artefact)),
        distortion=_distortion(fields),
        behind=_behind(fields.get("behind")),
    )


def _key(fields: Mapping[str, Any]) -> ChunkKey:
    namespace, digest = fields.get("namespace"), fields.get("digest")
    if not isinstance(namespace, str) or not isinstance(digest, str):
        raise FrameCorruptError("header names no key")
    try:
        return chunk_key(parse_hex(namespace, NAMESPACE_BYTES, "namespace"), parse_hex(digest, DIGEST_BYTES, "digest"))
    except KeyFormatError as exc:
        raise FrameCorruptError(f"header: {exc}") from exc


def _integer(fields: Mapping[str, Any], name: str, largest: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= largest:
        raise FrameCorruptError(f"header: {name} must be an integer from 0 to {largest}")
    return value


def _list(fields: Mapping[str, Any], name: str, least: int, most: int, item: Callable[[object], T]) -> Sequence[T]:
    value = fields.get(name)
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise FrameCorruptError(f"header: {name} must be a list of {least} to {most}")
    return [item(element) for element in value]


def _layer_count(value: object) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise FrameCorruptError("header: a layer group has at least one layer")
    return value


def _plane_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= PLANES_MAX:
        raise FrameCorruptError(f"header: a level has 1 to {PLANES_MAX} planes")
    if not all(isinstance(name, str) and 0 < len(name) <= 64 for name in value):
        raise FrameCorruptError("header: a plane name is a text of 1 to 64 characters")
    if len(set(value)) != len(value):
        raise FrameCorruptError("header: a level names a plane twice")
    return tuple(value)


def _stage(value: object) -> StageSpec:
    if not isinstance(value, dict) or not isinstance(value.get("stage"), str):
        raise FrameCorruptError("header: a stage of the pipeline has no name")
    return MappingProxyType(value)


def _artefact(value: object) -> str:
    if not isinstance(value, str):
        raise FrameCorruptError("header: an artefact digest is not a text")
    try:
        return parse_hex(value, DIGEST_BYTES, "artefact digest").hex()
    except KeyFormatError as exc:
        raise FrameCorruptError(f"header: {exc}") from exc


def _distortion(fields: Mapping[str, Any]) -> Mapping[str, tuple[float, ...]]:
    value = fields.get("distortion")
    if not isinstance(value, dict) or len(value) > PLANES_MAX:
        raise FrameCorruptError("header: distortion must be an object by plane")
    return MappingProxyType({name: _errors(errors) for name, errors in value.items()})


def _errors(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) > LEVELS_MAX:
        raise FrameCorruptError("header: the distortion of a plane is a list by level")
    return tuple(_real(error) for error in value)


def _real(value: object) -> float:
    if type(value) not in (int, float):
        raise FrameCorruptError("header: a number is missing")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError as exc:
        raise FrameCorruptError("header: a number is out of range") from exc
    if not math.isfinite(number) or number < 0:
        raise FrameCorruptError("header: a number is negative or not finite")
    return number


def _behind(value: object) -> Behind | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FrameCorruptError("header: behind must be an object or null")
    return Behind(_integer(value, "level", LEVELS_MAX), _real(value.get("kl_nats")))
