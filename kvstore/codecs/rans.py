"""Code: rANS with static tables by sigma class, the coder of nested indices."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvstore.codecs.fast.nested import Array, decode, decode_tables, encode
from kvstore.codecs.lanes import Lanes, lanes_bytes_max, pack_lanes, parse_lanes
from kvstore.codecs.nested import total_offset
from kvstore.codecs.options import require_int
from kvstore.codecs.ref.classes import CLASSES_PER_LEVEL, EXTRA_DIGITS_MAX, HEAD_CLASSES, tables
from kvstore.codecs.ref.nested import CLASS_MIN, COST_MAX, costs, limits
from kvstore.codecs.stage import Planes, Specs, is_context
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.layout import PlaneSpec

_COLUMN_LANES_MAX = 16
_LANES_MAX = 1 << 12
_INTEGER_CLASS_MAX = 30


@dataclass(frozen=True, slots=True)
class Rans:
    """Codes the planes of the stage `nested`, and small integers such as `k.class`; `[...]` becomes `[bytes]` uint8.

    Args:
        lane_bytes: Bytes a lane should have at least. Six of them are overhead; more lanes decode in parallel.
        packed_from: From this level on digits are left to the stage `pack`, 0 for none: 1.6 bits, no tables.
    """

    lane_bytes: int = 768
    packed_from: int = 0
    name: ClassVar[str] = "rans"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int(self.name, "lane_bytes", self.lane_bytes, 16, 1 << 20)
        require_int(self.name, "packed_from", self.packed_from, 0, 16)

    def infer(self, specs: Specs) -> Specs:
        names = _nested_planes(specs)
        if not names:
            raise PipelineError("stage 'rans' codes what the stage 'nested' makes, and there is none of it")
        for name in names:
            self._check_shapes(name, specs)
        out = dict(specs)
        for name, spec in specs.items():
            if self._is_coded(name, spec, names):
                symbols = 1 if spec.symbols else 1 + EXTRA_DIGITS_MAX
                size = lanes_bytes_max(spec.elements * symbols, _LANES_MAX)
                out[name] = PlaneSpec("uint8", (size,), spec.level, at_most=True)
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name, spec in specs.items():
            if self._is_coded(name, spec, _nested_planes(specs)) and spec.dtype == "int8":
                out[name] = self._pack_integers(planes[name])
        for name in _nested_planes(specs):
            grid = _Grid.of(name, planes)
            index = planes[f"{name}.0"]
            for level, plane in self._levels(name, planes):
                if level:
                    index = 3 * index + (planes[plane].int() - 1)
                out[plane] = self._pack_grid(grid, index, level)
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        names = _nested_planes(planes)
        out = {name: planes[name] for name in like}
        for name, spec in like.items():
            if self._is_coded(name, spec, names) and spec.dtype == "int8":
                out[name] = _unpack_integers(name, planes[name], spec)
        known = {**planes, **out}
        for name in names:
            grid = _Grid.of(name, known)
            index = torch.zeros(like[f"{name}.0"].shape, dtype=torch.int32)
            for level, plane in self._levels(name, like):
                parent = index
                index = _unpack_grid(plane, grid, planes[plane], parent, level)
                out[plane] = (index - 3 * parent + 1).to(torch.uint8) if level else index
        return out

    def _is_coded(self, name: str, spec: PlaneSpec, names: list[str]) -> bool:
        base, _, last = name.rpartition(".")
        if is_context(name) or spec.level is None:
            return False
        if base in names and last.isdigit():
            return not self.packed_from or int(last) < self.packed_from
        return spec.dtype == "int8"

    def _check_shapes(self, name: str, specs: Specs) -> None:
        """Refuse planes that another coder has changed already: the compiled loops go by their shapes."""
        layers, _, heads, n = specs[f".{name}.class"].shape
        tokens = specs[f"{name}.class"].shape[1] if len(specs[f"{name}.class"].shape) == 4 else 0
        wanted = {f"{name}.class": ("int8", (layers, tokens, heads, 1))}
        for level, plane in self._levels(name, specs):
            wanted[plane] = ("uint8" if level else "int32", (layers, tokens, heads, n))
        for plane, (dtype, shape) in wanted.items():
            if (specs[plane].dtype, specs[plane].shape) != (dtype, shape) or not tokens:
                raise PipelineError(f"stage 'rans': plane {plane!r} is not as the stage 'nested' makes it")

    def _levels(self, name: str, planes: Planes | Specs) -> list[tuple[int, str]]:
        """Levels that this stage codes and that are there."""
        found = []
        for level in range(self.packed_from or 1 << 8):
            if f"{name}.{level}" not in planes:
                break
            found.append((level, f"{name}.{level}"))
        return found

    def _pack_grid(self, grid: "_Grid", index: torch.Tensor, level: int) -> torch.Tensor:
        rows = index.reshape(-1, index.shape[-1]).contiguous().numpy()
        coded = grid.coded(level)
        lanes = self._lanes_for(coded // 8, coded)
        made = grid.encode(rows, level, lanes)
        # How many lanes are worth their overhead is known once the bytes are.
        fit = self._lanes_for(2 * len(made.words), coded)
        if not fit // 4 <= lanes <= fit:
            made = grid.encode(rows, level, fit)
        return pack_lanes(made)

    def _lanes_for(self, size_bytes: int, symbols: int) -> int:
        """A power of two."""
        lanes = max(1, min(size_bytes // self.lane_bytes, _LANES_MAX, symbols))
        return 1 << (lanes.bit_length() - 1)

    def _pack_integers(self, x: torch.Tensor) -> torch.Tensor:
        values = x.int().reshape(-1, 1).contiguous()
        magnitude = np.minimum(np.abs(values.numpy()[:, 0]), COST_MAX - 1)
        bits = costs()[: _INTEGER_CLASS_MAX + 1, magnitude].sum(1)
        # Costs are known up to a bound; what lies beyond it must fit all the same.
        bits[limits(1)[-CLASS_MIN : _INTEGER_CLASS_MAX + 1 - CLASS_MIN] < np.abs(values.numpy()).max()] = np.inf
        grid = _Grid.of_integers(len(values), int(bits.argmin()))
        lanes = self._lanes_for(int(bits.min()) // 8, len(values))
        return pack_lanes(grid.encode(values.numpy(), 0, lanes), tag=int(bits.argmin()))


def _nested_planes(planes: Planes | Specs) -> list[str]:
    """Base names of what the stage `nested` announced classes for."""
    return [name[1:-6] for name in planes if name.startswith(".") and name.endswith(".class")]


@dataclass(frozen=True, slots=True)
class _Grid:
    """Classes of the elements of a plane: `base` by layer and head, `offset` by row."""

    base: Array
    offset: Array
    tokens: int
    heads: int

    @classmethod
    def of(cls, name: str, planes: Planes) -> "_Grid":
        base, offset = planes[f".{name}.class"], total_offset(name, planes)
        _, tokens, heads, _ = offset.shape
        return cls(
            base.reshape(-1, base.shape[-1]).contiguous().numpy(),
            offset.reshape(-1).contiguous().numpy(),
            tokens,
            heads,
        )

    @classmethod
    def of_integers(cls, count: int, sigma_class: int) -> "_Grid":
        return cls(np.full((1, 1), sigma_class, np.int32), np.zeros(count, np.int32), count, 1)

    def coded(self, level: int) -> int:
        """About how many elements take a symbol."""
        blocks, rows = len(self.base), len(self.offset)
        at = -int(np.median(self.offset)) - CLASSES_PER_LEVEL * level
        return int((self.base >= at).sum()) * (rows // blocks)

    def encode(self, index: Array, level: int, lanes: int) -> Lanes:
        count, n = index.shape
        columns = min(lanes, _COLUMN_LANES_MAX, 1 << (n.bit_length() - 1))
        rows = lanes // columns
        widest = int(self.base.max()) + int(self.offset.max()) - HEAD_CLASSES + CLASSES_PER_LEVEL
        symbols = 1 if level else 1 + max(0, widest // CLASSES_PER_LEVEL)
        lane_words = -(-count // rows) * -(-n // columns) * symbols
        words = np.empty(min(lane_words, 0xFFFF) * lanes, np.uint16)
        states, lengths = np.empty(lanes, np.uint32), np.empty(lanes, np.uint16)
        static = tables()
        total = encode(
            index,
            self.base,
            self.offset,
            self.tokens,
            self.heads,
            level,
            rows,
            columns,
            static.head,
            static.digit,
            np.empty(lane_words, np.uint16),
            words,
            states,
            lengths,
        )
        if total < 0:
            return self.encode(index, level, 2 * lanes)
        return Lanes(rows, columns, states, lengths, words[:total])

    def decode(self, lanes: Lanes, index: Array, level: int) -> bool:
        ends = lanes.lengths.astype(np.int64).cumsum()
        return bool(
            decode(
                index,
                self.base,
                self.offset,
                self.tokens,
                self.heads,
                level,
                lanes.rows,
                lanes.columns,
                *decode_tables(),
                lanes.words,
                lanes.states.astype(np.uint64),
                ends - lanes.lengths,
                ends,
            )
        )


def _unpack_grid(plane: str, grid: _Grid, data: torch.Tensor, parent: torch.Tensor, level: int) -> torch.Tensor:
    lanes, _ = parse_lanes("rans", plane, data)
    index = parent.clone()
    if not grid.decode(lanes, index.view(-1, index.shape[-1]).numpy(), level):
        raise FrameCorruptError(f"stage 'rans': plane {plane!r} is no stream of its classes")
    return index


def _unpack_integers(name: str, data: torch.Tensor, spec: PlaneSpec) -> torch.Tensor:
    lanes, tag = parse_lanes("rans", name, data)
    if tag > _INTEGER_CLASS_MAX:
        raise FrameCorruptError(f"stage 'rans': plane {name!r} has the class {tag}")
    index = np.zeros((spec.elements, 1), np.int32)
    if not _Grid.of_integers(spec.elements, tag).decode(lanes, index, 0) or np.abs(index).max() > 127:
        raise FrameCorruptError(f"stage 'rans': plane {name!r} is no stream of small integers")
    return torch.from_numpy(index).view(spec.shape).to(torch.int8)
