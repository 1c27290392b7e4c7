"""rANS of nested indices, compiled: what `ref/rans.py` does, a few nanoseconds a symbol.

Rows are vectors: row `(layer * tokens + token) * heads + head` of `[layers, tokens, heads, n]`. The class of a
coefficient is `base[layer * heads + head, column] + offset[row]`. Lane `(r, c)` of `R x C` takes the elements of rows
`r, r + R, ...` and in each the columns `c, c + C, ...`.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.fast.compiled import inlined, jit
from kvstore.codecs.ref.classes import (
    CLASSES_PER_LEVEL,
    DIGIT_CLASS_MAX,
    DIGIT_CLASS_MIN,
    DIGIT_PARENTS,
    FREQUENCY_BITS,
    HEAD_CLASSES,
    HEAD_MAX,
    HEAD_SYMBOLS,
    tables,
)

Array = npt.NDArray[Any]
STATE_MIN = 1 << 16
U64 = np.uint64
_BITS = U64(FREQUENCY_BITS)
_SLOT = U64((1 << FREQUENCY_BITS) - 1)


@inlined
def put(state: int, low: int, width: int, words: Array, at: int) -> tuple[int, int]:
    """Code one symbol; returns the state and where the next word (towards the front) goes."""
    if state >= width << (32 - FREQUENCY_BITS):
        at -= 1
        words[at] = state & 0xFFFF
        state >>= 16
    return ((state // width) << FREQUENCY_BITS) + state % width + low, at


@inlined
def put_digit(
    state: int, digit: int, parent: int, row_class: int, table: Array, words: Array, at: int
) -> tuple[int, int]:
    """Code a digit -1, 0 or 1 behind its parent."""
    row = _digit_row(row_class, abs(parent))
    symbol = 1 - digit if parent < 0 else 1 + digit
    low = int(table[row, symbol])
    return put(state, low, int(table[row, symbol + 1]) - low, words, at)


@inlined
def _digit_row(row_class: int, parent: int) -> int:
    clamped = min(max(row_class, DIGIT_CLASS_MIN), DIGIT_CLASS_MAX)
    return (clamped - DIGIT_CLASS_MIN) * DIGIT_PARENTS + min(parent, DIGIT_PARENTS - 1)


@inlined
def _parent(index: int) -> int:
    """The cell of the level before: rounds to the nearest third."""
    return (index + 1) // 3


@inlined
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


@inlined
def take(state: Any, low: Any, width: Any, words: Array, at: Any, end: Any) -> tuple[Any, Any]:
    """Undo `put`. A lane without a word left ends beyond its end, which no sound one does."""
    state = U64(width) * (state >> _BITS) + (state & _SLOT) - U64(low)
    if state < U64(STATE_MIN):
        if at >= end:
            return state, end + 1
        state = state << U64(16) | U64(words[U64(at)])
        at += 1
    return state, at


@inlined
def take_head(
    state: Any, head_class: Any, head: Array, slots: Array, words: Array, at: Any, end: Any
) -> tuple[Any, Any, Any]:
    """Decode a head: the state, where the next word is, and the index."""
    symbol = U64(slots[U64(head_class) << _BITS | (state & _SLOT)])
    row = U64(head_class) * U64(HEAD_SYMBOLS + 1) + symbol
    state, at = take(state, head[row], head[row + U64(1)] - head[row], words, at, end)
    return state, at, np.int64(symbol) - HEAD_MAX


@inlined
def take_digit(
    state: Any, parent: Any, row_class: Any, digit: Array, words: Array, at: Any, end: Any
) -> tuple[Any, Any, Any]:
    """Decode a digit behind its parent: the state, where the next word is, and the index."""
    row = U64(4 * _digit_row(row_class, abs(parent)))
    slot = state & _SLOT
    symbol = U64(slot >= digit[row + U64(1)]) + U64(slot >= digit[row + U64(2)])
    low = digit[row + symbol]
    state, at = take(state, low, digit[row + symbol + U64(1)] - low, words, at, end)
    towards = np.int64(symbol) - 1
    return state, at, 3 * parent + (-towards if parent < 0 else towards)


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
    slots: Array,
    digit: Array,
    words: Array,
    states: Array,
    at: Array,
    ends: Array,
) -> bool:
    """Decode all lanes in step; `index` holds the parents at levels above 0 and becomes the indices.

    The tables are flat, uint32, and all indices into them unsigned, which spares the loop every look at signs.

    Returns:
        Whether every lane ended where its coder began. A stream that no encoder wrote gives indices within the bounds
        of their classes and False.
    """
    count, width = index.shape
    for tile in range(0, count, rows):
        for step in range(0, width, columns):
            for i in range(tile, min(tile + rows, count)):
                block = i // (tokens * heads) * heads + i % heads
                first = (i - tile) * columns - step
                for j in range(step, min(step + columns, width)):
                    row_class: Any = np.int64(base[U64(block), U64(j)]) + offset[i] + CLASSES_PER_LEVEL * (level - 1)
                    if row_class < DIGIT_CLASS_MIN:
                        continue
                    lane = U64(first + j)
                    state, word, end = states[lane], at[lane], ends[lane]
                    if level > 0:
                        value: Any = np.int64(index[U64(i), U64(j)])
                        digits = 1
                    else:
                        digits = _extra(row_class + CLASSES_PER_LEVEL)
                        row_class += CLASSES_PER_LEVEL * (1 - digits)
                        state, word, value = take_head(state, row_class, head, slots, words, word, end)
                    for _ in range(digits):
                        state, word, value = take_digit(state, value, row_class, digit, words, word, end)
                        row_class += CLASSES_PER_LEVEL
                    states[lane] = state
                    at[lane] = word
                    index[U64(i), U64(j)] = value
    sound = True
    for n in range(rows * columns):
        sound = sound and states[n] == U64(STATE_MIN) and at[n] == ends[n]
    return sound


@lru_cache(maxsize=1)
def decode_tables() -> tuple[Array, Array, Array]:
    """The static tables as `decode` reads them: heads, their slots, digits."""
    static = tables()
    return static.head.ravel().astype(np.uint32), static.slots.ravel(), static.digit.ravel().astype(np.uint32)
