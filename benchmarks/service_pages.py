"""How the results of benchmarks.service are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, new_figure, plain, save_figure, two_digits

_TEXT = """\
vLLM engines on one side of a link between two network namespaces, and kvstore servers, in memory, on the other; the
kernel holds the link to its rate in both directions. *Remote prefix*: prefixes were stored before, by an engine beside
the server; a request is one of them and 32 tokens that nobody has seen. *Prefill apart*: a prefill engine beside the
server (`kv_producer`) and a decode engine behind the link (`kv_consumer`) get a new prompt at the same time; the one
computes and stores it, the other waits for its chunks (`do_remote_prefill`), fetches them and computes the rest.
Prefixes have 384 to 1,920 tokens, in turns; requests come one at a time and ask for 16 tokens. In every round all arms
are asked for the same prompt, in an order drawn anew; before each one the engine's own cache is emptied (not timed),
and engines that are not asked are stopped (SIGSTOP).

*uncompressed* sends raw chunks, *fp8*, *cachegen* and *ladder-packed, level 1* are pipelines that engines are
configured with, all without plans and without the guard. *kvserve* is a server that plans as KVServe's published
controller does (version A of its code, see the controller's benchmark), told the link's true rate whenever it changes
and the measured numbers of its profiles: kvstore's recompositions of KVServe's quantiser, of CacheGen's and of KIVI's,
with one level each; its quantiser's head classes are left out, which cost bytes at equal loss here
([quality](#quality-kl-against-ratio)). It may compute instead of fetching, which the code cannot. *adaptive* is
kvstore as it ships, with profiles pushed: those that ship with it, KVServe's, and calibrated ones; it is told nothing
of the link, and in the first setting its chunks are stored by an engine that waits for nobody (`kv_both`). *recompute*
fetches nothing; it is there to compare with, and no part of the aims.

The model is small: a token's K and V are 3,072 bytes, a 42nd of those of Llama-3.1-8B, and two cores compute 1,920
tokens in some 0.2 s. So factors are those of this model, link and machine: the longer transfers are beside everything
else, the larger they become. KVServe claims up to 9.13 (JCT) and 32.8 (TTFT) against uncompressed caches, with larger
models on GPUs."""

_SERVICE_TEXT = """\
**TTFT** and **JCT** are the times from handing a request over (to both engines at once, where prefill is apart) to its
first and its last token, medians in milliseconds. **x raw** and **x kvserve** are the median of *uncompressed* or
*kvserve* divided by the arm's: above 1 is faster. Bounds are 95 % intervals: rounds drawn with replacement, 2,000
times. **KB** came over the link for one request (median). **used** says what was fetched how often, and **nats** what
the worst of it loses as measured (KL, the worst length, a standard error above the mean); the budget is 0.01."""

_FIRST_TEXT = """\
Median of *adaptive* divided by that of the fastest other arm; below 1 *adaptive* is first."""

_PROFILE_TEXT = """\
What the servers were told. Those called `p01` to `p10` ship with kvstore and were measured before, on this model and
two cores; all others were measured before the run, one thread, prompts of calibration text of 256, 512 and 1,536
tokens, as many of each as the last column says. What was served comes from other text."""

_STYLES = {
    "uncompressed": "#202020",
    "fp8": "#c8c8c8",
    "cachegen": "#b0b0b0",
    "ladder-packed, level 1": "#989898",
    "kvserve": "#b5483a",
    "adaptive": "#1f5fa8",
    "recompute": "#6a8f3c",
}


def _rate(gbit_per_s: float) -> str:
    return f"{gbit_per_s:g} Gb/s"


def _ms(value: float) -> str:
    return f"{value:.1f}"


def _kb(size_bytes: float) -> str:
    return f"{size_bytes / 1e3:,.0f}"


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def _factor(value: float | None) -> str:
    return "" if value is None else two_digits(value)


def _factors(metric: str) -> tuple[Column, ...]:
    start = f"{metric}_of"
    return (
        Column(f"{metric}_ms", f"{metric.upper()} ms", _ms),
        Column(f"{start}_uncompressed", "x raw", _factor),
        Column(f"{start}_uncompressed_low", "low", _factor),
        Column(f"{start}_uncompressed_high", "high", _factor),
        Column(f"{start}_kvserve", "x kvserve", _factor),
        Column(f"{start}_kvserve_low", "low", _factor),
        Column(f"{start}_kvserve_high", "high", _factor),
    )


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of TTFT and, behind them, JCT: a line for each setting, a panel for each rate."""
    found = [row for row in rows if row["table"] == "service"]
    settings = list(dict.fromkeys(row["setting"] for row in found))
    links = sorted({row["link_gbit_per_s"] for row in found})
    figure = new_figure((4.4 * len(links), 2.6 * len(settings) + 0.4))
    panels = figure.subplots(len(settings), len(links), squeeze=False, sharey="row", sharex=True)
    for line, setting in zip(panels, settings, strict=True):
        for panel, link in zip(line, links, strict=True):
            _draw(panel, [row for row in found if (row["setting"], row["link_gbit_per_s"]) == (setting, link)])
            panel.set_title(f"{setting}, {_rate(link)}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("ms (median): TTFT, pale JCT; whiskers p10 to p90")
    save_figure(figure, path)


def _draw(panel: Any, rows: Sequence[Row]) -> None:
    names = [row["arm"] for row in rows]
    colours = [_STYLES.get(name, "#d8d8d8") for name in names]
    panel.barh(names, [row["jct_ms"] for row in rows], color=colours, alpha=0.3)
    medians = [row["ttft_ms"] for row in rows]
    below = [row["ttft_ms"] - row["ttft_p10_ms"] for row in rows]
    above = [row["ttft_p90_ms"] - row["ttft_ms"] for row in rows]
    panel.barh(names, medians, xerr=[below, above], color=colours, ecolor="#404040", capsize=2)
    panel.grid(axis="x", linewidth=0.3)
    panel.set_axisbelow(True)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()


SERVICE_PAGES: Mapping[str, Page] = {
    "service": Page(
        "Service: remote prefixes, and prefill and decode apart",
        _TEXT,
        {
            "service": RowTable(
                "Time to the first and to the last token",
                _SERVICE_TEXT,
                (
                    Column("setting", "setting"),
                    Column("link_gbit_per_s", "link", _rate),
                    Column("arm", "arm"),
                    *_factors("ttft"),
                    *_factors("jct"),
                    Column("link_bytes", "KB", _kb),
                    Column("used", "used"),
                    Column("loss_nats", "nats", _four_digits),
                    Column("n", "n"),
                ),
            ),
            "first": RowTable(
                "Adaptive beside the fastest other arm",
                _FIRST_TEXT,
                (
                    Column("setting", "setting"),
                    Column("link_gbit_per_s", "link", _rate),
                    Column("metric", "metric"),
                    Column("other", "fastest other arm"),
                    Column("ratio", "ratio", lambda value: f"{value:.3f}"),
                    Column("low", "low", two_digits),
                    Column("high", "high", two_digits),
                ),
            ),
            "profiles": RowTable(
                "Profiles",
                _PROFILE_TEXT,
                (
                    Column("pushed", "for"),
                    Column("profile", "profile and level"),
                    Column("ratio", "ratio", two_digits),
                    Column("encode_s_per_gb", "encode s/GB", plain),
                    Column("decode_s_per_gb", "decode s/GB", plain),
                    Column("loss_nats", "nats", _four_digits),
                    Column("prompts", "prompts"),
                ),
            ),
            "setup": RowTable(
                "Set-up",
                "Bytes are those of K and V of all layers.",
                (
                    Column("model", "model"),
                    Column("token_bytes", "bytes a token"),
                    Column("chunk_tokens", "tokens a chunk"),
                    Column("prefixes_tokens", "prefixes, tokens"),
                    Column("budget_nats", "budget, nats", plain),
                ),
            ),
        },
        _plot,
    ),
}
