# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Decode in one kernel: rANS or packed digits, centroids, inverse Hadamard rotation, and the end of `epilogue.py`.

Segments differ in their lanes, so a tile is 16 *row lanes* (the 16 column lanes of one row of lanes each) of any
segments, and every step decodes a `[16, 16]` tile of coefficients that goes straight into a matrix product. Levels
above 0 are decoded in the same step, so that parents never leave registers; where a level has more row lanes than the
one with the fewest, these take turns, and the states wait in memory between two rows.
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

ROW_LANES = 16
"""Row lanes of a tile, and columns of a row lane."""
SEGMENT_FIELDS = 8
"""Of a segment: rows, row lanes, first row in the offsets, first in the blocks, in the scales, chunk, layer, mean;
means count by 8, so that the compiler knows that loads may be wide."""
STREAM_FIELDS = 2
"""Of a level of a segment: row lanes and its first lane; or, where it is packed, 0 and its first byte."""
LEVELS_MAX = 3
_LANES = tl.constexpr(ROW_LANES)
_PER_LEVEL = tl.constexpr(CLASSES_PER_LEVEL)
_FIELDS = tl.constexpr(SEGMENT_FIELDS)
_STREAM = tl.constexpr(STREAM_FIELDS)


@triton.jit
def _lane(streams_ptr, segment, row, used, level: tl.constexpr, LEVELS: tl.constexpr):
    """Lanes `[16, 16]` that hold a row of a level of every segment."""
    stream = streams_ptr + (segment * LEVELS + level) * _STREAM
    row_lanes = tl.load(stream, mask=used, other=1)
    first = tl.load(stream + 1, mask=used, other=0)
    lane = first + (row % tl.maximum(row_lanes, 1)) * _LANES
    return lane[:, None] + tl.arange(0, _LANES)[None, :]


