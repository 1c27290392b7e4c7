"""Keep: attention sinks and the recent window as they are, bit for bit."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvstore.codecs.options import require_int
from kvstore.codecs.ref.keep import join, split
from kvstore.codecs.stage import Planes, Specs, base_planes, require_floats, require_new
from kvstore.errors import FrameCorruptError, PipelineError

_TOKENS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Keep:
    """Puts a few tokens raw: `k.kept`, `[layers, up to sinks + recent, heads, dim]` of the plane's own dtype, level 0.

    In the plane itself they are replaced by the mean of the others. Which chunk holds the sinks follows from its
    first position; which one is the last of a prefix only the writer knows, so the reader goes by the length of
    `k.kept`. The stage belongs in front of all that change the dtype.

    Args:
        sinks: Tokens at the start of a prompt.
        recent: Tokens at the end of the prefix that is being put.
    """

    sinks: int = 0
    recent: int = 0
    name: ClassVar[str] = "keep"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int(self.name, "sinks", self.sinks, 0, _TOKENS_MAX)
        require_int(self.name, "recent", self.recent, 0, _TOKENS_MAX)

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        if not self.sinks + self.recent:
            return out
        for name in require_floats(self.name, specs):
            spec = specs[name]
            require_new(self.name, specs, f"{name}.kept")
            layers, tokens, *rest = spec.shape
            shape = (layers, min(self.sinks + self.recent, tokens), *rest)
            out[f"{name}.kept"] = replace(spec, shape=shape, level=0, at_most=True)
        if self.sinks and ".position" not in specs:
            raise PipelineError(f"stage {self.name!r}: sinks need the positions of the tokens, '.position'")
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name in base_planes(specs) if self.sinks + self.recent else ():
            first = self._first(planes, planes[name].shape[1])
            is_last = ".last" in planes and bool(planes[".last"])
            last = self._last(first, planes[name].shape[1]) if is_last else 0
            out[name], out[f"{name}.kept"] = split(planes[name], first, last)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name in base_planes(like) if self.sinks + self.recent else ():
            out[name] = self._joined(
                name, planes[name], planes[f"{name}.kept"], self._first(planes, like[name].shape[1])
            )
        return out

    def _first(self, planes: Planes, tokens: int) -> int:
        """Sinks in this chunk."""
        return min(self.sinks, tokens) if self.sinks and int(planes[".position"][0]) == 0 else 0

    def _last(self, first: int, tokens: int) -> int:
        """Recent tokens of this chunk, if it is the last one."""
        return min(self.recent, tokens - first)

    def _joined(self, name: str, x: torch.Tensor, kept: torch.Tensor, first: int) -> torch.Tensor:
        last = self._last(first, x.shape[1])
        if kept.shape[1] not in (first, first + last):
            raise FrameCorruptError(
                f"stage {self.name!r}: plane {name!r} keeps {kept.shape[1]} tokens, not {first} or {first + last}"
            )
        return join(x, kept, first)
