"""A segment of interleaved rANS streams.

    4 bytes: log2 of the lanes along rows, log2 of those along columns, a tag, 0
    lanes x uint32: final states | lanes x uint16: words of each lane | uint16 words, lane after lane

Little-endian. A lane reads its words from the front; lanes are independent, so a GPU gives each a thread.
"""

from typing import NamedTuple

import numpy as np
import torch

from kvstore.codecs.fast.nested import Array
from kvstore.errors import FrameCorruptError

_HEADER = 4
_LANE = 6
_LOG_MAX = 12


class Lanes(NamedTuple):
    """Streams of `rows * columns` lanes.

    Args:
        rows: Lanes along the rows, a power of two.
        columns: Lanes along the columns, a power of two.
        states: `[lanes]` uint32.
        lengths: Words of each lane, `[lanes]` uint16.
        words: uint16 of all lanes, one lane after the other.
    """

    rows: int
    columns: int
    states: Array
    lengths: Array
    words: Array


def lanes_bytes_max(symbols: int, lanes: int) -> int:
    """Bytes that a segment of so many symbols takes at most: a word a symbol."""
    return _HEADER + _LANE * lanes + 2 * symbols


def pack_lanes(lanes: Lanes, tag: int = 0) -> torch.Tensor:
    """Bytes of a segment, `[bytes]` uint8."""
    head = np.array([lanes.rows.bit_length() - 1, lanes.columns.bit_length() - 1, tag, 0], np.uint8)
    parts = [head, lanes.states.astype("<u4"), lanes.lengths.astype("<u2"), lanes.words.astype("<u2")]
    return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))


def parse_lanes(stage: str, plane: str, data: torch.Tensor) -> tuple[Lanes, int]:
    """Lanes and tag of a segment; every length is compared with the bytes that are there.

    Raises:
        FrameCorruptError: They do not fit.
    """
    raw = data.numpy()
    if len(raw) < _HEADER or raw[0] > _LOG_MAX or raw[1] > _LOG_MAX or raw[0] + raw[1] > _LOG_MAX or raw[3]:
        raise FrameCorruptError(f"stage {stage!r}: plane {plane!r} does not start like a coded segment")
    count = 1 << int(raw[0] + raw[1])
    start = _HEADER + _LANE * count
    if len(raw) < start or len(raw) % 2:
        raise FrameCorruptError(f"stage {stage!r}: plane {plane!r} is too short for {count} lanes")
    states = raw[_HEADER : _HEADER + 4 * count].view("<u4")
    lengths = raw[_HEADER + 4 * count : start].view("<u2")
    words = raw[start:].view("<u2")
    if int(lengths.astype(np.int64).sum()) != len(words):
        raise FrameCorruptError(f"stage {stage!r}: plane {plane!r} has not the words that its lanes have")
    return Lanes(1 << int(raw[0]), 1 << int(raw[1]), states, lengths, words), int(raw[2])
