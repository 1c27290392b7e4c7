# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Decode in two kernels: coefficients of any lanes and classes to float16 scratch, then a matrix product.

The path of transforms that span heads or layers, where a vector is far larger than a tile, and of segments with too few
lanes for `fused.py`. A level is a launch; indices of all but the last one are int32 scratch. The product skips columns
that are certainly zero at the level, so that its rank falls with the level.
"""

import triton
import triton.language as tl

from kvstore.codecs.kernels.epilogue import finish, pair_columns
from kvstore.codecs.kernels.symbols import (
    centroid,
    extra_digits,
    head_bounds,
    shifts_of,
    take_digit,
    take_head,
    trit,
)
from kvstore.codecs.ref.classes import CLASSES_PER_LEVEL

GRID_FIELDS = 8
"""Of a coded plane: rows, columns, columns in use, tokens * heads, heads, first class, first offset, first scratch."""
STREAM_FIELDS = 4
"""Of a program: its coded plane, its first lane in the plane, log2 of row and column lanes, first lane of all."""
_GRID = tl.constexpr(GRID_FIELDS)
_STREAM = tl.constexpr(STREAM_FIELDS)
_PER_LEVEL = tl.constexpr(CLASSES_PER_LEVEL)


@triton.jit
def _class_of(classes_ptr, offsets_ptr, width, span, heads, row, column, live):
    """Classes at level 0 of elements of a coded plane."""
    block = row // span * heads + row % heads
    base = tl.load(classes_ptr + block * width + column, mask=live, other=-100)
    return base + tl.load(offsets_ptr + row, mask=live, other=0).to(tl.int32)


@triton.jit
def _put(index, sigma_class, at, live, indices_ptr, values_ptr, shift_ptr, LEVEL: tl.constexpr, LAST: tl.constexpr):
    """Keep indices for the next level, or the values of the last one."""
    if LAST:
        shift1, shift2, shift3 = shifts_of(shift_ptr, sigma_class + _PER_LEVEL * LEVEL)
        tl.store(values_ptr + at, centroid(index, shift1, shift2, shift3), mask=live)
    else:
        tl.store(indices_ptr + at, index, mask=live)


@triton.jit
def lanes_kernel(
    words_ptr,
    states_ptr,
    positions_ptr,
    ends_ptr,
    programs_ptr,
    grids_ptr,
    classes_ptr,
    offsets_ptr,
    indices_ptr,
    values_ptr,
    head_ptr,
    digit_ptr,
    shift_ptr,
    LANES: tl.constexpr,
    LEVEL: tl.constexpr,
    LAST: tl.constexpr,
):
    """Decode `LANES` lanes of one coded plane, a thread each; states and positions end up where they were."""
    stream = programs_ptr + tl.program_id(0) * _STREAM
    grid = grids_ptr + tl.load(stream) * _GRID
    log_rows = tl.load(stream + 2).to(tl.int32) >> 8
    log_columns = tl.load(stream + 2).to(tl.int32) & 0xFF
    number = tl.load(stream + 1).to(tl.int32) + tl.arange(0, LANES)
    used = number < (1 << (log_rows + log_columns))
    lane = tl.load(stream + 3) + number
    rows = tl.load(grid).to(tl.int32)
    width = tl.load(grid + 1).to(tl.int32)
    columns = tl.load(grid + 2).to(tl.int32)
    span = tl.load(grid + 3).to(tl.int32)
    heads = tl.load(grid + 4).to(tl.int32)
    classes = classes_ptr + tl.load(grid + 5)
    offsets = offsets_ptr + tl.load(grid + 6)
    scratch = tl.load(grid + 7)
    # [LANES]
    state = tl.load(states_ptr + lane, mask=used, other=0).to(tl.uint32, bitcast=True)
    at = tl.load(positions_ptr + lane, mask=used, other=0)
    end = tl.load(ends_ptr + lane, mask=used, other=0)
    for row_start in range(0, rows, 1 << log_rows):
        row = row_start + (number >> log_columns)
        for column_start in range(0, columns, 1 << log_columns):
            column = column_start + (number & ((1 << log_columns) - 1))
            live = used & (row < rows) & (column < columns)
            element = scratch + row.to(tl.int64) * width + column
            sigma_class = _class_of(classes, offsets, width, span, heads, row, column, live)
            if LEVEL == 0:
                active = live & (sigma_class >= 0)
                extra = tl.where(active, extra_digits(sigma_class), 0)
                b1, b2, b3, b4, b5, b6, b7, b8 = head_bounds(head_ptr, sigma_class)
                index, state, at = take_head(state, at, end, words_ptr, b1, b2, b3, b4, b5, b6, b7, b8, active)
                for n in range(tl.max(extra, 0)):
                    row_class = sigma_class - _PER_LEVEL * (extra - n)
                    index, state, at = take_digit(index, row_class, state, at, end, words_ptr, digit_ptr, n < extra)
            else:
                active = live & (sigma_class + _PER_LEVEL * LEVEL >= 0)
                index = tl.load(indices_ptr + element, mask=live, other=0)
                row_class = sigma_class + _PER_LEVEL * (LEVEL - 1)
                index, state, at = take_digit(index, row_class, state, at, end, words_ptr, digit_ptr, active)
            _put(index, sigma_class, element, live, indices_ptr, values_ptr, shift_ptr, LEVEL, LAST)
    tl.store(states_ptr + lane, state.to(tl.int32, bitcast=True), mask=used)
    tl.store(positions_ptr + lane, at, mask=used)


@triton.jit
def digits_kernel(
    bytes_ptr,
    firsts_ptr,
    grids_ptr,
    classes_ptr,
    offsets_ptr,
    indices_ptr,
    values_ptr,
    shift_ptr,
    tiles,
    SIZE: tl.constexpr,
    LEVEL: tl.constexpr,
    LAST: tl.constexpr,
):
    """Refine `SIZE` indices of a coded plane by digits that are packed five to a byte."""
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    grid = grids_ptr + plane * _GRID
    rows = tl.load(grid).to(tl.int32)
    width = tl.load(grid + 1).to(tl.int32)
    element = tl.program_id(0) % tiles * SIZE + tl.arange(0, SIZE)
    live = element < rows * width
    at = tl.load(grid + 7) + element
    packed = tl.load(bytes_ptr + tl.load(firsts_ptr + plane) + element // 5, mask=live, other=0)
    index = 3 * tl.load(indices_ptr + at, mask=live, other=0) + trit(packed, element % 5) - 1
    span = tl.load(grid + 3).to(tl.int32)
    heads = tl.load(grid + 4).to(tl.int32)
    classes = classes_ptr + tl.load(grid + 5)
    offsets = offsets_ptr + tl.load(grid + 6)
    row = element // width
    sigma_class = _class_of(classes, offsets, width, span, heads, row, element - row * width, live)
    _put(index, sigma_class, at, live, indices_ptr, values_ptr, shift_ptr, LEVEL, LAST)


PRODUCT_FIELDS = 10
"""Of a plane of a layer group: layers, values, their row's length, columns in use, matrix; blocks, scales, chunk,
layer, mean: where they begin, or which. Values, rows, matrices and means count by 8, so that the compiler knows that
loads may be wide."""
_PRODUCT = tl.constexpr(PRODUCT_FIELDS)


@triton.jit
def product_kernel(
    values_ptr,
    segments_ptr,
    segment_keys_ptr,
    units_ptr,
    scales_ptr,
    powers_ptr,
    matrix_ptr,
    mean_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    cache_ptr,
    places_ptr,
    tokens,
    tiles,
    group,
    row_layer,
    row_token,
    row_head,
    matrix_layer,
    matrix_head,
    column_layer,
    column_head,
    scale_layer,
    mean_layer,
    mean_token,
    stride_block,
    stride_token,
    stride_head,
    stride_dim,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Multiply `TOKENS` rows of values by the columns of the matrix that make one head of one layer.

    Row, matrix and column of a layer and head are found by strides: of a transform per head, over the heads of a
    layer, or over all layers of a group.
    """
    # Programs that read the same values, and then those that read the same matrix, follow one another.
    program = tl.program_id(0) // tiles
    segment = program // (group * HEADS)
    fields = segments_ptr + segment.to(tl.int64) * _PRODUCT
    layer = program // HEADS % group
    head = program % HEADS
    if layer >= tl.load(fields):
        return
    width = tl.load(fields + 2) * 8
    used_columns = tl.load(fields + 3).to(tl.int32)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    alive = token < tokens
    first, second = pair_columns(DIM, ROTARY, INTERLEAVED)
    row = (layer * row_layer + head * row_head) + token.to(tl.int64) * row_token
    value = values_ptr + tl.load(fields + 1) * 8 + row[:, None] * width
    matrix_at = tl.load(fields + 4) * 8 + layer.to(tl.int64) * matrix_layer + head * matrix_head
    column = layer * column_layer + head * column_head
    matrix = matrix_ptr + matrix_at + column
    low = tl.zeros((TOKENS, DIM // 2), tl.float32)
    high = tl.zeros((TOKENS, DIM // 2), tl.float32)
    for start in range(0, used_columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        # [TOKENS, BLOCK] and twice [BLOCK, DIM / 2]
        part = tl.load(value + k[None, :], mask=alive[:, None] & (k < used_columns)[None, :], other=0.0)
        rows = matrix + k[:, None] * width
        inside = (k < used_columns)[:, None]
        low = tl.dot(part, tl.load(rows + first[None, :], mask=inside, other=0.0), low)
        high = tl.dot(part, tl.load(rows + second[None, :], mask=inside, other=0.0), high)
    block = tl.load(fields + 5) + layer * HEADS + head
    power = tl.load(scales_ptr + tl.load(fields + 6) + layer * scale_layer + token, mask=alive, other=0).to(tl.int32)
    factor = tl.load(units_ptr + block) * tl.load(powers_ptr + power + 128)
    everywhere = tl.zeros((TOKENS,), tl.int64)
    finish(
        low, high, factor, tl.load(segment_keys_ptr + segment), tl.load(fields + 7) * tokens + token,
        everywhere + tl.load(fields + 8) + layer, everywhere + head,
        tl.load(fields + 9) * 8 + layer * mean_layer + head * DIM + token.to(tl.int64) * mean_token, alive,
        mean_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, cache_ptr, places_ptr,
        stride_block, stride_token, stride_head, stride_dim,
        DIM, HEADS, ROTARY, INTERLEAVED, MEAN, WEIGHT, ROPE, PAGE, UNIT,
    )  # fmt: skip
