"""The log of decisions: what was known when each was made, what came of it, and what another policy would have done."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from kvstore.controller.controller import Decision
from kvstore.controller.latency import Terms
from kvstore.controller.policy import Arm, Policy, Prospect, Wish
from kvstore.errors import ConfigError
from kvstore.files import read_text


@dataclass(frozen=True, slots=True)
class Recorded:
    """A decision of a log.

    Args:
        id: Its number.
        situation: What it was learned by.
        wish: What was asked.
        prospects: All arms, those beyond the budget left out.
        arm: Name of the one that was taken.
        took_s: What came of it; None where nobody said.
    """

    id: int
    situation: tuple[str, ...]
    wish: Wish
    prospects: tuple[Prospect, ...]
    arm: str
    took_s: float | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a policy would have done.

    Args:
        decisions: How many were replayed.
        total_s: Seconds that its choices are estimated to take.
        best_s: Seconds of the best choices, by the same estimates.
        same: Share of choices that are those of the log.
    """

    decisions: int
    total_s: float
    best_s: float
    same: float

    @property
    def regret_s(self) -> float:
        """Seconds lost to the best choices."""
        return self.total_s - self.best_s


def line_of(decision: Decision) -> str:
    """A line of the log that tells of a decision."""
    return json.dumps({"kind": "decision", **decision.report()}, separators=(",", ":"))


def outcome_line(number: int, took_s: float) -> str:
    """A line of the log that tells what came of it."""
    return json.dumps({"kind": "outcome", "id": number, "took_s": took_s}, separators=(",", ":"))


def read_log(path: Path) -> list[Recorded]:
    """The decisions of a log, with their outcomes. A torn last line, as a kill leaves it, is left out.

    Raises:
        ConfigError: The file cannot be read, or is no such log.
    """
    text = read_text(path)
    found: dict[int, Recorded] = {}
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if record["kind"] == "decision":
                found[record["id"]] = _recorded(record)
            elif record["kind"] == "outcome" and record["id"] in found:
                found[record["id"]] = replace(found[record["id"]], took_s=float(record["took_s"]))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(f"{path}, line {number}: not a line of a decision log ({exc})") from exc
    return list(found.values())


def replay(log: Iterable[Recorded], policy: Policy) -> Replayed:
    """What a policy would have chosen from the same prospects, and what that is estimated to take.

    The time of an arm that was not taken is not known. It is estimated as what was expected of it, times what came of
    this arm over what was expected of it, on average over the outcomes of the log in the same situation.
    """
    known = list(log)
    corrections = _corrections(known)
    total_s = best_s = 0.0
    same = 0
    for one in known:
        times_s = {
            prospect.arm.name: prospect.arm.terms.total_s * corrections.get((one.situation, prospect.arm.name), 1.0)
            for prospect in one.prospects
        }
        if one.took_s is not None:
            times_s[one.arm] = one.took_s
        chosen = policy.choose(one.prospects, one.wish).arm.name
        total_s += times_s[chosen]
        best_s += min(times_s.values())
        same += chosen == one.arm
    return Replayed(len(known), total_s, best_s, same / len(known) if known else 1.0)


def _corrections(log: Iterable[Recorded]) -> dict[tuple[tuple[str, ...], str], float]:
    residuals: dict[tuple[tuple[str, ...], str], list[float]] = {}
    for one in log:
        taken = next((prospect for prospect in one.prospects if prospect.arm.name == one.arm), None)
        if taken is None or one.took_s is None or not one.took_s > 0 or not taken.arm.terms.total_s > 0:
            continue
        residuals.setdefault((one.situation, one.arm), []).append(math.log(one.took_s / taken.arm.terms.total_s))
    return {name: math.exp(fmean(found)) for name, found in residuals.items()}


def _recorded(record: Mapping[str, Any]) -> Recorded:
    return Recorded(
        int(record["id"]),
        tuple(str(value) for value in record["situation"].values()),
        Wish(_limit(record["budget_nats"]), _limit(record["deadline_s"])),
        tuple(_prospects(record["arms"])),
        str(record["arm"]),
    )


def _prospects(records: Iterable[Mapping[str, Any]]) -> Iterator[Prospect]:
    for one in records:
        arm = Arm(str(one["arm"]), float(one["loss_nats"]), Terms.of_report(one["terms"]))
        yield Prospect(arm, float(one["mean_s"]), float(one["drawn_s"]))


def _limit(value: Any) -> float:
    return math.inf if value is None else float(value)
