"""What was found out about what a tier holds: counted the same way for every tier, while it is verified."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

Progress = Callable[[int], None]
"""Called with the bytes that were read since the last call."""


class Damage(StrEnum):
    """What can be wrong with a chunk, and what is done about it."""

    RECORD_OLD = "record of an older format"
    """Written anew."""
    RECORD_MISSING = "record missing"
    """Made from head and levels."""
    RECORD_WRONG = "record wrong"
    """Made from head and levels."""
    RECORD_ALONE = "record without head and levels"
    """Deleted."""
    HEAD_MISSING = "levels without head"
    """Quarantined."""
    HEAD_DAMAGED = "head damaged"
    """Quarantined with its levels."""
    LEVELS_MISSING = "head without levels"
    """Quarantined."""
    LEVELS_CUT = "levels missing"
    """The complete levels below are kept, those beyond the gap are quarantined."""
    LEVEL_DAMAGED = "level damaged"
    """The intact levels below are kept; the frame is quarantined."""
    KEY_WRONG = "frame of another key"
    """Quarantined."""
    STRAY = "record that belongs to nothing"
    """Deleted."""
    FRAME_DAMAGED = "frame damaged"
    """The tier took it away, as it does when it is read."""
    FRAME_MISSING = "frame missing"
    """The tier named a chunk that it could not serve."""


@dataclass
class Findings:
    """Figures of one verification.

    Args:
        chunks: Chunks that are held, mended ones included.
        levels: Levels of these.
        verified_bytes: Bytes of heads and levels that were read and checked.
        damage: Number of chunks by what was wrong with them; a chunk may have more than one thing wrong.
        quarantined: Chunks whose bytes were moved, or would be moved, into `quarantine/`.
        unread: Chunks that the tier could not be asked about.
        seconds: Time that it took.
    """

    chunks: int = 0
    levels: int = 0
    verified_bytes: int = 0
    damage: Counter[Damage] = field(default_factory=Counter)
    quarantined: int = 0
    unread: int = 0
    seconds: float = 0.0
