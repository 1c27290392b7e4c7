"""A second reader of frames, written from docs/format.md alone; it shares no code with the package.

It reads one frame that lies in memory, checks everything that the page asks for, and decodes nothing.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import xxhash

MAGIC = bytes.fromhex("894B56460D0A1A0A")


@dataclass(frozen=True)
class ReadFrame:
    """What a frame says and holds; segments are named by level, layer group and plane."""

    key: bytes
    header: dict[str, Any]
    levels_held: int
    id: bytes
    segments: dict[tuple[int, int, str], bytes]


def _need(true: bool, message: str) -> None:
    if not true:
        raise ValueError(message)


def _integer(value: Any, low: int, high: float) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value) and value >= 0
    except OverflowError:  # an integer beyond every double
        return False


def _hexadecimal(value: Any, pattern: str) -> bool:
    return type(value) is str and re.fullmatch(pattern, value) is not None


def _list(value: Any, low: int, high: int, good: Callable[[Any], bool]) -> bool:
    return type(value) is list and low <= len(value) <= high and all(good(item) for item in value)


def _name(value: Any) -> bool:
    return type(value) is str and re.fullmatch(r"[a-z0-9_.-]{1,64}", value) is not None


def _names(value: Any) -> bool:
    return _list(value, 1, 64, _name) and len(set(value)) == len(value)


def _literal(text: str) -> Any:
    """An integer, fraction or constant of the JSON text."""
    value: Any = int(text) if re.fullmatch("-?[0-9]{1,19}", text) and len(text) < 20 else float(text)
    _need(math.isfinite(value) and (type(value) is int) == text.lstrip("-").isdigit(), f"{text} does not fit")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _need(len(dict(pairs)) == len(pairs), "an object names a field twice")
    return dict(pairs)


def _depth(value: Any) -> int:
    inner = list(value.values()) if type(value) is dict else value if type(value) is list else None
    return 0 if inner is None else 1 + max([_depth(item) for item in inner], default=0)


def _header(raw: bytes) -> dict[str, Any]:
    """The JSON header, with every required field checked."""
    _need(raw.isascii(), "header is not ASCII")
    text = raw.decode("ascii").rstrip(" ")
    _need(text.startswith("{") and text.endswith("}"), "header is not one JSON object padded with spaces")
    try:
        header: dict[str, Any] = json.loads(
            text, parse_int=_literal, parse_float=_literal, parse_constant=_literal, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header is not JSON: {error}") from error
    _need(_depth(header) <= 16, "header nests too deep")
    planes, distortion, behind = header.get("planes"), header.get("distortion"), header.get("behind", "missing")
    fields = {
        "namespace": _hexadecimal(header.get("namespace"), "[0-9a-f]{32}"),
        "digest": _hexadecimal(header.get("digest"), "[0-9a-f]{64}"),
        "tokens": _integer(header.get("tokens"), 0, 65_536),
        "first_position": _integer(header.get("first_position"), 0, 2**40),
        "groups": _list(header.get("groups"), 1, 1024, lambda layers: _integer(layers, 1, 2**20)),
        "planes": _list(planes, 1, 16, _names),
        "pipeline": _list(header.get("pipeline"), 1, 32, lambda s: type(s) is dict and _name(s.get("stage"))),
        "artefacts": _list(header.get("artefacts"), 0, 32, lambda a: _hexadecimal(a, "[0-9a-f]{64}")),
        "distortion": type(distortion) is dict
        and type(planes) is list
        and all(_name(n) and _list(e, len(planes), len(planes), _number) for n, e in distortion.items()),
        "behind": behind is None
        or (type(behind) is dict and _integer(behind.get("level"), 0, 15) and _number(behind.get("kl_nats"))),
    }
    for field, good in fields.items():
        _need(good, f"header field {field} is missing or not as it must be")
    blob: dict[str, Any] = {
        "tokens": 0,
        "first_position": 0,
        "groups": [1],
        "planes": [["blob"]],
        "pipeline": [{"stage": "blob"}],
    }
    blob |= {"artefacts": [], "distortion": {}, "behind": None}
    _need((header["tokens"] == 0) == (blob.items() <= header.items()), "only an opaque blob has no tokens")
    return header


def read(data: bytes, key: bytes | None = None) -> ReadFrame:
    """Read a whole frame, or one cut at the end of a level; anything else is a ValueError."""
    _need(len(data) >= 40, "frame is shorter than its prefix")
    magic, version, zero, h, s, zero2, payload_length, head_checksum = struct.unpack_from("<8sHHIIIQQ", data)
    _need(magic == MAGIC, "not a frame: wrong magic")
    _need(version == 1, f"format version {version} is not 1")
    _need(zero == 0 and zero2 == 0, "reserved bytes of the prefix are not zero")
    _need(h <= 65_536, f"header of {h} bytes is too long")
    _need(payload_length <= 2**40, "payload is too long")
    _need(1 <= s <= 16_384, f"{s} segments are not 1 to 16,384")
    start = 40 + h + 24 * s
    _need(start % 64 == 0, "head does not end at a multiple of 64")
    _need(len(data) >= start, "frame is cut within its head")
    _need(xxhash.xxh3_64_intdigest(data[:32] + data[40:start], seed=0) == head_checksum, "head checksum is wrong")
    header = _header(data[40 : 40 + h])
    groups, planes = header["groups"], header["planes"]
    _need(s == len(groups) * sum(len(level) for level in planes), "number of segments is not that of the header")

    places = [(v, g, name) for v, level in enumerate(planes) for g in range(len(groups)) for name in level]
    rows = list(struct.iter_unpack("<QQQ", data[40 + h : start]))
    level_ends = [0] * len(planes)
    end = 0
    for (level, group, name), (offset, length, _) in zip(places, rows, strict=True):
        _need(offset == end, f"gap or overlap before segment {level}/{group}/{name}")
        end = level_ends[level] = offset + (length + 15) // 16 * 16
    _need(end == payload_length, "segments do not end where the payload ends")
    _need(all(a < b for a, b in pairwise(level_ends)), "a level above 0 is empty")

    own_key = bytes.fromhex(header["namespace"] + header["digest"])
    _need(key is None or key == own_key, "header names another key")
    _need(len(data) - start in level_ends, "payload does not end where a level ends")
    levels_held = level_ends.index(len(data) - start) + 1

    seed = xxhash.xxh3_64_intdigest(own_key, seed=0)
    segments: dict[tuple[int, int, str], bytes] = {}
    for place, (offset, length, checksum) in zip(places, rows, strict=True):
        if place[0] >= levels_held:
            break
        padded = data[start + offset : start + offset + (length + 15) // 16 * 16]
        _need(xxhash.xxh3_64_intdigest(padded, seed=seed) == checksum, f"checksum of segment {place} is wrong")
        _need(not any(padded[length:]), f"padding of segment {place} is not zero")
        segments[place] = padded[:length]
    return ReadFrame(own_key, header, levels_held, hashlib.sha256(data[:start]).digest()[:16], segments)
