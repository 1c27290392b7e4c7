"""A relay for tests that have no event loop."""

import asyncio
import threading
from contextlib import AsyncExitStack
from typing import Any

from tests.tcp_relay import Relay, tcp_relay


class RelayThread:
    """A relay in a loop of its own, so that tests need none."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self.relay: Relay = self._run(self._stack.enter_async_context(tcp_relay(port)))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def set(self, fault: str, after_bytes: int = 0) -> None:
        """What happens to answers from now on, once so many bytes have passed; `slow` is one megabyte a second."""
        slow = fault == "slow"
        self.relay.rate_bytes_per_s = 1e6 if slow else 0.0
        self.relay.fault, self.relay.after_bytes = "" if slow else fault, after_bytes

    def lead_to(self, port: int) -> None:
        """End every connection; new ones lead to another port."""
        self.relay.port = port
        self.drop()

    def drop(self) -> None:
        """End every connection, and lose what is on its way."""
        self._run(self.relay.stop())

    def stop(self) -> None:
        self._run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
