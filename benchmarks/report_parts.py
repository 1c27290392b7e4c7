"""What the pages of benchmarks.report are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row


@dataclass(frozen=True)
class Column:
    """A column of a table: where its value is in a row, its heading, and how the value is written."""

    field: str
    heading: str
    text: Callable[[Any], str] = str


@dataclass(frozen=True)
class RowTable:
    """How the rows of one table are shown: what its metric is, and its columns."""

    title: str
    definition: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Page:
    """How one benchmark is shown: what it measures, its tables by the name their rows carry, and its plot."""

    title: str
    text: str
    tables: Mapping[str, RowTable]
    plot: Callable[[Sequence[Row], Path], None] | None = None


def plain(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def two_digits(value: float) -> str:
    """Two digits behind the point."""
    return f"{value:.2f}"


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure, inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish_panel(panel: Any, x: str, y: str) -> None:
    """Labels, a logarithmic y axis, a grid behind the lines, and the legend."""
    panel.set_yscale("log")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(which="both", linewidth=0.3)
    panel.set_axisbelow(True)
    panel.legend(fontsize=8)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG."""
    # The version of the plotting library is left out, so that equal figures are equal bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
