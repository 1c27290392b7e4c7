"""How long anything was under way, where things overlap."""

import time


class Stopwatch:
    """Runs while at least one of the blocks that it is entered for is open; for the tasks of one event loop."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._count = 0
        self._since_s = 0.0

    def __enter__(self) -> None:
        if not self._count:
            self._since_s = time.monotonic()
        self._count += 1

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.total_s += time.monotonic() - self._since_s
