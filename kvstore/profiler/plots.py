"""Pictures of a run, as SVG: the Pareto front from all sides, and how hypervolume grew."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvstore.profiler.pareto import KL_FLOOR
from kvstore.profiler.run import Finished, Found

_MEASURED, _KEPT = "#b0b8c4", "#1f5fa8"
_MARKS = {"nested": "o", "minmax": "s", "absmax": "^", "codebook": "D", "step": "v", "fp8": "P", "exact": "X"}

Level = tuple[str, float, float, float]
"""Quantiser, ratio, decode seconds per GB, quality loss in nats."""


def measured_levels(found: Found) -> list[Level]:
    """Every level that was measured in the search."""
    return [
        (str(one.values["quantiser"]), ratio, found.trials[one].decode_s_per_gb[level], outcome.kl_nats(level))
        for one, outcome in found.outcomes.items()
        for level, ratio in enumerate(outcome.ratio)
    ]


def kept_levels(finished: Finished) -> list[Level]:
    """Every level of the profiles, as they were measured at the end; loss is the mean over buckets."""
    return [
        (
            str(configuration.values["quantiser"]),
            level.ratio,
            level.decode_s_per_gb,
            sum(one.kl_nats for one in level.quality.values()) / len(level.quality),
        )
        for configuration, profile in zip(finished.configurations, finished.profiles.profiles, strict=True)
        for level in profile.levels
    ]


def pairs(finished: Finished) -> str:
    """Loss against ratio, decode time against ratio, and loss against decode time."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    sides = (("ratio", 1), ("decode, s/GB", 2), ("quality loss, nats", 3))
    for panel, (x, y) in zip(figure.subplots(1, 3), ((0, 2), (0, 1), (1, 2)), strict=True):
        for levels, colour, size, name in _layers(finished):
            _scatter(panel, levels, sides[x][1], sides[y][1], colour, size, name)
        panel.set_xlabel(sides[x][0])
        panel.set_ylabel(sides[y][0])
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis, name in ((panel.xaxis, sides[x][0]), (panel.yaxis, sides[y][0])):
            axis.set_major_locator(LogLocator(subs=(1.0,) if name.startswith("quality") else (1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        _grid(panel)
    handles, names = figure.axes[0].get_legend_handles_labels()
    # Below all panels: inside one it would lie on points.
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return _svg(figure)


def space(finished: Finished) -> str:
    """The front in all three objectives."""
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    panel: Any = figure.add_subplot(projection="3d")
    for levels, colour, size, name in _layers(finished):
        columns = [[_log10(level[side]) for level in levels] for side in (1, 2, 3)]
        panel.scatter(*columns, c=colour, s=size, label=name, depthshade=False)
    panel.set_xlabel("ratio, log10")
    panel.set_ylabel("decode s/GB, log10")
    panel.set_zlabel("loss in nats, log10")
    panel.view_init(22, -50)
    panel.legend(fontsize=8)
    return _svg(figure)


def growth(found: Found) -> str:
    """Hypervolume against the configurations that were measured with the model."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    panel.step(range(1, len(found.volumes) + 1), found.volumes, where="post", color=_KEPT)
    panel.set_xlabel("configurations measured with the model")
    panel.set_ylabel("hypervolume, log units cubed")
    panel.set_xlim(left=0)
    _grid(panel)
    return _svg(figure)


def _layers(finished: Finished) -> tuple[tuple[list[Level], str, float, str], ...]:
    return (
        (measured_levels(finished.found), _MEASURED, 14.0, "measured in the search"),
        (kept_levels(finished), _KEPT, 34.0, "levels of the profiles"),
    )


def _scatter(panel: Axes, levels: Sequence[Level], x: int, y: int, colour: str, size: float, name: str) -> None:
    """Points, marked by their quantiser."""
    for quantiser, mark in _MARKS.items():
        mine = [level for level in levels if level[0] == quantiser]
        if mine:
            values = [[max(float(level[side]), KL_FLOOR if side == 3 else 0.0) for level in mine] for side in (x, y)]
            panel.scatter(values[0], values[1], c=colour, s=size, marker=mark, label=f"{name}: {quantiser}")


def _log10(value: float | str) -> float:
    return math.log10(max(float(value), KL_FLOOR))


def _grid(panel: Axes) -> None:
    panel.grid(which="both", linewidth=0.3)
    panel.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    """The picture as an element that a page can hold; the same numbers give the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "kvstore", "svg.fonttype": "none"}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
