"""The part of `codec_speed` that needs a GPU: decode kernels against a device copy and an unfused torch pipeline."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.codec_speed import GPU_AIMS, Run, synthetic_planes
from benchmarks.harness import Aim, Row, at_least
from kvstore.codecs import build_pipeline, encode, named_pipeline
from kvstore.codecs.artefact import load_artefact
from kvstore.codecs.kernels.batch import collect
from kvstore.codecs.kernels.decode import decode_into_pages
from kvstore.codecs.kernels.decoding import Decoding
from kvstore.codecs.kernels.paged import PagedCache
from kvstore.codecs.kernels.recipe import Recipe
from kvstore.codecs.named import NAMED, ladder_klt
from kvstore.codecs.ref.hadamard import rotation
from kvstore.frame import Frame
from kvstore.keys import chunk_keys
from kvstore.layout import Layout

_DEVICE = "cuda"
_BLOCK_TOKENS = 16
_DISTINCT = 4
_WARM_UPS = 3
_UNFUSED_CHUNKS_MAX = 8


class Profile(NamedTuple):
    """Chunks of one pipeline, to be decoded again and again."""

    name: str
    recipe: Recipe
    frames: list[Frame]


def gpu_rows(run: Run, artefacts: dict[str, bytes], seed: int) -> tuple[list[Row], list[Aim]]:
    """Rows for every profile, level and batch size, and the aims on them."""
    layout = run.layout
    rows: list[Row] = []
    for name in ("packed", "rans", "klt"):
        profile = _profile(name, layout, artefacts, seed)
        for chunks in run.chunks:
            frames = [profile.frames[n % len(profile.frames)] for n in range(chunks)]
            cache, slots = _cache(layout, chunks, seed)
            for level in range(frames[0].levels):
                held = [frame.truncated(level) for frame in frames]
                rows.append(_measure(profile, held, layout, artefacts, cache, slots, run.gpu_rounds))
                print(rows[-1])
            del cache
    return rows, _aims(rows, max(run.chunks))


def _profile(name: str, layout: Layout, artefacts: dict[str, bytes], seed: int) -> Profile:
    digest = next(iter(artefacts))
    pipeline = {
        "packed": lambda: named_pipeline("ladder-packed"),
        "rans": lambda: build_pipeline(NAMED["ladder"]),
        "klt": lambda: build_pipeline(ladder_klt(digest), artefacts),
    }[name]()
    key = chunk_keys(layout, range(layout.chunk_tokens))[0]
    basis = load_artefact(artefacts[digest]) if name == "klt" else None
    frames = []
    for number in range(_DISTINCT):
        planes = synthetic_planes(layout, basis, seed + number)
        frames.append(encode(planes, layout, pipeline, key=key))
    return Profile(name, Recipe.of(pipeline, layout), frames)


def _cache(layout: Layout, chunks: int, seed: int) -> tuple[PagedCache, torch.Tensor]:
    """A cache with room for all chunks, whose blocks are in no order."""
    _, tokens, heads, dim = layout.planes["k"].shape
    blocks = -(-chunks * tokens // _BLOCK_TOKENS)
    shape = (2, blocks, _BLOCK_TOKENS, heads, dim)
    layers = [torch.full(shape, torch.nan, dtype=torch.bfloat16, device=_DEVICE) for _ in range(layout.layers)]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    slots = (order[:, None] * _BLOCK_TOKENS + torch.arange(_BLOCK_TOKENS)).flatten()[: chunks * tokens]
    return PagedCache.nhd(layers), slots.view(chunks, tokens)


def _measure(
    profile: Profile,
    frames: list[Frame],
    layout: Layout,
    artefacts: dict[str, bytes],
    cache: PagedCache,
    slots: torch.Tensor,
    rounds: int,
) -> Row:
    decoding = Decoding(collect(frames, profile.recipe, pinned=True), profile.recipe, cache, slots)
    decoding.run()
    written_bytes = len(frames) * layout.chunk_bytes
    source = torch.randn(written_bytes // 2, dtype=torch.bfloat16, device=_DEVICE)
    target = torch.empty_like(source)
    kernels = _events(decoding.launch, decoding.reset, rounds)
    copied = _events(lambda: target.copy_(source), lambda: None, rounds)
    keys = [frame.key for frame in frames]

    def whole() -> None:
        decode_into_pages(frames, layout, artefacts, cache, slots, keys=keys)

    row: Row = {
        "table": "gpu",
        "profile": profile.name,
        "chunks": len(frames),
        "level": frames[0].levels - 1,
        "coded_bytes": sum(frame.size_bytes for frame in frames),
        "kernels_gb_per_s": written_bytes / median(kernels) / 1e9,
        "end_to_end_gb_per_s": written_bytes / median(_clock(whole, rounds)) / 1e9,
        # A copy's own speed counts what it writes, like ours; it reads as much again.
        "copy_gb_per_s": written_bytes / median(copied) / 1e9,
        "samples": rounds,
    }
    row["of_copy"] = row["kernels_gb_per_s"] / row["copy_gb_per_s"]
    if profile.name == "packed":
        some = min(len(frames), _UNFUSED_CHUNKS_MAX)
        unfused = Unfused(frames[:some], profile.recipe, cache, slots[:some])
        taken = median(_events(unfused.run, lambda: None, max(3, rounds // 3)))
        row["unfused_gb_per_s"] = some * layout.chunk_bytes / taken / 1e9
    return row


def _events(work: Callable[[], object], before: Callable[[], object], rounds: int) -> list[float]:
    """Seconds on the device."""
    taken = []
    for number in range(-_WARM_UPS, rounds):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if number >= 0:
            taken.append(start.elapsed_time(end) / 1e3)
    return taken


def _clock(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds on the host, until the device is done."""
    taken = []
    for number in range(-_WARM_UPS, rounds):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number >= 0:
            taken.append(time.perf_counter() - start_s)
    return taken


