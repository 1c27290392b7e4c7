"""How the S3 tier makes blocking calls: in a bounded number of threads, under a deadline, past a circuit breaker.

A thread that waits on a socket cannot be stopped. So a call is awaited until its thread has ended, which the deadline
and the socket timeouts see to; whoever asked for it is answered at the deadline all the same (`Calls.collect`).
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvstore.backends.breaker import Breaker, Permit
from kvstore.errors import BackendError, BackendUnavailableError, ConfigError, FrameCorruptError, FrameError
from kvstore.metrics import Metrics

_WATCH_S = 0.05

T = TypeVar("T")


class DeadlineError(BackendUnavailableError):
    """The time of the call is over."""


class BreakerOpenError(BackendUnavailableError):
    """S3 failed lately and is not asked now."""


class AbsentError(Exception):
    """There is no such object."""


class ChangedError(Exception):
    """The object is not what the request took it for."""


class ForeignError(FrameError):
    """An object is sound for all that is known, but none that this server may take for its own or read."""


class DamagedError(FrameCorruptError):
    """An object is not the frame that its name promises.

    Args:
        detail: What is wrong.
        etag: Which version of the object that is.
    """

    def __init__(self, detail: str, etag: str) -> None:
        super().__init__(detail)
        self.etag = etag


class Deadline:
    """The moment by which a call must have ended; shared by the event loop and the call's threads."""

    def __init__(self, tier: str, seconds: float) -> None:
        self._tier = tier
        self._seconds = seconds
        self._at_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left; 0 once it has passed."""
        return max(0.0, self._at_s - time.monotonic())

    def expire(self) -> None:
        """Let it pass now: nobody waits any more."""
        self._at_s = time.monotonic()

    def check(self) -> None:
        """Raise `DeadlineError` once it has passed."""
        if not self.left_s:
            raise self.error()

    def error(self) -> DeadlineError:
        """The error that says so."""
        return DeadlineError(self._tier, f"S3 did not answer within {self._seconds:g} s")


class _Lane:
    """Threads for one kind of call, and who waits for them."""

    def __init__(self, name: str, threads: int) -> None:
        self.free = asyncio.Semaphore(threads)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=name)


class Calls:
    """Runs blocking calls.

    Args:
        tier: Name of the tier, for errors and metrics.
        threads: Calls of callers that run at one time.
        background_threads: Calls on the tier's own behalf that run beside them.
        breaker: Keeps calls away from a service that fails.
        metrics: Where to count.

    Attributes:
        tier: The same.
        breaker: The same.
        available: Set while the breaker is closed.
    """

    def __init__(self, tier: str, threads: int, background_threads: int, breaker: Breaker, metrics: Metrics) -> None:
        self.breaker = breaker
        self.available = asyncio.Event()
        self._down = asyncio.Event()
        self.tier = tier
        self._metrics = metrics
        self._lanes = {
            False: _Lane(f"kvstore-{tier}", threads),
            True: _Lane(f"kvstore-{tier}-background", background_threads),
        }
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opened_seen = 0
        self._closed = False
        self._note()

    async def run(
        self,
        work: Callable[[Deadline], T],
        deadline: Deadline,
        *,
        background: bool = False,
        begun: Callable[[], None] = lambda: None,
    ) -> T:
        """What `work` returns, once its thread has ended.

        Args:
            work: The call; it must end soon after the deadline.
            deadline: When nobody waits any more.
            background: Whether it is the tier's own.
            begun: Called just before the thread begins, and not where the call is refused.

        Raises:
            BreakerOpenError: S3 is not asked now.
            DeadlineError: The deadline passed; a thread was there.
            BackendError: What `work` raised, or that no thread became free in time.
        """
        self._refuse()
        lane = self._lanes[background]
        try:
            async with asyncio.timeout(deadline.left_s):
                await lane.free.acquire()
        except TimeoutError as exc:
            # The threads' own calls tell the breaker how S3 is.
            raise DeadlineError(self.tier, "every thread was busy until the deadline") from exc
        try:
            permit = self._admit()
            begun()
            future = asyncio.get_running_loop().run_in_executor(lane.pool, work, deadline)
        except BaseException:
            lane.free.release()
            raise
        future.add_done_callback(lambda _: lane.free.release())
        return await self._ended(future, permit, deadline)

    async def collect(self, jobs: Sequence[Coroutine[Any, Any, T]], deadline: Deadline) -> list[T | BaseException]:
        """What jobs come to by the deadline; those that have not ended go on, and their answer is `DeadlineError`."""
        tasks = [asyncio.create_task(job) for job in jobs]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._forget)
        if tasks:
            await asyncio.wait(tasks, timeout=deadline.left_s)
        return [_outcome(task) if task.done() else deadline.error() for task in tasks]

    async def watch(self, probe: Callable[[Deadline], None], timeout_s: float) -> None:
        """Try an open breaker as soon as it lets a probe pass, so that it closes without anybody's call; never ends."""
        while True:
            await self._down.wait()
            await asyncio.sleep(max(_WATCH_S, self.breaker.retry_after_s))
            if not self.breaker.closed:
                # What it says is the breaker's to know.
                call = self.run(probe, Deadline(self.tier, timeout_s), background=True)
                await asyncio.gather(call, return_exceptions=True)

    def trip(self, reason: str) -> None:
        """Open the breaker at once."""
        self.breaker.trip(reason)
        self._note()

    async def aclose(self, timeout_s: float) -> bool:
        """Wait for what runs, at most this long, and free the threads; whether all of them have ended."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        self._closed = True
        for lane in self._lanes.values():
            lane.pool.shutdown(wait=False, cancel_futures=True)
        return not self._tasks

    async def _ended(self, future: "asyncio.Future[T]", permit: Permit, deadline: Deadline) -> T:
        """The call's result; the breaker learns at the deadline, even if the thread needs longer."""
        try:
            await asyncio.wait({future}, timeout=deadline.left_s)
            if future.done():
                self._judge(future, permit)
            else:
                self.breaker.failed(permit, deadline.error().detail)
                self._note()
                await asyncio.wait({future})
        finally:
            if not future.done():
                # Nobody waits any more: the thread ends at its next look at the deadline.
                deadline.expire()
                self.breaker.unused(permit)
                future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return future.result()

    def _judge(self, future: "asyncio.Future[T]", permit: Permit) -> None:
        error = future.exception()
        if isinstance(error, BackendUnavailableError | ConfigError):
            self.breaker.failed(permit, error.detail if isinstance(error, BackendError) else str(error))
        else:
            # Whatever it answered, it answered.
            self.breaker.succeeded(permit)
        self._note()

    def _refuse(self) -> None:
        """Refuse a call where it could not be made now."""
        if self._closed:
            raise BackendUnavailableError(self.tier, "is closed")
        if not self.breaker.closed and self.breaker.retry_after_s > 0:
            raise self._open_error()

    def _admit(self) -> Permit:
        self._refuse()
        if (permit := self.breaker.admit()) is None:
            raise self._open_error()
        return permit

    def _open_error(self) -> BreakerOpenError:
        retry_after_s = max(self.breaker.retry_after_s, _WATCH_S)
        return BreakerOpenError(
            self.tier,
            f"left alone after failures ({self.breaker.reason}); next try in {retry_after_s:.1f} s",
            retry_after_s,
        )

    def _note(self) -> None:
        """Tell others of the breaker's state."""
        if self.breaker.closed:
            self.available.set()
            self._down.clear()
        else:
            self.available.clear()
            self._down.set()
        self._metrics.tier_up.labels(self.tier).set(self.breaker.closed)
        self._metrics.breaker_opened.labels(self.tier).inc(self.breaker.opened - self._opened_seen)
        self._opened_seen = self.breaker.opened

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # A job whose caller has been answered may fail unheard.
            task.exception()


def _outcome(task: "asyncio.Task[T]") -> T | BaseException:
    if task.cancelled():
        return asyncio.CancelledError()
    return task.exception() or task.result()
