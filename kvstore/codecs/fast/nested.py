"""rANS of nested indices, compiled: what `ref/rans.py` does, a few nanoseconds a symbol.

Rows are vectors: row `(layer * tokens + token) * heads + head` of `[layers, tokens, heads, n]`. The class of a
coefficient is `base[layer * heads + head, column] + offset[row]`. Lane `(r, c)` of `R x C` takes the elements of rows
`r, r + R, ...` and in each the columns `c, c + C, ...`.
"""

from typing import Any, TypeVar, cast

import numpy.typing as npt
from numba import njit

from kvstore.codecs.ref.classes import (
    CLASSES_PER_LEVEL,
    DIGIT_CLASS_MAX,
    DIGIT_CLASS_MIN,
    DIGIT_PARENTS,
    FREQUENCY_BITS,
    HEAD_CLASSES,
    HEAD_MAX,
    HEAD_SYMBOLS,
)

Array = npt.NDArray[Any]
F = TypeVar("F")
STATE_MIN = 1 << 16


def jit(function: F) -> F:
    """Compile without the interpreter lock, and keep the machine code."""
    return cast(F, njit(cache=True, nogil=True, error_model="numpy")(function))


@jit
def put(state: int, low: int, width: int, words: Array, at: int) -> tuple[int, int]:
    """Code one symbol; returns the state and where the next word (towards the front) goes."""
    if state >= width << (32 - FREQUENCY_BITS):
        at -= 1
        words[at] = state & 0xFFFF
        state >>= 16
    return ((state // width) << FREQUENCY_BITS) + state % width + low, at


@jit
def put_digit(
    state: int, digit: int, parent: int, row_class: int, table: Array, words: Array, at: int
) -> tuple[int, int]:
    """Code a digit -1, 0 or 1 behind its parent."""
    row = _digit_row(row_class, abs(parent))
    symbol = 1 - digit if parent < 0 else 1 + digit
    low = int(table[row, symbol])
    return put(state, low, int(table[row, symbol + 1]) - low, words, at)


@jit
def _digit_row(row_class: int, parent: int) -> int:
    clamped = min(max(row_class, DIGIT_CLASS_MIN), DIGIT_CLASS_MAX)
    return (clamped - DIGIT_CLASS_MIN) * DIGIT_PARENTS + min(parent, DIGIT_PARENTS - 1)


@jit
def _parent(index: int) -> int:
    """The cell of the level before: rounds to the nearest third."""
    return (index + 1) // 3


@jit
def _extra(sigma_class: int) -> int:
    if sigma_class < HEAD_CLASSES:
        return 0
    return (sigma_class - HEAD_CLASSES + CLASSES_PER_LEVEL) // CLASSES_PER_LEVEL


@jit
def encode_lane(
    lane: int,
    rows: int,
    columns: int,
    index: Array,
    base: Array,
    offset: Array,
    tokens: int,
    heads: int,
    level: int,
    head: Array,
    digit: Array,
    words: Array,
) -> tuple[int, int]:
    """Code a lane into the end of `words`; returns its state and where its first word is.

    Args:
        lane: Which one.
        rows: Lanes along the rows.
        columns: Lanes along the columns.
        index: `[rows, n]` int32, indices of this level.
        base: `[layers * heads, n]` int32.
        offset: `[rows]` int32.
        tokens: Tokens of a layer.
        heads: Heads of a layer.
        level: 0 for heads and extra digits, else one digit an element.
        head: Cumulative head table.
        digit: Cumulative digit table.
        words: uint16 scratch.
    """
    count, width = index.shape
    state, at = STATE_MIN, len(words)
    row_lane, column_lane = lane // columns, lane % columns
    last_row = row_lane + (count - 1 - row_lane) // rows * rows
    last_column = column_lane + (width - 1 - column_lane) // columns * columns
    for i in range(last_row, -1, -rows):
        block = i // (tokens * heads) * heads + i % heads
        for j in range(last_column, -1, -columns):
            c = int(base[block, j]) + int(offset[i])
            value = int(index[i, j])
            if level > 0:
                if c + CLASSES_PER_LEVEL * level >= 0:
                    parent = _parent(value)
                    row_class = c + CLASSES_PER_LEVEL * (level - 1)
                    state, at = put_digit(state, value - 3 * parent, parent, row_class, digit, words, at)
            elif c >= 0:
                extra = _extra(c)
                for n in range(extra):
                    parent = _parent(value)
                    row_class = c - CLASSES_PER_LEVEL * (n + 1)
                    state, at = put_digit(state, value - 3 * parent, parent, row_class, digit, words, at)
                    value = parent
                head_class = c - CLASSES_PER_LEVEL * extra
                low = int(head[head_class, value + HEAD_MAX])
                state, at = put(state, low, int(head[head_class, value + HEAD_MAX + 1]) - low, words, at)
    return state, at


@jit
def encode(
    index: Array,
    base: Array,
    offset: Array,
    tokens: int,
    heads: int,
    level: int,
    rows: int,
    columns: int,
    head: Array,
    digit: Array,
    scratch: Array,
    out: Array,
    states: Array,
    lengths: Array,
) -> int:
    """Code all lanes one after the other; returns the number of words in `out`, -1 where it is too short."""
    total = 0
    for lane in range(rows * columns):
        state, at = encode_lane(lane, rows, columns, index, base, offset, tokens, heads, level, head, digit, scratch)
        length = len(scratch) - at
        if total + length > len(out) or length > 0xFFFF:
            return -1
        out[total : total + length] = scratch[at:]
        states[lane], lengths[lane] = state, length
        total += length
    return total


@jit
def decode(
    index: Array,
    base: Array,
    offset: Array,
    tokens: int,
    heads: int,
    level: int,
    rows: int,
    columns: int,
    head: Array,
    digit: Array,
    words: Array,
    states: Array,
    at: Array,
    ends: Array,
) -> bool:
    """Decode all lanes in step; `index` holds the parents at levels above 0 and becomes the indices.

    Returns:
        Whether every lane ended where its coder began. A stream that no encoder wrote gives indices within the bounds
        of their classes and False.
    """
    count, width = index.shape
    sound = True
    for tile in range(0, count, rows):
        for step in range(0, width, columns):
            for i in range(tile, min(tile + rows, count)):
                block = i // (tokens * heads) * heads + i % heads
                lane = (i - tile) * columns
                for j in range(step, min(step + columns, width)):
                    c = int(base[block, j]) + int(offset[i])
                    value = int(index[i, j]) if level > 0 else 0
                    if level > 0:
                        digits, row_class = 1, c + CLASSES_PER_LEVEL * (level - 1)
                        if row_class < DIGIT_CLASS_MIN:
                            digits = 0
                    elif c < 0:
                        digits, row_class = 0, 0
                    else:
                        digits = _extra(c)
                        row_class = c - CLASSES_PER_LEVEL * digits
                        state = int(states[lane])
                        slot = state & 0xFFF
                        symbol = 0
                        for n in range(1, HEAD_SYMBOLS):
                            symbol += int(slot >= head[row_class, n])
                        low = int(head[row_class, symbol])
                        state = (int(head[row_class, symbol + 1]) - low) * (state >> FREQUENCY_BITS) + slot - low
                        if state < STATE_MIN:
                            if at[lane] < ends[lane]:
                                state = state << 16 | int(words[at[lane]])
                                at[lane] += 1
                            else:
                                sound = False
                        states[lane] = state
                        value = symbol - HEAD_MAX
                    for _ in range(digits):
                        row = _digit_row(row_class, abs(value))
                        state = int(states[lane])
                        slot = state & 0xFFF
                        symbol = int(slot >= digit[row, 1]) + int(slot >= digit[row, 2])
                        low = int(digit[row, symbol])
                        state = (int(digit[row, symbol + 1]) - low) * (state >> FREQUENCY_BITS) + slot - low
                        if state < STATE_MIN:
                            if at[lane] < ends[lane]:
                                state = state << 16 | int(words[at[lane]])
                                at[lane] += 1
                            else:
                                sound = False
                        states[lane] = state
                        value = 3 * value + (1 - symbol if value < 0 else symbol - 1)
                        row_class += CLASSES_PER_LEVEL
                    index[i, j] = value
                    lane += 1
    for lane in range(rows * columns):
        sound = sound and states[lane] == STATE_MIN and at[lane] == ends[lane]
    return sound