class Unfused:
    """`ladder-packed` in plain torch on the device, an operation at a time, all inputs there already."""

    def __init__(self, frames: list[Frame], recipe: Recipe, cache: PagedCache, slots: torch.Tensor) -> None:
        self._batch = collect(frames, recipe, pinned=False)
        self._recipe, self._cache = recipe, cache
        self._slots = slots.to(_DEVICE)
        assert recipe.step is not None
        assert recipe.hadamard is not None
        self._step = 3.0 ** (recipe.step.levels - self._batch.held)
        self._matrix = rotation(recipe.dim, recipe.hadamard.seed).T.contiguous().to(_DEVICE)
        self._powers = torch.tensor([1, 3, 9, 27, 81], device=_DEVICE, dtype=torch.int32)
        self._coded = [{name: x.to(_DEVICE) for name, x in part.coded.items()} for part in self._batch.segments]

    def run(self) -> None:
        """Decode everything into the cache."""
        for segment, coded in zip(self._batch.segments, self._coded, strict=True):
            name, layers = segment.name, segment.layers
            tokens, heads, dim = self._recipe.layout.chunk_tokens, self._recipe.heads, self._recipe.dim
            shape = (layers, tokens, heads, dim)
            index = torch.zeros(layers * tokens * heads * dim, dtype=torch.int32, device=_DEVICE)
            for level in range(self._batch.held):
                packed = coded[f"{name}.{level}"].int()
                digits = (packed[:, None] // self._powers % 3).flatten()[: index.numel()]
                index = 3 * index + digits
            centre = coded[f"{name}.{self._batch.held - 1}.centroids"].view(torch.float16).float()
            table = torch.cat([-centre.flip(0), centre.new_zeros(1), centre])
            scale = coded[f"{name}.scale"].view(torch.bfloat16).float().view(*shape[:3], 1)
            x = table[index].view(shape) * (scale * self._step)
            x = x @ self._matrix
            x = x + coded[f"{name}.mean"].view(torch.bfloat16).float().view(layers, 1, heads, dim)
            slots = self._slots[segment.chunk]
            for layer in range(layers):
                view = self._cache.planes[name][segment.start + layer]
                view[slots // _BLOCK_TOKENS, slots % _BLOCK_TOKENS] = x[layer].to(view.dtype)


def _aims(rows: Sequence[Row], chunks: int) -> list[Aim]:
    """At the finest level, where there is most to do; the largest batch."""
    finest = {row["profile"]: row for row in rows if row["chunks"] == chunks}
    values = [finest[name]["kernels_gb_per_s"] for name in ("packed", "rans", "klt")]
    values.append(finest["packed"]["kernels_gb_per_s"] / finest["packed"]["unfused_gb_per_s"])
    return [at_least(aim, target, value) for (aim, target), value in zip(GPU_AIMS, values, strict=True)]
