"""The one place where kernels are started, so that a test can see what every one of them is started with."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
from triton.runtime import interpreter

from kvstore.errors import ConfigError

_INTERPRETED = "Interpreted"


@cache
def _mend_interpreter() -> None:
    """Let loops in interpreted kernels end at loaded numbers, and calls of device functions cost next to nothing.

    Triton 3.6 makes an index of a number with `int(array)`, which numpy from 2.4 on refuses for arrays with axes; and
    it patches its whole language again for every call inside of a kernel, though the kernel's start has done so.
    """
    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    patched = set()

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.item()))

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton's own functions use a part of the language that kernels do not; that patch stays once it is made.
        if function.fn.__module__.startswith("triton.") and function.fn.__module__ not in patched:
            patched.add(function.fn.__module__)
            patch_language(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpretedFunction.__call__ = call


def run(kernel: Any, programs: int | tuple[int, ...], arguments: Mapping[str, Any], **options: int) -> None:
    """Start a kernel on a grid of programs; nothing is started where there are none.

    Args:
        kernel: A function of `triton.jit`.
        programs: Programs along each axis.
        arguments: By name, compile-time ones included.
        options: `num_warps`, `num_stages`.
    """
    grid = (programs,) if isinstance(programs, int) else programs
    if is_interpreted(kernel):
        _mend_interpreter()
    if min(grid) > 0:
        kernel[grid](**arguments, **options)


def is_interpreted(kernel: Any) -> bool:
    """Whether triton runs this kernel on the CPU."""
    return type(kernel).__name__.startswith(_INTERPRETED)


def require_device(kernel: Any, device: torch.device) -> None:
    """Refuse a device that kernels cannot reach.

    Raises:
        ConfigError: The tensors are on the CPU, and the interpreter is off.
    """
    if device.type == "cpu" and not is_interpreted(kernel):
        raise ConfigError("kernels need a GPU; on a CPU set TRITON_INTERPRET=1 before kvstore is imported")


def power_of_two(count: int, low: int, high: int) -> int:
    """The least power of two that is not below `count`, within bounds that are powers of two."""
    return int(min(max(triton.next_power_of_2(max(count, 1)), low), high))
