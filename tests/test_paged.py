"""Planes of a chunk to and from an engine's paged cache, whatever its layout."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from kvstore.codecs import decode, encode, named_pipeline
from kvstore.connectors.guard import Guard
from kvstore.connectors.paged import (
    PackedPages,
    Pages,
    TiledPages,
    check_chunk_tokens,
    derived,
    empty_planes,
    gather_layer,
    is_exact,
    packed_pages,
    probe_orders,
    scatter,
    strided_pages,
)
from kvstore.errors import ConfigError, PipelineError
from kvstore.header import Behind
from kvstore.keys import chunk_keys
from kvstore.layout import Layout, PlaneSpec, attention_layout
from tests.vllm_stub import pack

BLOCKS, TOKENS, HEADS, DIM, LAYERS = 12, 4, 2, 8, 3
LAYOUT = attention_layout("m", "r", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, chunk_tokens=16)
LATENT = Layout("m", "r", {"latent": PlaneSpec("bfloat16", (LAYERS, 16, 1, DIM))}, 16)
CHUNK_BLOCKS = [7, 2, 11, 5]


def _joined(order: str) -> Callable[[], Pages]:
    """Pages of `[blocks, heads, tokens, 2 * dim]` whose memory lies in the order of the letters; L is the layer."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": 2 * DIM}

    def make() -> Pages:
        whole = torch.zeros([sizes[axis] for axis in order], dtype=torch.bfloat16)
        logical = whole.permute([order.index(axis) for axis in "LBHNC"])
        return strided_pages(list(logical), blocks=BLOCKS, heads=HEADS, dim=DIM)

    return make


def _split(shape: tuple[int, ...]) -> Callable[[], Pages]:
    def make() -> Pages:
        layers = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]
        return strided_pages(layers, blocks=BLOCKS, heads=HEADS, dim=DIM)

    return make


def cpu_write(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor, slots: torch.Tensor) -> None:
    """An engine's operation that packs pages in an order of its own."""
    blocks, heads, tokens, _ = layer.shape
    pack(keys, values, *layer.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2), slots)


def _packed() -> Pages:
    layers = [torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM), dtype=torch.bfloat16) for _ in range(LAYERS)]
    return packed_pages(layers, probe_orders(cpu_write, layers[0].shape, torch.bfloat16))


def _shuffled() -> Pages:
    """An order without any structure."""
    layers = [torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM), dtype=torch.bfloat16) for _ in range(LAYERS)]
    places = torch.randperm(TOKENS * 2 * DIM, generator=torch.Generator().manual_seed(1)).reshape(2, TOKENS, DIM)
    return packed_pages(layers, {"k": places[0], "v": places[1]})


def _amx() -> Pages:
    """The order of processors with matrix units: pairs of dimensions of K, pairs of tokens of V."""
    token, dim = torch.arange(TOKENS)[:, None], torch.arange(DIM)
    keys = dim % 2 + 2 * token + 2 * TOKENS * (dim // 2)
    values = token % 2 + 2 * dim + 2 * DIM * (token // 2) + TOKENS * DIM
    layers = [torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM), dtype=torch.bfloat16) for _ in range(LAYERS)]
    return packed_pages(layers, {"k": keys, "v": values})


PAGES: Mapping[str, Callable[[], Pages]] = {
    **{order: _joined(order) for order in ("LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")},
    "NHD": _split((2, BLOCKS, TOKENS, HEADS, DIM)),
    "HND": _split((2, BLOCKS, HEADS, TOKENS, DIM)),
    "blocks first": _split((BLOCKS, 2, TOKENS, HEADS, DIM)),
    "packed": _packed,
    "shuffled": _shuffled,
    "matrix units": _amx,
}


def _planes(layout: Layout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(spec.shape, generator=generator).bfloat16() for name, spec in layout.planes.items()}


def _gather(pages: Pages, layout: Layout) -> dict[str, torch.Tensor]:
    planes = empty_planes(layout)
    for layer in range(pages.layers):
        gather_layer(pages, layer, torch.tensor(CHUNK_BLOCKS), planes)
    return planes


@pytest.mark.parametrize("reader", PAGES)
@pytest.mark.parametrize("writer", PAGES)
def test_what_one_layout_holds_another_reads(writer: str, reader: str) -> None:
    planes = _planes(LAYOUT)
    first, second = PAGES[writer](), PAGES[reader]()
    scatter(first, torch.tensor(CHUNK_BLOCKS), planes)
    key = chunk_keys(LAYOUT, range(16))[0]
    frame = encode(_gather(first, LAYOUT), LAYOUT, named_pipeline("raw"), key=key)
    scatter(second, torch.tensor(CHUNK_BLOCKS), decode(frame, LAYOUT, key=key))
    found = _gather(second, LAYOUT)
    assert all(torch.equal(found[name], planes[name]) for name in planes)


@pytest.mark.parametrize("shape", [(BLOCKS, 1, TOKENS, DIM), (BLOCKS, TOKENS, DIM)], ids=["four axes", "three axes"])
def test_latent_planes_are_read_and_written(shape: tuple[int, ...]) -> None:
    layers = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]
    pages = strided_pages(layers, blocks=BLOCKS, heads=1, dim=DIM)
    planes = _planes(LATENT)
    scatter(pages, torch.tensor(CHUNK_BLOCKS), planes)
    assert torch.equal(_gather(pages, LATENT)["latent"], planes["latent"])


