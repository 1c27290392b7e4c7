"""Order-0 rANS whose frequency tables are part of every segment, in lanes that decode side by side.

A segment, little-endian:

    uint8   logarithm (base 2) of the number of lanes
    uint8   1, the version of this format
    uint16  symbols of the alphabet
    uint32  state of each lane from which decoding starts
    uint16  words of each lane
    bytes   tables: for each a bitmap of the symbols that occur (bit 0 first), then for each the 12-bit frequencies of
            all of them but the last, whose frequency is what is left of 4,096; two frequencies in three bytes
    uint16  words, lane by lane

Element `i` belongs to lane `i % lanes`. A state is at least `2**16` and below `2**32`. Coding a symbol with frequency
`f` and start `s` (the sum of the frequencies before it) moves the lower 16 bits of the state out as a word if the state
is at least `f << 20`, and makes it `(x // f << 12) + x % f + s`; elements are coded from the last to the first, so that
they are decoded in order. Every lane begins and so must end with the state `2**16`.

The loops below are slow and plain; `fast/ans.py` has the same ones compiled. Source: Duda, arXiv 1311.2540; Giesen,
arXiv 1402.3392 (interleaving). KVServe uses nvCOMP's ANS and CacheGen an arithmetic coder in this place.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FREQUENCY_BITS = 12
TOTAL = 1 << FREQUENCY_BITS
STATE_MIN = 1 << 16
LANE_SYMBOLS_MIN = 1024
LANE_SYMBOLS_MAX = 65535
LANE_BYTES = 6
LANES_SHARE = 200
"""Lanes are added as long as their states and counts stay below this part (one in 200) of the words."""
LANES_LOG_MAX = 20
VERSION = 1
HEADER = np.dtype([("lanes_log", "<u1"), ("version", "<u1"), ("symbols", "<u2")])


class Plan(NamedTuple):
    """Which table an element has: `(row * steps + step) * inner + c` has the table `row * inner + c`."""

    rows: int
    steps: int
    inner: int

    @property
    def elements(self) -> int:
        """Elements of the plane."""
        return self.rows * self.steps * self.inner

    @property
    def tables(self) -> int:
        """Tables of the plane."""
        return self.rows * self.inner


class Tables(NamedTuple):
    """Tables for decoding: entries `offsets[t]` to `offsets[t + 1]` of the other arrays are those of table `t`."""

    offsets: Array
    symbols: Array
    starts: Array
    widths: Array


class Loops(NamedTuple):
    """The loops over elements, plain or compiled."""

    tally: Callable[[Array, int, int, int, int], Array]
    frequencies: Callable[[Array], Array]
    encode_lanes: Callable[[Array, Array, Array, int, int, int, int], tuple[Array, Array, Array]]
    decode_lanes: Callable[[Array, Array, Array, Array, Array, Array, Array, int, int, int, Array], bool]


def plan_of(shape: Sequence[int], tables: str) -> Plan:
    """Plan of a plane `[layers, tokens, ...]` with one table for the `plane`, each `layer` or each `channel` of one."""
    elements = math.prod(shape)
    if tables == "plane":
        return Plan(1, elements, 1)
    if tables == "layer":
        return Plan(shape[0], elements // shape[0], 1)
    return Plan(shape[0], shape[1], math.prod(shape[2:]))


def lanes_of(elements: int, words_bytes: float) -> int:
    """Lanes of a segment, a power of two: as many as cost little, at least as many as a count of 16 bits needs."""
    lanes = 1
    while 2 * lanes * LANE_SYMBOLS_MIN <= elements and 2 * lanes * LANE_BYTES * LANES_SHARE <= words_bytes:
        lanes *= 2
    while lanes * LANE_SYMBOLS_MAX < elements:
        lanes *= 2
    return lanes


def bound_bytes(plan: Plan, symbols: int) -> int:
    """Most bytes that a segment can take: one word a symbol."""
    frequencies = plan.tables * (min(symbols, plan.steps) - 1)
    tables = plan.tables * _bitmap_bytes(symbols) + _packed_bytes(frequencies)
    return HEADER.itemsize + LANE_BYTES * lanes_of(plan.elements, math.inf) + tables + 2 * plan.elements


def encode(q: Array, symbols: int, plan: Plan, loops: Loops) -> Array:
    """Segment of a plane.

    Args:
        q: `[elements]` uint8, each below `symbols`.
        symbols: Size of the alphabet.
        plan: Which table each element has.
        loops: How to run over the elements.

    Returns:
        `[bytes]` uint8.
    """
    counts = loops.tally(q, symbols, *plan)
    widths = loops.frequencies(counts)
    starts = widths.cumsum(1) - widths
    bits = float((counts * np.log2(TOTAL / np.maximum(widths, 1))).sum())
    lanes = lanes_of(plan.elements, bits / 8)
    states, taken, words = loops.encode_lanes(q, starts, widths, *plan, lanes)
    header = np.array([(lanes.bit_length() - 1, VERSION, symbols)], HEADER)
    parts = [header, states.astype("<u4"), taken.astype("<u2"), pack_tables(widths), words.astype("<u2")]
    return np.concatenate([part.view(np.uint8) for part in parts])


def decode(data: Array, symbols: int, plan: Plan, loops: Loops) -> Array:
    """Undo `encode`; every length is checked before it is used.

    Raises:
        ValueError: The bytes are no segment of such a plane.
    """
    _require(len(data) >= HEADER.itemsize, "its header is cut off")
    header = data[: HEADER.itemsize].view(HEADER)[0]
    _require(header["version"] == VERSION and header["symbols"] == symbols, "its header is not that of this plane")
    _require(header["lanes_log"] <= LANES_LOG_MAX, "it has too many lanes")
    lanes = 1 << int(header["lanes_log"])
    at = HEADER.itemsize + LANE_BYTES * lanes
    _require(lanes <= lanes_of(plan.elements, math.inf) and at <= len(data), "it has too many lanes")
    states = data[HEADER.itemsize : at - 2 * lanes].copy().view("<u4").astype(np.int64)
    _require(bool((states >= STATE_MIN).all()), "a state is too small")
    ends = data[at - 2 * lanes : at].copy().view("<u2").astype(np.int64).cumsum()
    tables, used = unpack_tables(data[at:], plan.tables, symbols)
    words = data[at + used :].copy()
    _require(len(words) == 2 * int(ends[-1]), f"it has {len(words)} bytes of words and says {2 * int(ends[-1])}")
    out = np.empty(plan.elements, np.uint8)
    whole = loops.decode_lanes(states, ends, words.view("<u2"), *tables, *plan, out)
    _require(whole, "a lane does not end where it began")
    return out


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _bitmap_bytes(symbols: int) -> int:
    return -(-symbols // 8)


def _packed_bytes(frequencies: int) -> int:
    return (3 * frequencies + 1) // 2


def pack_tables(widths: Array) -> Array:
    """Tables as a segment has them, `[bytes]` uint8, from frequencies `[tables, symbols]`."""
    present = widths > 0
    bitmap = np.packbits(present, axis=1, bitorder="little")
    last = widths.shape[1] - 1 - present[:, ::-1].argmax(1)
    present[np.arange(len(present)), last] = False
    stored = widths[present]
    pairs = np.concatenate([stored, np.zeros(len(stored) % 2, stored.dtype)]).reshape(-1, 2)
    low, high = pairs[:, 0], pairs[:, 1]
    packed = np.stack([low & 0xFF, low >> 8 | (high & 0xF) << 4, high >> 4], 1).astype(np.uint8).ravel()
    return np.concatenate([bitmap.ravel(), packed[: _packed_bytes(len(stored))]])


def unpack_tables(data: Array, tables: int, symbols: int) -> tuple[Tables, int]:
    """Undo `pack_tables`.

    Args:
        data: `[bytes]` uint8 that begin with the tables.
        tables: Number of tables.
        symbols: Size of the alphabet.

    Returns:
        The tables, and the bytes that they take.

    Raises:
        ValueError: They are cut off, a table is empty, or its frequencies do not add up.
    """
    size = tables * _bitmap_bytes(symbols)
    _require(len(data) >= size, "its tables are cut off")
    bits = np.unpackbits(data[:size].reshape(tables, -1), axis=1, bitorder="little")
    _require(not bits[:, symbols:].any(), "a table has symbols beyond the alphabet")
    entries = bits.sum(1, dtype=np.int64)
    _require(bool(entries.all()), "a table is empty")
    offsets = np.concatenate([np.zeros(1, np.int64), entries.cumsum()])
    used = size + _packed_bytes(int(offsets[-1]) - tables)
    _require(len(data) >= used, "its tables are cut off")
    widths = np.zeros(offsets[-1], np.int32)
    stored = np.ones(len(widths), bool)
    stored[offsets[1:] - 1] = False
    widths[stored] = _unpack_frequencies(data[size:used], int(offsets[-1]) - tables)
    _require(bool((widths[stored] > 0).all()), "a frequency is zero")
    widths[offsets[1:] - 1] = TOTAL - np.add.reduceat(widths, offsets[:-1])
    _require(bool((widths > 0).all()), "frequencies add up to more than they may")
    starts = widths.cumsum() - widths - TOTAL * np.arange(tables).repeat(entries)
    return Tables(offsets, bits.nonzero()[1].astype(np.uint8), starts.astype(np.int32), widths), used


def _unpack_frequencies(data: Array, frequencies: int) -> Array:
    """12-bit numbers, `[frequencies]` int32."""
    triples = np.concatenate([data, np.zeros(-len(data) % 3, np.uint8)]).reshape(-1, 3).astype(np.int32)
    pairs = np.stack([triples[:, 0] | (triples[:, 1] & 0xF) << 8, triples[:, 1] >> 4 | triples[:, 2] << 4], 1).ravel()
    _require(not pairs[frequencies:].any(), "bits after the tables are not zero")
    return pairs[:frequencies]


def tally(q: Array, symbols: int, rows: int, steps: int, inner: int) -> Array:
    """How often each symbol occurs with each table: `[tables, symbols]` int64."""
    counts = np.zeros((rows * inner, symbols), np.int64)
    for element, symbol in enumerate(q):
        counts[element // (steps * inner) * inner + element % inner, symbol] += 1
    return counts


def frequencies(counts: Array) -> Array:
    """Frequencies that add up to 4,096 a table, at least 1 for what occurs: `[tables, symbols]` int32 of counts.

    Shares are rounded to the nearest; the most frequent symbol, at equal ones the first, gives or takes the rest one
    by one.
    """
    widths = np.zeros(counts.shape, np.int32)
    for table, row in enumerate(counts.tolist()):
        total = sum(row)
        found = [max(1, (occurs * TOTAL + total // 2) // total) if occurs else 0 for occurs in row]
        while sum(found) != TOTAL:
            found[found.index(max(found))] += 1 if sum(found) < TOTAL else -1
        widths[table] = found
    return widths


def encode_lanes(
    q: Array, starts: Array, widths: Array, rows: int, steps: int, inner: int, lanes: int
) -> tuple[Array, Array, Array]:
    """Code every lane.

    Args:
        q: `[elements]` uint8.
        starts: `[tables, symbols]`: the sum of the frequencies before a symbol.
        widths: `[tables, symbols]`: the frequency of a symbol.
        rows: See `Plan`, as `steps` and `inner`.
        steps: Steps of a row.
        inner: Tables of a row.
        lanes: Number of lanes.

    Returns:
        States `[lanes]`, words of each lane `[lanes]`, and all words `[words]` uint16, lane by lane.
    """
    states: list[int] = []
    taken: list[int] = []
    words: list[int] = []
    for lane in range(lanes):
        state = STATE_MIN
        found: list[int] = []
        for element in reversed(range(lane, rows * steps * inner, lanes)):
            table = element // (steps * inner) * inner + element % inner
            start, width = int(starts[table, q[element]]), int(widths[table, q[element]])
            if state >= width << (32 - FREQUENCY_BITS):
                found.append(state & 0xFFFF)
                state >>= 16
            state = (state // width << FREQUENCY_BITS) + state % width + start
        states.append(state)
        taken.append(len(found))
        words += reversed(found)
    return np.array(states, np.int64), np.array(taken, np.int64), np.array(words, np.uint16)


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
    """Undo `encode_lanes`.

    Args:
        states: `[lanes]` int64.
        ends: `[lanes]` int64: where each lane's words end.
        words: `[words]` uint16.
        offsets: See `Tables`, as the next three.
        symbols: Symbol of each entry.
        starts: Start of each entry.
        widths: Frequency of each entry.
        rows: See `Plan`, as `steps` and `inner`.
        steps: Steps of a row.
        inner: Tables of a row.
        out: `[elements]` uint8 to write.

    Returns:
        Whether every lane took exactly its words and ended in the state that coding begins with.
    """
    for lane in range(len(states)):
        state, at = int(states[lane]), int(ends[lane - 1]) if lane else 0
        for element in range(lane, rows * steps * inner, len(states)):
            table = element // (steps * inner) * inner + element % inner
            slot = state % TOTAL
            entry = max(e for e in range(offsets[table], offsets[table + 1]) if starts[e] <= slot)
            out[element] = symbols[entry]
            state = (state >> FREQUENCY_BITS) * int(widths[entry]) + slot - int(starts[entry])
            if state < STATE_MIN:
                if at == ends[lane]:
                    return False
                state = state << 16 | int(words[at])
                at += 1
        if state != STATE_MIN or at != ends[lane]:
            return False
    return True


PLAIN = Loops(tally, frequencies, encode_lanes, decode_lanes)
"""The loops of this module."""
