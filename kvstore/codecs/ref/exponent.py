"""Bfloat16 without loss in about 12 bits: a nibble names one of the 16 most frequent exponents, the rest stays.

A bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa are noise and stay a byte; the exponents
of a cache take few values. Those beyond the 16 most frequent are escapes: records of a position and an exponent, or,
where that would be longer, the exponents of all elements. Source: the idea is SplitZip's and DFloat11's (arXiv
2504.11651), the format is ours.
"""

import torch

NAMED = 16
RECORD_BYTES = 5
"""An escape: position (uint32, little-endian) and exponent (uint8)."""
RECORDS, DENSE = 0, 1
"""First byte of the escapes: whether records follow, or every element's exponent."""


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sign and mantissa in a byte, and exponent: bfloat16 of any shape to two of uint8."""
    bits = x.contiguous().view(torch.int16)
    return ((bits >> 8 & 0x80) | (bits & 0x7F)).to(torch.uint8), (bits >> 7 & 0xFF).to(torch.uint8)


def join(mantissa: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Undo `split`."""
    wide = mantissa.to(torch.int16)
    # The sign moves into the sign bit of the int16 and leaves nothing else there.
    return ((wide & 0x80) << 8 | exponent.to(torch.int16) << 7 | (wide & 0x7F)).view(torch.bfloat16)


def frequent(exponent: torch.Tensor) -> torch.Tensor:
    """The most frequent exponents, `[16]` uint8, in falling order; among equals the smaller one first."""
    count = torch.bincount(exponent.flatten(), minlength=256)
    return count.argsort(descending=True, stable=True)[:NAMED].to(torch.uint8)


def name(exponent: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nibbles, `[...]` uint8, and which elements are escapes, `[...]` bool; an escape has the nibble 0."""
    nibble = torch.full((256,), NAMED, dtype=torch.uint8)
    nibble[table.int()] = torch.arange(NAMED, dtype=torch.uint8)
    found = nibble.index_select(0, exponent.flatten().int()).view(exponent.shape)
    escaped = found == NAMED
    return found.masked_fill(escaped, 0), escaped


def escape_bytes(exponent: torch.Tensor, escaped: torch.Tensor) -> torch.Tensor:
    """The escapes of a plane: `[bytes]` uint8, at most one more than it has elements."""
    position = escaped.flatten().nonzero()[:, 0]
    if RECORD_BYTES * len(position) > exponent.numel():
        return torch.cat([torch.tensor([DENSE], dtype=torch.uint8), exponent.flatten()])
    records = torch.empty(len(position), RECORD_BYTES, dtype=torch.uint8)
    records[:, :4] = torch.stack([position >> shift & 0xFF for shift in (0, 8, 16, 24)], 1)
    records[:, 4] = exponent.flatten()[position]
    return torch.cat([torch.tensor([RECORDS], dtype=torch.uint8), records.flatten()])


def exponents(nibbles: torch.Tensor, table: torch.Tensor, escapes: torch.Tensor) -> torch.Tensor:
    """Undo `name` and `escape_bytes`, `[...]` uint8.

    Raises:
        ValueError: The escapes are none that `escape_bytes` writes.
    """
    kind = int(escapes[0]) if len(escapes) else -1
    if kind == DENSE and len(escapes) == nibbles.numel() + 1:
        return escapes[1:].view(nibbles.shape)
    if kind != RECORDS or len(escapes) % RECORD_BYTES != 1:
        raise ValueError(f"{len(escapes)} bytes of kind {kind} are no escapes")
    named = table.index_select(0, nibbles.flatten().bitwise_and(NAMED - 1).int())
    records = escapes[1:].view(-1, RECORD_BYTES)
    position = (records[:, :4].long() << torch.tensor([0, 8, 16, 24])).sum(1)
    if (position >= len(named)).any():
        raise ValueError(f"an escape at {int(position.max())} of {len(named)} elements")
    named[position] = records[:, 4]
    return named.view(nibbles.shape)
