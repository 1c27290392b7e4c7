"""How the results of the controller's benchmarks are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, finish_panel, new_figure, plain, save_figure

_REGRET_TEXT = """\
Requests fetch the cache of their prompts (128 KiB a token) over a link that wanders between 2 and 400 Gb/s and leaps
now and then. Decoding is some three times slower than the profiles say, each level by a factor of its own (20 % either
way); times have 10 % of noise, and every fiftieth transfer takes four times as long. Ratios and losses are those of the
profiles that ship with kvstore; decode speeds are theirs relative to one another, on a GPU's scale: this is a
simulation. The oracle knows everything but the noise. *kvstore* is told the wire's and the decoder's time of each
transfer that it chose, and nothing of the link. *kvserve* is the controller of KVServe's published code in its two
versions, told the time of each transfer, and before it the link's true rate, which the code takes from its
configuration; it may recompute, which the code cannot. *analytical only* is kvstore's latency model with the link as
it was measured and the profile as it is wrong. No arm loses more than 0.01 nats."""

_CONTROLLERS_TEXT = """\
**Lost** is the time beyond the oracle's; shares are of the oracle's time, over all requests and after the first 500."""

_DECISION_TEXT = """\
Levels of the set, the arms that are left of them within the budget (none beats them in bytes and decoding), and
microseconds (99th percentile) to build their terms, draw and choose."""

_PUBLISHED_TEXT = """\
KVServe's published times (Llama-3.1-8B; the tables of other models are left out) against kvstore's latency model
behind a link that some clients share, each of which asks again some time after its answer. What the paper does not
give is fitted to these same figures: for each table the number of clients, the time between requests and (completion
times only) the bytes of a request, to one of its rows; then for every row the ratio of its method. Methods other than
kvstore transfer whole and then decode. It is a check of the model, and no measurement of kvstore: **overlap** is
KVServe with its own ratio and codec, its chunks decoded while others arrive; **kvstore** has besides the ratio that
`ladder-klt` has on the project's model of 5.5 million parameters at a loss of 0.01 nats (look-up pages of 512 tokens,
where KVServe's has 4.5), and still KVServe's codec times, because no accelerator was there to measure its own. Small
models flatter that ratio."""

_OFF_TEXT = """**Off** is the modelled time relative to the published one, where that one transferred."""

_COLUMNS = (
    Column("method", "method"),
    Column("gbit_per_s", "Gb/s", plain),
    Column("published_ms", "published ms", plain),
    Column("modelled_ms", "modelled ms", plain),
    Column("off", "off", lambda share: "" if share is None else f"{100 * share:+.0f} %"),
    Column("overlap_ms", "overlap, modelled ms", plain),
    Column("kvstore_ms", "kvstore, modelled ms", plain),
)

_STYLES = {
    "kvstore": ("#1f5fa8", "-"),
    "kvserve A": ("#b5483a", "-"),
    "kvserve B": ("#d98a5b", "-"),
    "analytical only": ("#6a8f3c", "-"),
    "best static": ("#8a8f98", "--"),
}


def _plot(rows: Sequence[Row], path: Path) -> None:
    figure = new_figure((8, 4.6))
    panel = figure.subplots()
    curves = [row for row in rows if row["table"] == "curve"]
    for name in dict.fromkeys(row["controller"] for row in curves):
        mine = [row for row in curves if row["controller"] == name]
        colour, line = _STYLES[name.partition(" (")[0]]
        x, y = [row["requests"] for row in mine], [row["lost_s"] for row in mine]
        panel.plot(x, y, line, color=colour, label=name, linewidth=1.8)
    finish_panel(panel, "requests", "seconds lost to the oracle, in all")
    save_figure(figure, path)


_TIERS_TEXT = """\
A production trace is replayed through the `Index`, the `Policies` and the placement that a server runs, moved between
tiers as the stack moves chunks: memory (10 GB/s), disk (2 GB/s), below them S3, which keeps everything, or nothing.
Sizes and losses of levels are those of a profile of the default set, as measured; **times are modelled**, because S3
and the link must change: every ninth of the requests has other rates. Three conversations in ten belong to an
application that allows a loss of 0.001 nats, the others allow 0.01; each asks for the lowest level within that, which
the budgeted policy takes. A request fetches what is held at its level as far as that is faster than to compute it
(5,000 tokens a second, more behind long prefixes), and computes and puts the rest. **Seconds** are means over requests
of the time until all that had been put before is there again. A **hit** is a chunk fetched, at a level within the
budget; shares are of the chunks that had been put before. *host 1, disk 2* keeps levels 0 to 1 in memory and 0 to 2 on
disk once there is no room; *learned* is kvstore's placement, told of each fetch, of levels that a plan found missing,
and of nothing else. **Relative** is to the fixed levels that are best there, known only in hindsight."""

_TIER_COLOURS = {"16 GB, 64 GB, s3": "#7fa8d4", "64 GB, 512 GB, s3": "#1f5fa8"}
_TIER_COLOURS |= {"16 GB, 64 GB, nothing": "#d98a5b", "64 GB, 512 GB, nothing": "#b5483a"}

_TIER_COLUMNS = (
    Column("setting", "memory, disk, below"),
    Column("placement", "levels"),
    Column("mean_s", "s", plain),
    Column("took_share", "relative", plain),
    Column("hit_share", "hits", plain),
    Column("hits_share", "relative", plain),
)
_POINT_COLUMNS = (Column("s3_gb_per_s", "S3 GB/s", plain), Column("link_gbit_per_s", "link Gb/s", plain))


def _plot_tiers(rows: Sequence[Row], path: Path) -> None:
    figure = new_figure((8, 4.6))
    panel = figure.subplots()
    points = [row for row in rows if row["table"] == "points" and row["placement"] == "learned"]
    for setting in dict.fromkeys(row["setting"] for row in points):
        mine = [row for row in points if row["setting"] == setting]
        x, y = [row["point"] for row in mine], [row["took_share"] for row in mine]
        panel.plot(x, y, "o-", color=_TIER_COLOURS.get(setting), label=setting, linewidth=1.8, markersize=4)
    rates = {row["point"]: f"S3 {row['s3_gb_per_s']:g}\nlink {row['link_gbit_per_s']:g}" for row in points}
    panel.axhline(1.0, color="#8a8f98", linewidth=1, linestyle="--")
    panel.set_xticks(list(rates), list(rates.values()), fontsize=8)
    panel.set_xlabel("S3 in GB/s, link in Gb/s; time passes to the right")
    panel.set_ylabel("fetch time in that of the best fixed levels")
    panel.grid(linewidth=0.3)
    panel.legend(fontsize=8)
    save_figure(figure, path)


CONTROLLER_PAGES: Mapping[str, Page] = {
    "controller_regret": Page(
        "Controller: time lost to an oracle",
        _REGRET_TEXT,
        {
            "controllers": RowTable(
                "Controllers",
                _CONTROLLERS_TEXT,
                (
                    Column("controller", "controller"),
                    Column("lost_s", "lost s", plain),
                    Column("lost_share", "lost share", plain),
                    Column("lost_share_settled", "after 500", plain),
                    Column("oracle_s", "oracle s", plain),
                ),
            ),
            "setting": RowTable(
                "Setting",
                "Where prompt lengths and profiles come from.",
                (
                    Column("requests", "requests"),
                    Column("lengths", "prompt lengths"),
                    Column("profiles", "profiles of"),
                ),
            ),
            "decision": RowTable(
                "What a decision costs",
                _DECISION_TEXT,
                (Column("levels", "levels"), Column("arms", "arms left"), Column("p99_us", "us (p99)", plain)),
            ),
        },
        _plot,
    ),
    "tier_profiles": Page(
        "Levels chosen per tier",
        _TIERS_TEXT,
        {
            "whole": RowTable(
                "Over all requests", "Every setting, learned and with every fixed choice.", _TIER_COLUMNS
            ),
            "points": RowTable(
                "While S3 and the link change",
                "The same by the rates of the moment, in the order in which they came.",
                (*_POINT_COLUMNS, *_TIER_COLUMNS),
            ),
            "levels": RowTable(
                "Levels",
                "Of the profile: how much smaller than the exact cache, and the loss on the prompts that suffer most.",
                (
                    Column("level", "level"),
                    Column("ratio", "ratio", plain),
                    Column("kl_nats", "KL, nats", plain),
                    Column("trace", "trace"),
                ),
            ),
        },
        _plot_tiers,
    ),
    "published_settings": Page(
        "KVServe's published tables by the latency model",
        _PUBLISHED_TEXT,
        {
            "jct": RowTable("Completion time, prefill and decode apart", _OFF_TEXT, _COLUMNS),
            "ttft": RowTable("Time to the first token, remote prefix", _OFF_TEXT, _COLUMNS),
            "fits": RowTable(
                "What was fitted",
                "Ratios by method; those of BF16 are 1.",
                (
                    Column("of", "table"),
                    Column("clients", "clients"),
                    Column("gbit", "Gbit a request", plain),
                    Column("think_s", "s between", plain),
                    Column("ratio CacheGen", "CacheGen", plain),
                    Column("ratio KIVI", "KIVI", plain),
                    Column("ratio KVServe", "KVServe", plain),
                    Column("ratio kvstore", "kvstore (measured)", plain),
                ),
            ),
        },
    ),
}
