"""Code: every plane as a Zstandard frame."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import zstandard

from kvstore.codecs.options import require_bool, require_int
from kvstore.codecs.raw import Raw
from kvstore.codecs.ref.zstd import bound_bytes, compress, content_bytes, decompress, shuffle, unshuffle
from kvstore.codecs.stage import Planes, Specs, is_context
from kvstore.errors import FrameCorruptError
from kvstore.layout import ITEM_BYTES, PlaneSpec

_LEVEL_MAX = 19


@dataclass(frozen=True, slots=True)
class Zstd:
    """Turns every plane into at most `bound_bytes` bytes, `[bytes]` uint8, without changing a bit.

    Args:
        level: Effort, 1 to 19.
        shuffle: Whether the bytes of elements are transposed first, so that exponents stand beside exponents.
    """

    level: int = 3
    shuffle: bool = False
    name: ClassVar[str] = "zstd"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int(self.name, "level", self.level, 1, _LEVEL_MAX)
        require_bool(self.name, "shuffle", self.shuffle)

    def infer(self, specs: Specs) -> Specs:
        return {
            name: spec
            if is_context(name)
            else PlaneSpec("uint8", (bound_bytes(spec.size_bytes),), spec.level, at_most=True)
            for name, spec in specs.items()
        }

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        data = Raw().encode({name: x for name, x in planes.items() if not is_context(name)}, specs)
        return {
            name: compress(shuffle(x, ITEM_BYTES[specs[name].dtype]) if self.shuffle else x, self.level)
            for name, x in data.items()
        }

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return Raw().decode({name: self._bytes(name, planes[name], like[name]) for name in like}, like)

    def _bytes(self, name: str, data: torch.Tensor, spec: PlaneSpec) -> torch.Tensor:
        """Bytes of a plane as its spec allows them."""
        item_bytes = ITEM_BYTES[spec.dtype]
        try:
            size = content_bytes(data)
            fits = 0 <= size <= spec.size_bytes and size % item_bytes == 0 if spec.at_most else size == spec.size_bytes
            if not fits:
                raise FrameCorruptError(
                    f"stage {self.name!r}: plane {name!r} claims {size} bytes, its pipeline makes {spec.size_bytes}"
                )
            found = decompress(data, size)
        except zstandard.ZstdError as exc:
            raise FrameCorruptError(f"stage {self.name!r}: plane {name!r} cannot be decompressed: {exc}") from exc
        if len(found) != size:
            raise FrameCorruptError(f"stage {self.name!r}: plane {name!r} has {len(found)} bytes and claims {size}")
        return unshuffle(found, item_bytes) if self.shuffle else found
