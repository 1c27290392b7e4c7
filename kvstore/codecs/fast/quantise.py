"""Quantisation of rows on a nested grid, compiled: indices, and the class that each row is coded with."""

import math

import numpy as np

from kvstore.codecs.fast.compiled import jit
from kvstore.codecs.fast.nested import Array
from kvstore.codecs.ref.classes import CLASS_MAX, CLASSES_PER_LEVEL, UNIT_CLASS
from kvstore.codecs.ref.nested import CLASS_MIN, COST_MAX

# What a squared error of one step costs in bits where rate and distortion are traded at a Gaussian's slope.
_ERROR_BITS = 6 / math.log(2)
# Where clipping costs no more than this, no wider class can gain anything.
_CLIPPED_BITS = 2.0
# Share of the energy that makes a value an outlier.
_OUTLIER = 0.25


@jit
def row_cost(x: Array, step: float, classes: Array, offset: int, costs: Array, limits: Array, finer: float) -> float:
    """Bits of a row at level 0 with its classes shifted by `offset`, clipping included as the bits it is worth.

    Args:
        x: `[n]` float32.
        step: Step of the row at level 0.
        classes: `[n]` int32.
        offset: Shift to try.
        costs: Bits by class and magnitude.
        limits: Largest finest index by class, from `CLASS_MIN` on.
        finer: Steps of the finest level in one of level 0.
    """
    bits = 0.0
    for j in range(len(x)):
        c = classes[j] + offset
        y = abs(x[j]) / step
        if c > CLASS_MAX:
            return np.inf
        limit = (limits[max(c, CLASS_MIN) - CLASS_MIN] + 0.5) / finer
        if y > limit:
            bits += _ERROR_BITS * (y - limit) ** 2
            y = limit
        if c >= 0:
            magnitude = int(y + 0.5)
            if magnitude < COST_MAX and costs[c, magnitude] < 1e9:
                bits += costs[c, magnitude]
            else:
                sigma = 3.0 ** ((c - UNIT_CLASS) / CLASSES_PER_LEVEL)
                bits += math.log2(sigma * 2.5066) + 0.7213 * (y / sigma) ** 2
    return bits


@jit
def clipped_bits(x: Array, step: float, classes: Array, offset: int, limits: Array, finer: float) -> float:
    """What `row_cost` counts for clipping."""
    bits = 0.0
    for j in range(len(x)):
        c = min(max(classes[j] + offset, CLASS_MIN), CLASS_MAX)
        beyond = abs(x[j]) / step - (limits[c - CLASS_MIN] + 0.5) / finer
        if beyond > 0:
            bits += _ERROR_BITS * beyond**2
    return bits


@jit
def _fitting(power: float, count: int, low: int, high: int) -> int:
    """The shift that fits so much energy, in units of what the classes expect, of so many values."""
    shift = 0.0 if count == 0 else 0.5 * CLASSES_PER_LEVEL * math.log(max(power / count, 1e-12)) / math.log(3.0)
    return min(max(round(shift), low), high)


@jit
def downhill(
    x: Array, step: float, classes: Array, start: int, low: int, high: int, costs: Array, limits: Array, finer: float
) -> tuple[int, float]:
    """The bottom of the valley that a shift lies in, and its cost; see `row_cost`."""
    best, cost = start, row_cost(x, step, classes, start, costs, limits, finer)
    for direction in (1, -1):
        while low <= best + direction <= high:
            other = row_cost(x, step, classes, best + direction, costs, limits, finer)
            if other > cost or (other == cost and not other > 1e300):
                break
            best, cost = best + direction, other
    return best, cost


