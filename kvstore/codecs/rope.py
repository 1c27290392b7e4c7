"""Canonicalise: undo the rotary embedding of K, so that what is left does not depend on the position."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvstore.codecs.ref.rope import rotate, unrotate
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import PipelineError


@dataclass(frozen=True, slots=True)
class UndoRope:
    """Turns K back by the layout's rotary embedding and the chunk's positions; decoding turns it forward again."""

    name: ClassVar[str] = "rope"
    lossless: ClassVar[bool] = False

    def infer(self, specs: Specs) -> Specs:
        if "k" not in specs:
            planes = ", ".join(name for name in specs if "." not in name)
            raise PipelineError(f"stage 'rope' needs a plane 'k' with heads of its own, this layout has {planes}")
        require_floats(self.name, specs, ("k",))
        if ".cos" not in specs:
            raise PipelineError(
                "stage 'rope' needs the rotary embedding, which this layout does not name or this build not know"
            )
        if specs[".cos"].shape[1] > specs["k"].shape[-1]:
            raise PipelineError(
                f"stage 'rope': the layout rotates {specs['.cos'].shape[1]} of {specs['k'].shape[-1]} dimensions"
            )
        return {**specs, "k": replace(specs["k"], dtype="float32")}

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        require_finite(self.name, "k", planes["k"])
        return {**planes, "k": unrotate(planes["k"].float(), planes[".cos"], planes[".sin"], planes[".partner"])}

    def decode(self, planes: Planes, like: Specs) -> Planes:
        return {**planes, "k": rotate(planes["k"].float(), planes[".cos"], planes[".sin"], planes[".partner"])}
