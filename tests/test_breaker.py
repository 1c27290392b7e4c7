"""The circuit breaker: a run of failures opens it, one probe at a time closes it, and it waits ever longer."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from kvstore.backends.breaker import Breaker, Permit


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(failures_max: int = 3) -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(failures_max=failures_max, cooldown_s=1.0, cooldown_max_s=5.0, clock=clock), clock


def admitted(breaker: Breaker) -> Permit:
    permit = breaker.admit()
    assert permit is not None
    return permit


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(admitted(breaker), "down")


def test_a_run_of_failures_opens_it_and_a_success_ends_the_run() -> None:
    breaker, _ = make()
    fail(breaker, 2)
    breaker.succeeded(admitted(breaker))
    fail(breaker, 2)
    assert breaker.closed
    fail(breaker)
    assert (breaker.closed, breaker.opened, breaker.reason) == (False, 1, "down")
    assert breaker.admit() is None


def test_one_probe_passes_after_the_cool_down_and_closes_it() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    clock.now_s += 0.6
    assert breaker.admit() is None
    assert abs(breaker.retry_after_s - 0.4) < 1e-9
    clock.now_s += 0.4
    probe = admitted(breaker)
    assert probe.probe
    assert breaker.admit() is None, "one probe at a time"
    breaker.succeeded(probe)
    assert (breaker.closed, breaker.reason) == (True, "")
    assert not admitted(breaker).probe


def test_a_probe_that_fails_doubles_the_cool_down_up_to_its_limit() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    waits_s = []
    for _ in range(5):
        waits_s.append(breaker.retry_after_s)
        clock.now_s += breaker.retry_after_s
        fail(breaker)
    assert waits_s == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert breaker.opened == 6


def test_a_probe_that_told_nothing_leaves_room_for_the_next() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    clock.now_s += 1
    breaker.unused(admitted(breaker))
    assert admitted(breaker).probe


def test_only_a_usual_success_ends_the_doubling() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    clock.now_s += 1
    breaker.succeeded(admitted(breaker))
    fail(breaker, 3)
    assert breaker.retry_after_s == 2.0, "the probe alone proves little"
    clock.now_s += 2
    breaker.succeeded(admitted(breaker))
    breaker.succeeded(admitted(breaker))
    fail(breaker, 3)
    assert breaker.retry_after_s == 1.0


def test_calls_from_before_it_opened_change_nothing() -> None:
    breaker, clock = make()
    late = [admitted(breaker) for _ in range(5)]
    fail(breaker, 3)
    breaker.succeeded(late[0])
    breaker.failed(late[1], "late")
    assert (breaker.closed, breaker.opened, breaker.retry_after_s) == (False, 1, 1.0)
    clock.now_s += 1
    breaker.succeeded(admitted(breaker))
    for permit in late[2:]:
        breaker.failed(permit, "late")
    assert breaker.closed


class BreakerMachine(RuleBasedStateMachine):
    """Calls that overlap at random: never two probes, never a refusal while closed, always a way back."""

    permits: Bundle[Permit] = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.clock = make()
        self.probes = 0

    @precondition(lambda self: self.breaker.closed or not self.breaker.retry_after_s)
    @rule(target=permits)
    def call(self) -> Permit:
        permit = self.breaker.admit()
        assert (permit is None) == (not self.breaker.closed and self.probes == 1)
        if permit is None:
            permit = Permit(False, -1)
        self.probes += permit.probe
        return permit

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(permit=consumes(permits), what=st.sampled_from(["succeeded", "failed", "unused"]))
    def end(self, permit: Permit, what: str) -> None:
        self.probes -= permit.probe
        if what == "failed":
            self.breaker.failed(permit, "down")
        else:
            getattr(self.breaker, what)(permit)

    @invariant()
    def holds(self) -> None:
        assert self.probes in (0, 1)
        assert 0 <= self.breaker.retry_after_s <= 5.0
        assert bool(self.breaker.reason) != self.breaker.closed


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