@jit
def best_offset(
    x: Array, step: float, classes: Array, low: int, high: int, costs: Array, limits: Array, finer: float
) -> int:
    """The shift of a row's classes, `low` to `high`, that codes it best: downhill from the one that fits its energy."""
    power, peak, count = 0.0, 0.0, 0
    for j in range(len(x)):
        if classes[j] >= 0:
            z = x[j] / step * 3.0 ** ((UNIT_CLASS - classes[j]) / CLASSES_PER_LEVEL)
            power += z * z
            peak = max(peak, z * z)
            count += 1
    best = _fitting(power, count, low, high)
    best, cost = downhill(x, step, classes, best, low, high, costs, limits, finer)
    if count > 1 and peak > _OUTLIER * power:
        # One value has much of the energy: there is a valley that fits it, and one that fits all others.
        start = _fitting(max(power - peak, 0.0), count - 1, low, high)
        other_best, other = downhill(x, step, classes, start, low, high, costs, limits, finer)
        if other < cost:
            best, cost = other_best, other
    # An outlier where next to nothing was expected is cut until its class is wide enough, which may be far uphill.
    # Where the cutting ends the cost may leap once before it falls.
    widest, before, goes_on, was_clipped = best, cost, False, False
    while widest < high:
        clipped = clipped_bits(x, step, classes, widest, limits, finer) > _CLIPPED_BITS
        if not (goes_on or clipped or was_clipped):
            break
        widest += 1
        other = row_cost(x, step, classes, widest, costs, limits, finer)
        goes_on, before, was_clipped = other < before, other, clipped
        if other < cost:
            best, cost = widest, other
    return best


@jit
def quantise_rows(
    x: Array,
    step: Array,
    classes: Array,
    tokens: int,
    heads: int,
    low: int,
    high: int,
    levels: int,
    costs: Array,
    limits: Array,
    index: Array,
    offset: Array,
) -> None:
    """Indices of the finest level and the class offset of every row.

    Args:
        x: `[rows, n]` float32.
        step: `[rows]` float64, steps at level 0.
        classes: `[layers * heads, n, ]` int32 without the row's offset.
        tokens: Tokens of a layer.
        heads: Heads of a layer.
        low: Smallest offset.
        high: Largest.
        levels: Number of levels.
        costs: See `row_cost`.
        limits: See `row_cost`.
        index: `[rows, n]` int32, written.
        offset: `[rows]` int32; holds what is added to all classes of the row, the chosen offset is added to it.
    """
    count, width = x.shape
    finer = 3.0 ** (levels - 1)
    shifted = np.empty(width, np.int32)
    for i in range(count):
        block = i // (tokens * heads) * heads + i % heads
        for j in range(width):
            shifted[j] = classes[block, j] + offset[i]
        found = best_offset(x[i], step[i], shifted, low, high, costs, limits, finer)
        offset[i] += found
        for j in range(width):
            c = min(max(shifted[j] + found, CLASS_MIN), CLASS_MAX)
            limit = float(limits[c - CLASS_MIN])
            y = x[i, j] / step[i] * finer
            # Cut before rounding: an outlier may be wider than an integer.
            index[i, j] = round(min(max(y, -limit), limit))


@jit
def reconstruct_rows(
    index: Array,
    classes: Array,
    offset: Array,
    step: Array,
    tokens: int,
    heads: int,
    shift: Array,
    out: Array,
) -> None:
    """Values of indices: centroids of their cells, bit for bit those of `ref/nested.reconstruct`.

    Args:
        index: `[rows, n]` int32.
        classes: `[layers * heads, n]` int32 without the row's offset.
        offset: `[rows]` int32, at this level's resolution.
        step: `[rows]` float32, this level's step.
        tokens: Tokens of a layer.
        heads: Heads of a layer.
        shift: Of centroids towards zero, in steps, by class and magnitude; see `ref/classes.py`.
        out: `[rows, n]` float32, written.
    """
    count, width = index.shape
    known, columns = shift.shape
    for i in range(count):
        block = i // (tokens * heads) * heads + i % heads
        for j in range(width):
            value = int(index[i, j])
            c = max(classes[block, j] + offset[i], 0)
            towards_zero = np.float32(0.0)
            if value != 0 and c < known:
                towards_zero = shift[c, min(abs(value), columns) - 1]
            if value < 0:
                towards_zero = -towards_zero
            out[i, j] = (np.float32(value) - towards_zero) * step[i]
