"""Estimators and bandit: they follow what changes, are not moved by what lies, and can be saved and added."""

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.controller.bandit import Bandit, Residuals
from kvstore.controller.estimators import DecodeSpeed, Level, LinkState, Load, PrefillSpeed
from kvstore.controller.votes import Votes

CONTEXT = ("tenant", "link", "host", 24, 0)


def _noisy(rng: Random, value: float, deviation: float = 0.1) -> float:
    return value * math.exp(rng.gauss(0, deviation))


@pytest.mark.parametrize("factor", [0.05, 0.5, 2.0, 20.0])
def test_a_rate_that_changes_is_known_after_a_few_transfers(factor: float) -> None:
    rng = Random(1)
    level = Level(1e8)
    for _ in range(50):
        level.observe(_noisy(rng, 3e8))
    assert level.value == pytest.approx(3e8, rel=0.15)
    for _ in range(4):
        level.observe(_noisy(rng, factor * 3e8))
    assert level.value == pytest.approx(factor * 3e8, rel=0.25)


@pytest.mark.parametrize("lie", [1e-6, 1e-3, 1e3, 1e9])
def test_one_outlier_moves_little(lie: float) -> None:
    rng = Random(2)
    level = Level(1e8)
    for _ in range(50):
        level.observe(_noisy(rng, 1e8))
    before = level.value
    level.observe(lie * 1e8)
    assert 1 / 4.1 < level.value / before < 4.1
    for _ in range(3):
        level.observe(_noisy(rng, 1e8))
    assert level.value == pytest.approx(1e8, rel=0.3)


def test_a_client_that_was_busy_tells_only_how_fast_a_link_is_at_least() -> None:
    link = LinkState()
    for _ in range(10):
        link.observe(1e8, 1.0)
    for _ in range(10):
        link.observe(1e8, 20.0, held_up=True)
    assert link.rate.value == pytest.approx(1e8, rel=0.1)
    assert list(link.past)[-10:] == pytest.approx([1e8] * 10, rel=0.1)
    for _ in range(10):
        link.observe(1e8, 0.2, held_up=True)
    assert link.rate.value == pytest.approx(5e8, rel=0.1)


def test_who_computes_because_of_a_link_meets_it_as_it_was() -> None:
    link = LinkState()
    for _ in range(10):
        link.observe(1e8, 1.0)
    before = link.rate.variance
    for _ in range(5):
        link.pass_by()
    assert list(link.past)[-5:] == pytest.approx([1e8] * 5, rel=0.1)
    assert link.rate.variance > before


def test_what_is_not_seen_for_long_may_have_changed() -> None:
    rng, level = Random(9), Level(1.0)
    for _ in range(20):
        level.observe(1.0)
    sure = level.variance
    for _ in range(50):
        level.age()
    assert level.value == pytest.approx(1.0)
    assert level.variance > 10 * sure
    drawn = [level.drawn(rng) for _ in range(500)]
    assert min(drawn) < 0.5 < 2.0 < max(drawn)
    # High, so that it is tried.
    assert level.hoped > 2.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20))
def test_whatever_is_seen_a_level_stays_a_positive_number(found: list[float]) -> None:
    level = Level(1.0)
    for one in found:
        level.observe(one)
    assert 0 < level.value < math.inf
    assert 0 < level.variance < math.inf


def test_round_trip_and_rate_are_told_apart() -> None:
    rng = Random(3)
    link = LinkState()
    for _ in range(60):
        size = rng.choice([2_000, 1e6, 3e7])
        link.observe(size, _noisy(rng, 0.04 + size / 5e7, 0.05))
    assert link.rtt.value == pytest.approx(0.04, rel=0.2)
    assert link.rate.value == pytest.approx(5e7, rel=0.2)
    assert link.report()["transfers"] > 20


def test_a_first_byte_that_is_known_tells_the_round_trip() -> None:
    link = LinkState()
    for _ in range(20):
        link.observe(1e7, 0.5 + 0.1, first_byte_s=0.1)
    assert link.rtt.value == pytest.approx(0.1, rel=0.05)
    assert link.rate.value == pytest.approx(2e7, rel=0.05)


@pytest.mark.parametrize("first_byte_s", [-1.0, 0.0, 1e200, math.nan, math.inf])
def test_a_first_byte_that_cannot_be_is_not_believed(first_byte_s: float) -> None:
    link = LinkState()
    for _ in range(10):
        link.observe(1e7, 0.1, first_byte_s=first_byte_s)
    assert link.rate.value == pytest.approx(1e8, rel=0.1)
    assert link.rtt.seen == 0


