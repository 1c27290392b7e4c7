"""The loops of `ref/ans.py`, compiled: same names, same arguments, same bytes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.fast.compiled import jit
from kvstore.codecs.ref.ans import FREQUENCY_BITS, STATE_MIN, TOTAL, Loops

Array = npt.NDArray[Any]


@jit
def tally(q: Array, symbols: int, rows: int, steps: int, inner: int) -> Array:
    """How often each symbol occurs with each table: `[tables, symbols]` int64."""
    counts = np.zeros((rows * inner, symbols), np.int64)
    element = 0
    for row in range(rows):
        for _ in range(steps):
            for c in range(inner):
                counts[row * inner + c, q[element]] += 1
                element += 1
    return counts


@jit
def frequencies(counts: Array) -> Array:
    """Frequencies that add up to 4,096 a table, at least 1 for what occurs: `[tables, symbols]` int32 of counts."""
    widths = np.zeros(counts.shape, np.int32)
    for table in range(len(counts)):
        total = counts[table].sum()
        left = TOTAL
        for symbol in range(counts.shape[1]):
            occurs = counts[table, symbol]
            if occurs:
                widths[table, symbol] = max(1, (occurs * TOTAL + total // 2) // total)
                left -= widths[table, symbol]
        while left:
            change = 1 if left > 0 else -1
            widths[table, np.argmax(widths[table])] += change
            left -= change
    return widths


@jit
def encode_lanes(
    q: Array, starts: Array, widths: Array, rows: int, steps: int, inner: int, lanes: int
) -> tuple[Array, Array, Array]:
    """Code every lane; see `ref/ans.py`."""
    # A lane's words are written from the end of its room towards the front, for they are read the other way round.
    room = -(-len(q) // lanes)
    words = np.empty(room * lanes, np.uint16)
    begins = np.arange(1, lanes + 1) * room
    states = np.full(lanes, STATE_MIN, np.int64)
    element = len(q)
    for row in range(rows - 1, -1, -1):
        for _ in range(steps):
            for c in range(inner - 1, -1, -1):
                element -= 1
                lane = element & (lanes - 1)
                table = row * inner + c
                width = np.int64(widths[table, q[element]])
                state = states[lane]
                if state >= width << (32 - FREQUENCY_BITS):
                    begins[lane] -= 1
                    words[begins[lane]] = state & 0xFFFF
                    state >>= 16
                quotient = state // width
                states[lane] = state + quotient * (TOTAL - width) + starts[table, q[element]]
    taken = np.arange(1, lanes + 1) * room - begins
    at = 0
    for lane in range(lanes):
        for place in range(begins[lane], begins[lane] + taken[lane]):
            words[at] = words[place]
            at += 1
    return states, taken, words[:at].copy()


@jit
def _guesses(offsets: Array, starts: Array, widths: Array, bits: int) -> Array:
    """Where to look for a slot, by its upper bits: the entry within its table that holds the first such slot."""
    guess = np.empty((len(offsets) - 1) << bits, np.uint8)
    for table in range(len(offsets) - 1):
        entry = offsets[table]
        for upper in range(1 << bits):
            while upper << (FREQUENCY_BITS - bits) >= starts[entry] + widths[entry]:
                entry += 1
            guess[table << bits | upper] = entry - offsets[table]
    return guess


@jit
def decode_lanes(
    states: Array,
    ends: Array,
    words: Array,
    offsets: Array,
    symbols: Array,
    starts: Array,
    widths: Array,
    rows: int,
    steps: int,
    inner: int,
    out: Array,
) -> bool:
    """Undo `encode_lanes`; see `ref/ans.py`. Neither `words` nor the tables are read outside whatever they hold."""
    lanes = len(states)
    bits = 0
    while bits < FREQUENCY_BITS and (len(offsets) - 1) << (bits + 1) <= len(out):
        bits += 1
    guess = _guesses(offsets, starts, widths, bits)
    at = np.zeros(lanes, np.int64)
    at[1:] = ends[:-1]
    element = 0
    for row in range(rows):
        for _ in range(steps):
            for c in range(inner):
                lane = element & (lanes - 1)
                state = states[lane]
                slot = state & (TOTAL - 1)
                table = row * inner + c
                entry = offsets[table] + guess[table << bits | slot >> (FREQUENCY_BITS - bits)]
                # The last entry of a table ends at the total, so this ends within it.
                while slot >= starts[entry] + widths[entry]:
                    entry += 1
                out[element] = symbols[entry]
                element += 1
                state = (state >> FREQUENCY_BITS) * widths[entry] + slot - starts[entry]
                if state < STATE_MIN:
                    if at[lane] == ends[lane]:
                        return False
                    state = state << 16 | np.int64(words[at[lane]])
                    at[lane] += 1
                states[lane] = state
    return bool((states == STATE_MIN).all() and (at == ends).all())


COMPILED = Loops(tally, frequencies, encode_lanes, decode_lanes)
"""The loops of this module."""
