# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""What every decode kernel ends with: unweigh, add the mean, rotate, and scatter into the pages of a cache.

A tile of vectors comes as two halves, the first and the second dimensions of the rotary pairs, so that a rotation
needs no exchange between columns; which dimensions these are follows from `pair_columns`.
"""

import triton
import triton.language as tl


@triton.jit
def pair_columns(DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Dimensions of the two halves, `[DIM / 2]` each: partners in the rotary pairs, what is not rotated behind them."""
    column = tl.arange(0, DIM // 2)
    if INTERLEAVED:
        return 2 * column, 2 * column + 1
    if ROTARY == DIM:
        return column, column + DIM // 2
    return (
        tl.where(column < ROTARY // 2, column, column + ROTARY // 2),
        tl.where(column < ROTARY // 2, column + ROTARY // 2, column + DIM // 2),
    )


@triton.jit
def _rotate(
    low,
    high,
    cos_ptr,
    sin_ptr,
    row,
    used,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Apply the embedding of table rows `[rows]` to both halves."""
    first, second = pair_columns(DIM, ROTARY, INTERLEAVED)
    at = (row * ROTARY)[:, None]
    # [rows, DIM / 2] each
    first_mask = used[:, None] & (first < ROTARY)[None, :]
    second_mask = used[:, None] & (second < ROTARY)[None, :]
    cos_low = tl.load(cos_ptr + at + first[None, :], mask=first_mask, other=1.0)
    sin_low = tl.load(sin_ptr + at + first[None, :], mask=first_mask, other=0.0)
    cos_high = tl.load(cos_ptr + at + second[None, :], mask=second_mask, other=1.0)
    sin_high = tl.load(sin_ptr + at + second[None, :], mask=second_mask, other=0.0)
    return low * cos_low + high * sin_low, high * cos_high + low * sin_high


@triton.jit
def finish(
    low,
    high,
    factor,
    is_key,
    slot_row,
    layer_row,
    head,
    mean_at,
    used,
    mean_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    cache_ptr,
    places_ptr,
    stride_block,
    stride_token,
    stride_head,
    stride_dim,
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
    """Make values of a tile of vectors and write them.

    Of the arguments, these are tiles and what belongs to their rows; the others are the same for all:
        low: `[rows, DIM / 2]` float32, first half of each vector.
        high: The second half.
        factor: `[rows]` float32 that multiplies them.
        is_key: Whether this tile is of K, a scalar.
        slot_row: `[rows]` int64, `chunk * tokens + token`: row of the slots and of the rotary tables.
        layer_row: `[rows]` int64, `plane * layers + layer`: row of the places and of the weights.
        head: `[rows]`.
        mean_at: `[rows]` int64, where the mean of this layer and head begins, a multiple of 8.
        used: `[rows]` bool.
    """
    first, second = pair_columns(DIM, ROTARY, INTERLEAVED)
    low *= factor[:, None]
    high *= factor[:, None]
    if WEIGHT:
        at = ((layer_row * HEADS + head) * DIM)[:, None]
        low /= tl.load(weight_ptr + at + first[None, :], mask=used[:, None], other=1.0)
        high /= tl.load(weight_ptr + at + second[None, :], mask=used[:, None], other=1.0)
    if MEAN:
        at = mean_at[:, None]
        low += tl.load(mean_ptr + at + first[None, :], mask=used[:, None], other=0.0).to(tl.float32)
        high += tl.load(mean_ptr + at + second[None, :], mask=used[:, None], other=0.0).to(tl.float32)
    if ROPE:  # noqa: SIM102 # One is known when the kernel is compiled, the other when it runs.
        if is_key != 0:
            low, high = _rotate(low, high, cos_ptr, sin_ptr, slot_row, used, DIM, ROTARY, INTERLEAVED)
    slot = tl.load(slots_ptr + slot_row, mask=used, other=-1)
    # In units of 16 bytes where they are aligned, so that the compiler knows that stores may be wide.
    place = tl.load(places_ptr + layer_row, mask=used, other=0) * UNIT
    at = place + (slot // PAGE) * stride_block + (slot % PAGE) * stride_token + head.to(tl.int64) * stride_head
    written = (used & (slot >= 0))[:, None]
    page = cache_ptr + at[:, None]
    dtype = cache_ptr.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, DIM)
        tl.store(page + (column * stride_dim)[None, :], tl.interleave(low, high).to(dtype), mask=written)
    else:
        tl.store(page + (first * stride_dim)[None, :], low.to(dtype), mask=written)
        tl.store(page + (second * stride_dim)[None, :], high.to(dtype), mask=written)
