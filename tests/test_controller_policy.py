"""The policy: the budget is never broken, the deadline only where nothing meets it."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvstore.controller.latency import compute_terms
from kvstore.controller.policy import EXACT, RECOMPUTE, Arm, Budgeted, Measured, Prospect, Wish, undominated


def _prospect(name: str, loss_nats: float, mean_s: float, drawn_s: float | None = None) -> Prospect:
    return Prospect(Arm(name, loss_nats, compute_terms(mean_s)), mean_s, mean_s if drawn_s is None else drawn_s)


FOUR = [
    _prospect("fine", 0.004, 0.5),
    _prospect("coarse", 0.03, 0.1),
    _prospect(EXACT, 0.0, 2.0),
    _prospect(RECOMPUTE, 0.0, 5.0),
]


@pytest.mark.parametrize(
    ("budget", "deadline_s", "arm", "reason"),
    [
        (0.1, math.inf, "coarse", "fastest"),
        (0.01, math.inf, "fine", "fastest"),
        (0.0, math.inf, EXACT, "fastest"),
        (0.1, 1.0, "fine", "quality"),
        (0.1, 3.0, EXACT, "quality"),
        # Of two exact ones the faster one.
        (0.1, 9.0, EXACT, "quality"),
        (0.1, 0.05, "coarse", "fastest"),
        (0.01, 0.2, "fine", "fastest"),
    ],
)
def test_budget_first_then_deadline_then_quality(budget: float, deadline_s: float, arm: str, reason: str) -> None:
    choice = Budgeted().choose(FOUR, Wish(budget, deadline_s))
    assert (choice.arm.name, choice.reason) == (arm, reason)
    assert set(choice.refused) == {one.arm.name for one in FOUR if one.arm.loss_nats > budget}


def test_exploring_never_breaks_a_deadline_knowingly() -> None:
    # The finer arm was drawn as fast, and is expected to be slow.
    arms = [_prospect("fine", 0.001, 2.0, drawn_s=0.5), _prospect("coarse", 0.01, 0.8)]
    assert Budgeted().choose(arms, Wish(0.1, 1.0)).arm.name == "coarse"


def test_what_nobody_measured_is_not_chosen() -> None:
    arms = [_prospect("unknown", math.inf, 0.1), _prospect(RECOMPUTE, 0.0, 5.0)]
    for budget in (1.0, math.inf):
        choice = Budgeted().choose(arms, Wish(budget))
        assert (choice.arm.name, choice.refused) == (RECOMPUTE, ("unknown",))
    with pytest.raises(ValueError, match="no arm is within"):
        Budgeted().choose(arms[:1], Wish(1.0))


def test_arms_that_another_one_beats_need_not_be_looked_at() -> None:
    levels = [
        Measured("small", 8.0, 0.2, 0.008),
        Measured("slow and large", 4.0, 0.3, 0.001),
        Measured("fast", 4.0, 0.05, 0.004),
        Measured("coarse", 16.0, 0.05, 0.1),
        Measured("unknown", 32.0, 0.01, math.inf),
    ]
    names = {hurried: {one.name for one in undominated(levels, 0.01, hurried=hurried)} for hurried in (True, False)}
    assert names[True] == {"small", "fast"}
    # With time left, what loses less is worth something.
    assert names[False] == {"small", "fast", "slow and large"}


LOSSES = st.floats(0, 1)
TIMES = st.floats(1e-6, 1e3)
PROSPECTS = st.lists(st.builds(_prospect, st.text("abc", min_size=1), LOSSES, TIMES, TIMES), min_size=1, max_size=12)


@given(PROSPECTS, LOSSES, TIMES)
def test_no_arm_beyond_the_budget_is_ever_chosen(arms: list[Prospect], budget: float, deadline_s: float) -> None:
    assume(any(one.arm.loss_nats <= budget for one in arms))
    choice = Budgeted().choose(arms, Wish(budget, deadline_s))
    assert choice.arm.loss_nats <= budget
    chosen = next(one for one in arms if one.arm is choice.arm)
    timely = [one for one in arms if one.arm.loss_nats <= budget and max(one.mean_s, one.drawn_s) <= deadline_s]
    if timely:
        assert chosen in timely
        assert choice.arm.loss_nats == min(one.arm.loss_nats for one in timely)
    else:
        assert chosen.drawn_s == min(one.drawn_s for one in arms if one.arm.loss_nats <= budget)
