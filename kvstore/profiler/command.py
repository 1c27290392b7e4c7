"""The command `kvstore profile`: progress while it runs, and at its end a set of profiles and a report."""

import json
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvstore.files import write_output
from kvstore.profile import SET_FILE, profiles_json
from kvstore.profiler.options import Options
from kvstore.profiler.report import html_report
from kvstore.profiler.run import Finished, Run

REPORT = "report.html"


def run_profile(options: Options) -> Finished:
    """Profile a model, and write `profiles.json` and `report.html` into the folder of the run.

    Raises:
        ConfigError: Model, text, settings or folder cannot be used; what was measured is kept.
    """
    columns = (SpinnerColumn(), "{task.description}", BarColumn(bar_width=12), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn(), "{task.fields[note]}")
    with Progress(*columns, *times, console=Console(stderr=True)) as progress:
        phases: dict[str, TaskID] = {}

        def watch(what: str, done: int, total: int, note: str) -> None:
            if what not in phases:
                if phases:
                    progress.stop_task(list(phases.values())[-1])
                phases[what] = progress.add_task(what, total=total or None, note=note)
            progress.update(phases[what], completed=done, total=total or None, note=note)

        finished = Run(options, watch).finish()
    data = json.dumps(profiles_json(finished.profiles), indent=1).encode() + b"\n"
    write_output(options.out / SET_FILE, data)
    write_output(options.out / REPORT, html_report(finished).encode())
    return finished


def summary(finished: Finished, options: Options) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "profiles": str(options.out / SET_FILE),
        "report": str(options.out / REPORT),
        "count": len(finished.profiles.profiles),
        "took_s": round(finished.took_s, 1),
        **finished.profiles.details,
    }
