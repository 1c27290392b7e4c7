"""The controller: decisions that can be explained, outcomes that cannot be forged, and a log that replays."""

import json
import math
from pathlib import Path
from random import Random

import pytest

from kvstore.controller.controller import Controller, Ignored, Pending, Situation
from kvstore.controller.decisions import line_of, outcome_line, read_log, replay
from kvstore.controller.estimators import octave
from kvstore.controller.latency import Link, Rates, Volume, compute_terms, fetch_terms
from kvstore.controller.policy import EXACT, RECOMPUTE, Arm, Budgeted, Choice, Prospect, Wish
from kvstore.errors import ConfigError

ARMS = [
    Arm("p01/0", 0.005, compute_terms(1.0)),
    Arm("p01/1", 0.001, compute_terms(2.0)),
    Arm(EXACT, 0.0, compute_terms(4.0)),
    Arm(RECOMPUTE, 0.0, compute_terms(8.0)),
]
WISH = Wish(0.01)


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _situation(client: str = "a", tenant: str = "t") -> Situation:
    return Situation(tenant, client, "host", 24, 0)


def _controller(clock: Clock, *, explores: bool = False) -> Controller:
    return Controller(clock, Random(0), explores=explores)


def _tell(controller: Controller, clock: Clock, client: str, arm: Arm, took_s: float, tenant: str = "t") -> None:
    decision = controller.decide(_situation(client, tenant), [arm], Wish(math.inf))
    clock.now_s += took_s
    assert isinstance(controller.observe(decision.id, took_s, tenant=tenant), Pending)


def test_it_learns_what_its_model_gets_wrong() -> None:
    clock = Clock()
    controller = _controller(clock)
    assert controller.decide(_situation(), ARMS, WISH).choice.arm.name == "p01/0"
    for _ in range(10):
        _tell(controller, clock, "a", ARMS[0], 5.0)
    assert controller.decide(_situation(), ARMS, WISH).choice.arm.name == "p01/1"
    # Another client's choices do not depend on this one's outcomes alone.
    assert controller.decide(_situation("b"), ARMS, WISH).choice.arm.name == "p01/0"


def test_what_three_clients_saw_is_expected_by_a_fourth() -> None:
    clock = Clock()
    controller = _controller(clock)
    for _ in range(10):
        for client in ("a", "b", "c"):
            _tell(controller, clock, client, ARMS[0], 5.0)
    assert controller.decide(_situation("d"), ARMS, WISH).choice.prospects[0].mean_s == pytest.approx(2.0)


def test_a_lying_client_cannot_move_others() -> None:
    clock = Clock()
    controller = _controller(clock)
    for number in range(10):
        for honest in ("a", "b"):
            _tell(controller, clock, honest, ARMS[0], 1.0)
        # It waits, so that the clock believes it, and calls itself by many names.
        _tell(controller, clock, f"liar {number}", ARMS[0], 500.0, tenant="other")
    decision = controller.decide(_situation("c"), ARMS, WISH)
    assert decision.choice.arm.name == "p01/0"
    assert decision.choice.prospects[0].mean_s == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("took_s", [0.0, -1.0, math.nan, math.inf, 1000.0, 0.001])
def test_times_that_the_clock_finds_impossible_teach_nothing(took_s: float) -> None:
    clock = Clock()
    controller = _controller(clock)
    decision = controller.decide(_situation(), ARMS, WISH)
    clock.now_s += 1.0
    assert isinstance(controller.observe(decision.id, took_s, tenant="t", at_least_s=0.01), Ignored)
    assert controller.ignored[Ignored.IMPLAUSIBLE] == 1
    assert not controller.save()


def test_unknown_old_and_foreign_reports_are_counted() -> None:
    clock = Clock()
    controller = _controller(clock)
    assert isinstance(controller.observe(7, 1.0, tenant="t"), Ignored)
    decision = controller.decide(_situation(), ARMS, WISH)
    clock.now_s += 1.0
    assert isinstance(controller.observe(decision.id, 1.0, tenant="other"), Ignored)
    assert isinstance(controller.observe(decision.id, 1.0, tenant="t"), Pending)
    # Once is enough.
    assert isinstance(controller.observe(decision.id, 1.0, tenant="t"), Ignored)
    assert controller.ignored[Ignored.UNKNOWN] == 3
    late = controller.decide(_situation(), ARMS, WISH)
    clock.now_s += 3600.0
    assert isinstance(controller.observe(late.id, 1.0, tenant="t"), Ignored)
    assert controller.ignored[Ignored.OLD] == 1


