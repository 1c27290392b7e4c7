"""Zstandard frames of a plane's bytes, if asked for with those of equal significance brought together first.

The size of what comes out is always the caller's: a frame says how long its content is, and that is only compared.
"""

import torch
import zstandard


def bound_bytes(size: int) -> int:
    """Most bytes that a frame of `size` bytes can take (zstd's `ZSTD_COMPRESSBOUND`)."""
    return size + (size >> 8) + (max((128 << 10) - size, 0) >> 11)


def shuffle(data: torch.Tensor, item_bytes: int) -> torch.Tensor:
    """All first bytes of the elements, then all second ones, ...: `[bytes]` uint8."""
    return data.view(-1, item_bytes).T.flatten()


def unshuffle(data: torch.Tensor, item_bytes: int) -> torch.Tensor:
    """Undo `shuffle`."""
    return data.view(item_bytes, -1).T.flatten()


def compress(data: torch.Tensor, level: int) -> torch.Tensor:
    """`[bytes]` uint8 to the `[bytes]` uint8 of one frame that says its size."""
    found = zstandard.ZstdCompressor(level=level).compress(data.numpy().data)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def content_bytes(data: torch.Tensor) -> int:
    """Size of the content that a frame claims, -1 where it claims none.

    Raises:
        zstandard.ZstdError: It is not a frame.
    """
    head = data[:32].numpy().tobytes()
    return int(zstandard.frame_content_size(head))


def decompress(data: torch.Tensor, size: int) -> torch.Tensor:
    """Content of one frame that claims `size` bytes: `[size]` uint8.

    Raises:
        zstandard.ZstdError: The frame is damaged, or something follows it.
    """
    found = zstandard.ZstdDecompressor().decompress(
        data.numpy().data, max_output_size=size, read_across_frames=False, allow_extra_data=False
    )
    # `torch.frombuffer` refuses to make nothing of nothing.
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)
