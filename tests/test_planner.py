"""Plans from what is held, what was measured, and what links were like; and what is said of them."""

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.backend import Copy, Held
from kvstore.controller.controller import Controller, Ignored, Pending
from kvstore.controller.losses import Losses
from kvstore.controller.planner import Planner, Who
from kvstore.controller.policy import EXACT, RECOMPUTE
from kvstore.errors import RequestError
from kvstore.plan import (
    Action,
    Context,
    Outcome,
    Plan,
    context_json,
    outcome_json,
    parse_context,
    parse_outcome,
    parse_plan,
    plan_json,
)
from kvstore.profile import Profile, ProfileSet, parse_profiles
from tests.test_profiles import a_set, level, profile, quality

MB = 1 << 20
WHO = Who("", "10.0.0.1/a")
CONTEXT = Context(chunk_bytes=32 * MB, chunk_tokens=256)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def levels(*measured: tuple[float, float]) -> list[dict[str, Any]]:
    """Levels of a ratio and a loss each; loss is worse on short prompts."""
    return [
        level(
            ratio=ratio,
            decode_s_per_gb=0.001,
            quality={
                "text-256": quality(kl_nats=2 * kl, standard_error=0.0),
                "text-1024": quality(kl_nats=kl, standard_error=0.0),
                "pages-256": quality(kl_nats=10 * kl, standard_error=0.0),
            },
        )
        for ratio, kl in measured
    ]


FINE = profile(
    name="fine", pipeline=[{"stage": "mean"}, {"stage": "raw"}], levels=levels((16, 0.02), (8, 0.002), (4, 0.0002))
)
COARSE = profile(
    name="coarse",
    pipeline=[{"stage": "mean", "coarse": True}, {"stage": "raw"}],
    encode_s_per_gb=0.01,
    levels=levels((40, 0.2), (20, 0.05)),
)
SET = parse_profiles(a_set(profiles=[FINE, COARSE]))


def held(found: Profile | None, levels: int | None = None, *, tier: str = "host", **change: Any) -> Held:
    """A chunk as a profile makes it; of nobody's where it is None."""
    sizes = (8 * MB,) if found is None else _sizes(found)
    copy = Copy(tier, 1024, sizes[:levels], len(sizes), profile=bytes(8) if found is None else found.id)
    return Held(None, copy._replace(**change))


def _sizes(found: Profile) -> tuple[int, ...]:
    ends = [round(32 * MB / one.ratio) for one in found.levels]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def planner(**change: Any) -> Planner:
    clock = Clock()
    return Planner(Controller(clock, Random(0), explores=False), **change)


def ask(plans: Planner, chunks: list[Held], **change: Any) -> tuple[str, int | None]:
    decision, level = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT._replace(**change), len(chunks))
    return decision.choice.arm.name, level


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("fine/1", 1)),
        ({"budget_nats": 0.05}, ("fine/0", 0)),
        ({"budget_nats": 0.001}, ("fine/2", None)),
        ({"budget_nats": 0.0}, (RECOMPUTE, None)),
        ({"workload": "pages", "budget_nats": 0.05}, ("fine/1", 1)),
        # Nobody has measured such text: it counts as the worst that somebody did.
        ({"workload": "poems", "budget_nats": 0.05}, ("fine/1", 1)),
        # With time enough quality is worth something, without it the fastest is taken.
        ({"deadline_s": 10.0}, ("fine/2", None)),
        ({"deadline_s": 1e-6}, ("fine/1", 1)),
        ({"prefill_s": 1e-4}, (RECOMPUTE, None)),
    ],
)
def test_a_plan_keeps_to_the_budget_and_the_deadline(change: dict[str, Any], expected: tuple[str, int | None]) -> None:
    assert ask(planner(), [held(SET.profiles[0])] * 4, **change) == expected


def test_a_short_prompt_is_judged_by_what_short_prompts_lose() -> None:
    assert ask(planner(), [held(SET.profiles[0])] * 4, budget_nats=0.03) == ("fine/0", 0)
    assert ask(planner(), [held(SET.profiles[0])], budget_nats=0.03) == ("fine/1", 1)
    # Between two lengths the worse of both counts.
    assert ask(planner(), [held(SET.profiles[0])] * 3, budget_nats=0.03) == ("fine/1", 1)


