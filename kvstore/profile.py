"""Profiles: pipelines with what was measured of each of their levels, and the machine and model it was measured on.

A set of them is a JSON file that people can read. It may come from anywhere, so every field is checked and bounded.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from kvstore.errors import ProfileError
from kvstore.header import LEVELS_MAX, STAGES_MAX, StageSpec, is_lossless, profile_id

VERSION = 1
"""Of the JSON; a reader refuses others."""
SET_FILE = "profiles.json"
ARTEFACTS = "artefacts"
"""The file of a set, and the folder beside it with the calibration artefacts that its profiles need."""
PROFILES_MAX = 64
BUCKETS_MAX = 32
SET_BYTES_MAX = 1 << 20
_ARTEFACTS_MAX = 16
_TEXTS_MAX = 64
_STRING_MAX = 256
_SECONDS_MAX = 1e6
_RATIO_MAX = 1e6

_NAME = re.compile(r"[a-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality loss of a level on prompts of one bucket (a length and a kind of text).

    Args:
        kl_nats: KL(exact || compressed) of the next-token distributions behind the prefix, mean over tokens.
        standard_error: Of it, over prompts.
        perplexity_change: Relative.
        agreement: Share of tokens whose most likely successor is the same.
        prompts: How many prompts it was measured on.
    """

    kl_nats: float
    standard_error: float
    perplexity_change: float
    agreement: float
    prompts: int


@dataclass(frozen=True, slots=True)
class Level:
    """What was measured of one quality level, those below it included.

    Args:
        ratio: Bytes of the exact cache in those of the frames.
        decode_s_per_gb: Seconds to decode a GB of exact cache.
        quality: By bucket, such as `text-512`.
    """

    ratio: float
    decode_s_per_gb: float
    quality: Mapping[str, Quality]


@dataclass(frozen=True, slots=True)
class Profile:
    """A pipeline and its measured levels, coarsest first.

    Args:
        name: What people and metrics call it; unique in its set.
        pipeline: Its JSON.
        artefacts: SHA-256 of the calibration artefacts that it needs, hexadecimal.
        encode_s_per_gb: Seconds to encode a GB of exact cache, all levels.
        levels: What was measured of each.
    """

    name: str
    pipeline: tuple[StageSpec, ...]
    artefacts: tuple[str, ...]
    encode_s_per_gb: float
    levels: tuple[Level, ...]

    @property
    def id(self) -> bytes:
        """What frames that it made say of it; see `kvstore.header.profile_id`."""
        return profile_id(self.pipeline)

    @property
    def lossless(self) -> bool:
        """Whether all levels together decode to every bit."""
        return is_lossless(self.pipeline)


@dataclass(frozen=True, slots=True)
class Measured:
    """Where the numbers of a set come from.

    Args:
        model: Name of the model.
        revision: SHA-256 of its configuration and weights.
        texts: Names of the text files.
        device: What times were taken on, such as `cpu` or `cuda`.
        machine: Its processor or accelerator.
        date: When, ISO 8601.
        kvstore: Version that measured.
        seed: Of everything random.
    """

    model: str
    revision: str
    texts: tuple[str, ...]
    device: str
    machine: str
    date: str
    kvstore: str
    seed: int


@dataclass(frozen=True, slots=True)
class ProfileSet:
    """Profiles that were measured together.

    Args:
        measured: Where the numbers come from.
        profiles: The profiles.
        details: What else the profiler wants to say; nothing depends on it.
    """

    measured: Measured
    profiles: tuple[Profile, ...]
    details: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def artefacts(self) -> tuple[str, ...]:
        """Digests of the calibration artefacts of all profiles, each once."""
        return tuple(dict.fromkeys(digest for profile in self.profiles for digest in profile.artefacts))


def profiles_json(found: ProfileSet) -> dict[str, Any]:
    """A set as JSON; `parse_profiles` undoes it."""
    measured = found.measured
    return {
        "version": VERSION,
        "measured": {name: _plain(getattr(measured, name)) for name in Measured.__slots__},
        "profiles": [
            {
                "name": profile.name,
                "pipeline": [dict(stage) for stage in profile.pipeline],
                "artefacts": list(profile.artefacts),
                "encode_s_per_gb": profile.encode_s_per_gb,
                "levels": [
                    {
                        "ratio": level.ratio,
                        "decode_s_per_gb": level.decode_s_per_gb,
                        "quality": {
                            bucket: {name: getattr(quality, name) for name in Quality.__slots__}
                            for bucket, quality in level.quality.items()
                        },
                    }
                    for level in profile.levels
                ],
            }
            for profile in found.profiles
        ],
        "details": dict(found.details),
    }


