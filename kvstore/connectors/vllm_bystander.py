"""Stands in for a worker of the vLLM connector that could not start: it loads and saves nothing, and says so.

The scheduler's half may have started all the same, and a load that nobody ends would keep its request waiting for ever.
"""

from collections.abc import Sequence

from kvstore.connectors.paged import Pages
from kvstore.connectors.vllm_plan import Counters, Load, Loaded, Report, Save


class Bystander:
    """Fails every load at once.

    Args:
        counters: Where to count.
    """

    busy = False

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._loads: list[Load] = []
        self._invalid: set[int] = set()
        self._report = Report()

    def attach(self, pages: Pages) -> None:
        """It has no use for the engine's cache."""

    def start_loads(self, loads: Sequence[Load], aborted: Sequence[str] = ()) -> None:
        """Take loads."""
        self._loads += loads

    def finished(self, *, idle: bool = False) -> set[str]:
        """Requests whose load has failed since the last call."""
        loads, self._loads = self._loads, []
        for load in loads:
            self._invalid.update(load.block_ids[load.skip : load.end])
            self._report.loads[load.request_id] = [Loaded(0, None, "error", 0, 0.0)]
            self._counters.add("loads")
            self._counters.add("failed_error")
        return {load.request_id for load in loads}

    def take_invalid(self) -> set[int]:
        """Blocks that were not loaded."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> Report | None:
        """What the scheduler must know."""
        report, self._report = self._report, Report()
        return report if report.loads else None

    def stage(self, saves: Sequence[Save], layer: int) -> None:
        """Nothing is saved."""

    def finish_saves(self, saves: Sequence[Save]) -> None:
        """Nothing is saved."""

    def close(self) -> None:
        """There is nothing to end."""
