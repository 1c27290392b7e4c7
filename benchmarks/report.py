"""docs/benchmarks.md and its plots, from benchmarks/results/*.json alone.

`python -m benchmarks.report` writes the same bytes whenever it finds the same results.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bandwidth_pages import BANDWIDTH_PAGES
from benchmarks.codec_pages import CODEC_PAGES
from benchmarks.controller_pages import CONTROLLER_PAGES
from benchmarks.engine_pages import ENGINE_PAGES
from benchmarks.engine_quality_pages import ENGINE_QUALITY_PAGES
from benchmarks.harness import RESULTS, ROOT, Row
from benchmarks.peer_pages import PEER_PAGES
from benchmarks.profiler_pages import PROFILER_PAGES
from benchmarks.report_parts import Column, Page, RowTable, new_figure, plain, save_figure, two_digits
from benchmarks.service_pages import SERVICE_PAGES
from benchmarks.tier_pages import TIER_PAGES

DOCS = ROOT / "docs"

_PREAMBLE = """\
# Benchmarks

This page is made from the files in `benchmarks/results/` by `python -m benchmarks.report`; do not edit it. Every
benchmark says how it can be run again. Figures of one table were measured in one run, the cases taking turns, so they
can be compared with one another; figures of different machines or runs cannot.

**median, p10, p90, p99**: the sample below which 50, 10, 90 or 99 % of the repetitions lie. **n**: repetitions.
An **aim** is what was promised before it was measured; it stays in the table when it is missed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write docs/benchmarks.md.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the results are")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where page and plots go")
    args = parser.parse_args(argv)
    write_report(args.results, args.docs)


def write_report(results: Path, docs: Path) -> None:
    """Write the page and a plot for each result that has one.

    Args:
        results: Folder with one JSON file for each benchmark.
        docs: Folder that gets `benchmarks.md` and `plots/`.
    """
    parts = [_PREAMBLE]
    for path in sorted(set(results.glob("*.json")) - set(results.glob("*.rejected.json"))):
        result = json.loads(path.read_text("utf-8"))
        page = PAGES.get(result["benchmark"], Page(result["benchmark"], "", {}))
        parts += _section(result, page, path.stem)
        if page.plot is not None:
            (docs / "plots").mkdir(parents=True, exist_ok=True)
            page.plot(result["rows"], docs / "plots" / f"{path.stem}.png")
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text("\n".join(parts), "utf-8")


def _section(result: Mapping[str, Any], page: Page, stem: str) -> Iterator[str]:
    yield f"## {page.title}\n"
    if page.text:
        yield f"{page.text}\n"
    yield f"{_provenance(result)}\n"
    if page.plot is not None:
        yield f"![{page.title}](plots/{stem}.png)\n"
    yield "### Aims\n"
    yield _markdown_table(_AIM_COLUMNS, result["aims"])
    for name in dict.fromkeys(row.get("table", "rows") for row in result["rows"]):
        rows = [row for row in result["rows"] if row.get("table", "rows") == name]
        table = page.tables.get(name) or _plain_table(name, rows)
        yield f"### {table.title}\n"
        if table.definition:
            yield f"{table.definition}\n"
        yield _markdown_table(table.columns, rows)


def _provenance(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"`python -m benchmarks.{result['benchmark']} --seed {result['seed']}`, {result['date']}, commit "
        f"`{result['commit']}`, on {machine['processor']}, {machine['cores']} cores, {memory} of memory, "
        f"{machine['gpu'] or 'no GPU'}, Linux {machine['kernel']}; {versions}."
    )


