# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Encode on the device up to the integers: canonicalise, transform, quantise, pack. rANS stays on the host.

Integers equal those of the references except where a quotient lies within its last bits of the middle between two
cells: the references divide in float64 (`nested`) or after a matrix product that adds in another order. Either cell is
a legal choice, for the decoder never repeats the encoder's arithmetic.
"""

import torch
import triton
import triton.language as tl

from kvstore.codecs.kernels.launch import power_of_two, require_device, run
from kvstore.codecs.ref.pack import packed_bytes
from kvstore.codecs.stage import require_finite

_ROWS = 16
_SIZE = 1024


@triton.jit
def _nearest(x):
    """Round to the nearest integer, ties to even, without a library: 2**23 leaves no room for a fraction."""
    magnitude = tl.abs(x)
    whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def _bfloat16(x):
    """Bits of the nearest bfloat16, int32; a cast would be cut off by the interpreter."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _wide(bits):
    """Value of bits of bfloat16, float32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def canonicalise_kernel(x_ptr, cos_ptr, sin_ptr, partner_ptr, mean_ptr, out_ptr, rows, tokens, heads,
                        DIM: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Turn rows `[layers, tokens, heads]` back and subtract their mean; `ROTARY` 0 turns nothing."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    live = (row < rows)[:, None] & (column >= 0)[None, :]
    # [ROWS, DIM]
    x = tl.load(x_ptr + row[:, None] * DIM + column[None, :], mask=live, other=0.0).to(tl.float32)
    token = row // heads % tokens
    if ROTARY > 0:
        inside = live & (column < ROTARY)[None, :]
        partner = tl.load(partner_ptr + column, mask=column < ROTARY, other=0)
        other = tl.load(x_ptr + row[:, None] * DIM + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        at = token[:, None] * ROTARY + column[None, :]
        cos = tl.load(cos_ptr + at, mask=inside, other=1.0)
        sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
        squared = cos * cos + sin * sin
        x = x * tl.div_rn(cos, squared) + other * tl.div_rn(-sin, squared)
    at = (row // (tokens * heads) * heads + row % heads)[:, None] * DIM + column[None, :]
    x -= tl.load(mean_ptr + at, mask=live, other=0.0)
    tl.store(out_ptr + row[:, None] * DIM + column[None, :], x, mask=live)


@triton.jit
def transform_kernel(x_ptr, matrix_ptr, out_ptr, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows times a matrix `[DIM, DIM]`, `BLOCK` columns of it, in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (row < rows)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, DIM, BLOCK):
        k = start + tl.arange(0, BLOCK)
        part = tl.load(x_ptr + row[:, None] * DIM + k[None, :], mask=live, other=0.0)
        total = tl.dot(part, tl.load(matrix_ptr + k[:, None] * DIM + column[None, :]), total, input_precision="ieee")
    tl.store(out_ptr + row[:, None] * DIM + column[None, :], total, mask=live)


@triton.jit
def step_kernel(x_ptr, scale_ptr, index_ptr, rows, DIM: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr):
    """Scale (bits of bfloat16) and cells of rows; `CELLS` is `3**levels`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    live = (row < rows)[:, None] & (column >= 0)[None, :]
    # [ROWS, DIM]
    x = tl.load(x_ptr + row[:, None] * DIM + column[None, :], mask=live, other=0.0)
    largest = tl.max(tl.abs(x), 1)
    step = tl.div_rn(largest, largest * 0 + CELLS / 2)
    bits = _bfloat16(step)
    bits = tl.where(_wide(bits) < step, _bfloat16(step * 1.008), bits)
    scale = _wide(bits)[:, None]
    quotient = tl.where(scale > 0, tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    half: tl.constexpr = (CELLS - 1) // 2
    cell = tl.minimum(tl.maximum(_nearest(quotient), -half), half) + half
    tl.store(scale_ptr + row, bits.to(tl.int16), mask=row < rows)
    tl.store(index_ptr + row[:, None] * DIM + column[None, :], cell.to(tl.uint8), mask=live)


@triton.jit
def nested_kernel(x_ptr, step_ptr, limit_ptr, index_ptr, count, width, SIZE: tl.constexpr):
    """Indices of the finest level: `x / step` to the nearest integer, cut at the limit of the class."""
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = element < count
    x = tl.load(x_ptr + element, mask=live, other=0.0)
    step = tl.load(step_ptr + element // width, mask=live, other=1.0)
    limit = tl.load(limit_ptr + element, mask=live, other=0).to(tl.float32)
    index = tl.minimum(tl.maximum(tl.div_rn(x, step), -limit), limit)
    tl.store(index_ptr + element, _nearest(index).to(tl.int32), mask=live)


@triton.jit
def pack_kernel(digits_ptr, packed_ptr, count, size, SIZE: tl.constexpr):
    """Five trits to a byte, the first one least significant."""
    byte = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    packed = tl.zeros((SIZE,), tl.int32)
    for position in tl.static_range(4, -1, -1):
        at = 5 * byte + position
        packed = 3 * packed + tl.load(digits_ptr + at, mask=at < count, other=0).to(tl.int32)
    tl.store(packed_ptr + byte, packed.to(tl.uint8), mask=byte < size)


def canonicalise(
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """Undo the rotary embedding and subtract the mean: `ref.rope.unrotate(x, *rotary) - mean`.

    Args:
        x: `[layers, tokens, heads, dim]` of a float dtype; `dim` a power of two.
        rotary: Cosines, sines and partners as `ref.rope.rotary_planes` makes them; None turns nothing.
        mean: `[layers, 1, heads, dim]`; None subtracts nothing.

    Raises:
        PipelineError: A value is NaN or infinite.
    """
    require_device(canonicalise_kernel, x.device)
    require_finite("canonicalise", "x", x)
    layers, tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    none = torch.zeros(1, device=x.device)
    cos, sin, partner = (side.to(x.device) for side in rotary) if rotary else (none, none, none.long())
    arguments = {
        "x_ptr": x.contiguous(), "cos_ptr": cos, "sin_ptr": sin, "partner_ptr": partner, "out_ptr": out,
        "mean_ptr": torch.zeros(layers, heads, dim, device=x.device) if mean is None else mean.float().contiguous(),
        "rows": layers * tokens * heads, "tokens": tokens, "heads": heads, "DIM": dim,
        "ROTARY": cos.shape[1] if rotary else 0, "ROWS": _ROWS,
    }  # fmt: skip
    run(canonicalise_kernel, -(-layers * tokens * heads // _ROWS), arguments)
    return out


def transform(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`x @ matrix`, `[..., dim]` float32 by `[dim, dim]` float32, in float32; `dim` a power of two, 16 or more.

    Raises:
        PipelineError: A value is NaN or infinite.
    """
    require_device(transform_kernel, x.device)
    require_finite("transform", "x", x)
    dim = x.shape[-1]
    rows, block = x.numel() // dim, min(dim, 64)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = {"x_ptr": x.contiguous(), "matrix_ptr": matrix.contiguous(), "out_ptr": out, "rows": rows}
    run(transform_kernel, (-(-rows // _ROWS), dim // block), {**arguments, "DIM": dim, "BLOCK": block, "ROWS": _ROWS})
    return out


def quantise_step(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale `[..., 1]` bfloat16 and cells `[..., dim]` uint8: `ref.step.scale_of` and `quantise`.

    Raises:
        PipelineError: A value is NaN or infinite.
    """
    require_device(step_kernel, x.device)
    require_finite("step", "x", x)
    dim = x.shape[-1]
    rows = x.numel() // dim
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.int16, device=x.device)
    index = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    arguments = {"x_ptr": x.contiguous(), "scale_ptr": scale, "index_ptr": index, "rows": rows}
    run(step_kernel, -(-rows // _ROWS), {**arguments, "DIM": dim, "CELLS": 3**levels, "ROWS": _ROWS})
    return scale.view(torch.bfloat16), index


def quantise_nested(x: torch.Tensor, step: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Indices of the finest level, int32 like `x`.

    Args:
        x: `[..., n]` float32.
        step: Its step, `[..., 1]` float32.
        limit: Largest magnitude of every index, as `ref.classes.index_limit` has it; int32 like `x`.

    Raises:
        PipelineError: A value is NaN or infinite.
    """
    require_device(nested_kernel, x.device)
    require_finite("nested", "x", x)
    index = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    arguments = {
        "x_ptr": x.contiguous(), "step_ptr": step.contiguous(), "limit_ptr": limit.contiguous(), "index_ptr": index,
        "count": x.numel(), "width": x.shape[-1], "SIZE": _SIZE,
    }  # fmt: skip
    run(nested_kernel, -(-x.numel() // _SIZE), arguments)
    return index


def pack_trits(digits: torch.Tensor) -> torch.Tensor:
    """Digits 0 to 2, uint8 of any shape, to `[packed_bytes]` uint8: `ref.pack.pack(digits, 3)`."""
    require_device(pack_kernel, digits.device)
    size_bytes = packed_bytes(digits.numel(), 3)
    packed = torch.empty(size_bytes, dtype=torch.uint8, device=digits.device)
    tile = power_of_two(size_bytes, 16, _SIZE)
    arguments = {"digits_ptr": digits.contiguous(), "packed_ptr": packed, "count": digits.numel(), "size": size_bytes}
    run(pack_kernel, -(-size_bytes // tile), {**arguments, "SIZE": tile})
    return packed
