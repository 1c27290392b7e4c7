"""Rows and aims of the bandwidth sweep, from its samples."""

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from benchmarks.bandwidth_runner import ADAPTIVE, BUDGET_NATS, RECOMPUTE, Get, Samples, Schedule, Setting, Stay
from benchmarks.harness import Aim, Row, at_most, percentile, ratio_interval


def rows_of(samples: Samples, setting: Setting) -> list[Row]:
    """What was measured, as tables."""
    rows: list[Row] = []
    for gbit_per_s, stay in samples.fixed.items():
        rows += _times(gbit_per_s, stay)
    for gbit_per_s, stay in samples.fixed.items():
        rows.append(_adaptive(gbit_per_s, stay))
    rows += _schedule(samples.schedule)
    rows.append(_budget(samples, setting))
    return rows


def aims_of(rows: Sequence[Row], seed: int) -> list[Aim]:
    """The issue's aims.

    Args:
        rows: Of `rows_of` and of the modelled links.
        seed: Of the interval of the ratio at each bandwidth, added to the rows.
    """
    measured = [row for row in rows if row["table"] == "adaptive"]
    for row in measured:
        _, row["low"], row["high"] = ratio_interval(row["adaptive_s"], row["best_s"], seed)
    modelled = [row for row in rows if row["table"] == "modelled"]
    totals = {row["arm"]: row["total_s"] for row in rows if row["table"] == "schedule"}
    fastest = min(total for arm, total in totals.items() if arm not in (ADAPTIVE, RECOMPUTE, "best of each request"))
    budget = next(row for row in rows if row["table"] == "budget")
    of_best = "time of adaptive / that of the best arm, the worst of"
    return [
        at_most(f"{of_best} {len(measured)} bandwidths, measured", 1.05, max(row["ratio"] for row in measured)),
        at_most(f"{of_best} {len(modelled)} bandwidths, modelled", 1.05, max(row["ratio"] for row in modelled)),
        at_most(
            "total of adaptive / that of the best single static profile, over the schedule",
            1.0,
            totals[ADAPTIVE] / fastest,
        ),
        at_most("fetches of adaptive beyond its quality budget", 0, budget["beyond"]),
    ]


def _times(gbit_per_s: float, stay: Stay) -> Iterator[Row]:
    for arm, got in stay.times.items():
        took = [one.took_s for one in got]
        yield {
            "table": "times",
            "gbit_per_s": gbit_per_s,
            "arm": arm,
            "median_s": median(took),
            "p10_s": percentile(took, 10),
            "p90_s": percentile(took, 90),
            "loss_nats": max(one.loss_nats for one in got),
            "n": len(took),
            "took_s": took,
        }


def _adaptive(gbit_per_s: float, stay: Stay) -> Row:
    """Adaptive beside the best of the other arms."""
    mine = [one.took_s for one in stay.times[ADAPTIVE]]
    # Those that were left out of some rounds are not the best.
    others = {arm: [one.took_s for one in got] for arm, got in stay.times.items() if len(got) == len(mine)}
    del others[ADAPTIVE]
    best = min(others, key=lambda arm: median(others[arm]))
    return {
        "table": "adaptive",
        "gbit_per_s": gbit_per_s,
        "best": best,
        "best_median_s": median(others[best]),
        "adaptive_median_s": median(mine),
        "ratio": median(mine) / median(others[best]),
        "took": _counted(stay.times[ADAPTIVE]),
        "put": ", ".join(f"{arm} ({took_s:.1f} s)" for arm, took_s in stay.puts),
        "cold_s": fmean(one.took_s for one in stay.cold),
        "cold_took": _counted(stay.cold),
        "best_s": others[best],
        "adaptive_s": mine,
    }


def _schedule(schedule: Schedule) -> Iterator[Row]:
    """Totals, and the samples that a plot needs."""
    best = [min(got) for got in zip(*([one.took_s for one in got] for got in _others(schedule)), strict=True)]
    times = {arm: [one.took_s for one in got] for arm, got in schedule.times.items()} | {"best of each request": best}
    for arm, took in sorted(times.items(), key=lambda pair: sum(pair[1])):
        yield {
            "table": "schedule",
            "arm": arm,
            "total_s": sum(took),
            "requests": len(took),
            "worst_s": max(took),
            "took": _counted(schedule.times[arm]) if arm == ADAPTIVE else "",
            "puts": ", ".join(f"{arm} ({took_s:.1f} s)" for arm, took_s in schedule.puts) if arm == ADAPTIVE else "",
            "took_s": took,
            "arms": [one.arm for one in schedule.times[arm]] if arm == ADAPTIVE else [],
            "links_gbit_per_s": schedule.links_gbit_per_s,
        }


def _others(stay: Stay) -> Iterator[Sequence[Get]]:
    return (got for arm, got in stay.times.items() if arm != ADAPTIVE)


def _budget(samples: Samples, setting: Setting) -> Row:
    """Every fetch of adaptive by what it lost."""
    stays = [*samples.fixed.values(), samples.schedule]
    got = [one for stay in stays for one in (*stay.cold, *stay.times[ADAPTIVE])]
    return {
        "table": "budget",
        "budget_nats": BUDGET_NATS,
        "fetches": len(got),
        "beyond": sum(one.loss_nats > BUDGET_NATS for one in got),
        "loss_nats_max": max(one.loss_nats for one in got),
        "refused": ", ".join(
            f"{name}/{level}"
            for name, lost in setting.losses.items()
            for level, loss_nats in enumerate(lost)
            if loss_nats > BUDGET_NATS
        ),
    }


def _counted(got: Sequence[Get]) -> str:
    return ", ".join(f"{arm} {times}" for arm, times in Counter(one.arm for one in got).most_common())
