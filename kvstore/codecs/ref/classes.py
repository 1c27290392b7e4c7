"""Sigma classes: the static tables by which nested digits are coded.

Class `c` means a standard deviation of `3**((c - 9) / 5)` steps: five classes to a factor of three, the factor between
levels, so refining by a level adds exactly five. A coefficient is coded as

    head (9 symbols, -4 to 4), then digits -1, 0, 1: index = 3 * index + digit

A class below 0 is certainly zero and takes no symbol. Classes 0 to 7 are a head alone. Wider ones have `extra_digits`
at level 0, the head then lies that many factors of three higher; every further level is one digit more. A head has room
for seven standard deviations. What does not fit is the encoder's to avoid, by choosing a wider class for the row.

The frequencies (12 bits) are integers in `classes.json`, made by `make_tables`: a file, because the last digit of an
error function is not the same everywhere and a decoder must not depend on it.
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

CLASSES_PER_LEVEL = 5
UNIT_CLASS = 9
"""The class whose standard deviation is one step."""
HEAD_CLASSES = 8
HEAD_MAX = 4
HEAD_SYMBOLS = 2 * HEAD_MAX + 1
DIGIT_CLASS_MIN = -CLASSES_PER_LEVEL
DIGIT_CLASS_MAX = 15
DIGIT_PARENTS = 4
"""A digit's distribution depends on its parent's magnitude: 0, 1, 2, or more."""
CLASS_MAX = 52
"""Largest class: indices stay below 2**31 with five levels."""
EXTRA_DIGITS_MAX = (CLASS_MAX - HEAD_CLASSES + CLASSES_PER_LEVEL) // CLASSES_PER_LEVEL
FREQUENCY_BITS = 12
FREQUENCY_SUM = 1 << FREQUENCY_BITS
SHIFTS = 3
"""Cells at distance 1, 2 and more from zero have centroids of their own."""

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


class Tables(NamedTuple):
    """Static tables.

    Args:
        head: Cumulative frequencies `[HEAD_CLASSES, HEAD_SYMBOLS + 1]` uint16.
        digit: Cumulative frequencies `[digit classes * DIGIT_PARENTS, 4]` uint16, for parents that are not negative;
            the digits of a negative parent are mirrored.
        shift: How far centroids lie from the middles of their cells towards zero, in steps: `[classes, SHIFTS]`.
        slots: The head's symbol for each of the `FREQUENCY_SUM` slots, `[HEAD_CLASSES, FREQUENCY_SUM]` uint8.
    """

    head: U16
    digit: U16
    shift: F32
    slots: U8


def extra_digits(sigma_class: int) -> int:
    """Digits behind the head at level 0."""
    return max(0, -(-(sigma_class - HEAD_CLASSES + 1) // CLASSES_PER_LEVEL))


def index_limit(sigma_class: int, levels: int) -> int:
    """Largest magnitude of an index of the finest of `levels` levels."""
    if sigma_class >= 0:
        finer: int = 3 ** (extra_digits(sigma_class) + levels - 1)
        return HEAD_MAX * finer + (finer - 1) // 2
    coded = max(levels - 1 + (sigma_class // CLASSES_PER_LEVEL) + 1, 0)
    return int(3**coded - 1) // 2


def digit_row(sigma_class: int, parent: int) -> int:
    """Row of the digit table, from the class at the parent's resolution and the parent's magnitude."""
    clamped = min(max(sigma_class, DIGIT_CLASS_MIN), DIGIT_CLASS_MAX)
    return (clamped - DIGIT_CLASS_MIN) * DIGIT_PARENTS + min(parent, DIGIT_PARENTS - 1)


@lru_cache(maxsize=1)
def tables() -> Tables:
    """The tables that frames are coded with."""
    data = json.loads(Path(__file__).with_name("classes.json").read_text("ascii"))
    return Tables(
        np.array([_cumulative(row) for row in data["head"]], np.uint16),
        np.array([_cumulative(row) for row in data["digit"]], np.uint16),
        (np.array(data["shift"], np.float32) / 256).astype(np.float32),
        np.array([np.repeat(np.arange(HEAD_SYMBOLS), row) for row in data["head"]], np.uint8),
    )


def _cumulative(frequencies: list[int]) -> list[int]:
    return [sum(frequencies[:n]) for n in range(len(frequencies) + 1)]


# -- how classes.json was made ---------------------------------------------------------------------------------------


def make_tables(tail: float = 0.02, tail_sigma: float = 2.0) -> dict[str, Any]:
    """What `classes.json` holds: Gaussians spread over their class, with a share of wider ones for heavier tails."""
    head = [
        normalised([_mass(_density(c, tail, tail_sigma), i - 0.5, i + 0.5, edge=abs(i) == HEAD_MAX) for i in _heads()])
        for c in range(HEAD_CLASSES)
    ]
    digit = [
        normalised([_mass(_density(c, tail, tail_sigma), p + (d - 1.5) / 3, p + (d - 0.5) / 3) for d in range(3)])
        for c in range(DIGIT_CLASS_MIN, DIGIT_CLASS_MAX + 1)
        for p in range(DIGIT_PARENTS)
    ]
    shift = [
        [round(256 * _shift(_density(c, tail, tail_sigma), cell)) for cell in range(1, SHIFTS + 1)]
        for c in range(DIGIT_CLASS_MAX + 1 + CLASSES_PER_LEVEL)
    ]
    return {"head": head, "digit": digit, "shift": shift}


def normalised(mass: list[float]) -> list[int]:
    """Frequencies that sum to `FREQUENCY_SUM`, none of them zero."""
    total = max(sum(mass), 1e-300)
    found = [max(1, round(m / total * FREQUENCY_SUM)) for m in mass]
    found[found.index(max(found))] += FREQUENCY_SUM - sum(found)
    return found


def _heads() -> range:
    return range(-HEAD_MAX, HEAD_MAX + 1)


def _density(sigma_class: int, tail: float, tail_sigma: float) -> Callable[[float], float]:
    """Cumulative distribution of a coefficient of the class, in steps."""
    spread = [3 ** ((sigma_class + (n + 0.5) / 8 - 0.5 - UNIT_CLASS) / CLASSES_PER_LEVEL) for n in range(8)]
    parts = [((1 - tail) / 8, s) for s in spread] + [(tail / 8, s * tail_sigma) for s in spread]

    def cumulative(x: float) -> float:
        return sum(weight * 0.5 * math.erfc(-x / s / math.sqrt(2)) for weight, s in parts)

    return cumulative


def _mass(cumulative: Callable[[float], float], low: float, high: float, *, edge: bool = False) -> float:
    if edge:
        return cumulative(-min(abs(low), abs(high)))
    # The smaller tail, so that nothing cancels.
    return cumulative(high) - cumulative(low) if low < 0 else cumulative(-low) - cumulative(-high)


def _shift(cumulative: Callable[[float], float], cell: int, parts: int = 200) -> float:
    cuts = [cell - 0.5 + n / parts for n in range(parts + 1)]
    mass = [_mass(cumulative, low, high) for low, high in pairwise(cuts)]
    total = sum(mass)
    if total <= 0:
        return 0.5
    return cell - sum(m * (low + high) / 2 for m, (low, high) in zip(mass, pairwise(cuts), strict=True)) / total
