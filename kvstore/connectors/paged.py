"""Between an engine's paged cache and the planes of a chunk: gather on save, scatter on load, by block ids.

Strides tell most layouts apart, so their pages are views and each block is copied once. An engine that packs a page in
an order of its own is asked for it: `probe_orders` lets the engine's write operation store known values, and finds
where each went. Planes are therefore always the model's true K and V, whatever wrote them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kvstore.codecs.kernels.paged import DTYPES, PagedCache
from kvstore.codecs.stage import TORCH_DTYPES, Planes
from kvstore.errors import ConfigError, PipelineError
from kvstore.frame import Frame, frame_around
from kvstore.header import Behind
from kvstore.layout import Layout

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    dtype: name for name, dtype in TORCH_DTYPES.items() if TORCH_DTYPES[name] in DTYPES
}
"""Names of the types that an engine's cache may have, as layouts spell them."""

KL_UNKNOWN_NATS = 1e9
"""Bound on what a lossy prefix costs, where nobody measured it."""

_DIGIT = 128
"""Base of the known values: every digit is exact in all dtypes of a cache."""

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""An engine's write operation: keys, values `[tokens, heads, dim]`, a layer of its cache, slots `[tokens]` int64."""


class Pages(Protocol):
    """Blocks of an engine's cache as planes `[tokens, heads, dim]`, layer by layer."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        ...

    def read(self, layer: int, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """The planes of blocks, in their order, as new tensors on the cache's device."""
        ...

    def write(self, layer: int, blocks: torch.Tensor, planes: Planes) -> None:
        """Overwrite blocks; the planes lie on the cache's device."""
        ...


@dataclass(frozen=True, eq=False)
class StridedPages:
    """Pages that views describe: every layout whose axes are in another order, and nothing else.

    Args:
        cache: Views of the engine's cache.
    """

    cache: PagedCache

    @property
    def layers(self) -> int:
        return self.cache.layers

    @property
    def block_tokens(self) -> int:
        return self.cache.block_tokens

    @property
    def device(self) -> torch.device:
        return self.cache.device

    def read(self, layer: int, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: views[layer][blocks].flatten(0, 1) for name, views in self.cache.planes.items()}

    def write(self, layer: int, blocks: torch.Tensor, planes: Planes) -> None:
        for name, views in self.cache.planes.items():
            view = views[layer]
            view[blocks] = planes[name].reshape(len(blocks), *view.shape[1:]).to(view.dtype)


