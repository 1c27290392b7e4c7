"""Decoding as it will be done on a device, to be timed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from kvstore.frame import Frame
from kvstore.layout import Layout
from kvstore.profiler.prompts import decode_chunks

_BLOCK_TOKENS = 16


class Decoder(Protocol):
    """Makes frames ready to be decoded again and again."""

    def ready(
        self, frames: Sequence[Frame], artefacts: Mapping[str, bytes], token_ids: Sequence[int]
    ) -> Callable[[], object]:
        """What decodes the frames of a prompt once, and returns when the planes are there."""
        ...


class CpuDecoder:
    """Into host memory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def ready(
        self, frames: Sequence[Frame], artefacts: Mapping[str, bytes], token_ids: Sequence[int]
    ) -> Callable[[], object]:
        def run() -> None:
            for _ in decode_chunks(frames, self._layout, artefacts, token_ids):
                pass

        return run


class GpuDecoder:
    """Into the blocks of a paged cache on a GPU: by kernels where they know the pipeline, else over host memory."""

    def __init__(self, layout: Layout, device: str) -> None:
        self._layout = layout
        self._device = device

    def ready(
        self, frames: Sequence[Frame], artefacts: Mapping[str, bytes], token_ids: Sequence[int]
    ) -> Callable[[], object]:
        from kvstore.codecs.kernels.decode import check_supported, decode_into_pages
        from kvstore.codecs.kernels.paged import PagedCache

        if not check_supported(frames, self._layout, artefacts):
            return self._over_host(frames, artefacts, token_ids)
        tokens = self._layout.chunk_tokens
        _, _, heads, dim = self._layout.planes["k"].shape
        shape = (2, len(frames) * tokens // _BLOCK_TOKENS, _BLOCK_TOKENS, heads, dim)
        cache = PagedCache.nhd(
            [torch.empty(shape, dtype=torch.bfloat16, device=self._device) for _ in range(self._layout.layers)]
        )
        slots = torch.arange(len(frames) * tokens).view(len(frames), tokens)
        known = [list(token_ids[: (number + 1) * tokens]) for number in range(len(frames))]

        def run() -> None:
            decode_into_pages(
                frames, self._layout, artefacts, cache, slots, keys=[f.key for f in frames], token_ids=known
            )
            torch.cuda.synchronize()

        return run

    def _over_host(
        self, frames: Sequence[Frame], artefacts: Mapping[str, bytes], token_ids: Sequence[int]
    ) -> Callable[[], object]:
        def run() -> None:
            for planes in decode_chunks(frames, self._layout, artefacts, token_ids):
                for x in planes.values():
                    x.to(self._device)
            torch.cuda.synchronize()

        return run


def decoder_for(device: str, layout: Layout) -> Decoder:
    """The decoder of a device, `cpu` or `cuda`."""
    return CpuDecoder(layout) if device == "cpu" else GpuDecoder(layout, device)