@triton.jit
def _finer(
    index,
    sigma_class,
    state,
    at,
    end,
    lane,
    element,
    live,
    words_ptr,
    bytes_ptr,
    digit_ptr,
    level: tl.constexpr,
    PACKED_FROM: tl.constexpr,
):
    """Indices of a level above 0 from those of the one before."""
    if PACKED_FROM > 0 and level >= PACKED_FROM:
        # `lane` holds the first byte of the digits here.
        packed = tl.load(bytes_ptr + lane + element // 5, mask=live, other=0)
        index = tl.where(live, 3 * index + trit(packed, element % 5) - 1, 0)
    else:
        active = live & (sigma_class + _PER_LEVEL * level >= 0)
        row_class = sigma_class + _PER_LEVEL * (level - 1)
        index, state, at = take_digit(index, row_class, state, at, end, words_ptr, digit_ptr, active)
    return index, state, at


@triton.jit
def _open(states_ptr, positions_ptr, ends_ptr, lane, live, level: tl.constexpr, PACKED_FROM: tl.constexpr):
    """State, position and end of lanes; a packed level has none."""
    coded = live
    if PACKED_FROM > 0 and level >= PACKED_FROM:
        coded = live & (lane < 0)
    state = tl.load(states_ptr + lane, mask=coded, other=0).to(tl.uint32, bitcast=True)
    return state, tl.load(positions_ptr + lane, mask=coded, other=0), tl.load(ends_ptr + lane, mask=coded, other=0)


@triton.jit
def _close(states_ptr, positions_ptr, lane, state, at, live, level: tl.constexpr, PACKED_FROM: tl.constexpr):
    """Undo `_open`."""
    if PACKED_FROM == 0 or level < PACKED_FROM:
        tl.store(states_ptr + lane, state.to(tl.int32, bitcast=True), mask=live)
        tl.store(positions_ptr + lane, at, mask=live)


@triton.jit
def _decode_rows(
    words_ptr,
    bytes_ptr,
    states_ptr,
    positions_ptr,
    ends_ptr,
    streams_ptr,
    head_ptr,
    digit_ptr,
    shift_ptr,
    matrix_ptr,
    segment,
    row,
    sigma_class,
    alive,
    LEVELS: tl.constexpr,
    PACKED_FROM: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Both halves of a vector of every row lane, `[16, DIM / 2]` float32 in units."""
    first, second = pair_columns(DIM, ROTARY, INTERLEAVED)
    column = tl.arange(0, _LANES)
    live = alive[:, None] & (column >= 0)[None, :]
    # [16, 1]: all coefficients of a rotated vector have one class.
    sigma_class = sigma_class[:, None]
    extra = extra_digits(sigma_class)
    most = tl.max(tl.max(extra, 1), 0)
    head_class = sigma_class - _PER_LEVEL * extra
    b1, b2, b3, b4, b5, b6, b7, b8 = head_bounds(head_ptr, sigma_class)
    shift1, shift2, shift3 = shifts_of(shift_ptr, sigma_class + _PER_LEVEL * (LEVELS - 1))
    lane0 = _lane(streams_ptr, segment, row, alive, 0, LEVELS)
    s0, a0, e0 = _open(states_ptr, positions_ptr, ends_ptr, lane0, live, 0, PACKED_FROM)
    if LEVELS > 1:
        lane1 = _lane(streams_ptr, segment, row, alive, 1, LEVELS)
        s1, a1, e1 = _open(states_ptr, positions_ptr, ends_ptr, lane1, live, 1, PACKED_FROM)
    if LEVELS > 2:
        lane2 = _lane(streams_ptr, segment, row, alive, 2, LEVELS)
        s2, a2, e2 = _open(states_ptr, positions_ptr, ends_ptr, lane2, live, 2, PACKED_FROM)
    low = tl.zeros((_LANES, DIM // 2), tl.float32)
    high = tl.zeros((_LANES, DIM // 2), tl.float32)
    for start in range(0, DIM, _LANES):
        # [16, 16]: a column of every column lane of every row lane
        active = live & (sigma_class >= 0)
        index, s0, a0 = take_head(s0, a0, e0, words_ptr, b1, b2, b3, b4, b5, b6, b7, b8, active)
        for n in range(most):
            row_class = head_class + _PER_LEVEL * n
            index, s0, a0 = take_digit(index, row_class, s0, a0, e0, words_ptr, digit_ptr, active & (n < extra))
        element = row[:, None] * DIM + start + column[None, :]
        if LEVELS > 1:
            index, s1, a1 = _finer(
                index, sigma_class, s1, a1, e1, lane1 - column[None, :], element, live,
                words_ptr, bytes_ptr, digit_ptr, 1, PACKED_FROM,
            )  # fmt: skip
        if LEVELS > 2:
            index, s2, a2 = _finer(
                index, sigma_class, s2, a2, e2, lane2 - column[None, :], element, live,
                words_ptr, bytes_ptr, digit_ptr, 2, PACKED_FROM,
            )  # fmt: skip
        value = centroid(index, shift1, shift2, shift3)
        # [16, DIM / 2] each: rows of the inverse rotation, +-1
        matrix = matrix_ptr + (start + column)[:, None] * DIM
        low = tl.dot(value, tl.load(matrix + first[None, :]), low)
        high = tl.dot(value, tl.load(matrix + second[None, :]), high)
    _close(states_ptr, positions_ptr, lane0, s0, a0, live, 0, PACKED_FROM)
    if LEVELS > 1:
        _close(states_ptr, positions_ptr, lane1, s1, a1, live, 1, PACKED_FROM)
    if LEVELS > 2:
        _close(states_ptr, positions_ptr, lane2, s2, a2, live, 2, PACKED_FROM)
    # Another thread may read them for the next row.
    tl.debug_barrier()
    return low, high


@triton.jit
def rans_tile_kernel(
    words_ptr,
    bytes_ptr,
    states_ptr,
    positions_ptr,
    ends_ptr,
    tile_segments_ptr,
    tile_rows_ptr,
    tile_keys_ptr,
    segments_ptr,
    streams_ptr,
    offsets_ptr,
    classes_ptr,
    units_ptr,
    scales_ptr,
    powers_ptr,
    head_ptr,
    digit_ptr,
    shift_ptr,
    matrix_ptr,
    mean_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    cache_ptr,
    places_ptr,
    tokens,
    stride_block,
    stride_token,
    stride_head,
    stride_dim,
    LEVELS: tl.constexpr,
    PACKED_FROM: tl.constexpr,
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
    """Decode 16 row lanes from their first row to their last; states and positions end up where they were."""
    tile = tl.program_id(0) * _LANES + tl.arange(0, _LANES)
    segment = tl.load(tile_segments_ptr + tile).to(tl.int64)
    row_lane = tl.load(tile_rows_ptr + tile)
    is_key = tl.load(tile_keys_ptr + tl.program_id(0))
    used = segment >= 0
    segment = tl.maximum(segment, 0)
    # [16] int64 each
    fields = segments_ptr + segment * _FIELDS
    rows = tl.load(fields, mask=used, other=0).to(tl.int32)
    stride = tl.load(fields + 1, mask=used, other=1).to(tl.int32)
    offset_at = tl.load(fields + 2, mask=used, other=0)
    block_at = tl.load(fields + 3, mask=used, other=0)
    scale_at = tl.load(fields + 4, mask=used, other=0)
    chunk = tl.load(fields + 5, mask=used, other=0)
    layer_at = tl.load(fields + 6, mask=used, other=0)
    mean_at = tl.load(fields + 7, mask=used, other=0)
    visits = tl.max((rows - row_lane + stride - 1) // stride, 0)
    for visit in range(visits):
        row = row_lane + visit * stride
        alive = used & (row < rows)
        row = tl.where(alive, row, 0)
        layer = row // (tokens * HEADS)
        token = row // HEADS % tokens
        head = row % HEADS
        block = block_at + layer * HEADS + head
        sigma_class = tl.load(classes_ptr + block, mask=alive, other=-100)
        sigma_class += tl.load(offsets_ptr + offset_at + row, mask=alive, other=0).to(tl.int32)
        low, high = _decode_rows(
            words_ptr, bytes_ptr, states_ptr, positions_ptr, ends_ptr, streams_ptr, head_ptr, digit_ptr, shift_ptr,
            matrix_ptr, segment, row, sigma_class, alive, LEVELS, PACKED_FROM, DIM, ROTARY, INTERLEAVED,
        )  # fmt: skip
        power = tl.load(scales_ptr + scale_at + layer * tokens + token, mask=alive, other=0).to(tl.int32)
        factor = tl.load(units_ptr + block, mask=alive, other=0.0) * tl.load(powers_ptr + power + 128)
        finish(
            low, high, factor, is_key, chunk * tokens + token, layer_at + layer, head,
            mean_at * 8 + (layer * HEADS + head) * DIM, alive,
            mean_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, cache_ptr, places_ptr,
            stride_block, stride_token, stride_head, stride_dim,
            DIM, HEADS, ROTARY, INTERLEAVED, MEAN, WEIGHT, ROPE, PAGE, UNIT,
        )  # fmt: skip


@triton.jit
def step_tile_kernel(
    bytes_ptr,
    halves_ptr,
    scales_ptr,
    segments_ptr,
    streams_ptr,
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
    unit,
    stride_block,
    stride_token,
    stride_head,
    stride_dim,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
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
    """Decode `ROWS` vectors of a segment whose digits are packed five to a byte.

    Of the fields, 1 says whether it is of K, 2 where its centroids are, 4 where its scales are.
    """
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    fields = segments_ptr + segment * _FIELDS
    rows = tl.load(fields).to(tl.int32)
    is_key = tl.load(fields + 1)
    centre_at = tl.load(fields + 2)
    scale_at = tl.load(fields + 4)
    chunk = tl.load(fields + 5)
    layer_at = tl.load(fields + 6)
    mean_at = tl.load(fields + 7)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    row = tl.where(alive, row, 0)
    layer = row // (tokens * HEADS)
    token = row // HEADS % tokens
    head = row % HEADS
    first, second = pair_columns(DIM, ROTARY, INTERLEAVED)
    low = tl.zeros((ROWS, DIM // 2), tl.float32)
    high = tl.zeros((ROWS, DIM // 2), tl.float32)
    for start in range(0, DIM, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # [ROWS, BLOCK]
        element = row[:, None] * DIM + column[None, :]
        byte = element // 5
        position = element - byte * 5
        index = tl.zeros((ROWS, BLOCK), tl.int32)
        for level in tl.static_range(LEVELS):
            digits_at = tl.load(streams_ptr + (segment * LEVELS + level) * _STREAM + 1)
            packed = tl.load(bytes_ptr + digits_at + byte, mask=alive[:, None], other=0)
            index = 3 * index + trit(packed, position) - 1
        magnitude = tl.abs(index)
        centre = tl.load(halves_ptr + centre_at + magnitude - 1, mask=magnitude > 0, other=0.0)
        value = tl.where(index < 0, -centre, centre)
        matrix = matrix_ptr + column[:, None] * DIM
        low = tl.dot(value, tl.load(matrix + first[None, :]), low)
        high = tl.dot(value, tl.load(matrix + second[None, :]), high)
    factor = tl.load(scales_ptr + scale_at + row, mask=alive, other=0.0).to(tl.float32) * unit
    finish(
        low, high, factor, is_key, chunk * tokens + token, layer_at + layer, head,
        mean_at * 8 + (layer * HEADS + head) * DIM, alive,
        mean_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, cache_ptr, places_ptr,
        stride_block, stride_token, stride_head, stride_dim,
        DIM, HEADS, ROTARY, INTERLEAVED, MEAN, WEIGHT, ROPE, PAGE, UNIT,
    )  # fmt: skip
