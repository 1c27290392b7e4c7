"""The JSON header of a frame: what the frame says about itself, checked field by field.

Nothing here is trusted: every field has a type and a bound, and no field chooses the size of an allocation.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
DEPTH_MAX = 16
PROFILE_ID_BYTES = 8
LOSSLESS_STAGES = frozenset(("ans", "blob", "exponent", "keep", "pack", "rans", "raw", "zstd"))
"""Stages that give back every bit: what a storage node knows of codecs, which it has none of."""

_NAME = re.compile(r"[a-z0-9_.-]{1,64}")
_KEYED = re.compile(rb'\{"namespace":"([0-9a-f]{32})","digest":"([0-9a-f]{64})",')
# A field that is named twice is refused, and an escape may hide its name.
_KEY_FIELD = re.compile(rb'"(?:namespace|digest)"|\\')
_SHARED_BYTES_MAX = 4096
_NO_KEY = ChunkKey(bytes(NAMESPACE_BYTES + DIGEST_BYTES))

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
        profile: `profile_id` of the pipeline; a header that was read has it.
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
    profile: bytes = field(default=bytes(PROFILE_ID_BYTES), compare=False)

    @property
    def lossless(self) -> bool:
        """Whether the whole frame decodes to every bit that was encoded."""
        return is_lossless(self.pipeline)

    @property
    def levels(self) -> int:
        """Number of quality levels of the whole frame."""
        return len(self.planes)

    def segment_counts(self) -> list[int]:
        """Number of segments of each level: layer groups times planes."""
        return [len(self.groups) * len(names) for names in self.planes]


def is_lossless(pipeline: Sequence[StageSpec]) -> bool:
    """Whether decoding gives back every bit."""
    return all(stage["stage"] in LOSSLESS_STAGES for stage in pipeline)


def profile_id(pipeline: Sequence[StageSpec], artefacts: Sequence[str] = ()) -> bytes:
    """What tells which profile made a frame: 8 bytes of SHA-256 over its pipeline, with its artefacts by digest.

    Args:
        pipeline: Stages, which name their artefacts by digest, or as headers do by number.
        artefacts: Digests that the numbers stand for.
    """
    stages = [dict(stage) for stage in pipeline]
    for stage in stages:
        number = stage.get("artefact")
        if type(number) is int and 0 <= number < len(artefacts):
            stage["artefact"] = artefacts[number]
    text = json.dumps(stages, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).digest()[:PROFILE_ID_BYTES]


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
    """Header from its JSON text, which may be padded with spaces.

    Raises:
        FrameCorruptError: The text is no JSON object, or a field is missing, of a wrong type or out of range.
    """
    keyed = _KEYED.match(text) if len(text) <= _SHARED_BYTES_MAX else None
    if keyed is not None and _KEY_FIELD.search(text, keyed.end()) is None:
        key = bytes.fromhex((keyed[1] + keyed[2]).decode("ascii"))
        return replace(_load_shared(b"{" + text[keyed.end() :]), key=ChunkKey(key))
    fields = _load_json(text)
    if not isinstance(fields, dict):
        raise FrameCorruptError("header is not a JSON object")
    return _header(_key(fields), fields)


# Chunks of one layout differ in their key and little else, and what this takes is what it costs to read a small frame.
@lru_cache(maxsize=1024)
def _load_shared(text: bytes) -> Header:
    """Header from the JSON text of all but its key."""
    fields = _load_json(text)
    assert isinstance(fields, dict), "it begins with a brace"
    return _header(_NO_KEY, fields)


def _header(key: ChunkKey, fields: Mapping[str, Any]) -> Header:
    planes = tuple(_list(fields, "planes", 1, LEVELS_MAX, _plane_names))
    pipeline = tuple(_list(fields, "pipeline", 1, STAGES_MAX, _stage))
    artefacts = tuple(_list(fields, "artefacts", 0, STAGES_MAX, _artefact))
    header = Header(
        key=key,
        tokens=_integer(fields, "tokens", 1 << 16),
        first_position=_integer(fields, "first_position", POSITION_MAX),
        groups=tuple(_list(fields, "groups", 1, GROUPS_MAX, _layer_count)),
        planes=planes,
        pipeline=pipeline,
        artefacts=artefacts,
        distortion=_distortion(fields, len(planes)),
        behind=_behind(fields.get("behind")),
        profile=profile_id(pipeline, artefacts),
    )
    if (header.tokens == 0) != (header == blob_header(header.key)):
        raise FrameCorruptError("header: an opaque blob, and only that, has no tokens")
    return header


def blob_header(key: ChunkKey) -> Header:
    """Header of an opaque blob: one plane of bytes, stored as it is."""
    return Header(key, 0, 0, (1,), (("blob",),), ({"stage": "blob"},))


def _load_json(text: bytes) -> object:
    """JSON of a restricted kind: ASCII, no name twice, numbers that fit, nothing deep."""
    body = text.rstrip(b" ")
    if not body.startswith(b"{") or not body.endswith(b"}"):
        raise FrameCorruptError("header does not start with { and end with } and spaces")
    try:
        fields = json.loads(
            body.decode("ascii"),
            object_pairs_hook=_object,
            parse_int=_short_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as exc:
        raise FrameCorruptError(f"header is not JSON as frames have it: {exc}") from exc
    if _depth(fields) > DEPTH_MAX:
        raise FrameCorruptError(f"header nests deeper than {DEPTH_MAX}")
    return fields


def _object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object names a field twice")
    return fields


def _short_integer(text: str) -> int:
    if len(text) > 19:
        raise ValueError("an integer has more than 19 characters")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is no number")


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


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
    if not all(_is_name(name) for name in value):
        raise FrameCorruptError(f"header: a plane name must match {_NAME.pattern}")
    if len(set(value)) != len(value):
        raise FrameCorruptError("header: a level names a plane twice")
    return tuple(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _stage(value: object) -> StageSpec:
    if not isinstance(value, dict) or not _is_name(value.get("stage")):
        raise FrameCorruptError("header: a stage of the pipeline has no name")
    return MappingProxyType(value)


def _artefact(value: object) -> str:
    if not isinstance(value, str):
        raise FrameCorruptError("header: an artefact digest is not a text")
    try:
        return parse_hex(value, DIGEST_BYTES, "artefact digest").hex()
    except KeyFormatError as exc:
        raise FrameCorruptError(f"header: {exc}") from exc


def _distortion(fields: Mapping[str, Any], levels: int) -> Mapping[str, tuple[float, ...]]:
    value = fields.get("distortion")
    if not isinstance(value, dict) or len(value) > PLANES_MAX or not all(map(_is_name, value)):
        raise FrameCorruptError("header: distortion must be an object by plane name")
    return MappingProxyType({name: _errors(errors, levels) for name, errors in value.items()})


def _errors(value: object, levels: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != levels:
        raise FrameCorruptError("header: the distortion of a plane is a list with a number for each level")
    return tuple(_real(error) for error in value)


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise FrameCorruptError("header: a number is missing or negative")
    return float(value)


def _behind(value: object) -> Behind | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FrameCorruptError("header: behind must be an object or null")
    return Behind(_integer(value, "level", LEVELS_MAX - 1), _real(value.get("kl_nats")))
