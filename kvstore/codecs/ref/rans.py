"""rANS of nested indices, a vector of lanes at a time: slow, plain, and what `fast/` and `kernels/` must equal.

State is 32 bits, in `[2**16, 2**32)`; a symbol of frequency `f` (of 4096) that starts at `c` takes the state `x` to
`x // f * 4096 + x % f + c`, after at most one 16-bit word went out. A decoder goes the other way and must end at 2**16
with no word left.
"""

import torch

from kvstore.codecs.ref.classes import (
    CLASSES_PER_LEVEL,
    FREQUENCY_BITS,
    HEAD_MAX,
    HEAD_SYMBOLS,
    digit_row,
    extra_digits,
    tables,
)

STATE_MIN = 1 << 16
Interval = tuple[int, int]


def symbols_of(index: int, sigma_class: int, level: int) -> list[Interval]:
    """Start and frequency of every symbol of one element, in the order of decoding."""
    if sigma_class + CLASSES_PER_LEVEL * level < 0:
        return []
    found: list[Interval] = []
    extra = extra_digits(sigma_class) if level == 0 else 1
    top = sigma_class + CLASSES_PER_LEVEL * (level - 1)
    for n in range(extra):
        parent = (index + 1) // 3
        row = tables().digit[digit_row(top - CLASSES_PER_LEVEL * n, abs(parent))]
        digit = index - 3 * parent
        found.append(_interval(row, 1 - digit if parent < 0 else 1 + digit))
        index = parent
    if level == 0:
        row = tables().head[sigma_class - CLASSES_PER_LEVEL * extra]
        found.append(_interval(row, index + HEAD_MAX))
    return found[::-1]


def _interval(row: object, symbol: int) -> Interval:
    low, high = int(row[symbol]), int(row[symbol + 1])  # type: ignore[index]
    return low, high - low


def lane_elements(rows: int, width: int, lane: int, row_lanes: int, column_lanes: int) -> list[tuple[int, int]]:
    """Row and column of a lane's elements, in the order of decoding."""
    return [
        (i, j)
        for i in range(lane // column_lanes, rows, row_lanes)
        for j in range(lane % column_lanes, width, column_lanes)
    ]


def encode_lane(symbols: list[Interval]) -> tuple[int, list[int]]:
    """State and words, in the order of decoding, of a lane's symbols."""
    state, words = STATE_MIN, []
    for low, width in reversed(symbols):
        if state >= width << (32 - FREQUENCY_BITS):
            words.append(state & 0xFFFF)
            state >>= 16
        state = (state // width << FREQUENCY_BITS) + state % width + low
    return state, words[::-1]


def encode(
    index: torch.Tensor, classes: torch.Tensor, level: int, row_lanes: int, column_lanes: int
) -> tuple[list[int], list[list[int]]]:
    """States and words of all lanes.

    Args:
        index: `[rows, n]` integers, indices of the level.
        classes: `[rows, n]` integers, at level 0.
        level: 0 for heads and extra digits, else one digit an element.
        row_lanes: Lanes along the rows.
        column_lanes: Lanes along the columns.
    """
    rows, width = index.shape
    values, levels0 = index.tolist(), classes.tolist()
    coded = []
    for lane in range(row_lanes * column_lanes):
        elements = lane_elements(rows, width, lane, row_lanes, column_lanes)
        coded.append(encode_lane([s for i, j in elements for s in symbols_of(values[i][j], levels0[i][j], level)]))
    return [state for state, _ in coded], [words for _, words in coded]


def decode(
    states: list[int],
    words: list[list[int]],
    parents: torch.Tensor,
    classes: torch.Tensor,
    level: int,
    row_lanes: int,
    column_lanes: int,
) -> torch.Tensor:
    """Indices of a level from its parents (zeros at level 0), `[rows, n]` int32.

    Raises:
        ValueError: A lane does not end where its coder began.
    """
    index = parents.int().clone()
    rows, width = index.shape
    for lane in range(row_lanes * column_lanes):
        reader = _Reader(states[lane], words[lane])
        for i, j in lane_elements(rows, width, lane, row_lanes, column_lanes):
            index[i, j] = reader.element(int(classes[i, j]), int(index[i, j]), level)
        if reader.state != STATE_MIN or reader.words:
            raise ValueError(f"lane {lane} does not end where its coder began")
    return index


class _Reader:
    """One lane being decoded."""

    def __init__(self, state: int, words: list[int]) -> None:
        self.state = state
        self.words = list(words)

    def element(self, sigma_class: int, parent: int, level: int) -> int:
        if sigma_class + CLASSES_PER_LEVEL * level < 0:
            return 3 * parent if level else 0
        if level:
            return self._digit(parent, sigma_class + CLASSES_PER_LEVEL * (level - 1))
        extra = extra_digits(sigma_class)
        row_class = sigma_class - CLASSES_PER_LEVEL * extra
        index = self._symbol(tables().head[row_class], HEAD_SYMBOLS) - HEAD_MAX
        for n in range(extra):
            index = self._digit(index, row_class + CLASSES_PER_LEVEL * n)
        return index

    def _digit(self, parent: int, row_class: int) -> int:
        symbol = self._symbol(tables().digit[digit_row(row_class, abs(parent))], 3)
        return 3 * parent + (1 - symbol if parent < 0 else symbol - 1)

    def _symbol(self, row: object, symbols: int) -> int:
        slot = self.state & ((1 << FREQUENCY_BITS) - 1)
        symbol = sum(slot >= int(row[n]) for n in range(1, symbols))  # type: ignore[index]
        low, width = _interval(row, symbol)
        self.state = width * (self.state >> FREQUENCY_BITS) + slot - low
        if self.state < STATE_MIN:
            if not self.words:
                raise ValueError("a lane has too few words")
            self.state = self.state << 16 | self.words.pop(0)
        return symbol
