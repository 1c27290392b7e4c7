"""How the results of the engines' benchmark are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, new_figure, save_figure, two_digits

_TEXT = """\
One vLLM engine for each way of getting a prefix, all long-lived, on one side of a link between two network
namespaces, and a kvstore server and LMCache's server, both in memory, on the other; the kernel holds the link
to its rate in both directions. Prefixes were stored before, over the unshaped link. A request is a stored
prefix and 32 tokens that nobody has seen, and asks for one token; before each one the engine's own cache is
emptied (not timed). In every round all methods are asked for the same prompts, in an order drawn anew, one at a
time; *recompute* and *kvstore* twice, because the aim on their ratio is narrower than one request is
repeatable. *recompute* has no connector, nor has *a second engine*, which is there to show what two engines that are
alike differ by. Every engine is bound to all cores, which vLLM does not do by itself.
Engines that are not asked are stopped (SIGSTOP): vLLM spins for a second after each request, and six engines
on two cores would feel that where users with one do not. *kvstore* is the connector with its default options:
raw chunks, and a guard that recomputes where it expects a fetch to take longer; *always fetch* is without the
guard, of raw chunks or up to a level of `ladder-packed`. *LMCache* is its MP mode: the server keeps chunks in
its memory, the engine's connector fetches them. Chunks are of 256 tokens everywhere, so of a prefix of 1,920
tokens 1,792 are fetched. That a method fetched what it should is seen by the engine's and the connectors' own
counters, and by the bytes that came over the link."""

_TTFT_TEXT = """\
**TTFT** is the time from handing the request to vLLM until its first token is out, milliseconds. **fetched** is the
share of requests that fetched their prefix. **KB** came over the link for one request, headers included (median)."""

_RATIO_TEXT = """\
**Ratio** is the TTFT of kvstore with its default options divided by the other one's, both medians; below 1 is
faster. *low* and *high* bound its 95 % interval: rounds drawn with replacement, 2,000 times."""

_PLACEBO_TEXT = """\
TTFT of the second engine without a connector divided by the first one's: what nobody can tell from a difference."""

_STYLES = {
    "recompute": ("#202020", "--", 1.6),
    "recompute, a second engine": ("#909090", ":", 1.2),
    "kvstore": ("#1f5fa8", "-", 2.6),
    "kvstore, always fetch": ("#7fa8d4", "-", 1.2),
    "kvstore, always fetch level 0": ("#2f8f5b", "-", 1.2),
    "kvstore, always fetch level 1": ("#6cb58e", "-", 1.2),
    "kvstore, always fetch level 2": ("#a9d6bd", "-", 1.2),
    "LMCache": ("#b5483a", "-", 1.6),
}


def _rate(gbit_per_s: float) -> str:
    return f"{gbit_per_s:g} Gb/s"


def _ms(value: float) -> str:
    return f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _kb(size_bytes: float) -> str:
    return f"{size_bytes / 1e3:,.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.3f}"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """TTFT against the length of the prefix, a panel for each rate of the link."""
    found = [row for row in rows if row["table"] == "ttft"]
    links = sorted({row["link_gbit_per_s"] for row in found})
    figure = new_figure((5.2 * min(2, len(links)), 4.0 * ((len(links) + 1) // 2) + 0.5))
    panels = figure.subplots(
        (len(links) + 1) // 2, min(2, len(links)), squeeze=False, sharex=True, sharey=True
    ).flatten()
    for panel, link_gbit_per_s in zip(panels, links, strict=False):
        _draw(panel, [row for row in found if row["link_gbit_per_s"] == link_gbit_per_s])
        panel.set_title(_rate(link_gbit_per_s))
    for panel in panels[len(links) :]:
        panel.set_visible(False)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw(panel: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for method in dict.fromkeys(row["method"] for row in rows):
        some = sorted((row for row in rows if row["method"] == method), key=lambda row: row["prefix_tokens"])
        colour, style, width = _STYLES.get(method, ("#c8c8c8", "-", 1.2))
        tokens = [row["prefix_tokens"] for row in some]
        panel.plot(tokens, [row["median_ms"] for row in some], style, color=colour, linewidth=width, label=method)
        if width > 1.5:
            low, high = ([row[field] for row in some] for field in ("p10_ms", "p90_ms"))
            panel.fill_between(tokens, low, high, color=colour, alpha=0.12, linewidth=0)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(sorted({row["prefix_tokens"] for row in rows}))
    panel.set_xlabel("tokens of the prefix")
    panel.set_ylabel("ms to the first token (median; p10 to p90)")
    panel.grid(which="both", linewidth=0.3)
    panel.set_axisbelow(True)


ENGINE_PAGES: Mapping[str, Page] = {
    "engines": Page(
        "Engines: time to the first token behind a link",
        _TEXT,
        {
            "ttft": RowTable(
                "Time to the first token",
                _TTFT_TEXT,
                (
                    Column("link_gbit_per_s", "link", _rate),
                    Column("prefix_tokens", "prefix"),
                    Column("method", "method"),
                    Column("median_ms", "median ms", _ms),
                    Column("p10_ms", "p10", _ms),
                    Column("p90_ms", "p90", _ms),
                    Column("fetched_share", "fetched", _percent),
                    Column("link_bytes", "KB", _kb),
                    Column("n", "n"),
                ),
            ),
            "ratio": RowTable(
                "kvstore against recomputing and against LMCache",
                _RATIO_TEXT,
                (
                    Column("link_gbit_per_s", "link", _rate),
                    Column("prefix_tokens", "prefix"),
                    Column("against", "against"),
                    Column("ratio", "ratio", _three_digits),
                    Column("low", "low", two_digits),
                    Column("high", "high", two_digits),
                    Column("n", "n"),
                ),
            ),
            "placebo": RowTable(
                "A second engine against the first",
                _PLACEBO_TEXT,
                (
                    Column("link_gbit_per_s", "link", _rate),
                    Column("prefix_tokens", "prefix"),
                    Column("ratio", "ratio", _three_digits),
                    Column("low", "low", two_digits),
                    Column("high", "high", two_digits),
                    Column("n", "n"),
                ),
            ),
            "missing": RowTable(
                "Not run", "What users might take instead.", (Column("method", "method"), Column("needs", "needs"))
            ),
        },
        _plot,
    )
}
