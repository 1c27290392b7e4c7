"""What a log of decisions tells: why a plan was made, and what other policies would have lost on the same plans."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvstore.controller.controller import Situation
from kvstore.controller.decisions import Recorded, read_log, replay
from kvstore.controller.policy import Budgeted, Choice, Policy, Prospect, Wish
from kvstore.errors import ConfigError

_STAGES = ("read", "wire", "copy", "decode", "encode")
POLICIES = ("recorded", "expected", "model", "best-static")
_STATIC = "static:"


@dataclass(frozen=True)
class Expected:
    """The usual policy without chance: arms are judged by what is expected of them."""

    def choose(self, prospects: Sequence[Prospect], wish: Wish) -> Choice:
        return Budgeted().choose([one._replace(drawn_s=one.mean_s) for one in prospects], wish)


@dataclass(frozen=True)
class Model:
    """The latency model as it stands, without what was learned of its errors."""

    def choose(self, prospects: Sequence[Prospect], wish: Wish) -> Choice:
        plain = [(one, one.arm.terms.total_s + one.arm.later_s) for one in prospects]
        return Budgeted().choose([one._replace(mean_s=took_s, drawn_s=took_s) for one, took_s in plain], wish)


@dataclass(frozen=True)
class Static:
    """One arm wherever there is one of this name, else what is expected to be the fastest.

    Args:
        arm: Its name.
    """

    arm: str

    def choose(self, prospects: Sequence[Prospect], wish: Wish) -> Choice:
        named = next((one for one in prospects if one.arm.name == self.arm), None)
        if named is None or named.arm.loss_nats > wish.budget_nats:
            return Expected().choose(prospects, wish)
        return Choice(named.arm, "static", tuple(prospects), ())


def replay_all(log: Path, names: Sequence[str]) -> dict[str, Any]:
    """What policies would have lost on the decisions of a log.

    Args:
        log: The log.
        names: Of policies; those of `POLICIES` where it is empty.

    Raises:
        ConfigError: The log cannot be read, is none, or has no decisions; or there is no such policy.
    """
    decisions = read_log(log)
    if not decisions:
        raise ConfigError(f"{log} has no decisions")
    known = sum(one.took_s is not None for one in decisions)
    rows = [_row(decisions, name) for name in names or POLICIES]
    return {"log": str(log), "decisions": len(decisions), "outcomes": known, "policies": rows}


def replay_table(found: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table(
        title=f"{found['decisions']} decisions, {found['outcomes']} outcomes",
        caption="Times of arms that were not taken are estimates: what was expected, corrected by what the arm's own "
        "outcomes in the same situation showed.",
        box=box.SIMPLE_HEAD,
    )
    for name in ("policy", "seconds", "lost to the best", "same choices"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in found["policies"]:
        lost = f"{row['regret_s']:.3g} s ({row['regret_s'] / max(row['best_s'], 1e-12):.1%})"
        table.add_row(row["policy"], f"{row['total_s']:.3f}", lost, f"{row['same']:.0%}")
    return table


def explain(log: Path, number: str) -> dict[str, Any]:
    """What a decision was made from.

    Args:
        log: The log that has it.
        number: As the plan named it.

    Raises:
        ConfigError: The log cannot be read, is none, or has no such decision.
    """
    found = next((one for one in read_log(log) if f"{one.id:016x}" == number), None)
    if found is None:
        raise ConfigError(f"{log} has no decision {number}; the file that it replaced may be beside it as {log.name}.1")
    return {
        "id": number,
        "situation": dict(zip(Situation._fields, found.situation, strict=True)),
        "budget_nats": _finite(found.wish.budget_nats),
        "deadline_s": _finite(found.wish.deadline_s),
        "arm": found.arm,
        "reason": found.reason,
        "refused": list(found.refused),
        "took_s": found.took_s,
        "arms": [
            {
                "arm": one.arm.name,
                "loss_nats": one.arm.loss_nats,
                "expected_s": one.mean_s,
                "drawn_s": one.drawn_s,
                "later_s": one.arm.later_s,
                "terms": one.arm.terms.report(),
            }
            for one in found.prospects
        ],
    }


def explain_table(found: dict[str, Any]) -> Table:
    """The same for people: a row an arm, the one that was taken first."""
    where = ", ".join(f"{name} {value}" for name, value in found["situation"].items() if value)
    took = "nobody said what came of it" if found["took_s"] is None else f"it took {_ms(found['took_s'])} ms"
    wished = f"budget {found['budget_nats']} nats"
    if found["deadline_s"] is not None:
        wished += f", deadline {_ms(found['deadline_s'])} ms"
    beyond = f" Beyond the budget: {', '.join(found['refused'])}." if found["refused"] else ""
    table = Table(
        title=f"{found['arm']} ({found['reason']}): {took}",
        caption=f"{where}; {wished}. Milliseconds: what passes once, the "
        f"stages, later fetches of a put, the model's total, what is expected after what was learned, and what was "
        f"drawn to choose by.{beyond}",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    stages = [name for name in _STAGES if any(one["terms"]["stages_s"].get(name) for one in found["arms"])]
    for name in ("arm", "loss", "once", *stages, "later", "model", "expected", "drawn"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for one in sorted(found["arms"], key=lambda one: (one["arm"] != found["arm"], one["drawn_s"])):
        terms = one["terms"]
        numbers = [sum(terms["fixed_s"].values()), *(terms["stages_s"].get(name, 0.0) for name in stages)]
        numbers += [one["later_s"], terms["total_s"] + one["later_s"], one["expected_s"], one["drawn_s"]]
        style = "bold" if one["arm"] == found["arm"] else None
        table.add_row(one["arm"], f"{one['loss_nats']:.2g}", *map(_ms, numbers), style=style)
    return table


def _row(decisions: Sequence[Recorded], name: str) -> dict[str, Any]:
    if name == "best-static":
        rows = [_row(decisions, _STATIC + arm) for arm in _arms(decisions)]
        best = min(rows, key=lambda row: row["total_s"])
        return {**best, "policy": f"best-static ({best['policy'].removeprefix(_STATIC)})"}
    found = replay(decisions, _policy(name))
    numbers = {"total_s": found.total_s, "best_s": found.best_s, "regret_s": found.regret_s, "same": found.same}
    return {"policy": name, **numbers}


def _policy(name: str) -> Policy:
    if name.startswith(_STATIC):
        return Static(name.removeprefix(_STATIC))
    known: dict[str, Policy] = {"recorded": Budgeted(), "expected": Expected(), "model": Model()}
    if name not in known:
        raise ConfigError(f"there is no policy {name!r}: it is one of {', '.join(POLICIES)}, or static:ARM")
    return known[name]


def _arms(decisions: Iterable[Recorded]) -> list[str]:
    return sorted({one.arm.name for decision in decisions for one in decision.prospects})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"
