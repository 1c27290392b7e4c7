"""The command `kvstore calibrate`: progress, and an artefact that is there whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from kvstore.calibration.calibrate import calibrate
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.errors import ConfigError
from kvstore.files import write_output
from kvstore.inspection import Report, inspect_file


def run_calibration(*, model: Path, texts: Sequence[Path], out: Path, settings: Settings, force: bool) -> Report:
    """Calibrate a model and write the artefact.

    Args:
        model: Folder of a Hugging Face causal LM.
        texts: Text of the kind that will be served.
        out: Where to write.
        settings: How to calibrate.
        force: Whether an artefact that is there may be replaced.

    Returns:
        What `kvstore inspect` says of the artefact, and its `path`.

    Raises:
        ConfigError: Model, text, settings or path cannot be used.
    """
    settings.check()
    _check_path(out, force)
    columns = (SpinnerColumn(), "{task.description}", BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), "left:", TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("loading the model", total=None)
        loaded = Model(model, dtype="float32")
        progress.update(bar, description=f"{settings.prompts} prompts", total=1.0)

        def show(share: float) -> None:
            progress.update(bar, completed=share)
            if share >= 1.0:
                progress.update(bar, description="computing bases", total=None)

        data = calibrate(loaded, texts, settings, show)
    write_output(out, data)
    return inspect_file(out) | {"path": str(out)}


def _check_path(out: Path, force: bool) -> None:
    """Refuse before the work what could not be written after it."""
    if out.is_dir():
        raise ConfigError(f"{out} is a directory: name a file")
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already, and frames may need it: name another file, or use --force")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"{out.parent} is no directory that can be written to")
