"""Packing of small alphabets: as many base-`n` digits in a byte as fit, so 8 bits, 5 trits or 2 nibbles.

Digit `i` lies in byte `i // per_byte`; the first digit of a byte is its least significant.
"""

from functools import lru_cache

import torch


def digits_per_byte(symbols: int) -> int:
    """Number of digits of an alphabet that fit into a byte."""
    count = 1
    while symbols ** (count + 1) <= 256:
        count += 1
    return count


def packed_bytes(elements: int, symbols: int) -> int:
    """Bytes that `elements` digits take."""
    return -(-elements // digits_per_byte(symbols))


def pack(digits: torch.Tensor, symbols: int) -> torch.Tensor:
    """Digits 0 to `symbols - 1`, uint8 of any shape, to `[packed_bytes]` uint8; a last byte is filled with zeros."""
    count = digits_per_byte(symbols)
    flat = digits.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % count)).view(-1, count)
    packed = torch.zeros(len(flat), dtype=torch.uint8)
    for position in range(count):
        packed += flat[:, position] * symbols**position
    return packed


def unpack(packed: torch.Tensor, symbols: int, elements: int) -> torch.Tensor:
    """`[packed_bytes]` uint8 to `[elements]` uint8. Bytes that `pack` never writes give digits all the same."""
    # Not `table[packed]`: general indexing is a hundred times slower than selecting rows.
    return _table(symbols).index_select(0, packed.int()).view(-1)[:elements]


@lru_cache(maxsize=16)
def _table(symbols: int) -> torch.Tensor:
    """`[256, per_byte]` uint8: the digits of every byte."""
    byte = torch.arange(256)
    return torch.stack([byte // symbols**n % symbols for n in range(digits_per_byte(symbols))], 1).to(torch.uint8)