@dataclass(frozen=True, eq=False)
class PackedPages:
    """Pages whose elements lie in an order that no strides describe.

    Args:
        pages: `[blocks, heads, elements]` a layer: the page of every block and head.
        orders: `[block_tokens, dim]` int64 by plane: where each element lies in its page. Together they cover a page.
    """

    pages: tuple[torch.Tensor, ...]
    orders: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        found = torch.cat([order.flatten() for order in self.orders.values()]).sort().values
        if not torch.equal(found, torch.arange(self.pages[0].shape[2])):
            raise PipelineError("the orders of the planes do not cover a page once")

    @property
    def layers(self) -> int:
        return len(self.pages)

    @property
    def block_tokens(self) -> int:
        return next(iter(self.orders.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return self.pages[0].device

    def read(self, layer: int, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.pages[layer][blocks]
        planes = {}
        for name, order in self.orders.items():
            plane = found.index_select(2, order.flatten()).reshape(*found.shape[:2], *order.shape)
            planes[name] = plane.transpose(1, 2).flatten(0, 1)
        return planes

    def write(self, layer: int, blocks: torch.Tensor, planes: Planes) -> None:
        pages = self.pages[layer]
        fresh = torch.empty((len(blocks), *pages.shape[1:]), dtype=pages.dtype)
        for name, order in self.orders.items():
            plane = planes[name].to(pages.dtype).reshape(len(blocks), self.block_tokens, pages.shape[1], -1)
            fresh.index_copy_(2, order.flatten(), plane.transpose(1, 2).flatten(2))
        pages[blocks] = fresh


def strided_pages(layers: Sequence[torch.Tensor], *, blocks: int, heads: int, dim: int) -> StridedPages:
    """Pages of an engine's cache, told from the shapes of its layers.

    Known are `[blocks, heads, tokens, 2 * dim]` in any stride order, a K and a V apart or on an axis of their own
    (first or second), heads or tokens first, and one latent plane (`dim` wide, `heads` 1).

    Args:
        layers: One tensor a layer, as the engine holds them.
        blocks: Number of blocks.
        heads: Heads of a layer on this worker; 1 for a latent plane.
        dim: Dimensions of a head, or of the latent.

    Raises:
        PipelineError: The shape is none of these, or could be two of them.
    """
    shape = tuple(layers[0].shape)
    makers: dict[str, tuple[int, Callable[[], PagedCache], tuple[int | None, ...]]] = {
        "joined": (4, lambda: PagedCache.joined(layers), (blocks, heads, None, 2 * dim)),
        "latent": (4, lambda: PagedCache.mla([x.squeeze(1) for x in layers]), (blocks, 1, None, dim)),
        "latent of three axes": (3, lambda: PagedCache.mla(layers), (blocks, None, dim)),
        "NHD": (5, lambda: PagedCache.nhd(layers), (2, blocks, None, heads, dim)),
        "HND": (5, lambda: PagedCache.hnd(layers), (2, blocks, heads, None, dim)),
        "blocks first": (5, lambda: PagedCache.blocks_first(layers), (blocks, 2, None, heads, dim)),
    }
    fits = [
        (name, make)
        for name, (axes, make, wanted) in makers.items()
        if len(shape) == axes and all(want in (None, has) for want, has in zip(wanted, shape, strict=True))
    ]
    if len(fits) != 1:
        names = " or ".join(name for name, _ in fits) or "no layout that is known"
        raise PipelineError(f"a cache layer of {list(shape)} ({blocks} blocks, {heads} heads of {dim}) is {names}")
    return StridedPages(fits[0][1]())


def probe_orders(write: Write, shape: Sequence[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Where an engine's write operation puts the elements of K and V in a page.

    It is given known values in a scratch layer, digit by digit, and must only move them.

    Args:
        write: The engine's operation.
        shape: `[blocks, heads, block_tokens, 2 * dim]` of a layer; the scratch has two blocks.
        dtype: Type of the cache.

    Returns:
        `[block_tokens, dim]` int64 for `k` and `v`.

    Raises:
        PipelineError: The operation does more than move elements, or not alike in every block and head.
    """
    _, heads, tokens, width = shape
    elements = tokens * width
    numbers = torch.arange(elements).reshape(tokens, width)
    found = torch.zeros((2, heads, elements), dtype=torch.int64)
    slots = torch.arange(2 * tokens)
    scale = 1
    while scale < elements:
        digits = (numbers // scale % _DIGIT).to(dtype)[:, None].expand(-1, heads, -1).repeat(2, 1, 1)
        scratch = torch.full((2, heads, tokens, width), -1.0, dtype=dtype)
        write(digits[..., : width // 2].contiguous(), digits[..., width // 2 :].contiguous(), scratch, slots)
        found += scratch.view(2, heads, elements).to(torch.int64) * scale
        scale *= _DIGIT
    if not torch.equal(found[0, 0].sort().values, torch.arange(elements)) or bool((found != found[0, 0]).any()):
        raise PipelineError("the engine's cache-write operation does not merely move the elements of K and V")
    places = found[0, 0].argsort().reshape(tokens, width)
    return {"k": places[:, : width // 2].contiguous(), "v": places[:, width // 2 :].contiguous()}


def packed_pages(layers: Sequence[torch.Tensor], orders: Mapping[str, torch.Tensor]) -> Pages:
    """Pages of `[blocks, heads, block_tokens, 2 * dim]` layers whose elements lie in the given orders."""
    if not all(layer[0].is_contiguous() for layer in layers):
        raise PipelineError("a page with an order of its own must be contiguous")
    tiles = {name: _tile(order) for name, order in orders.items()}
    if all(tile is not None for tile in tiles.values()):
        views = {name: tuple(_tiled(x, tile) for x in layers) for name, tile in tiles.items() if tile is not None}
        return TiledPages(views)
    return PackedPages(tuple(layer.flatten(2) for layer in layers), orders)


@dataclass(frozen=True, eq=False)
class TiledPages:
    """Pages whose tokens and dimensions lie in tiles, as processors with matrix units want them.

    Args:
        planes: `[blocks, tokens / a, a, heads, dim / b, b]` views by plane name, one a layer. They are copied about ten
            times as fast as an order that is looked up element by element.
    """

    planes: Mapping[str, tuple[torch.Tensor, ...]]

    @property
    def layers(self) -> int:
        return len(self._views)

    @property
    def block_tokens(self) -> int:
        return self._views[0].shape[1] * self._views[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self._views[0].device

    def read(self, layer: int, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        planes = {}
        for name, views in self.planes.items():
            view = views[layer]
            found = torch.empty((len(blocks), *view.shape[1:]), dtype=view.dtype)
            for number, block in enumerate(blocks.tolist()):
                found[number].copy_(view[block])
            planes[name] = found.reshape(len(blocks) * self.block_tokens, view.shape[3], -1)
        return planes

    def write(self, layer: int, blocks: torch.Tensor, planes: Planes) -> None:
        for name, views in self.planes.items():
            view = views[layer]
            fresh = planes[name].reshape(len(blocks), *view.shape[1:])
            for number, block in enumerate(blocks.tolist()):
                view[block].copy_(fresh[number])

    @property
    def _views(self) -> tuple[torch.Tensor, ...]:
        return next(iter(self.planes.values()))


_Tile = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset of a page's first element, lengths `[tokens / a, a, dim / b, b]`, and their strides."""


def _tile(order: torch.Tensor) -> _Tile | None:
    """The tiles that an order consists of; None where it does not."""
    lengths: list[int] = []
    strides: list[int] = []
    for line in (order[:, 0], order[0]):
        steps = line.diff().tolist() or [1]
        inner = next((number + 1 for number, step in enumerate(steps) if step != steps[0]), len(line))
        if len(line) % inner:
            return None
        lengths += [len(line) // inner, inner]
        strides += [int(line[inner] - line[0]) if inner < len(line) else 0, steps[0]]
    places = torch.zeros((), dtype=torch.int64)
    for length, stride in zip(lengths, strides, strict=True):
        places = places[..., None] + torch.arange(length) * stride
    offset = int(order[0, 0])
    if min(strides) < 0 or not torch.equal(places.reshape(order.shape) + offset, order):
        return None
    return offset, tuple(lengths), tuple(strides)


def _tiled(layer: torch.Tensor, tile: _Tile) -> torch.Tensor:
    offset, (outer, inner, wide, narrow), strides = tile
    blocks, heads = layer.shape[:2]
    return layer.as_strided(
        (blocks, outer, inner, heads, wide, narrow),
        (layer.stride(0), strides[0], strides[1], layer.stride(1), strides[2], strides[3]),
        layer.storage_offset() + offset,
    )


def empty_planes(layout: Layout) -> dict[str, torch.Tensor]:
    """Uninitialised planes of one chunk, on the CPU."""
    return {name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for name, spec in layout.planes.items()}


def gather_layer(pages: Pages, layer: int, blocks: torch.Tensor, out: Planes) -> None:
    """Copy one layer of a chunk's blocks into its planes `[layers, tokens, heads, dim]`."""
    for name, plane in pages.read(layer, blocks).items():
        out[name][layer].copy_(plane)


def scatter(pages: Pages, blocks: torch.Tensor, planes: Planes, *, first_block: int = 0) -> None:
    """Write a chunk's planes into blocks.

    Args:
        pages: The engine's cache.
        blocks: Block ids; as many blocks of the chunk are written.
        planes: `[layers, tokens, heads, dim]` each.
        first_block: The chunk's block that the first of them holds.
    """
    start = first_block * pages.block_tokens
    end = start + len(blocks) * pages.block_tokens
    for layer in range(pages.layers):
        pages.write(layer, blocks, {name: plane[layer, start:end].to(pages.device) for name, plane in planes.items()})


def is_exact(frame: Frame) -> bool:
    """Whether a frame holds every bit of what its key promises."""
    return not frame.head.header.distortion and frame.head.header.behind is None and frame.whole


def derived(frame: Frame, behind: Behind) -> Frame:
    """The same frame, marked as computed behind a lossy prefix; nothing is encoded again."""
    counts = iter(frame.head.segments)
    lengths = [[next(counts).length for _ in range(count)] for count in frame.head.header.segment_counts()]
    return frame_around(replace(frame.head.header, behind=behind), frame.payload, lengths)


def check_chunk_tokens(chunk_tokens: int, block_tokens: int) -> None:
    """Refuse chunks that do not end where a block ends.

    Raises:
        ConfigError: They do not.
    """
    if chunk_tokens % block_tokens:
        nearest = -(-chunk_tokens // block_tokens) * block_tokens
        raise ConfigError(
            f"chunk_tokens is {chunk_tokens}, which is no multiple of the engine's block of {block_tokens} tokens: "
            f"set chunk_tokens to {nearest}, or the engine's block size to a divisor of {chunk_tokens}"
        )