def test_what_nobody_measured_is_fetched_only_where_it_is_lossless() -> None:
    assert ask(planner(), [held(None)] * 4) == (RECOMPUTE, None)
    assert ask(planner(), [held(None, lossless=True)] * 4) == (EXACT, None)
    assert ask(planner(), [held(SET.profiles[0], inexact=True)] * 4) == (RECOMPUTE, None)


def test_chunks_of_several_profiles_are_judged_by_the_worst_of_them() -> None:
    mixed = [held(SET.profiles[0])] * 2 + [held(SET.profiles[1])] * 2
    assert ask(planner(), mixed, budget_nats=0.1) == ("mixed/1", 1)
    assert ask(planner(), mixed, budget_nats=0.01) == (RECOMPUTE, None)
    # What was shrunk is fetched with the levels that it has.
    short = [held(SET.profiles[0]), held(SET.profiles[0], 2)]
    assert ask(planner(), short * 2, budget_nats=0.001) == (RECOMPUTE, None)
    assert ask(planner(), short * 2, budget_nats=0.01) == ("fine/1", 1)


def test_a_put_takes_the_profile_that_will_be_fetched_soonest() -> None:
    def arm(**change: Any) -> tuple[str, str | None]:
        decision, found = planner().plan_put(WHO, Losses(SET), 4, CONTEXT._replace(**change))
        return decision.choice.arm.name, None if found is None else found.name

    assert arm(budget_nats=0.1) == ("coarse", "coarse")
    assert arm(budget_nats=0.01) == ("fine", "fine")
    assert arm(budget_nats=0.0) == (EXACT, None)


def test_a_put_over_a_fast_link_is_not_worth_its_encoding() -> None:
    plans = planner()
    for _ in range(20):
        decision, _ = plans.plan_put(WHO, Losses(SET), 4, CONTEXT)
        raw_bytes = 4 * CONTEXT.chunk_bytes
        plans.controller.clock.now_s += 1.0  # type: ignore[attr-defined]
        outcome = Outcome(0.001 + raw_bytes / 50e9, raw_bytes, raw_bytes / 50e9)
        assert isinstance(plans.observe("", decision.id, outcome), Pending)
    assert plans.plan_put(WHO, Losses(SET), 4, CONTEXT)[1] is None


@pytest.mark.parametrize(("reads", "expected"), [(None, None), (1.0, None), (100.0, "thorough")])
def test_what_is_read_often_is_worth_encoding(reads: float | None, expected: str | None) -> None:
    thorough = profile(name="thorough", encode_s_per_gb=30.0, levels=levels((4, 0.0002)))
    found = Losses(parse_profiles(a_set(profiles=[thorough])))
    chosen = planner().plan_put(WHO, found, 4, CONTEXT._replace(reads=reads))[1]
    assert (chosen and chosen.name) == expected


def test_a_put_reckons_with_the_rates_that_its_link_has_had() -> None:
    slow = profile(name="slow", levels=[level(ratio=4, decode_s_per_gb=2.0)], encode_s_per_gb=8.0)
    found = Losses(parse_profiles(a_set(profiles=[slow])))

    def arm(rates: list[float], **change: Any) -> str:
        plans = planner()
        for rate in rates:
            plans._client(WHO).link.observe(100 * MB, 100 * MB / rate)
        context = CONTEXT._replace(budget_nats=1.0, reads=100.0, **change)
        return plans.plan_put(WHO, found, 4, context)[0].choice.arm.name

    assert arm([1e9] * 8) == EXACT
    # It was slow, and may be so again when the copy is read: the rate of the last transfers alone does not decide.
    assert arm([1e7] * 16 + [1e9] * 8) == "slow"
    # Over such a link nobody would fetch where computing is that fast.
    assert arm([1e7] * 16 + [1e9] * 8, prefill_s=0.2) == EXACT


def reports(plans: Planner, who: Who, bytes_per_s: float) -> None:
    """A client fetches over a link of a rate, and says so."""
    for _ in range(20):
        decision, _ = plans.plan_get(who, Losses(SET), [held(SET.profiles[0])] * 4, CONTEXT, 4)
        plans.controller.clock.now_s += 100.0  # type: ignore[attr-defined]
        took_s = 16 * MB / bytes_per_s
        assert isinstance(plans.observe(who.tenant, decision.id, Outcome(took_s, 16 * MB, took_s)), Pending)


