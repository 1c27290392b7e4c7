"""A second decoder of frames, written from docs/codecs.md alone; it shares no code with the package.

It decodes what `rans` and `nested` make, K without its rotary embedding, one symbol at a time.
"""

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.second_reader import ReadFrame

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

TABLES = json.loads((Path(__file__).parent.parent / "kvstore" / "codecs" / "ref" / "classes.json").read_text())


class Shape(NamedTuple):
    """What a reader's own layout says."""

    tokens: int
    heads: int
    dim: int


def read_artefact(data: bytes) -> Tensors:
    """Tensors of an artefact."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    dtypes = {"F32": "<f4", "F16": "<f2", "I16": "<i2"}
    found = {}
    for name, spec in header.items():
        if name != "__metadata__":
            start, end = (8 + size + at for at in spec["data_offsets"])
            found[name] = np.frombuffer(data[start:end], dtypes[spec["dtype"]]).reshape(spec["shape"])
    return found


class Lane:
    """One stream."""

    def __init__(self, state: int, words: list[int]) -> None:
        self.state, self.words = state, words

    def symbol(self, frequencies: list[int]) -> int:
        """The next symbol."""
        slot = self.state % 4096
        s, low = 0, 0
        while slot >= low + frequencies[s]:
            low += frequencies[s]
            s += 1
        self.state = frequencies[s] * (self.state >> 12) + slot - low
        if self.state < 1 << 16:
            self.state = self.state << 16 | self.words.pop(0)
        return s

    def digit(self, row_class: int, parent: int) -> int:
        """A digit behind its parent."""
        s = self.symbol(TABLES["digit"][4 * (min(max(row_class, -5), 15) + 5) + min(abs(parent), 3)])
        return 1 - s if parent < 0 else s - 1

    def element(self, c: int, level: int, parent: int) -> int:
        """The index of an element at a level."""
        if c + 5 * level < 0:
            return 3 * parent
        if level:
            return 3 * parent + self.digit(c + 5 * (level - 1), parent)
        extra = max(0, math.ceil((c - 7) / 5))
        index = self.symbol(TABLES["head"][c - 5 * extra]) - 4
        for n in range(extra):
            index = 3 * index + self.digit(c - 5 * extra + 5 * n, index)
        return index


def decode_segment(data: bytes, classes: Array | None, shape: tuple[int, int], level: int, parents: Array) -> Array:
    """Indices of a matrix; its one class is the tag where `classes` is None."""
    log_rows, log_columns, tag, zero = data[:4]
    assert zero == 0
    rows, columns = 1 << log_rows, 1 << log_columns
    count = rows * columns
    states = struct.unpack_from(f"<{count}I", data, 4)
    lengths = struct.unpack_from(f"<{count}H", data, 4 + 4 * count)
    words = struct.unpack(f"<{sum(lengths)}H", data[4 + 6 * count :])
    out, at = np.zeros(shape, np.int64), 0
    for lane in range(count):
        stream = Lane(states[lane], list(words[at : at + lengths[lane]]))
        at += lengths[lane]
        for i in range(lane // columns, shape[0], rows):
            for j in range(lane % columns, shape[1], columns):
                c = tag if classes is None else int(classes[i, j])
                out[i, j] = stream.element(c, level, int(parents[i, j]))
        assert (stream.state, stream.words) == (1 << 16, [])
    return out


def _integers(data: bytes, shape: tuple[int, ...]) -> Array:
    matrix = (math.prod(shape), 1)
    return decode_segment(data, None, matrix, 0, np.zeros(matrix, np.int64)).reshape(shape)


def _bfloat16(data: bytes, shape: tuple[int, ...]) -> Array:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(float).reshape(shape)


class _Grid(NamedTuple):
    """The stage `nested` of one plane of a layer group."""

    name: str
    shape: tuple[int, int, int, int]
    sigma: Array | None
    stages: dict[str, Any]

    @property
    def step(self) -> int:
        """Step of level 0 in units."""
        grid = self.stages["nested"]
        return int(grid.get("step", 48)) + (0 if self.name == "k" else int(grid.get("value_step", 0)))

    @property
    def by_layer(self) -> bool:
        """Whether every layer has scales of its own."""
        return bool(self.stages["importance"].get("by_layer", False))

    def values(self, planes: dict[str, bytes], levels: int) -> Array:
        """What it makes of the levels that are there."""
        layers, tokens, heads, n = self.shape
        sigma = np.zeros((layers, 1, heads, n), np.int64) if self.sigma is None else self.sigma.astype(np.int64)
        base = np.clip((sigma - self.step + 8) // 16 + 9, -60, 52)
        scale = np.zeros((layers, tokens, 1, 1), np.int64)
        if "token.scale" in planes:
            scale = scale + _integers(planes["token.scale"], (layers if self.by_layer else 1, tokens, 1, 1))
        offset = _integers(planes[f"{self.name}.class"], (layers, tokens, heads, 1)) - scale
        classes = base + offset
        index = np.zeros((layers * tokens * heads, n), np.int64)
        for level in range(levels):
            data = planes[f"{self.name}.{level}"]
            index = decode_segment(data, classes.reshape(-1, n), index.shape, level, index)
        unit: Any = 3 ** (self.step / 80)
        if self.sigma is None:
            unit = _bfloat16(planes[f"{self.name}.step"], (layers, 1, heads, 1))
        values: Array = _centroids(index.reshape(self.shape), classes, levels - 1) * unit * 3.0 ** (scale / 5)
        return values


def _centroids(index: Array, classes: Array, level: int) -> Array:
    """Values in steps of level 0."""
    at = np.clip(classes + 5 * level, 0, 20)
    shift = np.array(TABLES["shift"])[at, np.clip(np.abs(index), 1, 3) - 1] / 256
    shift = np.where(classes + 5 * level > 20, 0, shift)
    found: Array = (index - np.sign(index) * shift) / 3.0**level
    return found


def decode(frame: ReadFrame, shape: Shape, artefact: Tensors, card: dict[str, Any], ids: Sequence[int]) -> Tensors:
    """K without rotary embedding and V, `[layers, tokens, heads, dim]`."""
    stages = {stage["stage"]: stage for stage in frame.header["pipeline"]}
    parts: dict[str, list[Array]] = {"k": [], "v": []}
    start = 0
    for group, layers in enumerate(frame.header["groups"]):
        planes = {name: data for (_, at, name), data in frame.segments.items() if at == group}
        numbers = list(range(start, start + layers))
        start += layers
        if "klt" in stages:
            found = _klt(planes, stages, frame.levels_held, shape, numbers, artefact, card)
        else:
            found = _hadamard(planes, stages, frame.levels_held, shape, numbers, artefact)
        for name, x in found.items():
            parts[name].append(x + _mean(name, planes, stages, shape, numbers, artefact, ids))
    return {name: np.concatenate(x) for name, x in parts.items()}


def _mean(
    name: str,
    planes: dict[str, bytes],
    stages: dict[str, Any],
    shape: Shape,
    numbers: list[int],
    artefact: Tensors,
    ids: Sequence[int],
) -> Array:
    side = (len(numbers), 1, shape.heads, shape.dim)
    if "predict" in stages:
        matrices = [artefact[f"{name}.predict.{layer}"].astype(float) for layer in numbers]
        vectors = artefact["tokens"].astype(float)
        window = (len(matrices[0]) - 1) // vectors.shape[1]
        rows = []
        for at in range(len(ids) - shape.tokens, len(ids)):
            seen = [vectors[ids[at - n]] if at >= n else np.zeros(vectors.shape[1]) for n in range(window)]
            rows.append(np.concatenate([*seen, [1.0]]))
        made = np.stack([np.stack(rows) @ matrix for matrix in matrices])
        return made.reshape(len(numbers), shape.tokens, shape.heads, shape.dim)
    if "artefact" in stages["mean"]:
        return artefact[f"{name}.mean"][numbers].astype(float)[:, None]
    if stages["mean"].get("coarse", False):
        return _integers(planes[f"{name}.mean"], side) * _bfloat16(planes[f"{name}.mean_step"], (*side[:3], 1))
    return _bfloat16(planes[f"{name}.mean"], side)


def _hadamard(
    planes: dict[str, bytes], stages: dict[str, Any], levels: int, shape: Shape, numbers: list[int], artefact: Tensors
) -> Tensors:
    matrix = np.ones((1, 1))
    while len(matrix) < shape.dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    text = f"kvstore signs 1 {stages['hadamard'].get('seed', 0)} {shape.dim}"
    bits = hashlib.shake_256(text.encode()).digest(-(-shape.dim // 8))
    signs = np.array([-1.0 if bits[i // 8] >> (i % 8) & 1 else 1.0 for i in range(shape.dim)])
    matrix = signs[:, None] * matrix / math.sqrt(shape.dim)
    found = {}
    for name in ("k", "v"):
        full = (len(numbers), shape.tokens, shape.heads, shape.dim)
        sigma = None
        if "weigh" in stages:
            spread = artefact[f"{name}.spread"][numbers][:, None, :, None]
            sigma = np.broadcast_to(spread, (len(numbers), 1, shape.heads, shape.dim))
        x = _Grid(name, full, sigma, stages).values(planes, levels) @ matrix.T
        found[name] = x / artefact[f"{name}.weight"][numbers][:, None] if "weigh" in stages else x
    return found


def _klt(
    planes: dict[str, bytes],
    stages: dict[str, Any],
    levels: int,
    shape: Shape,
    numbers: list[int],
    artefact: Tensors,
    card: dict[str, Any],
) -> Tensors:
    grouped = card["group_layers"] > 1
    found: Tensors = {}
    for name in ("kv",) if card["joint"] else ("k", "v"):
        firsts = numbers[:1] if grouped else numbers
        sigma = np.stack([artefact[f"{name}.sigma.{first}"] for first in firsts])[:, None]
        full = (len(firsts), shape.tokens, *sigma.shape[2:])
        x = _Grid(name, full, sigma, stages).values(planes, levels)
        inverse = np.stack([artefact[f"{name}.inverse.{first}"] for first in firsts]).astype(float)
        vectors = np.einsum("ltbj,lbji->ltbi", x, inverse).reshape(len(firsts), shape.tokens, -1)
        if grouped:
            vectors = vectors[0].reshape(shape.tokens, len(numbers), -1).transpose(1, 0, 2)
        for plane, part in zip(name, np.split(vectors, len(name), 2), strict=True):
            found[plane] = part.reshape(len(numbers), shape.tokens, shape.heads, shape.dim)
    return found
