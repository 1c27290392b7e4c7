"""How the bandwidth sweep is shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, finish_panel, new_figure, plain, save_figure

_TEXT = """\
A `kvstore serve` process and a client process in two network namespaces on one machine; the link between them is
shaped by the kernel (htb) in both directions, and was measured with a plain TCP connection before. What is fetched is
a KV cache of Llama-3.1-8B's geometry (32 layers, 8 KV heads of 128, bfloat16: 131,072 bytes a token), made of caches
of the project's small model over text that nothing was calibrated on: layer *l* comes from layer *l* mod *n* of the
small model, each head and each turn of the layers from another stretch of the text; a head of 128 is two KV heads of
one small layer, whose rotary pairs take turns (the rotary embedding is undone before and that of the large head
applied behind). So no part is a copy of another one, and codecs find what they find in the small caches; the table of
profiles has both ratios. **Time to usable KV** is from the client's request until all planes are decoded. A static
arm fetches a copy that was put before with its profile, up to its level; recomputing takes the prompt's length by the
stated prefill speed, which is slower than an accelerator's by about as much as two cores decode slower. *Adaptive* is
`kvstore.planned.PlannedPrefixes`: the server plans its put over the same link (told that many will read it) and the
level of each get, or to compute; the request for the plan is in its time. Nobody tells it of the link. At each
bandwidth it begins as a client that the server has not seen; a first put and some fetches (*cold*) are reported
apart, then it puts again. In every round all arms are fetched once in an order drawn anew; those that take more than
three seconds are left out of later rounds. Fewer than 30 repetitions fit into the time that a run may take. Levels
beyond the quality budget are no arms. Ratios and times of coding are measured at the start of the run on this cache;
losses are those of the set of profiles that ships with kvstore (measured on the same small model at its own geometry,
on other text), with a standard error on top."""

_SCHEDULE_TEXT = """\
Sums over the same requests, at whose beginning the link's rate jumps or drifts; adaptive's first requests, in which it
knows nothing, count. In every episode of five requests adaptive puts a new copy, planned at the rate of that time; puts
are in no arm's sum. *best of each request* would have known everything."""

_MODELLED_TEXT = """\
**Modelled**, nothing was transferred: two cores do not carry such links. The latency model of `kvstore.controller` with
the ratios measured above, decoding as fast as KVServe published for an H100 (no decoder of this project has been timed
on an H200 yet), prompts of 12,032 tokens whose prefill takes 0.7 s; the real planner decides and learns from these
times with 5 % of noise. Times are those of the arms taken, without the noise."""

_COLOURS = ("#1f5fa8", "#8a8f98", "#b5483a", "#d98a5b", "#6a8f3c", "#8c6bb1", "#c9a227", "#3b8686")


def _milli(value: float) -> str:
    return f"{value:.3f}"


def _plot(rows: Sequence[Row], path: Path) -> None:
    figure = new_figure((11, 4.6))
    left, right = figure.subplots(1, 2)
    times = [row for row in rows if row["table"] == "times"]
    names = sorted({row["arm"] for row in times}, key=lambda arm: (arm != "adaptive", arm != "recompute", arm))
    colours = dict(zip(names, _COLOURS, strict=False))
    for arm in reversed(names):
        mine = [row for row in times if row["arm"] == arm]
        x, y = [row["gbit_per_s"] for row in mine], [row["median_s"] for row in mine]
        left.plot(x, y, "o-", color=colours[arm], label=arm, linewidth=2.4 if arm == "adaptive" else 1.2, markersize=3)
    left.set_xscale("log")
    finish_panel(left, "link, Gb/s", "seconds to usable KV (median)")
    _plot_schedule(right, [row for row in rows if row["table"] == "schedule"], colours)
    save_figure(figure, path)


