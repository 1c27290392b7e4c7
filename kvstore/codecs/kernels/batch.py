"""Frames of a batch of chunks on their way to the device: bytes in one piece, and where everything lies in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore.codecs.coding import _check_identity, _coded_parts, _named
from kvstore.codecs.fast.nested import STATE_MIN, Array
from kvstore.codecs.kernels.recipe import Matrices, Recipe, value_unit
from kvstore.codecs.lanes import Lanes, parse_lanes
from kvstore.codecs.nested import total_offset
from kvstore.codecs.pipeline import Pipeline, build_pipeline
from kvstore.codecs.rans import _unpack_integers
from kvstore.codecs.ref.nested import step_size
from kvstore.codecs.stage import Planes, Specs
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.layout import Layout
from kvstore.resident import Resident

HEADER_BYTES = 4
LANE_BYTES = 6
"""What stands in front of the words of a stream of lanes; see `lanes.py`."""

Chunk = Frame | Resident
"""A frame that is to be decoded, in host memory or on the device."""

WORDS_MAX = 1 << 31
"""Words of a payload up to which their positions are 32-bit integers."""


@dataclass(eq=False)
class Stream:
    """A coded level of a segment: its lanes, or packed digits where there are none."""

    name: str
    byte: int
    lanes: Lanes | None = None
    first_lane: int = 0


@dataclass(eq=False)
class Segment:
    """A coded plane of a layer group of a chunk.

    Args:
        name: The coded plane.
        planes: The planes that it holds.
        chunk: Number of the chunk in the batch.
        start: First layer.
        layers: Number of layers.
        coded: Bytes of the coded planes of the group.
        at: Where they begin in the payload.
        classes: `[coded layers, 1, blocks, n]` int32 of the stage `nested`.
        offset: `[coded layers * tokens * blocks]` int8.
        scale: `[coded layers, tokens]` int8.
        unit: `[layers, heads]` float32.
        streams: One a held level.
    """

    name: str
    planes: tuple[str, ...]
    chunk: int
    start: int
    layers: int
    coded: Planes
    at: Mapping[str, int]
    classes: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    offset: Array = field(default_factory=lambda: np.zeros(0, np.int8))
    scale: Array = field(default_factory=lambda: np.zeros(0, np.int8))
    unit: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    streams: list[Stream] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """All segments, and the bytes of all frames.

    Args:
        payload: uint8, in memory from which a device copies at full speed where there is one.
        segments: K of all chunks first, then V.
        groups: Layers of every layer group.
        held: Levels that are decoded.
        positions: First position of every chunk.
    """

    payload: torch.Tensor
    segments: list[Segment]
    groups: tuple[int, ...]
    held: int
    positions: list[int]


def pipeline_of(
    frames: Sequence[Chunk], layout: Layout, keys: Sequence[ChunkKey], artefacts: Mapping[str, bytes] | None
) -> Pipeline:
    """The one pipeline of all frames.

    Raises:
        LayoutMismatchError: A frame belongs to another key or layout.
        PipelineError: The frames were not made alike, or a stage or artefact is not here.
        FrameCorruptError: A stage names an artefact that the header does not have.
    """
    if not frames or len(frames) != len(keys):
        raise PipelineError(f"{len(keys)} keys do not name {len(frames)} frames, one or more")
    first = frames[0].head.header
    for frame, key in zip(frames, keys, strict=True):
        _check_identity(frame.head.header, layout, key)
        header = frame.head.header
        if (header.pipeline, header.artefacts, header.groups) != (first.pipeline, first.artefacts, first.groups):
            raise PipelineError("the frames of a batch must be of one pipeline, artefact and layer grouping")
    missing = [digest for digest in first.artefacts if digest not in (artefacts or {})]
    if missing:
        raise PipelineError(f"decoding needs the calibration artefact {missing[0]}, which is not here")
    return build_pipeline(_named(first.pipeline, first.artefacts), artefacts)


def collect(frames: Sequence[Frame], recipe: Recipe, *, pinned: bool) -> Batch:
    """Put the payloads of frames into one buffer, and find the segments in it.

    Raises:
        FrameCorruptError: A frame's planes are not those of its pipeline, or a length in them is wrong.
        PipelineError: The frames hold different numbers of levels.
    """
    held_levels(frames)
    sizes = [sum(len(level) for level in frame.payload) for frame in frames]
    payload = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    view = memoryview(payload.numpy().data)
    bases = []
    at = 0
    for frame in frames:
        bases.append(at)
        for level in frame.payload:
            view[at : at + len(level)] = level
            at += len(level)
    return batch_around(payload, frames, bases, recipe)


def held_levels(frames: Sequence[Chunk]) -> int:
    """Number of levels that all frames hold.

    Raises:
        PipelineError: They hold different numbers of levels.
    """
    held = frames[0].levels
    if any(frame.levels != held for frame in frames):
        raise PipelineError("the frames of a batch hold different numbers of levels; name a level that all hold")
    return held


def batch_around(payload: torch.Tensor, frames: Sequence[Frame], bases: Sequence[int], recipe: Recipe) -> Batch:
    """A batch whose payload lies in its final place already.

    Args:
        payload: What kernels read.
        frames: Frames whose payload the host can read; only what it does read needs to be there.
        bases: Where the payload of each frame begins in `payload`.
        recipe: How they are decoded.

    Raises:
        FrameCorruptError: A frame's planes are not those of its pipeline, or a length in them is wrong.
    """
    segments: list[Segment] = []
    for chunk, (frame, base) in enumerate(zip(frames, bases, strict=True)):
        segments += _segments_of(frame, chunk, base, recipe)
    # All tiles of K first, for a tile is of one plane; chunks of a layer together, for they share its basis.
    segments.sort(key=lambda segment: (segment.name != "k", segment.start))
    groups, positions = frames[0].head.header.groups, [frame.head.header.first_position for frame in frames]
    return Batch(payload, segments, groups, frames[0].levels, positions)


def _segments_of(frame: Frame, chunk: int, base: int, recipe: Recipe) -> Iterator[Segment]:
    parts = _coded_parts(frame, recipe.pipeline, recipe.layout)
    places: list[dict[str, int]] = [{} for _ in parts]
    for segment, (_, group, name, _) in zip(frame.head.segments, frame.segments(), strict=False):
        places[group][name] = base + segment.offset
    start = 0
    for layers, coded, at in zip(frame.head.header.groups, parts, places, strict=True):
        for name, planes in recipe.coded.items():
            yield Segment(name, planes, chunk, start, layers, coded, at)
        start += layers


def read_nested(batch: Batch, recipe: Recipe, matrices: Matrices) -> None:
    """Read what is small on the host: classes of vectors, steps of tokens, and the tables of the lanes.

    Raises:
        FrameCorruptError: One of them is damaged.
    """
    groups: dict[int, tuple[Specs, Planes]] = {}
    sides: dict[tuple[int, int, str], torch.Tensor] = {}
    first_lane = 0
    for segment in batch.segments:
        if segment.start not in groups:
            groups[segment.start] = recipe.coder_input(segment.layers, segment.start)
        specs, known = groups[segment.start]
        planes = {f".{segment.name}.class": known[f".{segment.name}.class"]}
        for side in (f"{segment.name}.class", "token.scale"):
            if side in specs:
                place = (segment.chunk, segment.start, side)
                if place not in sides:
                    sides[place] = _unpack_integers(side, segment.coded[side], specs[side])
                planes[side] = sides[place]
        _read_segment(segment, planes, recipe, matrices, batch.held)
        first_lane = _read_streams(segment, recipe, batch.held, first_lane)


def _read_segment(segment: Segment, planes: Planes, recipe: Recipe, matrices: Matrices, held: int) -> None:
    """Classes, scales and units of a segment."""
    segment.classes = planes[f".{segment.name}.class"]
    tokens = recipe.layout.chunk_tokens
    coded_layers = len(segment.classes)
    segment.offset = total_offset(segment.name, planes).to(torch.int8).flatten().numpy()
    scale = planes.get("token.scale", torch.zeros(1, tokens, 1, 1, dtype=torch.int8))
    segment.scale = scale.expand(coded_layers, tokens, 1, 1).contiguous().flatten().numpy()
    nested = recipe.nested
    assert nested is not None
    step = torch.tensor(step_size(nested._step(segment.name)))
    if f"{segment.name}.step" in segment.coded:
        step = segment.coded[f"{segment.name}.step"].view(torch.bfloat16).float().view(segment.layers, recipe.heads)
    matrix = matrices.scale[segment.name][segment.start : segment.start + segment.layers, None]
    unit = step * (matrix * value_unit(recipe, held))
    segment.unit = unit.expand(segment.layers, recipe.heads).contiguous().numpy()


def _read_streams(segment: Segment, recipe: Recipe, held: int, first_lane: int) -> int:
    """The coded levels of a segment; returns the number of the next lane."""
    for level in range(held):
        name = f"{segment.name}.{level}"
        stream = Stream(name, segment.at[name], first_lane=first_lane)
        if not recipe.packed_from or level < recipe.packed_from:
            stream.lanes, _ = parse_lanes("rans", name, segment.coded[name])
            first_lane += len(stream.lanes.states)
        segment.streams.append(stream)
    return first_lane


def coarse_means(batch: Batch, recipe: Recipe) -> tuple[Array, dict[tuple[int, int, str], int]]:
    """Means that frames hold as small integers: values, and where those of a chunk, first layer and plane begin.

    Raises:
        FrameCorruptError: They are no stream of small integers.
    """
    values: list[Array] = []
    places: dict[tuple[int, int, str], int] = {}
    at = 0
    for segment in batch.segments:
        specs, _ = recipe.coder_input(segment.layers, segment.start)
        for plane in segment.planes:
            name = f"{plane}.mean"
            coded = segment.coded[name]
            whole = _unpack_integers(name, coded, specs[name]) if recipe.nested else coded.view(torch.int8)
            step = segment.coded[f"{plane}.mean_step"].view(torch.bfloat16).float()
            values.append((whole.view(len(step), -1).float() * step[:, None]).flatten().numpy())
            places[segment.chunk, segment.start, plane] = at
            at += len(values[-1])
    return np.concatenate(values), places


@dataclass(eq=False)
class LaneTable:
    """State, position and end of every lane of a batch; positions count 16-bit words of the payload.

    They are 64-bit integers where the payload is longer than 4 GiB: that of frames decoded in place reaches from the
    first of them to the last.
    """

    states: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "LaneTable":
        """As the frames say."""
        states, ends, starts = [], [], []
        position = np.int32 if len(batch.payload) // 2 < WORDS_MAX else np.int64
        for segment in batch.segments:
            for stream in segment.streams:
                if stream.lanes is None:
                    continue
                lengths = stream.lanes.lengths
                word = (stream.byte + HEADER_BYTES + LANE_BYTES * len(lengths)) // 2
                end = word + lengths.astype(np.int64).cumsum()
                states.append(stream.lanes.states.view("<i4"))
                ends.append(end)
                starts.append(end - lengths)
        return cls(
            torch.from_numpy(np.concatenate(states)).to(device),
            torch.from_numpy(np.concatenate(starts).astype(position)).to(device),
            torch.from_numpy(np.concatenate(ends).astype(position)).to(device),
        )

    def check(self, batch: Batch) -> None:
        """Compare where the lanes ended with where their coders began; the one wait for the device.

        Raises:
            FrameCorruptError: A stream is not one of its classes.
        """
        bad = (self.states != STATE_MIN) | (self.positions != self.ends)
        if not bool(bad.any()):
            return
        lane = int(bad.nonzero()[0])
        streams = [stream for segment in batch.segments for stream in segment.streams if stream.lanes is not None]
        name = next(stream.name for stream in reversed(streams) if stream.first_lane <= lane)
        raise FrameCorruptError(f"stage 'rans': plane {name!r} is no stream of its classes")
