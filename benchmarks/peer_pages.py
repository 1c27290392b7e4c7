"""How the results of the comparison with other stores are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, new_figure, save_figure, two_digits

_TEXT = """\
One process with the clients and each store's own server process on one machine, over loopback TCP, nothing
persisted. In every round each cell of a size is measured once, in an order drawn anew. Every store is driven
with one connection a client through the fastest client that it has here. *kvstore*: `Client`, all clients in
one event loop; the server verifies checksums of every put and get, and the client of every get; its *exists* is
a `match`, whose answer also tells tier, levels and sizes. *redis*:
redis-py with hiredis, once asynchronous in one event loop, once blocking with a thread for each client; nobody
verifies anything. *lmcache*: `lmcache_server`, asked over its own messages by blocking sockets in threads,
without its client's tensors; values are received into buffers that are used again and never handed out, which a
real client cannot do; a put has no answer, so an `exists` follows it. *mooncake*: Mooncake Store over TCP; one
process holds the memory, another one asks with a thread for each client out of and into registered buffers (its
library is C++, so its threads do not share an interpreter lock). Puts are of fresh keys (lmcache cannot delete,
so its keys go round), prepared and deleted outside of the timing."""

_PEERS_TEXT = """\
**GB/s** are the bytes of the values of all calls of a round over the time from the first call to the end of the
last, 10^9 bytes, median of the rounds; **calls/s** the same for calls. **p50**, **p99** are of single calls.
**server s/GB** is the processor time of the store's server processes, kernel included, for each GB. *get 32* is
one call for 32 values. Where sixteen such calls at one time would hold more than 1 GiB at the clients, as many
are made at a time as fit (**clients**)."""

_RATIO_TEXT = """\
**Ratio** is the rate of kvstore divided by that of the store which is fastest in that cell, medians of the
rounds. *low* and *high* bound its 95 % interval: rounds drawn with replacement, 2,000 times."""

_COLOURS = {
    "kvstore": "#1f5fa8",
    "redis, asyncio": "#b5483a",
    "redis, threads": "#d48a7f",
    "lmcache": "#7f7f7f",
    "mooncake": "#d4a03a",
}


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:g} MiB"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of the rates, a panel for each operation and number of clients."""
    measured = [row for row in rows if row["table"] == "peers"]
    asked = sorted({row["asked_clients"] for row in measured})
    operations = list(dict.fromkeys(row["operation"] for row in measured))
    figure = new_figure((12, 2.6 * len(operations)))
    panels = figure.subplots(len(operations), len(asked), squeeze=False)
    for line, operation in zip(panels, operations, strict=True):
        for panel, clients in zip(line, asked, strict=True):
            shown = [row for row in measured if (row["operation"], row["asked_clients"]) == (operation, clients)]
            _draw(panel, shown)
            panel.set_title(f"{operation}, {clients} client{'s' if clients > 1 else ''}", fontsize=10)
        line[0].set_ylabel("calls/s" if operation == "exists" else "GB/s")
    panels[0][0].legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def _draw(panel: Any, rows: Sequence[Row]) -> None:
    sizes = sorted({row["value_bytes"] for row in rows})
    stores = list(dict.fromkeys(row["store"] for row in rows))
    width = 0.8 / len(stores)
    for number, store in enumerate(stores):
        own = {row["value_bytes"]: row["gb_per_s"] or row["calls_per_s"] for row in rows if row["store"] == store}
        places = [place + (number - (len(stores) - 1) / 2) * width for place in range(len(sizes))]
        panel.bar(places, [own[size] for size in sizes], width, label=store, color=_COLOURS.get(store, "#c8c8c8"))
    panel.set_xticks(range(len(sizes)), [_mib(size) for size in sizes])
    panel.grid(axis="y", linewidth=0.3)
    panel.set_axisbelow(True)


PEER_PAGES: Mapping[str, Page] = {
    "peers": Page(
        "Peers: Redis, LMCache's server and Mooncake Store",
        _TEXT,
        {
            "peers": RowTable(
                "Rates",
                _PEERS_TEXT,
                (
                    Column("operation", "operation"),
                    Column("value_bytes", "value", _mib),
                    Column("clients", "clients"),
                    Column("store", "store"),
                    Column("gb_per_s", "GB/s", _rate),
                    Column("calls_per_s", "calls/s", _whole),
                    Column("p50_ms", "p50 ms", two_digits),
                    Column("p99_ms", "p99 ms", two_digits),
                    Column("server_s_per_gb", "server s/GB", _rate),
                    Column("n", "n"),
                ),
            ),
            "missing": RowTable(
                "Not measured", "Stores that were not installed.", (Column("store", "store"), Column("needs", "needs"))
            ),
            "ratio": RowTable(
                "kvstore against the fastest other",
                _RATIO_TEXT,
                (
                    Column("operation", "operation"),
                    Column("value_bytes", "value", _mib),
                    Column("clients", "clients"),
                    Column("against", "against"),
                    Column("ratio", "ratio", two_digits),
                    Column("low", "low", two_digits),
                    Column("high", "high", two_digits),
                    Column("n", "rounds"),
                ),
            ),
        },
        _plot,
    )
}