def _plot_schedule(panel: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    for row in rows:
        sums = [sum(row["took_s"][: end + 1]) for end in range(len(row["took_s"]))]
        wide = 2.4 if row["arm"] == "adaptive" else 1.2
        panel.plot(range(1, len(sums) + 1), sums, color=colours.get(row["arm"], "#c8c8c8"), label=row["arm"], lw=wide)
    rates = panel.twinx()
    rates.step(
        range(1, len(rows[0]["links_gbit_per_s"]) + 1), rows[0]["links_gbit_per_s"], color="#d0d0d0", where="mid"
    )
    rates.set_ylabel("link, Gb/s")
    finish_panel(panel, "requests of the schedule", "seconds in all")
    panel.set_yscale("linear")


BANDWIDTH_PAGES: Mapping[str, Page] = {
    "bandwidth_sweep": Page(
        "Time to usable KV by bandwidth",
        _TEXT,
        {
            "profiles": RowTable(
                "Profiles",
                "Ratio on the large cache and on the small ones that it is made of; seconds for a GB of exact cache; "
                "the worst loss of the set's buckets, nats.",
                (
                    Column("profile", "profile"),
                    Column("level", "level"),
                    Column("ratio", "ratio", plain),
                    Column("ratio_source", "ratio, small", plain),
                    Column("encode_s_per_gb", "encode", plain),
                    Column("decode_s_per_gb", "decode", plain),
                    Column("kl_nats", "loss", plain),
                ),
            ),
            "setting": RowTable(
                "Setting",
                "What is fetched; *reads* is what adaptive says of its puts.",
                (
                    Column("tokens", "tokens"),
                    Column("raw_mb", "MB", plain),
                    Column("prefill_tokens_per_s", "prefill, tokens/s", plain),
                    Column("budget_nats", "budget, nats", plain),
                    Column("reads", "reads", plain),
                    Column("link", "link"),
                ),
            ),
            "link": RowTable(
                "Link",
                "What one TCP connection got through.",
                (Column("gbit_per_s", "Gb/s asked", plain), Column("measured_gbit_per_s", "Gb/s measured", plain)),
            ),
            "times": RowTable(
                "Time to usable KV",
                "Seconds; *n* fetches.",
                (
                    Column("gbit_per_s", "Gb/s", plain),
                    Column("arm", "arm"),
                    Column("median_s", "median", _milli),
                    Column("p10_s", "p10", _milli),
                    Column("p90_s", "p90", _milli),
                    Column("loss_nats", "loss, nats", plain),
                    Column("n", "n"),
                ),
            ),
            "adaptive": RowTable(
                "Adaptive beside the best arm",
                "Medians, seconds; the ratio with its 95 % interval; what adaptive fetched, and what it put with (time "
                "of the put), the cold one first.",
                (
                    Column("gbit_per_s", "Gb/s", plain),
                    Column("best", "best arm"),
                    Column("best_median_s", "best", _milli),
                    Column("adaptive_median_s", "adaptive", _milli),
                    Column("ratio", "ratio", plain),
                    Column("low", "low", plain),
                    Column("high", "high", plain),
                    Column("took", "fetched"),
                    Column("put", "puts"),
                    Column("cold_s", "cold, mean", _milli),
                    Column("cold_took", "cold fetched"),
                ),
            ),
            "schedule": RowTable(
                "A changing link",
                _SCHEDULE_TEXT,
                (
                    Column("arm", "arm"),
                    Column("total_s", "total s", plain),
                    Column("requests", "requests"),
                    Column("worst_s", "slowest s", plain),
                    Column("took", "fetched"),
                    Column("puts", "puts"),
                ),
            ),
            "budget": RowTable(
                "Quality budget",
                "Every fetch of adaptive by the loss of the levels that came, cold ones too.",
                (
                    Column("budget_nats", "budget, nats", plain),
                    Column("fetches", "fetches"),
                    Column("beyond", "beyond it"),
                    Column("loss_nats_max", "largest loss, nats", plain),
                    Column("refused", "levels that are no arms"),
                ),
            ),
            "modelled": RowTable(
                "10, 25 and 100 Gb/s, modelled",
                _MODELLED_TEXT,
                (
                    Column("gbit_per_s", "Gb/s", plain),
                    Column("modelled", "modelled"),
                    Column("best", "best arm"),
                    Column("best_ms", "best ms", plain),
                    Column("adaptive_ms", "adaptive ms", plain),
                    Column("ratio", "ratio", plain),
                    Column("took", "fetched"),
                    Column("put", "puts"),
                    Column("cold_ms", "cold ms", plain),
                ),
            ),
        },
        _plot,
    ),
}
