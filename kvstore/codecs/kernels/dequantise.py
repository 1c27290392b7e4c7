# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Values from the codes of published methods: twins of `reconstruct` in `ref/minmax.py` and its neighbours.

Equal to their references up to one rounding: a GPU may fuse a product and a sum, which rounds once instead of twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kvstore.codecs.kernels.launch import require_device, run
from kvstore.codecs.ref.codebook import codebook

_SIZE = 1024
_AXES = 4


@triton.jit
def _side(ptr, element, size1, size2, size3, stride0, stride1, stride2, stride3, live):
    """What belongs to elements of a dense tensor in one that broadcasts to it, float32."""
    column = element % size3
    rest = element // size3
    head = rest % size2
    rest = rest // size2
    token = rest % size1
    at = rest // size1 * stride0 + token * stride1 + head * stride2 + column * stride3
    return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def minmax_kernel(q_ptr, first_ptr, second_ptr, out_ptr, count, size1, size2, size3,
                  first0, first1, first2, first3, second0, second1, second2, second3, SIZE: tl.constexpr):  # fmt: skip
    """`low + q * step`; the first side is the step."""
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = element < count
    q = tl.load(q_ptr + element, mask=live, other=0).to(tl.float32)
    step = _side(first_ptr, element, size1, size2, size3, first0, first1, first2, first3, live)
    low = _side(second_ptr, element, size1, size2, size3, second0, second1, second2, second3, live)
    tl.store(out_ptr + element, low + q * step, mask=live)


@triton.jit
def absmax_kernel(q_ptr, first_ptr, second_ptr, out_ptr, count, size1, size2, size3,
                  first0, first1, first2, first3, second0, second1, second2, second3, SIZE: tl.constexpr):  # fmt: skip
    """`(q - centre) * (scale / centre)`; the first side is the scale."""
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = element < count
    q = tl.load(q_ptr + element, mask=live, other=0).to(tl.float32)
    scale = _side(first_ptr, element, size1, size2, size3, first0, first1, first2, first3, live)
    centre = _side(second_ptr, element, size1, size2, size3, second0, second1, second2, second3, live)
    tl.store(out_ptr + element, (q - centre) * tl.div_rn(scale, tl.where(live, centre, 1.0)), mask=live)


@triton.jit
def codebook_kernel(q_ptr, first_ptr, second_ptr, out_ptr, count, size1, size2, size3,
                    first0, first1, first2, first3, ROOT: tl.constexpr, CODES: tl.constexpr,
                    SIZE: tl.constexpr):  # fmt: skip
    """`table[q] * (norm / root)`; the first side is the norm, the second the table."""
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = element < count
    q = tl.load(q_ptr + element, mask=live, other=0).to(tl.int32) & (CODES - 1)
    norm = _side(first_ptr, element, size1, size2, size3, first0, first1, first2, first3, live)
    unit = tl.load(second_ptr + q)
    tl.store(out_ptr + element, unit * tl.div_rn(norm, norm * 0 + ROOT), mask=live)


@triton.jit
def fp8_kernel(q_ptr, first_ptr, out_ptr, count, size1, size2, size3,
               first0, first1, first2, first3, SIZE: tl.constexpr):  # fmt: skip
    """Value of a float8_e4m3fn times its scale, the first side; by bits, for not every GPU knows the format."""
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = element < count
    code = tl.load(q_ptr + element, mask=live, other=0).to(tl.int32)
    exponent = (code >> 3) & 15
    normal = (((exponent + 120) << 23) | ((code & 7) << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent > 0, normal, (code & 7).to(tl.float32) * 0.001953125)
    value = tl.where((code & 127) == 127, float("nan"), value)
    scale = _side(first_ptr, element, size1, size2, size3, first0, first1, first2, first3, live)
    tl.store(out_ptr + element, tl.where(code >= 128, -value, value) * scale, mask=live)


def reconstruct_minmax(q: torch.Tensor, step: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """`[...]` float32 from codes and pairs, of up to four axes."""
    return _run(minmax_kernel, q, (step, low))


def reconstruct_absmax(q: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Values from codes, `[layers, tokens, heads, dim]` float32."""
    return _run(absmax_kernel, q, (scale, centre))


def reconstruct_codebook(q: torch.Tensor, norm: torch.Tensor, bits: int) -> torch.Tensor:
    """Values `[..., dim]` float32; codes that no encoder writes count as if their upper bits were not there."""
    table = codebook(bits).to(q.device)
    return _run(codebook_kernel, q, (norm,), second_ptr=table, CODES=2**bits, ROOT=float(q.shape[-1] ** 0.5))


def reconstruct_fp8(q: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Values, float32, of float8_e4m3fn."""
    side = torch.full((1,), scale, device=q.device) if isinstance(scale, float) else scale
    return _run(fp8_kernel, q.view(torch.uint8), (side,))


def _run(kernel: Any, q: torch.Tensor, sides: Sequence[torch.Tensor], **more: Any) -> torch.Tensor:
    require_device(kernel, q.device)
    dense = q.contiguous()
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    shape = (1,) * (_AXES - q.dim()) + tuple(q.shape)
    arguments = {"q_ptr": dense, "out_ptr": out, "count": q.numel(), "SIZE": _SIZE, **more}
    arguments |= dict(zip(("size1", "size2", "size3"), shape[1:], strict=True))
    for name, side in zip(("first", "second"), sides, strict=False):
        wide = side.expand(shape)
        arguments[f"{name}_ptr"] = wide
        arguments |= {f"{name}{axis}": stride for axis, stride in enumerate(wide.stride())}
    run(kernel, -(-q.numel() // _SIZE), arguments)
    return out