def test_what_was_learned_survives_a_restart() -> None:
    clock = Clock()
    before, after = _controller(clock), _controller(clock)
    for _ in range(10):
        for client in ("a", "b", "c"):
            _tell(before, clock, client, ARMS[0], 5.0)
    after.restore(json.loads(json.dumps(before.save())))
    assert after.decide(_situation("a"), ARMS, WISH).choice.arm.name == "p01/1"
    assert after.decide(_situation("d"), ARMS, WISH).choice.prospects[0].mean_s == pytest.approx(2.0)
    with pytest.raises(ValueError, match="unpack"):
        after.restore([{"context": ["t"], "arm": "a", "weight": 1}])


def test_one_tenant_takes_no_memory_from_another() -> None:
    clock = Clock()
    controller = _controller(clock)
    first = controller.decide(_situation(), ARMS, WISH)
    _tell(controller, clock, "a", ARMS[0], 5.0)
    for number in range(5000):
        controller.decide(_situation(f"link {number}", "greedy"), ARMS[:1], WISH)
    assert controller.pending < 4200
    assert isinstance(controller.observe(first.id, 1.0, tenant="t"), Pending)
    clock.now_s += 3600.0
    # What nobody reports on is forgotten with time, too.
    controller.decide(_situation("link", "greedy"), ARMS, WISH)
    assert controller.pending == 1


def test_it_explores_what_it_does_not_know() -> None:
    arms = [Arm(f"p0{number}/0", 0.0, compute_terms(1.0 + number / 50)) for number in range(4)]
    controller = _controller(Clock(), explores=True)
    taken = {controller.decide(_situation(), arms, WISH).choice.arm.name for _ in range(100)}
    assert taken == {arm.name for arm in arms}
    # All arms share one draw of the wire, which changes nothing between them, and much against computing.
    volume = Volume(1e9, 1e9, 1)
    fetch = Arm("p01/0", 0.0, fetch_terms(volume, Link(1e9), Rates()))
    compute = Arm(RECOMPUTE, 0.0, compute_terms(2.0))
    calm = _controller(Clock())
    assert calm.decide(_situation(), [fetch, compute], WISH).choice.arm is fetch
    assert calm.decide(_situation(), [fetch, compute], WISH, wire=4.0).choice.arm is compute
    # In doubt the link is hoped to be fast before anything is computed.
    assert calm.decide(_situation(), [fetch, compute], WISH, wire=4.0, hope=0.5).choice.arm is fetch
    slow = Arm("p01/0", 0.0, fetch_terms(volume, Link(1e8), Rates()))
    assert calm.decide(_situation(), [slow, compute], WISH, hope=0.5).choice.arm is compute


def test_a_decision_says_why() -> None:
    report = _controller(Clock()).decide(_situation(), ARMS, Wish(0.002, 3.0)).report()
    assert (report["arm"], report["reason"]) == ("p01/1", "quality")
    assert report["refused"] == ["p01/0"]
    assert [one["arm"] for one in report["arms"]] == ["p01/1", EXACT, RECOMPUTE]
    assert report["arms"][0]["terms"]["total_s"] == 2.0
    assert json.loads(json.dumps(report)) == report
    boundless = _controller(Clock()).decide(_situation(), ARMS, Wish(math.inf)).report()
    assert (boundless["budget_nats"], boundless["deadline_s"]) == (None, None)


def test_buckets_are_octaves() -> None:
    assert [octave(value) for value in (0, 0.5, 1, 2, 3, 1024)] == [0, 0, 0, 1, 1, 10]


class Patient:
    """A policy that always computes."""

    def choose(self, prospects: list[Prospect], wish: Wish) -> Choice:
        return Choice(prospects[-1].arm, "patience", tuple(prospects), ())


def test_a_log_replays(tmp_path: Path) -> None:
    clock, log = Clock(), tmp_path / "decisions.jsonl"
    controller = _controller(clock)
    with log.open("w") as stream:
        for took_s in (3.0, 3.0, 3.0, 2.0, 2.0):
            decision = controller.decide(_situation(), ARMS, WISH)
            clock.now_s += took_s
            controller.observe(decision.id, took_s, tenant="t")
            stream.write(line_of(decision) + "\n" + outcome_line(decision.id, took_s) + "\n")
        # A kill tears the last line.
        stream.write('{"kind":"decis')
    recorded = read_log(log)
    assert [one.took_s for one in recorded] == [3.0, 3.0, 3.0, 2.0, 2.0]
    assert recorded[0].prospects[0].arm == ARMS[0]
    again = replay(recorded, Budgeted())
    assert (again.decisions, again.same) == (5, 1.0)
    assert 0 <= again.regret_s < again.total_s
    patient = replay(recorded, Patient())  # type: ignore[arg-type]
    assert patient.total_s == 40.0
    assert patient.same == 0.0
    assert patient.regret_s > again.regret_s


@pytest.mark.parametrize("line", ["rubbish", "[]", '{"kind":"decision"}', '{"kind":"decision","id":"x","situation":1}'])
def test_what_is_no_log_is_refused(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_log(log)
    with pytest.raises(ConfigError, match="cannot read"):
        read_log(tmp_path / "none")
