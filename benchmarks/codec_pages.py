"""How the results of the codec benchmarks are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.quality import TARGETS, envelope
from benchmarks.report_parts import Column, Page, RowTable, new_figure, plain, save_figure, two_digits

_COLOURS = {
    "ladder-tokens": "#0b3c6f",
    "ladder-tokens, one layer": "#3f7fbf",
    "ladder-klt": "#1f5fa8",
    "ladder-klt, one layer": "#5f9fd8",
    "ladder-klt, K and V apart": "#8fbfe8",
    "ladder-weighted": "#2f8f6f",
    "ladder-repeats": "#5fae5f",
    "ladder": "#8fc98f",
    "ladder-packed": "#bfdfae",
    "kvserve": "#b5483a",
    "kvtc": "#d4803a",
    "cachegen": "#c8a03a",
    "turboquant": "#a86fb0",
    "kivi": "#7f7f7f",
}

_QUALITY_TEXT = """\
Prompts of documents that neither training nor calibration saw are prefilled, their KV cache is stored as frames
in chunks of 256 tokens and decoded again, and the model goes on from it along the 128 tokens that really
follow. **KL** is that of the next-token distributions against going on from the exact cache, in nats, mean over
those tokens and all prompts. **Ratio** is the bytes of the exact bfloat16 cache divided by those of whole
frames. All methods are stored in the same container; calibrated ones were calibrated on other documents of the
same kinds, for look-up pages too. `kvserve` takes the best of 11 pairs of levels, with and without its head
classes (the low class being the heads in which noise did least on calibration text); `kvtc` has a basis over
all layers. In the plot only settings are drawn that no other one of their method beats."""

_RATIOS_TEXT = """\
**Ratio at a KL** is read off a method's settings and levels, interpolated between the two nearest ones in the
logarithms of both; a dash is a KL outside of its sweep. **Answers kept** are the tokens of which the exact
cache is sure (p > 0.9) and right, and that are still the most probable ones at the setting next to a KL of
0.01."""

_RATE_TEXT = """\
**Bits** count whole frames, divided by the number of elements. **SNR** is the power of K and V over that of the
error. **Bound** is the least number of bits that any code of a Gaussian source needs for that SNR: half the
logarithm of it to base two. *alone* is the ladder with one level only, at the step of that level."""


def _ratio(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _plot_quality(rows: Sequence[Row], path: Path) -> None:
    """KL against ratio, a panel for each workload and prompt length."""
    points = [row for row in rows if row["table"] == "points"]
    workloads = list(dict.fromkeys((row["workload"], row["prefix_tokens"]) for row in points))
    figure = new_figure((13, 5 * -(-len(workloads) // 2)))
    panels = figure.subplots(-(-len(workloads) // 2), 2, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, (workload, prefix) in zip(panels, workloads, strict=False):
        mine = [row for row in points if (row["workload"], row["prefix_tokens"]) == (workload, prefix)]
        for method, colour in _COLOURS.items():
            line = envelope([row for row in mine if row["method"] == method])
            xs, ys = [row["ratio"] for row in line], [row["kl_nats"] for row in line]
            panel.plot(xs, ys, color=colour, marker="o", markersize=3, linewidth=1.2, label=method)
        panel.axhline(0.01, color="#404040", linewidth=0.6, linestyle="--")
        panel.set(title=f"{workload}, {prefix:,} tokens", xscale="log", yscale="log", xlabel="ratio", ylabel="KL, nats")
        panel.grid(which="both", linewidth=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    save_figure(figure, path)


def _plot_rate(rows: Sequence[Row], path: Path) -> None:
    """Bits against SNR on both sources, with the Gaussian's bound."""
    figure = new_figure((12, 5))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, source in zip(panels, ("gaussian", "model"), strict=True):
        mine = [row for row in rows if row["source"] == source and row["snr_db"] is not None]
        for name in dict.fromkeys(row["pipeline"] for row in mine if "alone" not in row["pipeline"]):
            line = [row for row in mine if row["pipeline"] == name]
            panel.plot([r["bits"] for r in line], [r["snr_db"] for r in line], marker="o", markersize=3, label=name)
        if source == "gaussian":
            panel.plot([0, 6], [0, 36.12], color="#404040", linewidth=0.8, linestyle="--", label="bound")
        panel.set(title=source, xlim=(0, 8.5), ylim=(0, 36), xlabel="bits an element, whole frames", ylabel="SNR, dB")
        panel.grid(linewidth=0.2)
        panel.legend(fontsize=6)
    save_figure(figure, path)


_RATE_COLUMNS = (
    Column("pipeline", "pipeline"),
    Column("level", "level"),
    Column("bits", "bits", plain),
    Column("snr_db", "SNR, dB", lambda value: "exact" if value is None else two_digits(value)),
    Column("bound_bits", "bound, bits", plain),
    Column("bits_over_bound", "above it", plain),
)

CODEC_PAGES: Mapping[str, Page] = {
    "quality": Page(
        "Quality: KL against ratio",
        _QUALITY_TEXT,
        {
            "ratios": RowTable(
                "Ratios",
                _RATIOS_TEXT,
                (
                    Column("workload", "workload"),
                    Column("prefix_tokens", "tokens"),
                    Column("method", "method"),
                    *(Column(f"ratio_at_{target}", f"ratio at {target}", _ratio) for target in TARGETS),
                    Column("answers_kept_at_0.01", "answers kept", _share),
                ),
            ),
            "points": RowTable(
                "Every setting and level",
                "",
                (
                    Column("workload", "workload"),
                    Column("prefix_tokens", "tokens"),
                    Column("method", "method"),
                    Column("setting", "setting"),
                    Column("level", "level"),
                    Column("ratio", "ratio", _ratio),
                    Column("kl_nats", "KL, nats", plain),
                    Column("kl_standard_error", "its error", plain),
                    Column("perplexity_change", "perplexity", lambda value: f"{100 * value:+.2f} %"),
                    Column("greedy_agreement", "greedy agreement", _share),
                    Column("answers_kept", "answers kept", _share),
                ),
            ),
        },
        _plot_quality,
    ),
    "rate_distortion": Page(
        "Rate and distortion",
        _RATE_TEXT,
        {
            "gaussian": RowTable("Unit Gaussian source", "", _RATE_COLUMNS),
            "model": RowTable("KV cache of a model, 512 tokens", "", _RATE_COLUMNS),
        },
        _plot_rate,
    ),
}
