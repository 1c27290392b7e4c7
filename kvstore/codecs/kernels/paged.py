"""A paged KV cache as an engine holds it: blocks of tokens in one tensor a layer, described by strides.

Every layout that engines use is the same four axes in another order, so a plane of a layer is a view
`[blocks, block_tokens, heads, dim]` here, and nothing is ever copied to get it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from kvstore.errors import PipelineError
from kvstore.layout import Layout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PAGE_AXES = 4


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Views of a cache, one for every plane and layer, all alike.

    Args:
        planes: `[blocks, block_tokens, heads, dim]` views by plane name, one a layer; bfloat16, float16 or float32.

    Raises:
        PipelineError: The views are not alike, or of another dtype.
    """

    planes: Mapping[str, tuple[torch.Tensor, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "planes", MappingProxyType({name: tuple(x) for name, x in self.planes.items()}))
        views = self._views()
        if not views or any(len(x) != self.layers for x in self.planes.values()):
            raise PipelineError("a paged cache needs the same number of layers, one or more, in every plane")
        first = views[0]
        if first.dim() != _PAGE_AXES or first.dtype not in DTYPES:
            raise PipelineError(f"a paged cache of {first.dtype}{list(first.shape)} is not one that kernels write")
        for view in views:
            alike = view.shape == first.shape and view.stride() == first.stride() and view.dtype == first.dtype
            if not alike or view.device != first.device:
                raise PipelineError("all planes and layers of a paged cache must have one shape, stride, dtype, device")

    @classmethod
    def nhd(cls, layers: Sequence[torch.Tensor]) -> "PagedCache":
        """From `[2, blocks, block_tokens, heads, dim]` a layer, K first."""
        return cls(_pair(layers, 0))

    @classmethod
    def nhd_pair(cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> "PagedCache":
        """From `[blocks, block_tokens, heads, dim]` a layer, K and V apart."""
        return cls({"k": tuple(keys), "v": tuple(values)})

    @classmethod
    def hnd(cls, layers: Sequence[torch.Tensor]) -> "PagedCache":
        """From `[2, blocks, heads, block_tokens, dim]` a layer, K first."""
        return cls({name: tuple(x.transpose(1, 2) for x in views) for name, views in _pair(layers, 0).items()})

    @classmethod
    def hnd_pair(cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> "PagedCache":
        """From `[blocks, heads, block_tokens, dim]` a layer, K and V apart."""
        return cls.nhd_pair([x.transpose(1, 2) for x in keys], [x.transpose(1, 2) for x in values])

    @classmethod
    def blocks_first(cls, layers: Sequence[torch.Tensor]) -> "PagedCache":
        """From `[blocks, 2, block_tokens, heads, dim]` a layer."""
        return cls(_pair(layers, 1))

    @classmethod
    def joined(cls, layers: Sequence[torch.Tensor]) -> "PagedCache":
        """From `[blocks, heads, block_tokens, 2 * dim]` a layer: a token's K and behind it its V."""
        dim = layers[0].shape[-1] // 2
        return cls.hnd_pair([x[..., :dim] for x in layers], [x[..., dim:] for x in layers])

    @classmethod
    def mla(cls, layers: Sequence[torch.Tensor], name: str = "latent") -> "PagedCache":
        """From `[blocks, block_tokens, latent_dim]` a layer."""
        return cls({name: tuple(x.unsqueeze(2) for x in layers)})

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(next(iter(self.planes.values()), ()))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self._views()[0].dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._views()[0].device

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self._views()[0].shape[1]

    @property
    def slots(self) -> int:
        """Tokens that it has room for."""
        return self._views()[0].shape[0] * self.block_tokens

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Elements from one block, token, head and dimension to the next."""
        block, token, head, dim = self._views()[0].stride()
        return block, token, head, dim

    def places(self, names: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Where the views begin, seen from the first plane's first layer.

        Returns:
            `[planes * layers]` int64 in the order of the names, and the number of elements that they count by: 16
            bytes where all are aligned to that.
        """
        first = self.planes[names[0]][0]
        found = torch.tensor([x.data_ptr() for name in names for x in self.planes[name]], dtype=torch.int64)
        found -= first.data_ptr()
        wide = 16 // first.element_size()
        unit = 1 if bool((found % 16).any()) else wide
        return found // (unit * first.element_size()), unit

    def check_layout(self, layout: Layout) -> None:
        """Compare with a layout; the cache's dtype may be another one.

        Raises:
            PipelineError: Planes, layers, heads or dimensions differ.
        """
        if self.planes.keys() != layout.planes.keys() or self.layers != layout.layers:
            raise PipelineError(
                f"the paged cache has {self.layers} layers of {sorted(self.planes)}, "
                f"the layout {layout.layers} of {sorted(layout.planes)}"
            )
        for name, spec in layout.planes.items():
            heads, dim = self.planes[name][0].shape[2:]
            if (heads, dim) != spec.shape[2:]:
                raise PipelineError(f"plane {name!r} of the paged cache has {heads} heads of {dim}, not {spec.shape}")

    def check_slots(self, slots: torch.Tensor, chunks: int, tokens: int) -> None:
        """Refuse slots that are not in the cache; negative ones stand for tokens that are not wanted.

        Args:
            slots: `[chunks, tokens]` int64 on the CPU: `block * block_tokens + offset`.
            chunks: Number of chunks.
            tokens: Tokens of a chunk.

        Raises:
            PipelineError: A slot is outside of the cache, or the tensor has another shape or dtype.
        """
        if slots.dtype != torch.int64 or tuple(slots.shape) != (chunks, tokens):
            raise PipelineError(f"slots are {slots.dtype}{list(slots.shape)}, not int64[{chunks}, {tokens}]")
        if slots.numel() and int(slots.max()) >= self.slots:
            raise PipelineError(f"slot {int(slots.max())} is outside of a paged cache of {self.slots} slots")

    def _views(self) -> list[torch.Tensor]:
        return [view for views in self.planes.values() for view in views]


def _pair(layers: Sequence[torch.Tensor], axis: int) -> dict[str, tuple[torch.Tensor, ...]]:
    for layer in layers:
        if layer.dim() != _PAGE_AXES + 1 or layer.shape[axis] != len(("k", "v")):
            raise PipelineError(f"axis {axis} of a layer of {list(layer.shape)} does not hold K and V")
    return {name: tuple(x.select(axis, n) for x in layers) for n, name in enumerate(("k", "v"))}
