"""Tables with a bound: what clients can make grow forgets its oldest entry."""

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def renewed(table: dict[K, V], key: K, most: int, make: Callable[[], V]) -> V:
    """The entry of a key, made where there is none, as the table's newest; the oldest goes where there are too many."""
    found = table.pop(key) if key in table else make()
    table[key] = found
    if len(table) > most:
        del table[next(iter(table))]
    return found
