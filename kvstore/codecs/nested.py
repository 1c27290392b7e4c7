"""Quantise: nested mid-tread levels on one step, with the class by which every coefficient is coded."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.fast.quantise import quantise_rows, reconstruct_rows
from kvstore.codecs.options import require_int
from kvstore.codecs.ref.classes import CLASS_MAX, CLASSES_PER_LEVEL, tables
from kvstore.codecs.ref.nested import class_of, coarser, costs, limits, step_size
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.layout import PlaneSpec

_LEVELS_MAX = 5
_STEP_MAX = 1600
_OFFSET_MAX = 60
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Nested:
    """Indices `k.0` of the coarsest level and digits `k.1`, `k.2`, ... of every finer one, each a third of the step.

    Where a transform before it announces `.k.sigma`, the step is absolute; else it is relative to the root mean square
    of each head over the chunk (`k.step`, `[layers, 1, heads, 1]` bfloat16). `k.class` (int8, a number for each vector)
    says how much wider or narrower than expected the vector is coded; `token.scale` of the stage `importance`
    multiplies the step of its token.

    Args:
        levels: Number of quality levels, 1 to 5.
        step: Step of level 0 in sixteenths of a class: `3**(step / 80)` times the unit; 0 is one standard deviation.
        value_step: The same for V where it shall have another one: added to `step` for every plane but K.
    """

    levels: int = 3
    step: int = 48
    value_step: int = 0
    name: ClassVar[str] = "nested"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int(self.name, "levels", self.levels, 1, _LEVELS_MAX)
        require_int(self.name, "step", self.step, -_STEP_MAX, _STEP_MAX)
        require_int(self.name, "value_step", self.value_step, -_STEP_MAX, _STEP_MAX)

    def infer(self, specs: Specs) -> Specs:
        names = require_floats(self.name, specs)
        out = {name: spec for name, spec in specs.items() if name not in names}
        for name in names:
            shape = specs[name].shape
            if "token.scale" in specs and specs["token.scale"].shape[0] not in (1, shape[0]):
                raise PipelineError(
                    f"stage 'nested': plane {name!r} spans several layers, so 'importance' cannot go by layer"
                )
            if f".{name}.sigma" not in specs:
                out[f"{name}.step"] = PlaneSpec("bfloat16", (shape[0], 1, shape[2], 1), level=0)
            out[f"{name}.class"] = PlaneSpec("int8", (*shape[:3], 1), level=0)
            out[f".{name}.class"] = PlaneSpec("int32", (shape[0], 1, *shape[2:]))
            out[f"{name}.0"] = PlaneSpec("int32", shape, level=0)
            for level in range(1, self.levels):
                out[f"{name}.{level}"] = PlaneSpec("uint8", shape, level=level, symbols=3)
        return out

    def announce(self, specs: Specs, context: Planes) -> Planes:
        found = {}
        for name in require_floats(self.name, specs):
            layers, _, heads, n = specs[name].shape
            sigma = context.get(f".{name}.sigma", torch.zeros(1, 1, 1, 1, dtype=torch.int16))
            found[f".{name}.class"] = class_of(sigma, self._step(name)).expand(layers, 1, heads, n)
        return found

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        names = require_floats(self.name, specs)
        out = {name: x for name, x in planes.items() if name not in names}
        for name in names:
            x = planes[name].float()
            require_finite(self.name, name, x)
            if f".{name}.sigma" not in planes:
                out[f"{name}.step"] = self._relative_step(name, x)
            index, offset = self._quantise(name, x, {**planes, **out})
            out[f"{name}.class"] = offset
            finer = [index]
            for _ in range(1, self.levels):
                finer.insert(0, coarser(finer[0]))
            out[f"{name}.0"] = finer[0]
            for level in range(1, self.levels):
                out[f"{name}.{level}"] = (finer[level] - 3 * finer[level - 1] + 1).to(torch.uint8)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        names = require_floats(self.name, like)
        out = {name: planes[name] for name in like if name not in names}
        for name in names:
            index = planes[f"{name}.0"]
            held = 1
            while held < self.levels and f"{name}.{held}" in planes:
                index = 3 * index + (planes[f"{name}.{held}"].int() - 1)
                held += 1
            out[name] = self._reconstruct(name, planes, index, held)
        return out

    def _step(self, name: str) -> int:
        return self.step if name == "k" else self.step + self.value_step

    def _relative_step(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`[layers, 1, heads, 1]` bfloat16, never zero and never infinite."""
        unit = x.double().square().mean((1, 3), keepdim=True).sqrt() * step_size(self._step(name))
        return unit.clamp(_TINY, 1e38).bfloat16()

    def _steps(self, name: str, planes: Planes) -> torch.Tensor:
        """Step of level 0, broadcastable to the plane, float32."""
        unit = planes.get(f"{name}.step")
        step = torch.tensor(step_size(self._step(name))) if unit is None else unit.float()
        scale = planes.get("token.scale")
        if scale is None:
            return step
        return step * torch.pow(3.0, scale.float() / CLASSES_PER_LEVEL)

    def _reconstruct(self, name: str, planes: Planes, index: torch.Tensor, held: int) -> torch.Tensor:
        """Values of the indices of a level, float32: what `ref.nested.reconstruct` gives, compiled."""
        _, tokens, heads, n = index.shape
        offset = (total_offset(name, planes) + CLASSES_PER_LEVEL * (held - 1)).reshape(-1).contiguous()
        step = (self._steps(name, planes) / 3 ** (held - 1)).expand(*index.shape[:3], 1).reshape(-1).contiguous()
        classes = planes[f".{name}.class"].reshape(-1, n).contiguous()
        out = torch.empty(index.shape)
        reconstruct_rows(
            index.reshape(-1, n).contiguous().numpy(),
            classes.numpy(),
            offset.numpy(),
            step.numpy(),
            tokens,
            heads,
            tables().shift,
            out.view(-1, n).numpy(),
        )
        return out

    def _quantise(self, name: str, x: torch.Tensor, planes: Planes) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the finest level, int32 like the plane, and `k.class`."""
        layers, tokens, heads, n = x.shape
        rows = (layers, tokens, heads, 1)
        classes = planes[f".{name}.class"].reshape(-1, n)
        scale = planes.get("token.scale", torch.zeros(1, 1, 1, 1, dtype=torch.int8)).int().expand(rows)
        offset = (-scale).reshape(-1).contiguous()
        step = self._steps(name, planes).double().expand(rows).reshape(-1).contiguous()
        index = torch.empty(x.shape, dtype=torch.int32)
        quantise_rows(
            x.reshape(-1, n).contiguous().numpy(),
            step.numpy(),
            classes.contiguous().numpy(),
            tokens,
            heads,
            -_OFFSET_MAX,
            _OFFSET_MAX,
            self.levels,
            costs(),
            limits(self.levels),
            index.view(-1, n).numpy(),
            offset.numpy(),
        )
        return index, (offset.view(rows) + scale).to(torch.int8)


def total_offset(name: str, planes: Planes) -> torch.Tensor:
    """What is added to the announced classes of every vector, int32 `[layers, tokens, heads, 1]`.

    Raises:
        FrameCorruptError: A class leaves its range; no encoder writes such a frame.
    """
    offset = planes[f"{name}.class"].int()
    if "token.scale" in planes:
        offset = offset - planes["token.scale"].int()
    base = planes[f".{name}.class"]
    if int(offset.abs().max()) > 2 * _OFFSET_MAX or int((base.amax(-1, keepdim=True) + offset).max()) > CLASS_MAX:
        raise FrameCorruptError(f"stage 'nested': plane '{name}.class' leaves the range of classes")
    return offset
