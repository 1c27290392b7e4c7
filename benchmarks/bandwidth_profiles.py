"""The profiles of the bandwidth sweep: what they give and cost is measured here, what they lose was measured before."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.bandwidth_cache import LargeCache
from benchmarks.harness import Row
from kvstore import __version__
from kvstore.codecs import NAMED, Context, Planes, build_pipeline, decode, encode
from kvstore.frame import Frame
from kvstore.header import StageSpec
from kvstore.keys import chunk_keys
from kvstore.layout import Layout
from kvstore.profile import Level, Profile, ProfileSet, Quality
from kvstore.profile_sets import DEFAULT, read_set

LOSSLESS: Mapping[str, Sequence[StageSpec]] = {"raw": NAMED["raw"], "splitzip": NAMED["splitzip"]}
"""Their loss is none by construction."""
LOSSY = ("p02-fp8", "p06-step")
"""Of the set that ships with kvstore: no entropy coder (on a CPU it is slower than any link here), no stage that knows
the prompt's token ids."""
_REPEATS = 3
_SOURCES = 8


class Static(NamedTuple):
    """A profile and a level that are always fetched.

    Args:
        name: As plans call it.
        profile: Name of the profile.
        level: Level to fetch up to; None for all.
        loss_nats: What it loses on prompts of this length.
    """

    name: str
    profile: str
    level: int | None
    loss_nats: float


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds for a GB of exact cache: to encode it, and to decode each level of it."""

    encode_s_per_gb: float
    decode_s_per_gb: tuple[float, ...]


def measured_set(cache: LargeCache, seed: int) -> tuple[ProfileSet, list[Row]]:
    """The set of the sweep, measured on the large cache; and rows that say what it is.

    Ratios, and times of encoding and decoding, are of this machine and this cache. Losses of lossy
    levels are those of the set that ships with kvstore.
    """
    shipped = read_set(Path(DEFAULT))
    by_name = {profile.name: profile for profile in shipped.profiles}
    buckets = by_name[LOSSY[0]].levels[0].quality
    nothing = {name: Quality(0.0, 0.0, 0.0, 1.0, one.prompts) for name, one in buckets.items()}
    asked: dict[str, tuple[Sequence[StageSpec], list[Mapping[str, Quality]]]]
    asked = {name: (spec, [nothing]) for name, spec in LOSSLESS.items()}
    asked |= {name: (by_name[name].pipeline, [one.quality for one in by_name[name].levels]) for name in LOSSY}
    profiles, rows = [], []
    for name, (spec, quality) in asked.items():
        pipeline = build_pipeline(spec)
        frames, speeds = _timed(cache.planes, cache.layout, spec)
        ratios, sources = _ratios(frames, cache.layout), _source_ratios(cache, spec)
        levels = [Level(*found) for found in zip(ratios, speeds.decode_s_per_gb, quality, strict=True)]
        profiles.append(Profile(name, pipeline.spec, (), speeds.encode_s_per_gb, tuple(levels)))
        rows += [
            {
                "table": "profiles",
                "profile": name,
                "level": number,
                "ratio": level.ratio,
                "ratio_source": source,
                "encode_s_per_gb": speeds.encode_s_per_gb,
                "decode_s_per_gb": level.decode_s_per_gb,
                "kl_nats": max(one.kl_nats for one in level.quality.values()),
            }
            for number, (level, source) in enumerate(zip(levels, sources, strict=True))
        ]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    measured = replace(shipped.measured, model=cache.layout.model, date=date, kvstore=__version__, seed=seed)
    return ProfileSet(measured, tuple(profiles)), rows


def with_speeds(found: ProfileSet, speeds: Mapping[str, Speeds]) -> ProfileSet:
    """A set as it would be where coding takes other times."""
    profiles = []
    for profile in found.profiles:
        own = speeds[profile.name]
        pairs = zip(profile.levels, own.decode_s_per_gb, strict=True)
        levels = tuple(replace(level, decode_s_per_gb=decode_s) for level, decode_s in pairs)
        profiles.append(replace(profile, encode_s_per_gb=own.encode_s_per_gb, levels=levels))
    return replace(found, profiles=tuple(profiles))


def statics(found: ProfileSet, losses: Callable[[Profile], Sequence[float]], budget_nats: float) -> Iterator[Static]:
    """Every level of every profile that is within the budget."""
    for profile in found.profiles:
        last = len(profile.levels) - 1
        for level, loss_nats in enumerate(losses(profile)):
            if loss_nats <= budget_nats:
                name = profile.name if not last else f"{profile.name}/{level}"
                yield Static(name, profile.name, None if level == last else level, loss_nats)


def _timed(planes: Planes, layout: Layout, spec: Sequence[StageSpec]) -> tuple[list[Frame], Speeds]:
    """Frames of all chunks, and median times: of encoding one, and of decoding all."""
    pipeline = build_pipeline(spec)
    chunks = planes["k"].shape[1] // layout.chunk_tokens
    keys = chunk_keys(layout, range(chunks * layout.chunk_tokens))
    gb = layout.chunk_bytes / 1e9
    frames: list[Frame] = []
    encoding: list[float] = []
    for number in [0, *range(chunks)]:
        # The first one warms up.
        first = number * layout.chunk_tokens
        chunk = {name: plane[:, first : first + layout.chunk_tokens] for name, plane in planes.items()}
        context = Context(first_position=first, last=number == chunks - 1)
        started_s = time.perf_counter()
        frames.append(encode(chunk, layout, pipeline, key=keys[number], context=context))
        encoding.append(time.perf_counter() - started_s)
    frames = frames[1:]
    decoding = [
        median(_decoded_s([frame.truncated(level) for frame in frames], layout) for _ in range(_REPEATS))
        for level in range(frames[0].levels)
    ]
    return frames, Speeds(median(encoding[1:]) / gb, tuple(one / (chunks * gb) for one in decoding))


def _decoded_s(frames: Sequence[Frame], layout: Layout) -> float:
    """Time to decode all chunks, side by side as clients do."""
    with ThreadPoolExecutor(len(frames)) as pool:
        started_s = time.perf_counter()
        for made in [pool.submit(decode, frame, layout, key=frame.key) for frame in frames]:
            made.result()
        return time.perf_counter() - started_s


def _ratios(frames: Sequence[Frame], layout: Layout) -> list[float]:
    """By level."""
    raw_bytes = len(frames) * layout.chunk_bytes
    return [raw_bytes / sum(frame.truncated(level).size_bytes for frame in frames) for level in range(frames[0].levels)]


def _source_ratios(cache: LargeCache, spec: Sequence[StageSpec]) -> list[float]:
    """The same of the small caches that the large one was made of."""
    pipeline = build_pipeline(spec)
    layout = cache.source_layout
    keys = chunk_keys(layout, range(layout.chunk_tokens))
    frames = [
        encode(
            {name: plane[:, : layout.chunk_tokens] for name, plane in source.planes.items()},
            layout,
            pipeline,
            key=keys[0],
        )
        for source in cache.sources[:: max(1, len(cache.sources) // _SOURCES)]
    ]
    return _ratios(frames, layout)
