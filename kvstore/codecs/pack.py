"""Code: pack planes of small alphabets, five trits or eight bits to a byte."""

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs.ref.pack import pack, packed_bytes, unpack
from kvstore.codecs.stage import Planes, Specs
from kvstore.layout import PlaneSpec


@dataclass(frozen=True, slots=True)
class Pack:
    """Packs every plane whose spec names an alphabet; `[...]` uint8 becomes `[bytes]` uint8."""

    name: ClassVar[str] = "pack"
    lossless: ClassVar[bool] = True

    def infer(self, specs: Specs) -> Specs:
        return {
            name: PlaneSpec("uint8", (packed_bytes(spec.elements, spec.symbols),), spec.level) if spec.symbols else spec
            for name, spec in specs.items()
        }

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        return {
            name: pack(x, specs[name].symbols) if name in specs and specs[name].symbols else x
            for name, x in planes.items()
        }

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {
            name: unpack(x, spec.symbols, spec.elements).view(spec.shape)
            if (spec := like.get(name)) and spec.symbols
            else x
            for name, x in planes.items()
        }
