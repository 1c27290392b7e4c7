# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Device functions of rANS: symbols by compares, a 32-bit state, at most one 16-bit word a symbol.

They work on tensors of lanes of any shape. A lane that runs out of words reads zeros and counts on, so that nothing
outside of its words is ever touched and its final position tells that the stream was damaged; see `ref/rans.py`.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from kvstore.codecs.ref.classes import (
    CLASSES_PER_LEVEL,
    DIGIT_CLASS_MAX,
    DIGIT_CLASS_MIN,
    DIGIT_PARENTS,
    HEAD_CLASSES,
    HEAD_MAX,
    HEAD_SYMBOLS,
    SHIFTS,
    tables,
)

_PER_LEVEL = tl.constexpr(CLASSES_PER_LEVEL)
_DIGIT_MIN = tl.constexpr(DIGIT_CLASS_MIN)
_DIGIT_MAX = tl.constexpr(DIGIT_CLASS_MAX)
_PARENTS = tl.constexpr(DIGIT_PARENTS)
_HEAD_CLASSES = tl.constexpr(HEAD_CLASSES)
_HEAD_MAX = tl.constexpr(HEAD_MAX)
_HEAD_ROW = tl.constexpr(8)
_SHIFTS = tl.constexpr(SHIFTS)
_SHIFT_CLASSES = tl.constexpr(len(tables().shift))

UNIT = 1.0 / 256
"""Reconstructed values are kept in float16 as `UNIT` steps: exact below 8 steps, and the largest index has room."""
_UNIT = tl.constexpr(UNIT)
# A little more than a third, a ninth, ... of 2**32: what is cut off later must not make a digit smaller.
_THIRDS = tuple(-(-(1 << 32) // 3**n) + 256 for n in range(1, 6))
_T0, _T1, _T2, _T3, _T4 = (tl.constexpr(third) for third in _THIRDS)


def static_tables(device: torch.device) -> dict[str, torch.Tensor]:
    """Tables of the coder as kernels read them: `head_ptr`, `digit_ptr`, `shift_ptr`.

    Heads are the 8 inner bounds of a class, int32; digits both inner bounds in one int32; shifts float32 with a last
    row of zeros for all wider classes.
    """
    static = tables()
    head = static.head[:, 1:HEAD_SYMBOLS].astype(np.int32)
    digit = static.digit[:, 1].astype(np.int32) | static.digit[:, 2].astype(np.int32) << 16
    shift = np.concatenate([static.shift, np.zeros((1, SHIFTS), np.float32)])
    found = {"head_ptr": head, "digit_ptr": digit, "shift_ptr": shift}
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in found.items()}


@triton.jit
def advance(state, at, end, words_ptr, low, width, active):
    """Take a symbol out of every active lane; returns states and positions."""
    # Not masked by need: the address is known early, so the load runs beside the compares.
    word = tl.load(words_ptr + at, mask=active & (at < end), other=0).to(tl.uint32) & 0xFFFF
    following = width.to(tl.uint32) * (state >> 12) + (state & 0xFFF) - low.to(tl.uint32)
    short = following < 65536
    following = tl.where(short, (following << 16) | word, following)
    return tl.where(active, following, state), at + (active & short).to(tl.int32)


@triton.jit
def head_bounds(head_ptr, sigma_class):
    """The 8 inner bounds of the heads of classes; classes of wide coefficients are those of their heads."""
    digits = extra_digits(sigma_class)
    row = head_ptr + tl.maximum(sigma_class - _PER_LEVEL * digits, 0) * _HEAD_ROW
    # One load each, of what is shared by all columns where classes are.
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
    )


@triton.jit
def extra_digits(sigma_class):
    """Digits behind the head at level 0."""
    return tl.where(sigma_class < _HEAD_CLASSES, 0, (sigma_class - _HEAD_CLASSES + _PER_LEVEL) // _PER_LEVEL)


@triton.jit
def _narrow(slot, bound, symbol, low, high):
    """One compare: at or above the bound, or below it."""
    above = slot >= bound
    low = tl.where(above, bound, low)
    high = tl.where(above, high, tl.minimum(high, bound))
    return symbol + above.to(tl.int32), low, high


@triton.jit
def take_head(state, at, end, words_ptr, b1, b2, b3, b4, b5, b6, b7, b8, active):
    """Decode heads, -4 to 4; 0 where a lane is not active."""
    slot = (state & 0xFFF).to(tl.int32)
    symbol = tl.zeros_like(slot)
    low = tl.zeros_like(slot)
    high = tl.zeros_like(slot) + 4096
    symbol, low, high = _narrow(slot, b1, symbol, low, high)
    symbol, low, high = _narrow(slot, b2, symbol, low, high)
    symbol, low, high = _narrow(slot, b3, symbol, low, high)
    symbol, low, high = _narrow(slot, b4, symbol, low, high)
    symbol, low, high = _narrow(slot, b5, symbol, low, high)
    symbol, low, high = _narrow(slot, b6, symbol, low, high)
    symbol, low, high = _narrow(slot, b7, symbol, low, high)
    symbol, low, high = _narrow(slot, b8, symbol, low, high)
    state, at = advance(state, at, end, words_ptr, low, high - low, active)
    return tl.where(active, symbol - _HEAD_MAX, 0), state, at


@triton.jit
def take_digit(index, row_class, state, at, end, words_ptr, digit_ptr, active):
    """Refine indices by a digit each; `row_class` is the class at the parent's resolution."""
    clamped = tl.minimum(tl.maximum(row_class, _DIGIT_MIN), _DIGIT_MAX) - _DIGIT_MIN
    row = clamped * _PARENTS + tl.minimum(tl.abs(index), _PARENTS - 1)
    bounds = tl.load(digit_ptr + row)
    first = bounds & 0xFFFF
    second = bounds >> 16
    slot = (state & 0xFFF).to(tl.int32)
    is_first = slot >= first
    is_second = slot >= second
    low = tl.where(is_second, second, tl.where(is_first, first, 0))
    high = tl.where(is_second, 4096, tl.where(is_first, second, first))
    state, at = advance(state, at, end, words_ptr, low, high - low, active)
    digit = is_first.to(tl.int32) + is_second.to(tl.int32) - 1
    digit = tl.where(index < 0, -digit, digit)
    return tl.where(active, 3 * index + digit, index), state, at


@triton.jit
def trit(packed, position):
    """Digit `position` (0 to 4) of bytes: the fraction of `byte / 3**(position + 1)`, times three.

    The multiplication wraps at 2**32, which is what leaves the fraction.
    """
    third = tl.where(position == 0, _T0, tl.where(position == 1, _T1, tl.where(position == 2, _T2, _T3)))
    third = tl.where(position == 4, _T4, third).to(tl.uint32)
    fraction = packed.to(tl.uint32) * third
    return (((fraction >> 8) * 3) >> 24).to(tl.int32)


@triton.jit
def shifts_of(shift_ptr, sigma_class):
    """How far the centroids of cells 1, 2 and more lie towards zero, by class at the last level."""
    row = shift_ptr + tl.minimum(tl.maximum(sigma_class, 0), _SHIFT_CLASSES) * _SHIFTS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def centroid(index, shift1, shift2, shift3):
    """Values from indices, float16 in units."""
    magnitude = tl.abs(index)
    shift = tl.where(magnitude <= 1, shift1, tl.where(magnitude == 2, shift2, shift3))
    value = magnitude.to(tl.float32) - tl.where(magnitude > 0, shift, 0.0)
    return (tl.where(index < 0, -value, value) * _UNIT).to(tl.float16)