def load_profiles(data: bytes) -> ProfileSet:
    """A set from the bytes of its file.

    Raises:
        ProfileError: They are no set that this build knows.
    """
    if len(data) > SET_BYTES_MAX:
        raise ProfileError(f"a set of profiles has at most {SET_BYTES_MAX} bytes, not {len(data)}")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise ProfileError(f"not JSON: {exc}") from exc
    return parse_profiles(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parse_profiles(value: object) -> ProfileSet:
    """A set from its JSON.

    Raises:
        ProfileError: A field is missing, unknown or out of range; the message names it.
    """
    known = _object(value, "the set", ("version", "measured", "profiles", "details"))
    if known["version"] != VERSION or type(known["version"]) is not int:
        raise ProfileError(f"version {known['version']!r} of a set of profiles; this build knows {VERSION}")
    profiles = _list(known["profiles"], "profiles", PROFILES_MAX, _profile)
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise ProfileError("two profiles have the same name")
    details = _object(known["details"], "details", None)
    return ProfileSet(_measured(known["measured"]), profiles, MappingProxyType(details))


def _measured(value: object) -> Measured:
    known = _object(value, "measured", Measured.__slots__)
    return Measured(
        model=_string(known["model"], "model"),
        revision=_matching(known["revision"], "revision", _DIGEST),
        texts=_list(known["texts"], "texts", _TEXTS_MAX, lambda text: _string(text, "a text")),
        device=_string(known["device"], "device"),
        machine=_string(known["machine"], "machine"),
        date=_string(known["date"], "date"),
        kvstore=_string(known["kvstore"], "kvstore"),
        seed=_integer(known["seed"], "seed", -(1 << 63), 1 << 63),
    )


def _profile(value: object) -> Profile:
    known = _object(value, "a profile", Profile.__slots__)
    levels = _list(known["levels"], "levels", LEVELS_MAX, _level)
    pipeline = _list(known["pipeline"], "pipeline", STAGES_MAX, _stage)
    if not levels or not pipeline:
        raise ProfileError("a profile has at least one level and one stage")
    return Profile(
        name=_matching(known["name"], "name", _NAME),
        pipeline=pipeline,
        artefacts=_list(
            known["artefacts"], "artefacts", _ARTEFACTS_MAX, lambda digest: _matching(digest, "an artefact", _DIGEST)
        ),
        encode_s_per_gb=_number(known["encode_s_per_gb"], "encode_s_per_gb", 0, _SECONDS_MAX),
        levels=levels,
    )


def _level(value: object) -> Level:
    known = _object(value, "a level", Level.__slots__)
    quality = _object(known["quality"], "quality", None)
    if not 0 < len(quality) <= BUCKETS_MAX:
        raise ProfileError(f"quality is by 1 to {BUCKETS_MAX} buckets")
    return Level(
        ratio=_number(known["ratio"], "ratio", 1 / _RATIO_MAX, _RATIO_MAX),
        decode_s_per_gb=_number(known["decode_s_per_gb"], "decode_s_per_gb", 0, _SECONDS_MAX),
        quality=MappingProxyType({_matching(name, "a bucket", _NAME): _quality(one) for name, one in quality.items()}),
    )


def _quality(value: object) -> Quality:
    known = _object(value, "quality", Quality.__slots__)
    return Quality(
        # A divergence is never negative; its estimate is by the last bit.
        kl_nats=_number(known["kl_nats"], "kl_nats", -1e-3, 1e3),
        standard_error=_number(known["standard_error"], "standard_error", 0, 1e3),
        perplexity_change=_number(known["perplexity_change"], "perplexity_change", -1, 1e9),
        agreement=_number(known["agreement"], "agreement", 0, 1),
        prompts=_integer(known["prompts"], "prompts", 1, 1 << 32),
    )


def _stage(value: object) -> StageSpec:
    known = _object(value, "a stage", None)
    _matching(known.get("stage"), "stage", _NAME)
    return MappingProxyType(known)


def _object(value: object, what: str, names: tuple[str, ...] | None) -> dict[str, Any]:
    """A JSON object; with `names`, one that has exactly these fields."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ProfileError(f"{what} must be a JSON object")
    for name in names or ():
        if name not in value:
            raise ProfileError(f"{what} has no {name!r}")
    unknown = [] if names is None else [name for name in value if name not in names]
    if unknown:
        raise ProfileError(f"{what} has an unknown field {unknown[0][:_STRING_MAX]!r}")
    return value


def _list(value: object, what: str, count: int, parse: Callable[[object], T]) -> tuple[T, ...]:
    if not isinstance(value, list) or len(value) > count:
        raise ProfileError(f"{what} must be a list of at most {count}")
    return tuple(parse(one) for one in value)


def _string(value: object, what: str) -> str:
    if not isinstance(value, str) or not value or len(value) > _STRING_MAX:
        raise ProfileError(f"{what} must be a text of 1 to {_STRING_MAX} characters")
    return value


def _matching(value: object, what: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ProfileError(f"{what} must match {pattern.pattern}, not {str(value)[:_STRING_MAX]!r}")
    return value


def _number(value: object, what: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ProfileError(f"{what} must be a number from {low:g} to {high:g}")
    return float(value)


def _integer(value: object, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProfileError(f"{what} must be an integer from {low} to {high}")
    return value


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
