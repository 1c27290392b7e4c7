"""The memory of the gpu tier: one tensor on a device, and the one thread that copies to, from and within it.

Copies happen in the order in which they are asked for, so whoever asks in the order of its own records never sees a
payload that is half there or has moved. That order also holds for what runs elsewhere: see `fence`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from kvstore.backends.gpu_extents import Shift
from kvstore.buffers import allocate
from kvstore.errors import ConfigError

T = TypeVar("T")


class Slab:
    """Bytes on a device.

    Args:
        size_bytes: How many; they are allocated here and stay until nobody uses them any more.
        device: As torch calls it: `cuda`, `cuda:1`, `cpu`.

    Raises:
        ConfigError: There is no such device, or not so much memory on it.
    """

    def __init__(self, size_bytes: int, device: str) -> None:
        self.size_bytes = size_bytes
        try:
            self._device = torch.device(device)
            self._bytes = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            self._stream = _make_stream(self._device)
        except (RuntimeError, AssertionError) as exc:
            # A torch without CUDA raises an AssertionError.
            reason = str(exc).partition("\n")[0]
            raise ConfigError(
                f"the gpu tier cannot have {size_bytes} bytes on the device {device!r}: {reason}"
            ) from exc
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="kvstore-gpu-copy")

    def submit(self, copying: Callable[[], T]) -> "Future[T]":
        """Run copies in the thread, behind all that were asked for before; they are done when the future is.

        Raises:
            RuntimeError: The slab is closed.
        """

        def run() -> T:
            with self._on_stream():
                done = copying()
                if self._stream is not None:
                    self._stream.synchronize()
                return done

        return self._copier.submit(run)

    def fence(self) -> None:
        """Let no later copy begin before what the caller's current stream was given so far has ended."""
        if self._stream is None:
            return
        stream = self._stream
        with torch.cuda.device(self._device):
            event = torch.cuda.current_stream().record_event()
        self._copier.submit(lambda: stream.wait_event(event))

    def view(self, start: int, size_bytes: int) -> torch.Tensor:
        """Bytes of the slab as a tensor; nothing is copied."""
        return self._bytes[start : start + size_bytes]

    def write(self, start: int, parts: Sequence[memoryview]) -> None:
        """Copy buffers into the slab, one behind the other."""
        for part in filter(len, parts):
            # torch refuses to share memory that it might write to.
            source = torch.frombuffer(bytearray(part) if part.readonly else part, dtype=torch.uint8)
            self.view(start, len(part)).copy_(source)
            start += len(part)

    def read(self, start: int, sizes_bytes: Sequence[int]) -> tuple[memoryview, ...]:
        """Copies of runs of bytes that lie one behind the other, in host memory."""
        parts = []
        for size_bytes in sizes_bytes:
            part = allocate(size_bytes)
            if size_bytes:
                torch.frombuffer(part, dtype=torch.uint8).copy_(self.view(start, size_bytes))
            parts.append(part)
            start += size_bytes
        return tuple(parts)

    def shift(self, shifts: Sequence[Shift]) -> None:
        """Copy within the slab, in steps of the distance where source and target overlap."""
        for source, target, size_bytes in shifts:
            step = min(abs(target - source), size_bytes)
            starts = range(0, size_bytes, step)
            for at in starts if target < source else reversed(starts):
                part_bytes = min(step, size_bytes - at)
                self.view(target + at, part_bytes).copy_(self.view(source + at, part_bytes))

    def close(self) -> None:
        """Wait for all copies, and let the memory go as soon as nobody else uses it; safe to call twice."""
        self._copier.shutdown()
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def _on_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _make_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
