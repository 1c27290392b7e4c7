"""How the hot loops are compiled."""

from typing import TypeVar, cast

from numba import njit

F = TypeVar("F")


def jit(function: F) -> F:
    """Compile without the interpreter lock, and keep the machine code."""
    return cast(F, njit(cache=True, nogil=True, error_model="numpy")(function))


def inlined(function: F) -> F:
    """Compile into every caller: a call that takes arrays counts references, which costs more than the work."""
    return cast(F, njit(inline="always", error_model="numpy")(function))
