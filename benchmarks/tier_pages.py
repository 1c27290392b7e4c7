"""How the results of the tiers' benchmark are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, new_figure, save_figure, two_digits

_TEXT = """\
Every tier is the production backend with budgets that evict nothing, asked directly or, for the server, by
the client over loopback. Frames have three levels of a third each; every get verifies all checksums. `s3` is
rclone's server of S3 over files on the same machine, so it shows what this side costs, not what a network
does."""

_SPEED_TEXT = """\
**GB/s** are the bytes of all calls of a cell over the time that they took together; **p50**, **p99** are of
single calls. Puts are of fresh keys and wait for the tier's own durability (`lmdb` for its commit, `s3` for
the answer). *stack, served by lmdb* copies what it reads into memory as well. `host` keeps the buffers it is
given, so a put there copies nothing; a get costs its checksums."""

_HITS_TEXT = """\
A production trace (12,031 requests of a service, one hash for every 512 tokens of prefix) is replayed through
the `Index` and the placement that the server runs. A request looks up its chunks in order; a **hit** is a
chunk of the leading run that is held at a level within a KL of 0.01 nats, and what is not held is put.
**Capacity** is a share of the bytes of all distinct chunks uncompressed. Bytes and KL of levels are those of
`ladder` and `ladder-tokens` in the quality results (text, prompts of 512 tokens). *all levels* and *budget
level* keep a fixed number of levels; *shrink* drops those above the budget level when room is needed.
**Below** are hits at lower levels, which do not count. **KL** is the mean of what is hit. In the plot
*shrink* lies on *budget level* where both hit the same."""

_POLICY_COLOURS = {"lru": "#7f7f7f", "s3-fifo": "#d4803a", "ours": "#1f5fa8"}
_POLICY_NAMES = {"lru": "LRU", "s3-fifo": "S3-FIFO", "ours": "ours"}
_STYLES = {"none": ":", "all levels": "-.", "budget level": "--", "shrink": "-"}


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:g} MiB"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _milli(value: float) -> str:
    return f"{value:.5f}"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Above rate and latency of every tier, below hits and KL against capacity."""
    figure = new_figure((13, 13))
    panels = figure.subplots(3, 2)
    speed = [row for row in rows if row["table"] == "speed" and row["operation"] in ("put", "get")]
    largest = max(row["payload_bytes"] for row in speed)
    for panel, operation in zip(panels[0], ("put", "get"), strict=True):
        _draw_speed(panel, [row for row in speed if row["operation"] == operation and row["payload_bytes"] == largest])
        panel.set_title(f"{operation} of {_mib(largest)}")
    hits = [row for row in rows if row["table"] == "hits"]
    methods = list(dict.fromkeys(row["method"] for row in hits if row["compression"] != "none"))
    by_name: dict[str, list[str]] = {}
    for method in methods:
        by_name.setdefault(method.partition(" ")[0].rstrip(","), []).append(method)
    for panel, (name, some) in zip(panels[1], list(by_name.items())[:2], strict=False):
        _draw_hits(panel, [row for row in hits if row["compression"] == "none" or row["method"] in some])
        panel.set_title(f"chunks hit, {name}")
    for panel, (name, some) in zip(panels[2], list(by_name.items())[:2], strict=False):
        _draw_kl(panel, [row for row in hits if row["method"] in some and row["policy"] == "ours"])
        panel.set_title(f"mean KL of what is hit, {name}")
    save_figure(figure, path)


