"""Frames that lie on the device already: decoded in place, with a copy of the little that the host must read.

That little are the classes of vectors, the steps, coarse means and the table in front of every stream of lanes, about
four in a hundred of the bytes. It comes in two copies, one that says how long the tables are and one with them, and
goes to its place in a mirror of the payloads in host memory; so the host parses and refuses what it would parse and
refuse of any frame. The rest of the mirror is never touched, and untouched pages cost nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvstore.codecs.fast.nested import Array
from kvstore.codecs.kernels.batch import HEADER_BYTES, LANE_BYTES, Batch, batch_around, held_levels
from kvstore.codecs.kernels.recipe import Recipe
from kvstore.errors import PipelineError
from kvstore.frame import ALIGNMENT, Frame, padded_bytes
from kvstore.resident import Resident

_LOG_LANES_MAX = 12
_UNIT = 8
"""Bytes that are copied as one; segments begin at multiples of it and are padded to it."""


def collect_lent(frames: Sequence[Resident], recipe: Recipe, device: torch.device) -> Batch:
    """Find the segments of frames in the memory in which they lie.

    Raises:
        FrameCorruptError: A frame's planes are not those of its pipeline, or a length in them is wrong.
        PipelineError: The frames hold different numbers of levels, or do not lie together on this device.
    """
    held_levels(frames)
    payload, bases = _around([frame.payload for frame in frames], device)
    sizes = np.array([len(frame.payload) for frame in frames], np.int64)
    mirror = np.zeros(int(sizes.sum()), np.uint8)
    places = sizes.cumsum() - sizes
    parsed = [_mirrored(frame, mirror, int(at)) for frame, at in zip(frames, places, strict=True)]
    whole, tables = _read_by_host(recipe)
    copies = _Copies(payload, mirror)
    headers = []
    for frame, base, at in zip(parsed, bases, places, strict=True):
        for segment, (_, _, name, _) in zip(frame.head.segments, frame.segments(), strict=False):
            place = (base + segment.offset, int(at) + segment.offset)
            if name in whole:
                copies.add(*place, segment.length)
            elif name in tables and segment.length >= HEADER_BYTES:
                copies.add(*place, HEADER_BYTES)
                headers.append((*place, segment.length))
    copies.run()
    for source, at, length in headers:
        copies.add(source, at, min(_table_bytes(mirror[at : at + HEADER_BYTES]), length))
    copies.run()
    return batch_around(payload, parsed, bases, recipe)


def _around(payloads: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """The run of memory in which all payloads lie, and where each of them begins in it."""
    first = payloads[0]
    for payload in payloads:
        together = payload.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not together or payload.device != device or payload.dtype != torch.uint8 or not payload.is_contiguous():
            raise PipelineError("frames that are decoded in place must be bytes of one storage on the cache's device")
        if payload.data_ptr() % ALIGNMENT:
            raise PipelineError(f"frames that are decoded in place must begin at a multiple of {ALIGNMENT} bytes")
    starts = [int(payload.storage_offset()) for payload in payloads]
    low = min(starts)
    high = max(start + len(payload) for start, payload in zip(starts, payloads, strict=True))
    return first.as_strided((high - low,), (1,), low), [start - low for start in starts]


def _mirrored(frame: Resident, mirror: Array, at: int) -> Frame:
    """The frame as it would lie in host memory."""
    levels = []
    for size_bytes in frame.head.level_bytes[: frame.levels]:
        levels.append(memoryview(mirror[at : at + size_bytes].data))
        at += size_bytes
    return Frame(frame.head, tuple(levels))


def _read_by_host(recipe: Recipe) -> tuple[set[str], set[str]]:
    """Names of the coded planes of which the host reads all, and of those of which it reads the table of lanes."""
    whole: set[str] = set()
    tables: set[str] = set()
    if recipe.nested:
        whole.add("token.scale")
        for name in recipe.coded:
            whole |= {f"{name}.class", f"{name}.step"}
            tables |= {f"{name}.{level}" for level in range(recipe.packed_from or recipe.nested.levels)}
    if recipe.mean and recipe.mean.coarse:
        whole |= {f"{name}.{side}" for name in recipe.layout.planes for side in ("mean", "mean_step")}
    return whole, tables


def _table_bytes(header: Array) -> int:
    """Length of a stream's table from its first bytes, or of nothing more where they are damaged."""
    logarithm = int(header[0]) + int(header[1])
    return HEADER_BYTES + (LANE_BYTES << logarithm if logarithm <= _LOG_LANES_MAX else 0)


class _Copies:
    """Many short runs of bytes to be copied from the device as one.

    Args:
        payload: Where they come from.
        mirror: Where they go.
    """

    def __init__(self, payload: torch.Tensor, mirror: Array) -> None:
        self._source = payload.view(torch.int64)
        self._target = mirror.view(np.int64)
        self._runs: list[tuple[int, int, int]] = []

    def add(self, source: int, target: int, size_bytes: int) -> None:
        """Take down a run: where it is, where it goes, and its length in bytes."""
        self._runs.append((source // _UNIT, target // _UNIT, padded_bytes(size_bytes) // _UNIT))

    def run(self) -> None:
        """Copy all runs that were taken down."""
        if not self._runs:
            return
        sources, targets, counts = np.array(self._runs, np.int64).T
        self._runs.clear()
        inner = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        wanted = torch.from_numpy(np.repeat(sources, counts) + inner).to(self._source.device)
        self._target[np.repeat(targets, counts) + inner] = self._source[wanted].cpu().numpy()
