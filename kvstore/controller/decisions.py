"""The log of decisions: what was known when each was made, what came of it, and what another policy would have done."""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from kvstore.controller.controller import Decision
from kvstore.controller.latency import Terms
from kvstore.controller.policy import Arm, Policy, Prospect, Wish
from kvstore.errors import ConfigError
from kvstore.files import read_text

_LINE_BYTES_MAX = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A decision of a log.

    Args:
        id: Its number.
        situation: What it was learned by.
        wish: What was asked.
        prospects: All arms, those beyond the budget left out.
        arm: Name of the one that was taken.
        reason: Why it was.
        refused: Names of the arms beyond the budget.
        took_s: What came of it; None where nobody said.
    """

    id: int
    situation: tuple[str, ...]
    wish: Wish
    prospects: tuple[Prospect, ...]
    arm: str
    reason: str
    refused: tuple[str, ...]
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
    return json.dumps({"kind": "outcome", "id": f"{number:016x}", "took_s": took_s}, separators=(",", ":"))


class DecisionLog:
    """A log as it is written: one file, and the one before it.

    Args:
        path: The file; what is there is gone on with.
        size_bytes_max: Size from which on a new one is begun; the old one keeps the name with `.1`.

    Raises:
        ConfigError: It cannot be written.
    """

    def __init__(self, path: Path, size_bytes_max: int) -> None:
        self._path = path
        self._size_bytes_max = size_bytes_max
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: TextIO | None = self._open()
        except OSError as exc:
            raise ConfigError(f"cannot write the decision log {path}: {exc.strerror or exc}") from exc

    def write(self, line: str) -> None:
        """Add a line. A disk that fails costs the rest of the log, and nothing else."""
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            if self._stream.tell() > self._size_bytes_max:
                self._stream.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._stream = self._open()
        except (OSError, ValueError) as exc:
            logger.warning("the decision log %s ends here, it cannot be written: %s", self._path, exc)
            self.close()

    def close(self) -> None:
        """Close the file."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()

    def _open(self) -> TextIO:
        """Open the file behind its last whole line: a kill may have torn the one after that."""
        with self._path.open("ab+") as stream:
            size_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size_bytes - _LINE_BYTES_MAX))
            tail = stream.read()
            if not tail.endswith(b"\n"):
                stream.truncate(size_bytes - len(tail) + tail.rfind(b"\n") + 1)
        return self._path.open("a", encoding="utf-8", buffering=1)


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
                one = _recorded(record)
                found[one.id] = one
            elif record["kind"] == "outcome" and (decided := found.get(int(record["id"], 16))) is not None:
                found[decided.id] = replace(decided, took_s=float(record["took_s"]))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(f"{path}, line {number}: not a line of a decision log ({exc})") from exc
    return list(found.values())


def replay(decisions: Iterable[Recorded], policy: Policy) -> Replayed:
    """What a policy would have chosen from the same prospects, and what that is estimated to take.

    The time of an arm that was not taken is not known. It is estimated as what was expected of it, times what came of
    this arm over what was expected of it, on average over the outcomes of the log in the same situation.
    """
    known = list(decisions)
    corrections = _corrections(known)
    total_s = best_s = 0.0
    same = 0
    for one in known:
        times_s = {
            arm.name: arm.later_s + arm.terms.total_s * corrections.get((one.situation, arm.name), 1.0)
            for arm, _, _ in one.prospects
        }
        if one.took_s is not None:
            times_s[one.arm] = one.took_s + next(arm.later_s for arm, _, _ in one.prospects if arm.name == one.arm)
        chosen = policy.choose(one.prospects, one.wish).arm.name
        total_s += times_s[chosen]
        best_s += min(times_s.values())
        same += chosen == one.arm
    return Replayed(len(known), total_s, best_s, same / len(known) if known else 1.0)


def _corrections(decisions: Iterable[Recorded]) -> dict[tuple[tuple[str, ...], str], float]:
    residuals: dict[tuple[tuple[str, ...], str], list[float]] = {}
    for one in decisions:
        taken = next((prospect for prospect in one.prospects if prospect.arm.name == one.arm), None)
        if taken is None or one.took_s is None or not one.took_s > 0 or not taken.arm.terms.total_s > 0:
            continue
        residuals.setdefault((one.situation, one.arm), []).append(math.log(one.took_s / taken.arm.terms.total_s))
    return {name: math.exp(fmean(found)) for name, found in residuals.items()}


def _recorded(record: Mapping[str, Any]) -> Recorded:
    return Recorded(
        int(record["id"], 16),
        tuple(str(value) for value in record["situation"].values()),
        Wish(_limit(record["budget_nats"]), _limit(record["deadline_s"])),
        tuple(_prospects(record["arms"])),
        str(record["arm"]),
        str(record["reason"]),
        tuple(str(name) for name in record["refused"]),
    )


def _prospects(records: Iterable[Mapping[str, Any]]) -> Iterator[Prospect]:
    for one in records:
        arm = Arm(str(one["arm"]), float(one["loss_nats"]), Terms.of_report(one["terms"]), float(one["later_s"]))
        yield Prospect(arm, float(one["mean_s"]), float(one["drawn_s"]))


def _limit(value: Any) -> float:
    return math.inf if value is None else float(value)