def _markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    lines = [[column.heading for column in columns], ["---"] * len(columns)]
    lines += [[column.text(row.get(column.field)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain_table(name: str, rows: Sequence[Row]) -> RowTable:
    """A table of whatever a benchmark without a page of its own measured; lists (samples) are left out."""
    fields = dict.fromkeys(field for row in rows for field, value in row.items() if not isinstance(value, list | dict))
    return RowTable(name, "", tuple(Column(field, field, plain) for field in fields if field != "table"))


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _bytes(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def _ms(value_s: float) -> str:
    return f"{value_s * 1e3:.2f}"


def _plot_wire(rows: Sequence[Row], path: Path) -> None:
    """Bars of throughput by case, one panel for each size and direction, copies within the process in every panel."""
    measured = [row for row in rows if row["table"] == "throughput"]
    sizes = sorted({row["value_bytes"] for row in measured})
    figure = new_figure((10, 2.8 * len(sizes)))
    panels = figure.subplots(len(sizes), 2, squeeze=False, sharex=True, sharey=True)
    for line, size_bytes in zip(panels, sizes, strict=True):
        for panel, direction in zip(line, ("put", "get"), strict=True):
            shown = [row for row in measured if row["value_bytes"] == size_bytes]
            _draw_bars(panel, [row for row in shown if row["direction"] in (direction, "copy")])
            panel.set_title(f"{direction} of {_bytes(size_bytes)}")
    for panel in panels[-1]:
        panel.set_xlabel("GB/s (median; whiskers p10 to p90)")
    save_figure(figure, path)


def _draw_bars(panel: Any, rows: Sequence[Row]) -> None:
    medians = [row["gb_per_s_median"] for row in rows]
    below = [row["gb_per_s_median"] - row["gb_per_s_p10"] for row in rows]
    above = [row["gb_per_s_p90"] - row["gb_per_s_median"] for row in rows]
    colours = [_COLOURS.get(row["case"], "#c8c8c8") for row in rows]
    panel.barh([row["case"] for row in rows], medians, xerr=[below, above], color=colours, ecolor="#404040", capsize=2)
    panel.set_xscale("log")
    panel.grid(axis="x", which="both", linewidth=0.3)
    panel.set_axisbelow(True)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()


_COLOURS = {
    "kvstore client": "#1f5fa8",
    "redis-py asyncio": "#b5483a",
    "redis-py": "#d48a7f",
    "bare socket": "#7fa8d4",
}

_AIM_COLUMNS = (
    Column("aim", "aim"),
    Column("target", "target", plain),
    Column("value", "measured", lambda value: "not measured" if value is None else plain(value)),
    Column("met", "", _met),
    Column("needs", "needs", plain),
)

_WIRE_TEXT = """\
One client process and one server process on one machine over loopback TCP, one request at a time. The kvstore server
keeps values in its memory tier (no disk tier); Redis persists nothing. In every round each case is measured once, in
an order drawn anew. Puts use keys that are not held; they are deleted outside of the timing. Every value was checked
once, outside of the timing, to come back as it was."""

_THROUGHPUT_TEXT = """\
**Throughput** is the bytes of the value divided by the time of one call, in GB/s (10^9 bytes): for a put until the
answer that it is held, for a get until the whole value is there. *kvstore client* sends frames that were made before,
and gets frames and verifies their checksums. *redis-py* is Redis through that library with hiredis, asynchronous and
blocking. *bare socket* drives the same kvstore server over one blocking socket, receiving into one buffer that is
reused and verifying nothing: the most that any Python client can get out of this server. *memcpy* is one copy within
the client by one thread, into a warm buffer or into memory that is fresh from the kernel, which whoever keeps a value
must pay for."""

_RATIO_TEXT = """\
**Ratio** is the throughput of the kvstore client divided by that of the other one (the faster of the two redis-py
clients, or the bare socket), both medians of the table above; 1 is as fast, 2 is twice as fast. *low* and *high* bound
its 95 % interval: rounds drawn with replacement, 2,000 times."""

_MATCH_TEXT = """\
**Match latency** is the time of one `POST /v1/match` over keys that are all held, on a keep-alive connection, until the
last byte of the answer. The clock starts just before the last digest is sent, the server having had 10 ms to take all
others (*last digest held back*); when the socket has taken the whole request, sent at once (*request sent at once*);
or before its first byte is sent (*whole request*)."""

PAGES: Mapping[str, Page] = {
    "wire": Page(
        "Wire: put, get and match over loopback",
        _WIRE_TEXT,
        {
            "throughput": RowTable(
                "Throughput",
                _THROUGHPUT_TEXT,
                (
                    Column("case", "case"),
                    Column("direction", "direction"),
                    Column("value_bytes", "value", _bytes),
                    Column("gb_per_s_median", "GB/s", two_digits),
                    Column("gb_per_s_p10", "p10", two_digits),
                    Column("gb_per_s_p90", "p90", two_digits),
                    Column("n", "n"),
                ),
            ),
            "ratio": RowTable(
                "Ratios",
                _RATIO_TEXT,
                (
                    Column("direction", "direction"),
                    Column("value_bytes", "value", _bytes),
                    Column("case", "case"),
                    Column("against", "against"),
                    Column("ratio", "ratio", two_digits),
                    Column("low", "low", two_digits),
                    Column("high", "high", two_digits),
                    Column("n", "n"),
                ),
            ),
            "match": RowTable(
                "Match latency",
                _MATCH_TEXT,
                (
                    Column("case", "clock starts"),
                    Column("keys", "keys"),
                    Column("median_s", "median ms", _ms),
                    Column("p10_s", "p10", _ms),
                    Column("p90_s", "p90", _ms),
                    Column("p99_s", "p99", _ms),
                    Column("n", "n"),
                ),
            ),
        },
        _plot_wire,
    ),
    **BANDWIDTH_PAGES,
    **CODEC_PAGES,
    **CONTROLLER_PAGES,
    **ENGINE_PAGES,
    **ENGINE_QUALITY_PAGES,
    **PEER_PAGES,
    **PROFILER_PAGES,
    **SERVICE_PAGES,
    **TIER_PAGES,
}
"""How each benchmark is shown; one that is not listed gets plain tables of its rows."""


if __name__ == "__main__":
    main()