def puts(plans: Planner, found: ProfileSet = SET, **change: Any) -> str:
    decision, _ = plans.plan_put(WHO, Losses(found), 4, CONTEXT._replace(**change))
    return decision.choice.arm.name


def beside_the_putter() -> Planner:
    """The planner of a server that those who put sit beside."""
    plans = planner()
    for _ in range(20):
        decision, _ = plans.plan_put(WHO, Losses(SET), 4, CONTEXT)
        plans.controller.clock.now_s += 1.0  # type: ignore[attr-defined]
        plans.observe("", decision.id, Outcome(0.003, 128 * MB, 0.0026))
    return plans


def test_what_is_put_is_encoded_for_the_links_of_those_who_fetch() -> None:
    plans, other = beside_the_putter(), beside_the_putter()
    assert puts(plans) == EXACT
    reports(plans, Who("", "10.0.0.7/reader"), 12.5e6)
    assert puts(plans) == "fine"
    # Those of others, and one slow one of three, make no difference.
    reports(other, Who("somebody", "10.0.0.7/reader"), 12.5e6)
    for number, rate in enumerate((50e9, 50e9, 12.5e6)):
        reports(other, Who("", f"10.0.0.{number}/x"), rate)
    assert puts(other) == EXACT


def test_whoever_fetches_puts_for_its_own_link() -> None:
    plans = planner()
    reports(plans, WHO, 50e9)
    for number in range(3):
        reports(plans, Who("", f"10.0.0.{number}/slow"), 12.5e6)
    assert puts(plans) == EXACT
    assert plans.plan_put(Who("", "10.0.0.9/new"), Losses(SET), 4, CONTEXT)[0].choice.arm.name == "fine"


def test_a_first_fetch_meets_the_link_as_it_is_and_later_ones_as_it_was() -> None:
    plans = planner()
    reports(plans, WHO, 50e9)
    for _ in range(12):
        # As if it had been slow before, half of the time.
        plans._clients[WHO.tenant][WHO.link].link.past.append(12.5e6)
    assert puts(plans) == EXACT
    assert puts(plans, reads=20.0) == "fine"


def test_what_is_fetched_often_may_be_encoded_for_long() -> None:
    slow = profile(
        name="slow",
        pipeline=[{"stage": "hadamard"}, {"stage": "raw"}],
        encode_s_per_gb=5.0,
        levels=levels((32, 0.0002)),
    )
    found = parse_profiles(a_set(profiles=[FINE, slow]))
    plans = planner()
    reports(plans, Who("", "10.0.0.7/reader"), 125e6)
    assert puts(plans, found) == "fine"
    assert puts(plans, found, reads=20.0) == "slow"


def test_links_that_turn_out_slow_make_computing_the_better_arm() -> None:
    plans = planner()
    chunks = [held(SET.profiles[0])] * 4
    assert ask(plans, chunks, prefill_s=2.0) == ("fine/1", 1)
    for _ in range(5):
        decision, _ = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT, 4)
        plans.controller.clock.now_s += 60.0  # type: ignore[attr-defined]
        plans.observe("", decision.id, Outcome(16.0, 16 * MB, 16.0, 0.001, 0.0001))
    assert ask(plans, chunks, prefill_s=2.0) == (RECOMPUTE, None)
    # Nobody else is told by one link.
    other = Who("", "10.0.0.2/b")
    decision, _ = plans.plan_get(other, Losses(SET), chunks, CONTEXT._replace(prefill_s=2.0), 4)
    assert decision.choice.arm.name == "fine/1"


def test_who_only_computes_tries_a_fetch_now_and_then() -> None:
    plans, chunks = planner(), [held(SET.profiles[0])] * 4

    def told(rate: float, prefill_s: float = 1.0) -> bool:
        """Whether it is told to compute, over a link of a rate."""
        decision, _ = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT._replace(prefill_s=prefill_s), 4)
        arm = decision.choice.arm
        plans.controller.clock.now_s += 100.0  # type: ignore[attr-defined]
        wire_s = arm.terms.stage_s("wire") * plans._clients[""][WHO.link].link.rate.value / rate
        computes = arm.name == RECOMPUTE
        took_s = prefill_s if computes else 0.01 + wire_s
        sent = Outcome(took_s) if computes else Outcome(took_s, round(wire_s * rate), wire_s, 0.001, 0.001)
        assert isinstance(plans.observe("", decision.id, sent), Pending)
        return computes

    while not told(10e6):
        pass
    slow = "".join("c" if told(10e6) else "f" for _ in range(60))
    # Ever less often, as long as it tells nothing new.
    tried = [number for number, what in enumerate(slow) if what == "f"]
    assert tried[0] < 4
    assert tried[-1] - tried[-2] > 2 * (tried[1] - tried[0])
    later = [told(1e9) for _ in range(80)]
    assert not any(later[-10:])
    # Not where it would take for ever, nor where there is a deadline.
    assert all(told(1e9, prefill_s=1e-4) for _ in range(20))