@pytest.mark.parametrize("name", PAGES)
def test_only_the_blocks_asked_for_are_written(name: str) -> None:
    pages, planes = PAGES[name](), _planes(LAYOUT)
    scatter(pages, torch.tensor(CHUNK_BLOCKS[1:3]), planes, first_block=1)
    found = _gather(pages, LAYOUT)
    for plane, tensor in found.items():
        assert torch.equal(tensor[:, TOKENS : 3 * TOKENS], planes[plane][:, TOKENS : 3 * TOKENS])
        assert not tensor[:, :TOKENS].any()
        assert not tensor[:, 3 * TOKENS :].any()
    others = torch.tensor([block for block in range(BLOCKS) if block not in CHUNK_BLOCKS[1:3]])
    assert not any(x.any() for layer in range(LAYERS) for x in pages.read(layer, others).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probing_finds_what_the_engine_wrote(dtype: torch.dtype) -> None:
    layers = [torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM), dtype=dtype) for _ in range(LAYERS)]
    pages = packed_pages(layers, probe_orders(cpu_write, layers[0].shape, dtype))
    keys, values = torch.randn((2, TOKENS, HEADS, DIM)).to(dtype)
    cpu_write(keys, values, layers[1], torch.arange(3 * TOKENS, 4 * TOKENS))
    found = pages.read(1, torch.tensor([3]))
    assert torch.equal(found["k"], keys)
    assert torch.equal(found["v"], values)


def _scaled(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor, slots: torch.Tensor) -> None:
    cpu_write(keys * 2, values, layer, slots)


def _half(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor, slots: torch.Tensor) -> None:
    cpu_write(keys, torch.zeros_like(values), layer, slots)


def _by_head(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor, slots: torch.Tensor) -> None:
    keys = keys.clone()
    keys[:, 1] = keys[:, 1].flip(1)
    cpu_write(keys, values, layer, slots)


def test_tiles_are_found_where_there_are_some() -> None:
    assert isinstance(_packed(), TiledPages)
    assert isinstance(_amx(), TiledPages)
    assert isinstance(_shuffled(), PackedPages)


@pytest.mark.parametrize("write", [_scaled, _half, _by_head])
def test_an_operation_that_does_more_than_move_is_refused(write: Any) -> None:
    with pytest.raises(PipelineError, match="cache-write operation"):
        probe_orders(write, (BLOCKS, HEADS, TOKENS, 2 * DIM), torch.bfloat16)


def test_unknown_and_ambiguous_shapes_are_refused() -> None:
    with pytest.raises(PipelineError, match="no layout that is known"):
        strided_pages([torch.zeros((3, 3, 3, 3))], blocks=BLOCKS, heads=HEADS, dim=DIM)
    with pytest.raises(PipelineError, match="NHD or HND"):
        strided_pages([torch.zeros((2, BLOCKS, HEADS, HEADS, DIM))], blocks=BLOCKS, heads=HEADS, dim=DIM)


def test_a_derived_frame_says_what_it_stands_on_and_decodes_alike() -> None:
    key = chunk_keys(LAYOUT, range(16))[0]
    planes = _planes(LAYOUT)
    frame = encode(planes, LAYOUT, named_pipeline("raw"), key=key)
    assert is_exact(frame)
    marked = derived(frame, Behind(0, 0.5))
    marked.verify(key)
    assert marked.head.header.behind == Behind(0, 0.5)
    assert not is_exact(marked)
    assert torch.equal(decode(marked, LAYOUT, key=key)["k"], planes["k"])


def test_a_lossy_frame_is_not_exact() -> None:
    key = chunk_keys(LAYOUT, range(16))[0]
    assert not is_exact(encode(_planes(LAYOUT), LAYOUT, named_pipeline("ladder-packed"), key=key))


def test_a_chunk_ends_where_a_block_ends() -> None:
    check_chunk_tokens(256, 32)
    with pytest.raises(ConfigError, match="set chunk_tokens to 288"):
        check_chunk_tokens(260, 32)


def test_the_guard_compares_fetching_with_computing() -> None:
    guard = Guard(bytes_per_s=1e6, latency_s=0.01, floor_s=0.0)
    assert guard.worth(1, 10**9), "nothing is known of the prefill yet"
    guard.prefill_tokens_per_s = 1000.0
    assert guard.worth(1000, 900_000)
    assert not guard.worth(1000, 1_000_000)


def test_the_guard_learns_from_slow_fetches_and_tries_again() -> None:
    guard = Guard(bytes_per_s=1e9, explore=3, floor_s=0.0)
    guard.prefill_tokens_per_s = 1000.0
    assert guard.worth(1000, 10**6)
    for _ in range(20):
        guard.observe_fetch(10**6, 30.0)
    assert [guard.worth(1000, 10**6) for _ in range(5)] == [False, False, False, True, False]
    for _ in range(20):
        guard.observe_fetch(10**6, 0.001)
    assert guard.worth(1000, 10**6)


def test_cheap_fetches_pass_the_guard() -> None:
    guard = Guard(bytes_per_s=1e9, floor_s=0.005)
    guard.prefill_tokens_per_s = 1e9
    assert guard.worth(8, 10**6)
    assert not guard.worth(8, 10**7)
