"""Decode frames straight into the pages of an engine's cache.

Frames are parsed and checked on the host, as `kvstore.codecs.decode` does it; their payload goes to the device as one
copy, and kernels do the rest: entropy or packed digits, centroids, inverse transform, weights, means, rotary
embedding, scatter. Pipelines of Hadamard rotations take one kernel, calibrated bases two. The classes of vectors and
the steps of tokens (`k.class`, `token.scale`: three in a hundred of the bytes) are read on the host. What a tier on the
device lends (`kvstore.resident`) is decoded where it lies.
"""

from collections.abc import Mapping, Sequence

import torch

from kvstore.codecs.kernels.batch import Chunk, collect, pipeline_of
from kvstore.codecs.kernels.decoding import Decoding
from kvstore.codecs.kernels.fused import step_tile_kernel
from kvstore.codecs.kernels.launch import require_device
from kvstore.codecs.kernels.lent import collect_lent
from kvstore.codecs.kernels.paged import PagedCache
from kvstore.codecs.kernels.recipe import Recipe
from kvstore.errors import PipelineError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.layout import Layout
from kvstore.resident import Resident

PAYLOAD_BYTES_MAX = 1 << 31
"""Bytes of a batch: positions of words are 32-bit integers."""
CHUNK_BYTES_MAX = 1 << 31
"""Uncompressed bytes of a batch: pipelines of two kernels take up to three times as much scratch on the device."""


def decode_into_pages(
    frames: Sequence[Chunk],
    layout: Layout,
    artefacts: Mapping[str, bytes] | None,
    cache: PagedCache,
    slots: torch.Tensor,
    *,
    keys: Sequence[ChunkKey],
    token_ids: Sequence[Sequence[int]] | None = None,
    level: int | None = None,
) -> None:
    """Decode chunks into a paged cache.

    Nothing outside of the slots is written, whatever a frame holds; what the slots hold after an error is undefined.

    Args:
        frames: Verified frames, all of one pipeline; small batches decode less than their share of a large one.
            Those on the device must lie in one storage and stay there until this returns and the device is done.
        layout: The caller's layout.
        artefacts: Calibration artefacts by digest.
        cache: Where to write, on the device that shall decode.
        slots: `[chunks, tokens]` int64 on the CPU, `block * block_tokens + offset`; a negative one skips its token.
        keys: The keys that the caller asked for.
        token_ids: For every chunk the token ids of its prompt up to its last one, where the pipeline predicts from
            them.
        level: Decode levels 0 to this one; all that are held by default.

    Raises:
        LayoutMismatchError: A frame belongs to another key or layout.
        FrameCorruptError: A frame is damaged; the message names stage and plane.
        PipelineError: Kernels do not decode the pipeline, an artefact is missing, the cache does not fit the layout,
            or a slot is outside of it.
        ConfigError: The cache is on a CPU, and triton's interpreter is off.
    """
    require_device(step_tile_kernel, cache.device)
    recipe = Recipe.of(pipeline_of(frames, layout, keys, artefacts), layout)
    cache.check_layout(layout)
    cache.check_slots(slots, len(frames), layout.chunk_tokens)
    if token_ids is not None and len(token_ids) != len(frames):
        raise PipelineError(f"{len(frames)} chunks need as many lists of token ids, not {len(token_ids)}")
    frames = [frame.truncated(level) for frame in frames]
    start = 0
    for end in _batch_ends(frames, max(1, CHUNK_BYTES_MAX // layout.chunk_bytes)):
        ids = None if token_ids is None else token_ids[start:end]
        prepare(frames[start:end], recipe, cache, slots[start:end], ids).run()
        start = end


def _batch_ends(frames: Sequence[Chunk], chunks_max: int) -> list[int]:
    """Where to cut, so that no batch is too large, a frame alone is never, and none is of two kinds."""
    ends, start, total = [], 0, 0
    for number, frame in enumerate(frames):
        too_large = total + frame.size_bytes > PAYLOAD_BYTES_MAX or number - start >= chunks_max
        if number > start and (too_large or type(frame) is not type(frames[start])):
            ends.append(number)
            start, total = number, 0
        total += frame.size_bytes
    return [*ends, len(frames)]


def prepare(
    frames: Sequence[Chunk],
    recipe: Recipe,
    cache: PagedCache,
    slots: torch.Tensor,
    token_ids: Sequence[Sequence[int]] | None = None,
) -> Decoding:
    """Parse frames and bring all that kernels need to the device.

    Raises:
        FrameCorruptError: A length in a frame is wrong.
        PipelineError: The frames hold different levels, or a basis or token ids are missing.
    """
    lent = [frame for frame in frames if isinstance(frame, Resident)]
    here = [frame for frame in frames if isinstance(frame, Frame)]
    if lent and here:
        raise PipelineError("the frames of a batch lie either all in host memory or all on the device")
    device = cache.device
    batch = collect_lent(lent, recipe, device) if lent else collect(here, recipe, pinned=device.type == "cuda")
    return Decoding(batch, recipe, cache, slots, token_ids)


def check_supported(frames: Sequence[Chunk], layout: Layout, artefacts: Mapping[str, bytes] | None) -> bool:
    """Whether kernels decode these frames, so that a caller can choose before it has a cache."""
    try:
        Recipe.of(pipeline_of(frames, layout, [frame.key for frame in frames], artefacts), layout)
    except PipelineError:
        return False
    return True