def test_a_decoder_that_was_slow_once_is_tried_again() -> None:
    coded = profile(name="coded", levels=[level(ratio=8, decode_s_per_gb=2.0)])
    plans, found = planner(), Losses(parse_profiles(a_set(profiles=[coded])))

    def told(prefill_s: float | None, codec_s: float) -> str:
        context = CONTEXT._replace(prefill_s=prefill_s, budget_nats=1.0)
        decision, _ = plans.plan_get(WHO, found, [held(found.found.profiles[0])] * 4, context, 4)
        plans.controller.clock.now_s += 200.0  # type: ignore[attr-defined]
        arm = decision.choice.arm.name
        computes = arm == RECOMPUTE
        outcome = Outcome(1.0) if computes else Outcome(0.1 + codec_s, 16 * MB, 0.1, 0.001, codec_s)
        plans.observe("", decision.id, outcome)
        return arm

    for _ in range(6):
        # As if its code were compiled anew each time.
        assert told(None, 100.0) != RECOMPUTE
    assert told(1.0, 0.3) == RECOMPUTE
    later = [told(1.0, 0.3) for _ in range(400)]
    assert later[:50] == [RECOMPUTE] * 50
    assert RECOMPUTE not in later[-5:]


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_lying_client_moves_nobody_elses_choice(factor: float) -> None:
    honest, lying = planner(), planner()
    chunks = [held(SET.profiles[0])] * 4
    for plans, liars in ((honest, 0), (lying, 1)):
        for turn in range(60):
            for number in range(4):
                who = Who("", f"10.0.0.{number}/x")
                decision, _ = plans.plan_get(who, Losses(SET), chunks, CONTEXT, 4)
                took_s = decision.choice.arm.terms.total_s * (1.1 if turn % 2 else 0.9)
                said_s = took_s * factor if liars and number == 0 else took_s
                plans.controller.clock.now_s += said_s  # type: ignore[attr-defined]
                plans.observe("", decision.id, Outcome(said_s, 16 * MB, said_s, None, said_s / 10))
    for number in range(1, 5):
        who = Who("", f"10.0.0.{number}/x")
        for prefill_s in (0.05, 0.1, 0.2, 0.4):
            context = CONTEXT._replace(prefill_s=prefill_s)
            chosen = [
                plans.plan_get(who, Losses(SET), chunks, context, 4)[0].choice.arm.name for plans in (honest, lying)
            ]
            assert chosen[0] == chosen[1]


def test_how_long_computing_takes_is_learned_where_nobody_says_so() -> None:
    plans = planner()
    chunks = [held(None)] * 4
    decision, _ = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT, 4)
    assert decision.choice.arm.name == RECOMPUTE
    plans.controller.clock.now_s += 1.0  # type: ignore[attr-defined]
    plans.observe("", decision.id, Outcome(0.5))
    again, _ = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT, 4)
    assert again.choice.arm.terms.total_s == pytest.approx(0.5)


def test_who_computes_only_part_of_a_prompt_saves_only_part() -> None:
    decision, _ = planner().plan_get(WHO, Losses(SET), [held(None)] * 4, CONTEXT._replace(prefill_s=2.0), 8)
    assert decision.choice.arm.terms.total_s == pytest.approx(1.0)


def test_reads_tell_how_fast_a_tier_is() -> None:
    plans = planner()
    chunks = [held(SET.profiles[0], tier="s3")] * 4
    before = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT, 4)[0].choice.arm.terms.stage_s("read")
    for _ in range(10):
        plans.observe_read("s3", 16 * MB, 16.0)
    after = plans.plan_get(WHO, Losses(SET), chunks, CONTEXT, 4)[0].choice.arm.terms.stage_s("read")
    assert after > 20 * before


