"""Calls of many clients at one time, timed. Standard library only: peers run it in environments of their own."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

PUT, GET, EXISTS, BATCH = "put", "get", "exists", "get 32"
OPERATIONS = (PUT, GET, EXISTS, BATCH)
BATCH_CHUNKS = 32

C = TypeVar("C")


class Work(NamedTuple):
    """Calls to be made.

    Args:
        operation: What each call does.
        value_bytes: Bytes of a value.
        clients: Clients that call, each one call after another.
        calls: Calls of all of them together.
        first: Number of the first fresh key, for puts.
    """

    operation: str
    value_bytes: int
    clients: int
    calls: int
    first: int

    @property
    def moved_bytes(self) -> int:
        """Bytes of all values that are moved."""
        values = {EXISTS: 0, BATCH: BATCH_CHUNKS}.get(self.operation, 1)
        return self.calls * values * self.value_bytes


@dataclass
class Taken:
    """Seconds of every call, and of all of them together."""

    call_s: list[float] = field(default_factory=list)
    all_s: float = 0.0


def held_key(value_bytes: int, number: int) -> str:
    """Key of a value that is held throughout."""
    return f"held {value_bytes} {number}"


def fresh_key(work: Work, number: int) -> str:
    """Key of a put of this work."""
    return f"fresh {work.value_bytes} {work.first + number}"


async def drive(clients: Sequence[C], call: Callable[[C, int], Awaitable[object]], calls: int) -> Taken:
    """Make calls on asynchronous clients, all of them in this event loop."""
    taken = Taken()
    pending = iter(range(calls))

    async def work(client: C) -> None:
        for number in pending:
            start_s = time.perf_counter()
            found = await call(client, number)
            taken.call_s.append(time.perf_counter() - start_s)
            del found

    start_s = time.perf_counter()
    await asyncio.gather(*(work(client) for client in clients))
    taken.all_s = time.perf_counter() - start_s
    return taken


def drive_threads(clients: Sequence[C], call: Callable[[C, int], object], calls: int) -> Taken:
    """Make calls on blocking clients, each of them in a thread of its own."""
    taken = Taken()
    pending = iter(range(calls))
    failures: list[BaseException] = []
    begin = threading.Event()

    def work(client: C) -> None:
        begin.wait()
        try:
            for number in pending:
                start_s = time.perf_counter()
                found = call(client, number)
                taken.call_s.append(time.perf_counter() - start_s)
                del found
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    start_s = time.perf_counter()
    begin.set()
    for thread in threads:
        thread.join()
    taken.all_s = time.perf_counter() - start_s
    if failures:
        raise failures[0]
    return taken