def _draw_speed(panel: Any, rows: Sequence[Row]) -> None:
    tiers = list(dict.fromkeys(row["tier"] for row in rows))
    concurrencies = sorted({row["concurrency"] for row in rows})
    for number, (concurrency, colour) in enumerate(zip(concurrencies, ("#7fa8d4", "#1f5fa8"), strict=False)):
        found = {row["tier"]: row["gb_per_s"] for row in rows if row["concurrency"] == concurrency}
        places = [place + 0.4 * number - 0.2 for place in range(len(tiers))]
        bars = panel.barh(places, [found[tier] for tier in tiers], height=0.38, color=colour)
        panel.bar_label(bars, fmt=f" %.3g ({concurrency} at a time)", fontsize=7)
    panel.set_yticks(range(len(tiers)), tiers)
    panel.invert_yaxis()
    panel.set_xscale("log")
    # Room for the labels behind the longest bar.
    rates = [row["gb_per_s"] for row in rows]
    panel.set_xlim(min(rates) / 3, max(rates) * 30)
    panel.set_xlabel("GB/s")
    panel.grid(axis="x", linewidth=0.3)
    panel.set_axisbelow(True)


def _draw_hits(panel: Any, rows: Sequence[Row]) -> None:
    for compression, policy in dict.fromkeys((row["compression"], row["policy"]) for row in rows):
        some = [row for row in rows if (row["compression"], row["policy"]) == (compression, policy)]
        some.sort(key=lambda row: row["capacity_share"])
        panel.plot(
            [100 * row["capacity_share"] for row in some],
            [100 * row["hit_share"] for row in some],
            _STYLES[compression],
            color=_POLICY_COLOURS[policy],
            linewidth=2.2 if compression == "shrink" else 1.2,
            marker="o" if policy == "ours" else None,
            markersize=3,
            label=f"{_POLICY_NAMES[policy]}, {compression if compression != 'none' else 'uncompressed'}",
        )
        if any(row["hits_below_budget"] for row in some):
            panel.plot(
                [100 * row["capacity_share"] for row in some],
                [100 * row["hits_below_budget"] / row["lookups"] for row in some],
                "x",
                color=_POLICY_COLOURS[policy],
                markersize=4,
            )
    _capacity_axis(panel, rows)
    panel.set_ylabel("% of chunks looked up")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _draw_kl(panel: Any, rows: Sequence[Row]) -> None:
    for compression in dict.fromkeys(row["compression"] for row in rows):
        some = sorted((row for row in rows if row["compression"] == compression), key=lambda row: row["capacity_share"])
        panel.plot(
            [100 * row["capacity_share"] for row in some],
            [row["mean_kl_nats"] for row in some],
            _STYLES[compression],
            color=_POLICY_COLOURS["ours"],
            marker="o",
            markersize=3,
            label=f"ours, {compression}",
        )
    _capacity_axis(panel, rows)
    panel.set_ylabel("nats")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _capacity_axis(panel: Any, rows: Sequence[Row]) -> None:
    shares = sorted({100 * row["capacity_share"] for row in rows})
    panel.set_xscale("log")
    panel.set_xticks(shares, [f"{share:g}" for share in shares])
    panel.minorticks_off()
    panel.set_xlabel("capacity, % of the bytes of all distinct chunks uncompressed")
    panel.grid(linewidth=0.3)


TIER_PAGES: Mapping[str, Page] = {
    "tiers": Page(
        "Tiers: speed, and hits against capacity",
        _TEXT,
        {
            "speed": RowTable(
                "Speed of the tiers",
                _SPEED_TEXT,
                (
                    Column("tier", "tier"),
                    Column("operation", "operation"),
                    Column("payload_bytes", "frame", _mib),
                    Column("concurrency", "at a time"),
                    Column("gb_per_s", "GB/s", two_digits),
                    Column("p50_ms", "p50 ms", two_digits),
                    Column("p99_ms", "p99 ms", two_digits),
                    Column("calls", "n"),
                ),
            ),
            "hits": RowTable(
                "Hits against capacity",
                _HITS_TEXT,
                (
                    Column("method", "method"),
                    Column("compression", "kept"),
                    Column("policy", "policy", lambda policy: _POLICY_NAMES[policy]),
                    Column("capacity_share", "capacity", _percent),
                    Column("hit_share", "hit", _percent),
                    Column("hits_below_budget", "below"),
                    Column("mean_kl_nats", "KL, nats", _milli),
                    Column("cost_saved_share", "computation saved", _percent),
                ),
            ),
        },
        _plot,
    )
}