def test_a_tenant_learns_nothing_of_what_another_was_told() -> None:
    plans = planner()
    decision, _ = plans.plan_get(Who("a", "x/1"), Losses(SET), [held(SET.profiles[0])], CONTEXT, 1)
    plans.controller.clock.now_s += 1.0  # type: ignore[attr-defined]
    assert plans.observe("b", decision.id, Outcome(0.5)) is Ignored.UNKNOWN
    assert isinstance(plans.observe("a", decision.id, Outcome(0.5)), Pending)


@given(st.integers(1, 200), st.sampled_from(["text", "pages", "poems"]), st.floats(0, 1), st.integers(1, 3))
def test_no_plan_is_ever_beyond_its_budget(chunks: int, workload: str, budget_nats: float, levels: int) -> None:
    plans = planner()
    losses = Losses(SET)
    context = CONTEXT._replace(workload=workload, budget_nats=budget_nats)
    decision, found = plans.plan_get(WHO, losses, [held(SET.profiles[0], levels)] * chunks, context, chunks)
    if decision.choice.arm.name != RECOMPUTE:
        lost = losses.of(SET.profiles[0], workload, 256 * chunks)
        assert lost[levels - 1 if found is None else found] <= budget_nats
    _, made = plans.plan_put(WHO, losses, chunks, context)
    assert made is None or losses.of(made, workload, 256 * chunks)[-1] <= budget_nats


def test_a_set_without_buckets_that_say_a_length_is_as_good_as_unmeasured() -> None:
    odd = parse_profiles(a_set(profiles=[profile(levels=[level(quality={"whatever": quality()})])]))
    assert Losses(odd).of(odd.profiles[0], "text", 512) == (math.inf,)
    assert Losses(ProfileSet(odd.measured, ())).profile(odd.profiles[0].id) is None


CONTEXT_JSON = {"chunk_bytes": 1 << 20, "chunk_tokens": 256}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("chunk_bytes", [0, -1, 1.5, math.nan, 1 << 60, "1", True]),
        ("chunk_tokens", [0, -1, math.inf, 1 << 40, [1]]),
        ("workload", ["", 7, "x" * 65, "a b", {}]),
        ("budget_nats", [-0.1, math.nan, math.inf, 1e9, "0.1", True]),
        ("deadline_s", [0, -1, math.nan, 1e9, "soon"]),
        ("prefill_s", [0, -1, math.nan, math.inf, -math.inf, 1e9, []]),
        ("reads", [0, -1, math.nan, 1e12, "often"]),
    ],
)
def test_a_context_is_refused_by_the_name_of_its_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=field):
            parse_context({**CONTEXT_JSON, field: value})
    without = {name: value for name, value in CONTEXT_JSON.items() if name != field}
    if without != CONTEXT_JSON:
        with pytest.raises(RequestError, match=field):
            parse_context(without)


@pytest.mark.parametrize(
    "value", [None, [], "x", 7, {**CONTEXT_JSON, "budget": 1}, {**CONTEXT_JSON, "chunk_tokens": {}}]
)
def test_what_is_no_context_is_refused(value: object) -> None:
    with pytest.raises(RequestError):
        parse_context(value)


@pytest.mark.parametrize("field", ["took_s", "size_bytes", "wire_s", "first_byte_s", "codec_s"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 1e300, "1", True, []])
def test_an_outcome_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        parse_outcome({"took_s": 1.0, field: value})


def test_contexts_outcomes_and_plans_come_back_from_their_json() -> None:
    context = CONTEXT._replace(workload="pages", deadline_s=0.5)
    assert parse_context(json.loads(json.dumps(context_json(context)))) == context
    outcome = Outcome(0.5, 100, codec_s=0.1)
    assert parse_outcome(json.loads(json.dumps(outcome_json(outcome)))) == outcome
    for plan in (
        Plan(Action.STATIC),
        Plan(Action.FETCH, "0" * 16, 1, "fine/1", 0.5, 0.1, 0.01, None, ("a" * 64,)),
        Plan(Action.PUT, "f" * 16, None, "fine", 0.5, 0.1, None, ({"stage": "raw"},)),
    ):
        assert parse_plan(json.loads(json.dumps(plan_json(plan)))) == plan


@pytest.mark.parametrize(
    "change",
    [{"action": "sing"}, {"level": 99}, {"level": "1"}, {"decision": "7"}, {"pipeline": []}, {"pipeline": [1]}],
)
def test_what_is_no_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, RequestError)):
        parse_plan({**plan_json(Plan(Action.STATIC)), **change})
