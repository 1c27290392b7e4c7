"""Processes that measure configurations, one at a time each; one that dies takes nothing with it."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Literal

from kvstore.profiler.objectives import Bench, InfeasibleError, Outcome, Task, Trial
from kvstore.profiler.space import Configuration

Kind = Literal["trial", "times", "outcome"]
"""A trial, one whose times are to be published, or what the model tells."""
Result = Trial | Outcome | InfeasibleError


class Workers:
    """A pool of processes with a `Bench` each.

    Args:
        task: What they measure on.
        jobs: How many; by default one for each core, or one where the device is a GPU.
    """

    def __init__(self, task: Task, jobs: int | None = None) -> None:
        self._task = task
        self.jobs = jobs or (len(os.sched_getaffinity(0)) if task.device == "cpu" else 1)
        self._pool = self._make()

    def _make(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.jobs, get_context("spawn"), initializer=_start, initargs=(self._task,))

    def measure(self, kind: Kind, configurations: Sequence[Configuration]) -> Iterator[tuple[Configuration, Result]]:
        """Measure, and yield in the order in which results come.

        A process that is killed (by the system, for its memory) makes its configuration infeasible; those that ran
        beside it are measured again.

        Raises:
            ConfigError: The model, the device or an artefact cannot be used.
        """
        left = list(configurations)
        try:
            for configuration, result in self._all(kind, left):
                left.remove(configuration)
                yield configuration, result
        except BrokenProcessPool:
            for configuration in left:
                yield configuration, self._alone(kind, configuration)

    def _all(self, kind: Kind, configurations: Sequence[Configuration]) -> Iterator[tuple[Configuration, Result]]:
        futures: dict[Future[Trial | Outcome], Configuration] = {
            self._pool.submit(_measure, kind, configuration): configuration for configuration in configurations
        }
        try:
            for future in as_completed(futures):
                yield futures[future], _result(future)
        finally:
            for future in futures:
                future.cancel()

    def _alone(self, kind: Kind, configuration: Configuration) -> Result:
        """Measure with nothing beside it, so that a process that dies says which configuration it was."""
        self._pool.shutdown(cancel_futures=True)
        self._pool = self._make()
        try:
            return _result(self._pool.submit(_measure, kind, configuration))
        except BrokenProcessPool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._make()
            return InfeasibleError("its process was killed, probably for its memory")

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _result(future: "Future[Trial | Outcome]") -> Result:
    try:
        return future.result()
    except InfeasibleError as exc:
        return exc


_TASK: list[Task] = []
_BENCH: list[Bench] = []


def _start(task: Task) -> None:
    _TASK[:] = [task]


def _measure(kind: Kind, configuration: Configuration) -> Trial | Outcome:
    # Not in the initialiser: what goes wrong there breaks the pool without saying why.
    if not _BENCH:
        _BENCH.append(Bench(_TASK[0]))
    bench = _BENCH[0]
    if kind == "outcome":
        return bench.run_model(configuration)
    return bench.try_codec(configuration, thorough=kind == "times")
