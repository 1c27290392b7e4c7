"""Loads through the fused kernels write what decoding and copying write: under triton's interpreter or on a GPU."""

import dataclasses
import time
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kvstore.codecs import Context, build_pipeline, encode
from kvstore.codecs.named import NAMED
from kvstore.connectors.background import Background
from kvstore.connectors.paged import packed_pages, strided_pages
from kvstore.connectors.paged_kernels import KernelDecoder, kernel_decoder
from kvstore.connectors.vllm_options import Options
from kvstore.connectors.vllm_plan import Counters, Load, pack_tokens
from kvstore.connectors.vllm_worker import WorkerSide
from kvstore.frame import Frame
from kvstore.keys import ChunkKey, chunk_keys
from kvstore.layout import Rope, attention_layout
from tests.test_kernels import DEVICE

BLOCK, CHUNK, BLOCKS, HEADS, DIM = 4, 8, 16, 2, 32
LAYOUT = attention_layout("m", "r", layers=2, kv_heads=HEADS, head_dim=DIM, chunk_tokens=CHUNK, rope=Rope(1e4, DIM))
IDS = [7 * number % 97 for number in range(4 * CHUNK)]


class Held:
    """A backend that answers a get from a dictionary."""

    name = "held"

    def __init__(self, frames: dict[ChunkKey, Frame]) -> None:
        self.frames = frames

    async def get(self, keys: Any, *, level: int | None = None) -> list[Frame]:
        return [self.frames[key].truncated(level) for key in keys]


def frames(pipeline: str) -> dict[ChunkKey, Frame]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, key in enumerate(chunk_keys(LAYOUT, IDS)):
        planes = {name: torch.randn(spec.shape, generator=generator).bfloat16() for name, spec in LAYOUT.planes.items()}
        context = Context(first_position=number * CHUNK, token_ids=IDS[: (number + 1) * CHUNK])
        found[key] = encode(planes, LAYOUT, build_pipeline(NAMED[pipeline]), key=key, context=context)
    return found


def cache() -> list[torch.Tensor]:
    shape = (BLOCKS, HEADS, BLOCK, 2 * DIM)
    return [torch.full(shape, -3.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(LAYOUT.layers)]


def load(pipeline: str, *, by_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], int]:
    """A cache into which a run of three chunks was loaded, without its first and last block; and kernels' chunks."""
    held, layers, counters = frames(pipeline), cache(), Counters()
    background = Background("test")
    options = Options(url="x", pipeline=pipeline, deadline_s=60.0)
    worker = WorkerSide(options, LAYOUT, 0, Held(held), background, counters)  # type: ignore[arg-type]
    decoded: list[Any] = []
    original = KernelDecoder.decode

    def watch(self: KernelDecoder, *args: Any) -> None:
        decoded.append(args)
        original(self, *args)

    monkeypatch.setattr(KernelDecoder, "decode", watch)
    if not by_kernels:
        monkeypatch.setattr(KernelDecoder, "takes", lambda self, frame: False)
    worker.attach(strided_pages(layers, blocks=BLOCKS, heads=HEADS, dim=DIM))
    keys = chunk_keys(LAYOUT, IDS)[1:]
    token_ids = pack_tokens(IDS, CHUNK, len(IDS))
    worker.start_loads([Load("a", 1, (tuple(keys),), (9, 3, 12, 5, 2, 7), token_ids, skip=1, end=5)])
    while not worker.finished():
        time.sleep(0.001)
    assert not worker.take_invalid()
    assert counters.take()["loaded_tokens"] == 4 * BLOCK
    worker.close()
    background.close(1.0)
    monkeypatch.undo()
    return layers, len(decoded)


def test_kernels_write_what_copying_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, by_kernels = load("ladder-packed", by_kernels=True, monkeypatch=monkeypatch)
    copied, by_copying = load("ladder-packed", by_kernels=False, monkeypatch=monkeypatch)
    assert (by_kernels, by_copying) == (3, 0)
    written = [block for block in range(BLOCKS) if bool((fused[0][block] != -3.0).any())]
    assert written == [2, 3, 5, 12], "blocks that are held already, and those behind the end, are not touched"
    for one, other in zip(fused, copied, strict=True):
        # The interpreter truncates where torch rounds: one unit in the last place of bfloat16.
        assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=2**-9)


def test_what_kernels_do_not_know_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, by_kernels = load("raw", by_kernels=True, monkeypatch=monkeypatch)
    assert by_kernels == 0
    assert bool((layers[1][5] != -3.0).all())


def test_caches_that_kernels_cannot_write_have_no_decoder() -> None:
    layers = cache()
    order = torch.arange(BLOCK * DIM).reshape(BLOCK, DIM)
    packed = packed_pages([layer.cpu() for layer in layers], {"k": order, "v": order + BLOCK * DIM})
    assert kernel_decoder(packed, LAYOUT, {}) is None
    pages = strided_pages(layers, blocks=BLOCKS, heads=HEADS, dim=DIM)
    other = dataclasses.replace(LAYOUT, planes={"k": LAYOUT.planes["k"]})
    assert kernel_decoder(pages, other, {}) is None
