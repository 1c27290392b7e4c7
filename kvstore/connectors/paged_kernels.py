"""Chunks decoded straight into an engine's cache on a GPU, by the codecs' fused kernels.

It stands beside decoding into planes and copying them (`paged.scatter`), which does what kernels do not: other
pipelines, caches that no strides describe, and machines without triton.
"""

from collections.abc import Mapping, Sequence

import torch

from kvstore.connectors.paged import Pages, StridedPages
from kvstore.errors import ConfigError, PipelineError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.layout import Layout


class KernelDecoder:
    """Decodes chunks of one layout into one cache.

    Args:
        pages: The engine's cache.
        layout: The caller's layout.
        artefacts: Calibration artefacts by digest.

    Raises:
        ConfigError: The cache is not on a device that kernels reach.
        ImportError: There is no triton.
        PipelineError: The cache does not fit the layout.
    """

    def __init__(self, pages: StridedPages, layout: Layout, artefacts: Mapping[str, bytes]) -> None:
        # Triton is no part of the connectors' requirements.
        from kvstore.codecs.kernels import decode
        from kvstore.codecs.kernels.fused import step_tile_kernel
        from kvstore.codecs.kernels.launch import require_device

        require_device(step_tile_kernel, pages.device)
        pages.cache.check_layout(layout)
        self._kernels = decode
        self._cache = pages.cache
        self._layout = layout
        self._artefacts = artefacts

    def takes(self, frame: Frame) -> bool:
        """Whether kernels decode this frame."""
        return self._kernels.check_supported([frame], self._layout, self._artefacts)

    def decode(
        self, frame: Frame, key: ChunkKey, blocks: Sequence[int], first_block: int, token_ids: Sequence[int]
    ) -> None:
        """Decode a chunk, and wait until it lies in its blocks.

        Args:
            frame: A verified frame.
            key: The key that the caller asked for.
            blocks: Block ids; as many blocks of the chunk are written.
            first_block: The chunk's block that the first of them holds.
            token_ids: Token ids up to the chunk's last one.

        Raises:
            FrameError: As `decode_into_pages`; what the blocks hold is undefined then.
            PipelineError: As `decode_into_pages`.
        """
        block_tokens = self._cache.block_tokens
        slots = torch.full((1, self._layout.chunk_tokens), -1)
        start = first_block * block_tokens
        places = torch.tensor(blocks)[:, None] * block_tokens + torch.arange(block_tokens)
        slots[0, start : start + places.numel()] = places.flatten()
        self._kernels.decode_into_pages(
            [frame], self._layout, self._artefacts, self._cache, slots, keys=[key], token_ids=[token_ids]
        )
        if self._cache.device.type == "cuda":
            torch.cuda.current_stream(self._cache.device).synchronize()


def kernel_decoder(pages: Pages, layout: Layout, artefacts: Mapping[str, bytes]) -> KernelDecoder | None:
    """A decoder for an engine's cache; None where kernels cannot write it."""
    if not isinstance(pages, StridedPages):
        return None
    try:
        return KernelDecoder(pages, layout, artefacts)
    except (ConfigError, ImportError, PipelineError):
        return None