def test_prefill_between_lengths_is_not_that_of_the_nearest_two() -> None:
    speed = PrefillSpeed()
    for tokens, token_s in ((700, 1e-3), (1400, 1e-3), (45_000, 4e-3)):
        for _ in range(5):
            speed.observe(tokens, tokens * token_s)
    found = speed.seconds(8000)
    assert found is not None
    assert 1.5e-3 < found / 8000 < 3e-3


def test_prefill_is_known_by_length() -> None:
    speed = PrefillSpeed()
    assert speed.seconds(100) is None
    assert speed.seconds(0) == 0.0
    for tokens in (512, 1024, 4096):
        for _ in range(5):
            speed.observe(tokens, tokens * 1e-3 * (1 + tokens / 4096))
    assert speed.seconds(512) == pytest.approx(512 * 1e-3 * 1.125, rel=0.15)
    assert speed.seconds(4096) == pytest.approx(4096 * 1e-3 * 2, rel=0.15)
    between = speed.seconds(2048)
    assert between is not None
    assert speed.seconds(1024) < between < speed.seconds(4096)  # type: ignore[operator]
    beyond = speed.seconds(65536)
    assert beyond == pytest.approx(65536 * 1e-3 * 2, rel=0.2)


def test_a_slower_decoder_is_known_of_arms_that_were_never_taken() -> None:
    rng, speed = Random(8), DecodeSpeed()
    assert speed.factor("a") == 1.0
    for number in range(12):
        speed.observe("ab"[number % 2], 1.0, _noisy(rng, 3.0))
    assert speed.factor("never taken") == pytest.approx(3.0, rel=0.3)
    for _ in range(30):
        speed.observe("a", 1.0, _noisy(rng, 3.0))
        speed.observe("b", 1.0, _noisy(rng, 6.0))
    assert speed.factor("a") == pytest.approx(3.0, rel=0.25)
    assert speed.factor("b") == pytest.approx(6.0, rel=0.25)


def test_load_is_smoothed_over_time() -> None:
    load = Load(half_life_s=1.0)
    load.observe(8, 0.0)
    load.observe(0, 1.0)
    assert load.value == pytest.approx(4.0)
    # A clock that goes backwards changes nothing.
    load.observe(0, 0.5)
    assert load.value == pytest.approx(4.0)


def test_without_outcomes_the_model_stands() -> None:
    bandit = Bandit(Random(0))
    assert bandit.look(CONTEXT, "a")[0] == 1.0
    drawn = [bandit.look(CONTEXT, "a")[1] for _ in range(2000)]
    assert sorted(drawn)[1000] == pytest.approx(1.0, rel=0.05)
    assert bandit.look(CONTEXT, "a", prior_mean=math.log(3))[0] == pytest.approx(3.0)


def test_a_model_that_is_wrong_by_a_factor_is_corrected() -> None:
    rng, bandit = Random(4), Bandit(Random(0))
    for _ in range(40):
        bandit.observe(CONTEXT, "a", 1.0, _noisy(rng, 3.0))
    assert bandit.look(CONTEXT, "a")[0] == pytest.approx(3.0, rel=0.1)
    assert bandit.look(CONTEXT, "b")[0] == bandit.look(("another",), "a")[0] == 1.0
    drawn = sorted(bandit.look(CONTEXT, "a")[1] for _ in range(500))
    # Little is left to explore.
    assert drawn[475] / drawn[25] < 1.5


