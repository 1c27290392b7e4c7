"""A frame whose payload lies in the memory of a device: what a tier there lends, and kernels decode in place.

It stands beside `Frame` so that backends may lend it and codecs take it without knowing each other. The payload has no
type here because a storage node has no torch.
"""

from dataclasses import dataclass
from typing import Any

from kvstore.frame import Head
from kvstore.keys import ChunkKey


@dataclass(frozen=True, eq=False)
class Resident:
    """A frame with its head in host memory and its payload on a device.

    Args:
        head: Prefix, header and segment table; always whole.
        payload: One-dimensional `torch.Tensor`, uint8, of the held levels, one behind the other; it is only lent, and
            nobody writes to it. Payloads that are decoded together are views of one storage.
    """

    head: Head
    payload: Any

    @property
    def key(self) -> ChunkKey:
        """Key that the header names."""
        return self.head.header.key

    @property
    def levels(self) -> int:
        """Number of levels that are held."""
        return self.head.held_levels(len(self.payload))

    @property
    def size_bytes(self) -> int:
        """Bytes of the frame as it is sent or kept."""
        return len(self.head.raw) + len(self.payload)

    def truncated(self, level: int | None) -> "Resident":
        """The frame with levels 0 to `level` only (None: all that are held); nothing is copied."""
        if level is None or level + 1 >= self.levels:
            return self
        return Resident(self.head, self.payload[: sum(self.head.level_bytes[: level + 1])])
