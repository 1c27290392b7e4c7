"""What a connector does beside the engine's loops, which must never wait: a loop of its own, and a bound on work."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_THREADS = 4

log = logging.getLogger(__name__)


def codec_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that gather, encode, decode and scatter beside an engine, each on one core.

    Torch would give every one of them a team of OpenMP threads. With more of these than cores, OpenMP lets none wait
    actively any more, and every parallel loop of an engine on the CPU begins with waking its threads: 10 to 20 % of a
    forward pass.
    """
    # vLLM puts a function that does nothing in the place of `torch.set_num_threads`; this sets the calling thread's.
    return ThreadPoolExecutor(count, name, initializer=torch._C.set_num_threads, initargs=(1,))


class Background:
    """Runs coroutines for threads that do not wait for them.

    Args:
        name: Name of the thread, and of those in which its coroutines compute.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(codec_threads(_THREADS, f"{name}-codec"))
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine; its result is found in the future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, timeout_s: float) -> bool:
        """Cancel what still runs and stop the loop; safe to call twice.

        Returns:
            Whether everything ended in time.
        """
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop)
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _cancel(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_default_executor()
        self._loop.stop()


class BoundedBytes:
    """Bytes that are on their way out, and their bound.

    Args:
        bytes_max: Most bytes at one time.
    """

    def __init__(self, bytes_max: int) -> None:
        self.used_bytes = 0
        self._bytes_max = bytes_max
        self._changed = threading.Condition()

    def take(self, size_bytes: int) -> bool:
        """Make room; whether there was some. One taker always finds some."""
        with self._changed:
            if self.used_bytes and self.used_bytes + size_bytes > self._bytes_max:
                return False
            self.used_bytes += size_bytes
            return True

    def give(self, size_bytes: int) -> None:
        """Give room back."""
        with self._changed:
            self.used_bytes -= size_bytes
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Whether nothing is on its way any more, after a bounded wait."""
        with self._changed:
            return self._changed.wait_for(lambda: self.used_bytes == 0, timeout_s)
