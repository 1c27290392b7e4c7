"""Decoding in place what the gpu tier lends, held against decoding the same frames from host memory."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import zip_longest
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kvstore.backend import Miss
from kvstore.backends.gpu import GpuBackend
from kvstore.codecs.kernels import batch, decoding
from kvstore.codecs.kernels.decode import check_supported
from kvstore.codecs.kernels.launch import run
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.frame import Frame
from kvstore.resident import Resident
from kvstore.testing import make_frame, make_key
from tests.test_kernels import CASES, DEVICE, Chunks, chunks_of

FILLERS = [make_frame(make_key(number), (3000 + 500 * number,)) for number in range(4)]
SMALL = CASES["packed"]._replace(chunks=3)


@asynccontextmanager
async def lent(
    frames: Sequence[Frame], level: int | None = None, budget_bytes: int = 4 << 20
) -> AsyncIterator[list[Resident]]:
    """Frames on lease from a tier in which they lie apart, the last one first, and have moved."""
    backend = await GpuBackend.open(budget_bytes, device=DEVICE)
    for filler, frame in zip_longest(FILLERS, reversed(frames)):
        for one in filter(None, (filler, frame)):
            assert (await backend.put([(one.key, one)]))[0].error is None
    await backend.delete([FILLERS[0].key, FILLERS[1].key])
    async with backend.lease([frame.key for frame in frames], level=level) as found:
        yield [one for one in found if not isinstance(one, Miss)]
    await backend.aclose()


def pages(chunks: Chunks, frames: Sequence[Frame | Resident], level: int | None = None) -> list[torch.Tensor]:
    """The bits of a cache into which frames were decoded."""
    chunks.clear()
    chunks._replace(frames=frames).decode(level)  # type: ignore[arg-type]
    views = [view for views in chunks.cache.planes.values() for view in views]
    bits = {2: torch.int16, 4: torch.int32}
    return [view.contiguous().view(bits[view.element_size()]).clone() for view in views]


def assert_equal(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))
    assert any(bool((one != exact[0].flatten()[0]).any()) for one in exact), "something was decoded"


@pytest.mark.parametrize(
    ("name", "chunks_count", "level", "words_max"),
    [
        ("packed partial", 2, 1, batch.WORDS_MAX),
        ("rans packed", 1, 1, batch.WORDS_MAX),
        # As where they lie further apart than 32 bits reach: fused, and level by level.
        ("rans one layer", 1, 0, 0),
        ("klt joint", 1, 0, 0),
    ],
)
async def test_what_is_decoded_in_place_is_what_host_frames_give(
    name: str, chunks_count: int, level: int | None, words_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = chunks_of(CASES[name]._replace(chunks=chunks_count), monkeypatch)
    exact = pages(chunks, chunks.frames, level)
    seen = set()

    def watch(kernel: Any, grid: Any, arguments: Any, **options: int) -> None:
        if "positions_ptr" in arguments:
            seen.add(arguments["positions_ptr"].dtype)
        run(kernel, grid, arguments, **options)

    monkeypatch.setattr(decoding, "run", watch)
    monkeypatch.setattr(batch, "WORDS_MAX", words_max)
    async with lent(chunks.frames, level) as frames:
        assert check_supported(frames, chunks.layout, chunks.artefacts)
        assert_equal(pages(chunks, frames), exact)
    assert (torch.int64 in seen) == (words_max == 0)


async def test_whole_frames_on_lease_are_decoded_at_a_lower_level(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(SMALL, monkeypatch)
    exact = pages(chunks, chunks.frames, 0)
    async with lent(chunks.frames) as frames:
        assert_equal(pages(chunks, frames, 0), exact)


async def test_chunks_may_lie_in_both_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(SMALL, monkeypatch)
    exact = pages(chunks, chunks.frames)
    async with lent(chunks.frames) as frames:
        assert_equal(pages(chunks, [frames[0], chunks.frames[1], frames[2]]), exact)


@pytest.mark.parametrize(("at", "message"), [(0, "does not start like"), (5, "is no stream of its classes")])
async def test_damage_on_the_device_is_refused_by_name(at: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES["rans few lanes"]._replace(chunks=1), monkeypatch)
    async with lent(chunks.frames, 0) as frames:
        names = [name for level in frames[0].head.header.planes for name in level]
        offset = frames[0].head.segments[names.index("k.0")].offset
        frames[0].payload[offset + at] ^= 0x20
        with pytest.raises(FrameCorruptError, match=f"plane 'k.0' {message}"):
            pages(chunks, frames)


async def test_frames_that_do_not_lie_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(SMALL, monkeypatch)
    async with lent(chunks.frames) as frames:
        alone = Resident(frames[0].head, frames[0].payload.clone())
        with pytest.raises(PipelineError, match="one storage"):
            pages(chunks, [alone, *frames[1:]])
        exact = pages(chunks, frames)
    shifted = torch.cat([torch.zeros(8, dtype=torch.uint8, device=DEVICE), alone.payload])[8:]
    with pytest.raises(PipelineError, match="multiple of 16 bytes"):
        pages(chunks, [Resident(alone.head, shifted), *chunks.frames[1:]])
    assert_equal(pages(chunks, [alone, *chunks.frames[1:]]), exact)
