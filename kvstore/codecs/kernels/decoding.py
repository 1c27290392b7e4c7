"""A batch of frames on the device: the arguments of every kernel that decodes it."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from kvstore.codecs.context import known_planes
from kvstore.codecs.fast.nested import Array
from kvstore.codecs.kernels.batch import Batch, LaneTable, Segment, coarse_means, read_nested
from kvstore.codecs.kernels.fused import LEVELS_MAX, ROW_LANES, rans_tile_kernel, step_tile_kernel
from kvstore.codecs.kernels.launch import power_of_two, run
from kvstore.codecs.kernels.paged import PagedCache
from kvstore.codecs.kernels.predict import predictions
from kvstore.codecs.kernels.recipe import Matrices, Recipe, matrices_of
from kvstore.codecs.kernels.scratch import digits_kernel, lanes_kernel, product_kernel
from kvstore.codecs.kernels.symbols import static_tables
from kvstore.codecs.mean import Mean
from kvstore.codecs.ref.classes import CLASSES_PER_LEVEL

# Sizes of tiles as the compiled code has it: registers, no spills, tensor cores. Not tuned on a GPU yet.
_PRODUCT_TOKENS = 128
_PRODUCT_BLOCK = 64
_STEP_ROWS = 64
_STEP_BLOCK = 32
_MMA_ROWS = 16
_LANES = 32
_DIGITS = 1024

Arguments = dict[str, Any]


class Decoding:
    """A batch of frames on the device, ready to be decoded; `launch` may be called again and again after `reset`."""

    def __init__(
        self,
        batch: Batch,
        recipe: Recipe,
        cache: PagedCache,
        slots: torch.Tensor,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.batch = batch
        self.recipe = recipe
        self.device = cache.device
        self._matrices: Matrices = matrices_of(recipe, batch.groups, self.device)
        self._names = list(recipe.layout.planes)
        self._payload = batch.payload.to(self.device, non_blocking=True)
        self._lanes: LaneTable | None = None
        self._mean_places: dict[tuple[int, int, str], int] = {}
        self._known = [
            known_planes(recipe.layout, position, token_ids[n] if token_ids else ())
            for n, position in enumerate(batch.positions)
        ]
        self._pages = self._page_arguments(cache, slots)
        self._launches: list[tuple[Any, tuple[int, ...], Arguments, dict[str, int]]] = []
        if recipe.step:
            self._prepare_step()
        else:
            self._prepare_nested()

    def run(self) -> None:
        """Decode, and wait for the result.

        Raises:
            FrameCorruptError: A stream is not one of its classes.
        """
        self.launch()
        if self._lanes is not None:
            self._lanes.check(self.batch)

    def launch(self) -> None:
        """Start the kernels, without a look at how they end."""
        for kernel, grid, arguments, options in self._launches:
            run(kernel, grid, arguments, **options)

    def reset(self) -> None:
        """Let the lanes start again, for another `launch`."""
        if self._lanes is not None:
            fresh = LaneTable.of(self.batch, self.device)
            self._lanes.states.copy_(fresh.states)
            self._lanes.positions.copy_(fresh.positions)

    def _on_device(self, values: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)

    def _page_arguments(self, cache: PagedCache, slots: torch.Tensor) -> Arguments:
        """What `epilogue.finish` needs."""
        layout, recipe = self.recipe.layout, self.recipe
        rope = layout.rope if recipe.rope else None
        empty = torch.zeros(1, device=self.device)
        cos = sin = mean = weight = empty
        if rope is not None:
            cos, sin = (torch.cat([known[name] for known in self._known]).to(self.device) for name in (".cos", ".sin"))
        if recipe.mean:
            mean = self._means(recipe.mean)
        if recipe.predict:
            mean = predictions(recipe.predict, recipe.layout, self._known, self.device)
        if recipe.weigh and recipe.weigh.data:
            weight = self._table(recipe.weigh.data, "weight")
        places, unit = cache.places(self._names)
        names = ("stride_block", "stride_token", "stride_head", "stride_dim")
        return {
            "mean_ptr": mean,
            "weight_ptr": weight,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "slots_ptr": slots.contiguous().flatten().to(self.device),
            "cache_ptr": cache.planes[self._names[0]][0],
            "places_ptr": places.to(self.device),
            "tokens": layout.chunk_tokens,
            **dict(zip(names, cache.strides, strict=True)),
            "DIM": recipe.dim,
            "HEADS": recipe.heads,
            "ROTARY": rope.rotary_dim if rope else recipe.dim,
            "INTERLEAVED": rope.interleaved if rope else False,
            "MEAN": recipe.mean is not None or recipe.predict is not None,
            "WEIGHT": recipe.weigh is not None,
            "ROPE": rope is not None,
            "PAGE": cache.block_tokens,
            "UNIT": unit,
        }

    def _table(self, artefact: Any, kind: str) -> torch.Tensor:
        """`[planes * layers, heads, dim]` float32 of an artefact."""
        layers = torch.arange(self.recipe.layout.layers)
        found = [artefact.of_layers(kind, f"{name}.{kind}", layers).float() for name in self._names]
        return torch.stack(found).to(self.device)

    def _means(self, stage: Mean) -> torch.Tensor:
        """Calibrated ones, those that frames hold as integers, or the payload itself, which holds bfloat16."""
        if stage.data is not None:
            return self._table(stage.data, "mean")
        if stage.coarse:
            values, self._mean_places = coarse_means(self.batch, self.recipe)
            return self._on_device(values)
        return self._payload.view(torch.bfloat16)

    def _place(self, segment: Segment, plane: str) -> tuple[int, int, int]:
        """Chunk, row of the first layer in tables of all planes and layers, and where the means begin (by 8)."""
        recipe = self.recipe
        row = self._names.index(plane) * recipe.layout.layers + segment.start
        mean_at = row * recipe.heads * recipe.dim
        if recipe.predict:
            vector = (segment.chunk * len(self._names) * recipe.layout.layers + row) * recipe.layout.chunk_tokens
            mean_at = vector * recipe.heads * recipe.dim
        if recipe.mean and recipe.mean.data is None:
            coarse = self._mean_places.get((segment.chunk, segment.start, plane))
            mean_at = segment.at[f"{plane}.mean"] // 2 if coarse is None else coarse
        return segment.chunk, row, mean_at // 8

    def _prepare_step(self) -> None:
        batch, recipe = self.batch, self.recipe
        assert recipe.step is not None
        tokens, heads = recipe.layout.chunk_tokens, recipe.heads
        fields, streams = [], []
        for segment in batch.segments:
            name = segment.name
            centre_at = segment.at[f"{name}.{batch.held - 1}.centroids"] // 2
            rows = segment.layers * tokens * heads
            scale_at = segment.at[f"{name}.scale"] // 2
            fields.append((rows, int(name == "k"), centre_at, 0, scale_at, *self._place(segment, name)))
            streams += [(0, segment.at[f"{name}.{level}"]) for level in range(batch.held)]
        rows = max(row[0] for row in fields)
        tile = power_of_two(rows, _MMA_ROWS, _STEP_ROWS)
        arguments = {
            "bytes_ptr": self._payload,
            "halves_ptr": self._payload.view(torch.float16),
            "scales_ptr": self._payload.view(torch.bfloat16),
            "segments_ptr": self._on_device(np.array(fields, np.int64)),
            "streams_ptr": self._on_device(np.array(streams, np.int64)),
            "matrix_ptr": self._matrices.data,
            "unit": 3.0 ** (recipe.step.levels - batch.held) * recipe.dim**-0.5,
            "tiles": -(-rows // tile),
            "ROWS": tile,
            "BLOCK": _STEP_BLOCK,
            "LEVELS": batch.held,
            **self._pages,
        }
        grid = (arguments["tiles"] * len(fields),)
        self._launches.append((step_tile_kernel, grid, arguments, {"num_warps": 8, "num_stages": 2}))

    def _prepare_nested(self) -> None:
        read_nested(self.batch, self.recipe, self._matrices)
        self._lanes = LaneTable.of(self.batch, self.device)
        self._tables = static_tables(self.device)
        powers = torch.pow(3.0, torch.arange(-128, 128).float() / CLASSES_PER_LEVEL)
        self._powers = powers.to(self.device)
        fused = [segment for segment in self.batch.segments if self._fits_a_tile(segment)]
        other = [segment for segment in self.batch.segments if not self._fits_a_tile(segment)]
        if fused:
            self._prepare_fused(fused)
        if other:
            self._prepare_scratch(other)

    def _fits_a_tile(self, segment: Segment) -> bool:
        lanes = [stream.lanes for stream in segment.streams if stream.lanes is not None]
        columns = {found.columns for found in lanes}
        return self.recipe.hadamard is not None and self.batch.held <= LEVELS_MAX and columns == {ROW_LANES}

    def _lane_arguments(self) -> Arguments:
        assert self._lanes is not None
        return {
            "words_ptr": self._payload.view(torch.int16),
            "states_ptr": self._lanes.states,
            "positions_ptr": self._lanes.positions,
            "ends_ptr": self._lanes.ends,
        }

    def _side_arguments(self, segments: Sequence[Segment]) -> Arguments:
        """Small planes of all segments, one behind the other."""
        return {
            "units_ptr": self._on_device(np.concatenate([segment.unit.ravel() for segment in segments])),
            "scales_ptr": self._on_device(np.concatenate([segment.scale for segment in segments])),
            "powers_ptr": self._powers,
        }

    def _prepare_fused(self, segments: Sequence[Segment]) -> None:
        fields, streams, offsets, classes = [], [], [], []
        offset_at = block_at = scale_at = 0
        for segment in segments:
            lanes = [stream.lanes for stream in segment.streams if stream.lanes is not None]
            row_lanes = min(found.rows for found in lanes)
            place = self._place(segment, segment.name)
            fields.append((len(segment.offset), row_lanes, offset_at, block_at, scale_at, *place))
            for stream in segment.streams:
                packed = stream.lanes is None
                streams.append((0, stream.byte) if packed else (stream.lanes.rows, stream.first_lane))  # type: ignore[union-attr]
            offsets.append(segment.offset)
            classes.append(segment.classes[..., 0].flatten().numpy())
            offset_at += len(segment.offset)
            block_at += len(classes[-1])
            scale_at += len(segment.scale)
        tiles = _tiles(segments, [row[:2] for row in fields])
        arguments = {
            **self._lane_arguments(),
            "bytes_ptr": self._payload,
            "tile_segments_ptr": self._on_device(tiles[0]),
            "tile_rows_ptr": self._on_device(tiles[1]),
            "tile_keys_ptr": self._on_device(tiles[2]),
            "segments_ptr": self._on_device(np.array(fields, np.int64)),
            "streams_ptr": self._on_device(np.array(streams, np.int64)),
            "offsets_ptr": self._on_device(np.concatenate(offsets)),
            "classes_ptr": self._on_device(np.concatenate(classes)),
            **self._side_arguments(segments),
            **self._tables,
            "matrix_ptr": self._matrices.data,
            "LEVELS": self.batch.held,
            "PACKED_FROM": self.recipe.packed_from,
            **self._pages,
        }
        self._launches.append((rans_tile_kernel, (len(tiles[2]),), arguments, {"num_warps": 4, "num_stages": 1}))

    def _prepare_scratch(self, segments: Sequence[Segment]) -> None:
        """Lanes level by level, then the product."""
        tokens = self.recipe.layout.chunk_tokens
        grids, products, is_key, offsets, classes = [], [], [], [], []
        class_at: dict[tuple[str, int], int] = {}
        offset_at = scratch_at = block_at = scale_at = classes_at = 0
        for segment in segments:
            coded_layers, _, blocks, n = segment.classes.shape
            place = class_at.setdefault((segment.name, segment.start), classes_at)
            if place == classes_at:
                classes.append(segment.classes.flatten().numpy())
                classes_at += len(classes[-1])
            used = _columns_in_use(segment, self.batch.held)
            rows = coded_layers * tokens * blocks
            grids.append((rows, n, used, tokens * blocks, blocks, place, offset_at, scratch_at))
            first = self._matrices.first[segment.name, segment.start]
            for number, plane in enumerate(segment.planes):
                column = first + number * self.recipe.heads * self.recipe.dim
                shape = (segment.layers, scratch_at // 8, n // 8, used, column // 8, block_at, scale_at)
                products.append((*shape, *self._place(segment, plane)))
                is_key.append(plane == "k")
            offsets.append(segment.offset)
            offset_at += rows
            scratch_at += rows * n
            block_at += segment.unit.size
            scale_at += len(segment.scale)
        shared = {
            "grids_ptr": self._on_device(np.array(grids, np.int64)),
            "classes_ptr": self._on_device(np.concatenate(classes)),
            "offsets_ptr": self._on_device(np.concatenate(offsets)),
            # A GPU's memory holds what was there before, so columns that no kernel writes are never read.
            "indices_ptr": torch.empty(scratch_at if self.batch.held > 1 else 1, dtype=torch.int32, device=self.device),
            "values_ptr": torch.empty(scratch_at, dtype=torch.float16, device=self.device),
        }
        for level in range(self.batch.held):
            self._prepare_level(segments, level, shared, max(row[0] * row[1] for row in grids))
        outputs = {
            "values_ptr": shared["values_ptr"],
            "segments_ptr": self._on_device(np.array(products, np.int64)),
            "segment_keys_ptr": self._on_device(np.array(is_key, np.int32)),
        }
        self._prepare_product(segments, outputs)

    def _prepare_level(self, segments: Sequence[Segment], level: int, shared: Arguments, elements: int) -> None:
        last = {"LEVEL": level, "LAST": level == self.batch.held - 1}
        streams = [segment.streams[level] for segment in segments]
        if streams[0].lanes is None:
            firsts = self._on_device(np.array([stream.byte for stream in streams], np.int64))
            size = power_of_two(elements, 16, _DIGITS)
            arguments = {
                "bytes_ptr": self._payload, "firsts_ptr": firsts, "shift_ptr": self._tables["shift_ptr"],
                **shared, **last, "SIZE": size, "tiles": -(-elements // size),
            }  # fmt: skip
            self._launches.append((digits_kernel, (arguments["tiles"] * len(streams),), arguments, {"num_warps": 4}))
            return
        programs = []
        for number, stream in enumerate(streams):
            assert stream.lanes is not None
            rows, columns = (count.bit_length() - 1 for count in (stream.lanes.rows, stream.lanes.columns))
            starts = range(0, 1 << (rows + columns), _LANES)
            programs += [(number, first, rows << 8 | columns, stream.first_lane) for first in starts]
        arguments = {
            **self._lane_arguments(),
            "programs_ptr": self._on_device(np.array(programs, np.int64)),
            **shared,
            **self._tables,
            **last,
            "LANES": _LANES,
        }
        self._launches.append((lanes_kernel, (len(programs),), arguments, {"num_warps": 1, "num_stages": 1}))

    def _prepare_product(self, segments: Sequence[Segment], outputs: Arguments) -> None:
        recipe, tokens = self.recipe, self.recipe.layout.chunk_tokens
        group = max(segment.layers for segment in segments)
        tile = power_of_two(tokens, _MMA_ROWS, _PRODUCT_TOKENS)
        arguments = {
            **outputs,
            **self._side_arguments(segments),
            "matrix_ptr": self._matrices.data,
            **_strides(recipe, segments[0]),
            "tiles": -(-tokens // tile),
            "group": group,
            "TOKENS": tile,
            "BLOCK": min(recipe.dim, _PRODUCT_BLOCK),
            **self._pages,
        }
        grid = (arguments["tiles"] * group * recipe.heads * len(outputs["segments_ptr"]),)
        warps = 8 if tile == _PRODUCT_TOKENS else 4
        self._launches.append((product_kernel, grid, arguments, {"num_warps": warps, "num_stages": 3}))


def _tiles(segments: Sequence[Segment], shapes: Sequence[Sequence[int]]) -> tuple[Array, Array, Array]:
    """Segment and row lane of every tile's row lanes, `[tiles * 16]` int32, and whether a tile is of K.

    Args:
        segments: K first.
        shapes: Rows and row lanes of each.
    """
    owners, rows, keys = [], [], []
    for is_key, members in groupby(range(len(segments)), lambda number: segments[number].name == "k"):
        counts = [(number, min(shapes[number])) for number in members]
        owner = np.concatenate([np.full(count, number, np.int32) for number, count in counts])
        row = np.concatenate([np.arange(count, dtype=np.int32) for _, count in counts])
        missing = -len(owner) % ROW_LANES
        owners.append(np.pad(owner, (0, missing), constant_values=-1))
        rows.append(np.pad(row, (0, missing)))
        keys.append(np.full(len(owners[-1]) // ROW_LANES, is_key, np.int32))
    return np.concatenate(owners), np.concatenate(rows), np.concatenate(keys)


def _columns_in_use(segment: Segment, held: int) -> int:
    """Columns up to the last one that is not certainly zero in all rows."""
    widest = segment.classes.amax((0, 1, 2)) + int(segment.offset.max()) + CLASSES_PER_LEVEL * (held - 1)
    used = (widest >= 0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def _strides(recipe: Recipe, segment: Segment) -> dict[str, int]:
    """From one layer, token or head to the next in rows, matrices and columns of a coded plane, and in scales."""
    tokens, heads, dim = recipe.layout.chunk_tokens, recipe.heads, recipe.dim
    names = ("row_layer", "row_token", "row_head", "matrix_layer", "matrix_head", "column_layer", "column_head")
    _, _, blocks, n = segment.classes.shape
    basis = dim * dim if recipe.klt else 0
    if recipe.klt and recipe.klt.data and recipe.klt.data.group_layers > 1:
        strides, scale = (0, 1, 0, 0, 0, len(segment.planes) * heads * dim, dim), 0
    elif n == dim and blocks == heads:
        strides, scale = (tokens * heads, heads, 1, heads * basis, basis, 0, 0), tokens
    else:
        strides, scale = (tokens, 1, 0, n * n, 0, 0, dim), tokens
    # One mean for all tokens of a layer, or a prediction for each.
    mean_layer, mean_token = (tokens * heads * dim, heads * dim) if recipe.predict else (heads * dim, 0)
    found = dict(zip(names, strides, strict=True))
    return {**found, "scale_layer": scale, "mean_layer": mean_layer, "mean_token": mean_token}
