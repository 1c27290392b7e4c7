"""How the results of the profiler's benchmark are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, finish_panel, new_figure, plain, save_figure

_TEXT = """\
Every configuration of a grid was measured once: encoded with all its levels, the model run behind each of them on 12
prompts of 512 tokens, decode times taken by a process for each core, with nothing else on the machine
(`benchmarks/results/profiler_grid.jsonl`). Searchers are charged for each configuration whose quality they ask for.
*kvstore* is the profiler's own search; it knows ratio, decode time and the two errors of every candidate, which needs
no model run. *kvserve* is the search of KVServe's published code: it knows every ratio, models accuracy (here `100
exp(-KL)`) with one Gaussian process, and looks for the largest ratio within three points; it stops by its own rule.
*random* draws without replacement. *greedy* knows everything, and takes each time the configuration that adds most:
no searcher can do much better."""

_SEARCHERS_TEXT = """\
Shares of the whole grid's hypervolume **after** so many evaluations, and **one in fifty** of the grid's; medians over
seeds. **Evaluations to 99 %** are empty where that was not reached within the budget; where *greedy* needs more of them
than an aim allows, hardly any search can meet it. Hypervolume is of (log ratio, log decode speed, log quality), losses
below 0.0001 nats counting as that, beyond the grid's worst feasible value on each axis;
feasible is a loss of at most 0.3 nats."""

_GRID_TEXT = """\
**Levels** are points of the grid, one for each quality level; **on the front** are those that no other one beats."""

_STYLES = {
    "greedy": ("#202020", ":"),
    "kvstore": ("#1f5fa8", "-"),
    "kvserve": ("#b5483a", "-"),
    "random": ("#8a8f98", "-"),
}


def _plot(rows: Sequence[Row], path: Path) -> None:
    figure = new_figure((8, 4.6))
    panel = figure.subplots()
    for name, (colour, line) in _STYLES.items():
        mine = next(row for row in rows if row["table"] == "searchers" and row["searcher"] == name)
        middle, low, high = ([1 - share for share in mine[side]] for side in ("p50", "p90", "p10"))
        x = range(1, len(middle) + 1)
        panel.plot(x, middle, line, color=colour, label=name, linewidth=1.8)
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.axhline(0.01, color="#404040", linewidth=0.6)
    finish_panel(
        panel, "configurations measured with the model", "missing share of the hypervolume (median; p10 to p90)"
    )
    save_figure(figure, path)


PROFILER_PAGES: Mapping[str, Page] = {
    "profiler_efficiency": Page(
        "Profiler: hypervolume against model runs",
        _TEXT,
        {
            "searchers": RowTable(
                "Searchers",
                _SEARCHERS_TEXT,
                (
                    Column("searcher", "searcher"),
                    Column("after_10", "after 10", plain),
                    Column("after_20", "after 20", plain),
                    Column("after_1_in_50", "after one in fifty", plain),
                    Column("evaluations", "evaluations to 99 %", plain),
                    Column("budget", "budget"),
                    Column("seeds", "seeds"),
                ),
            ),
            "grid": RowTable(
                "The grid",
                _GRID_TEXT,
                (
                    Column("configurations", "configurations"),
                    Column("levels", "levels"),
                    Column("on_front", "on the front"),
                    Column("hypervolume", "hypervolume", plain),
                    Column("reference_ratio", "ratio from", plain),
                    Column("reference_decode_s_per_gb", "decode s/GB to", plain),
                    Column("reference_kl_nats", "loss to", plain),
                ),
            ),
        },
        _plot,
    )
}
