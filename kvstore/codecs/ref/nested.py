"""Nested mid-tread quantisation on one step: indices, their levels, and values from them.

The index of a level is the index of the next one divided by three and rounded, so a cell is exactly three cells of the
next level. Classes are those of `ref/classes.py`.
"""

from functools import lru_cache

import numpy as np
import torch

from kvstore.codecs.ref.classes import (
    CLASS_MAX,
    CLASSES_PER_LEVEL,
    FREQUENCY_SUM,
    HEAD_MAX,
    UNIT_CLASS,
    digit_row,
    extra_digits,
    index_limit,
    tables,
)

CLASS_MIN = -60
"""Classes below this one are as certainly zero as this one, at every level."""
COST_MAX = 64
STEP_UNITS = 16
"""Steps and sigmas are written as integers, sixteenths of a class: `3**(n / 80)`."""


def step_size(units: int) -> float:
    """A step or sigma from its number of sixteenths of a class."""
    return float(3.0 ** (units / (STEP_UNITS * CLASSES_PER_LEVEL)))


def sigma_units(sigma: torch.Tensor) -> torch.Tensor:
    """Undo `step_size`: the nearest integers, int16."""
    units = sigma.double().clamp_min(1e-30).log() / np.log(3) * (STEP_UNITS * CLASSES_PER_LEVEL)
    found: torch.Tensor = units.round().clamp(-30000, 30000).to(torch.int16)
    return found


def class_of(sigma_units: torch.Tensor, step_units: int) -> torch.Tensor:
    """Class of coefficients of a given sigma on a given step, int32: integer arithmetic, the same everywhere."""
    classes = (sigma_units.int() - step_units + STEP_UNITS // 2).div(STEP_UNITS, rounding_mode="floor")
    found: torch.Tensor = (classes + UNIT_CLASS).clamp(CLASS_MIN, CLASS_MAX).int()
    return found


def coarser(index: torch.Tensor) -> torch.Tensor:
    """Indices of the level before."""
    found: torch.Tensor = (index + 1).div(3, rounding_mode="floor")
    return found


def reconstruct(index: torch.Tensor, classes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Values: centroids of their cells.

    Args:
        index: `[..., n]` int32.
        classes: Class of each at this level's resolution, broadcastable to `index`.
        step: This level's step, broadcastable to `index`.

    Returns:
        float32.
    """
    shift = torch.from_numpy(tables().shift)
    rows = classes.clamp(0, len(shift) - 1).expand(index.shape)
    columns = index.abs().clamp(1, shift.shape[1]) - 1
    towards_zero = shift.view(-1).index_select(0, (rows * shift.shape[1] + columns).view(-1)).view(index.shape)
    towards_zero = torch.where(classes < len(shift), towards_zero, 0.0)
    return (index - index.sign() * towards_zero) * step


@lru_cache(maxsize=1)
def costs() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Bits of a level 0 index, `[CLASS_MAX + 1, COST_MAX]` by class and magnitude; infinite where there is no room."""
    found = np.full((CLASS_MAX + 1, COST_MAX), np.inf, np.float32)
    for sigma_class in range(CLASS_MAX + 1):
        for magnitude in range(min(COST_MAX, index_limit(sigma_class, 1) + 1)):
            found[sigma_class, magnitude] = _bits(sigma_class, magnitude)
    return found


def _bits(sigma_class: int, index: int) -> float:
    head, digit = tables().head, tables().digit
    bits, extra = 0.0, extra_digits(sigma_class)
    for n in range(extra):
        parent = (index + 1) // 3
        row = digit[digit_row(sigma_class - CLASSES_PER_LEVEL * (n + 1), parent)]
        bits -= np.log2((int(row[index - 3 * parent + 2]) - int(row[index - 3 * parent + 1])) / FREQUENCY_SUM)
        index = parent
    row = head[sigma_class - CLASSES_PER_LEVEL * extra]
    return float(bits - np.log2((int(row[index + HEAD_MAX + 1]) - int(row[index + HEAD_MAX])) / FREQUENCY_SUM))


@lru_cache(maxsize=8)
def limits(levels: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Largest magnitude of a finest index by class, from `CLASS_MIN` to `CLASS_MAX`."""
    return np.array([index_limit(c, levels) for c in range(CLASS_MIN, CLASS_MAX + 1)], np.int64)