def test_outcomes_that_leave_the_band_bring_back_the_model() -> None:
    rng, bandit = Random(5), Bandit(Random(0))
    for _ in range(40):
        bandit.observe(CONTEXT, "a", 1.0, _noisy(rng, 4.0, 0.05))
    for _ in range(3):
        bandit.observe(CONTEXT, "a", 1.0, _noisy(rng, 0.5, 0.05))
    assert bandit.given_up == 1
    assert bandit.look(CONTEXT, "a") == (1.0, 1.0)
    for _ in range(20):
        bandit.observe(CONTEXT, "a", 1.0, _noisy(rng, 0.5, 0.05))
    assert bandit.look(CONTEXT, "a")[0] == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("took_s", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_tell_nothing(took_s: float) -> None:
    bandit = Bandit(Random(0))
    bandit.observe(CONTEXT, "a", 1.0, took_s)
    bandit.observe(CONTEXT, "a", took_s, 1.0)
    assert not bandit.contexts


def test_one_absurd_outcome_counts_as_a_large_one() -> None:
    rng, bandit = Random(6), Bandit(Random(0))
    for _ in range(10):
        bandit.observe(CONTEXT, "a", 1.0, _noisy(rng, 1.0))
    bandit.observe(CONTEXT, "a", 1.0, 1e9)
    assert bandit.look(CONTEXT, "a")[0] < 1.3


def test_what_two_servers_saw_can_be_added() -> None:
    rng = Random(7)
    whole, parts = Bandit(Random(0)), (Bandit(Random(0)), Bandit(Random(0)))
    for number in range(20):
        took_s = _noisy(rng, 2.0)
        whole.observe(CONTEXT, "a", 1.0, took_s)
        parts[number % 2].observe(CONTEXT, "a", 1.0, took_s)
    joined = Bandit(Random(0))
    for part in parts:
        for record in json.loads(json.dumps(part.save())):
            joined.restore(tuple(record["context"]), record["arm"], Residuals.of_record(record))
    assert joined.look(CONTEXT, "a")[0] == pytest.approx(whole.look(CONTEXT, "a")[0], rel=0.1)
    assert joined.contexts == whole.contexts


def test_contexts_are_bounded() -> None:
    bandit = Bandit(Random(0), contexts_max=3)
    for number in range(5):
        bandit.observe((number,), "a", 1.0, 2.0)
        bandit.observe((0,), "a", 1.0, 2.0)
    # The context that is used all the time stays.
    assert bandit.contexts == [(3,), (4,), (0,)]


def test_an_arm_that_is_not_tried_for_long_may_have_changed() -> None:
    bandit = Bandit(Random(0))
    for _ in range(10):
        bandit.observe(CONTEXT, "a", 1.0, 2.0)
    before = bandit.look(CONTEXT, "a")[0]
    for _ in range(3000):
        bandit.observe(CONTEXT, "b", 1.0, 1.0)
    assert before > 1.6
    assert bandit.look(CONTEXT, "a")[0] < 1.1


def test_sums_that_are_shared_again_and_again_count_once() -> None:
    held = Residuals()
    for _ in range(100):
        held.add(0.5)
    merged = held
    for _ in range(10):
        merged = merged.merged(held)
    assert merged.weight == pytest.approx(held.weight, rel=0.1)
    assert merged.posterior().mean == pytest.approx(held.posterior().mean, rel=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": -1.0},
        {"weight": 1e9},
        {"weight": math.nan},
        {"total": math.nan},
        {"total": math.inf},
        {"squares": -1.0},
        {"squares": math.inf},
        {"squares": "x"},
        {"cooling": None},
    ],
)
def test_sums_that_nobody_could_have_saved_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Residuals.of_record({"weight": 1.0, "total": 0.5, "squares": 0.25, "cooling": 0} | change)


def test_an_arm_that_was_given_up_stays_so_over_a_restart() -> None:
    bandit, again = Bandit(Random(0)), Bandit(Random(0))
    for took_s in (*[4.0] * 40, *[0.5] * 3):
        bandit.observe(CONTEXT, "a", 1.0, took_s)
    assert bandit.given_up == 1
    [record] = bandit.save()
    again.restore(CONTEXT, "a", Residuals.of_record(record))
    assert again.look(CONTEXT, "a") == (1.0, 1.0)


def test_a_median_of_clients_is_what_others_are_told() -> None:
    votes, shared = Votes(), ("host", 24, 0)
    for number in range(3):
        assert votes.prior("t", "new", shared, "a") == 0.0
        votes.cast("t", f"link {number}", shared, "a", 0.4)
    assert votes.prior("t", "new", shared, "a") == 0.4
    assert votes.prior("t", "new", shared, "b") == 0.0
    # One of three is not told what two others say: one of them could lie.
    assert votes.prior("t", "link 0", shared, "a") == 0.0
    # A tenant with many links is one voice among tenants.
    for number in range(20):
        votes.cast("liar", f"link {number}", shared, "a", 9.0)
    assert votes.prior("other", "new", shared, "a") == 0.0
    votes.cast("honest", "link", shared, "a", 0.3)
    assert votes.prior("other", "new", shared, "a") == 0.4
    # However many lie, a prior is a factor of two at most.
    votes.cast("liar too", "link", shared, "a", 9.0)
    votes.cast("and one more", "link", shared, "a", 9.0)
    assert votes.prior("other", "new", shared, "a") == pytest.approx(math.log(2))


@given(st.lists(st.floats(-2, 2), max_size=50), st.floats(-1, 1))
def test_a_posterior_lies_between_its_prior_and_what_was_seen(residuals: list[float], prior: float) -> None:
    held = Residuals()
    for one in residuals:
        held.add(one)
    found = held.posterior(prior)
    bounds = [prior, *residuals]
    assert min(bounds) - 1e-9 <= found.mean <= max(bounds) + 1e-9
    assert found.rate > 0
    assert found.deviation > 0
