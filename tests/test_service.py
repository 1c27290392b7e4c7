"""What benchmarks.service makes of its samples, and the policy that it compares kvstore's with."""

import pickle
from pathlib import Path

import pytest

from benchmarks.harness import write_result
from benchmarks.kvserve_server import Published
from benchmarks.report import main as report
from benchmarks.service_hosts import ADAPTIVE, ARMS, KVSERVE, RECOMPUTE, UNCOMPRESSED
from benchmarks.service_profiles import Chunks, Sets
from benchmarks.service_rows import APART, REMOTE, Point, Samples, report_rows
from kvstore.controller.controller import Controller
from kvstore.controller.losses import Losses
from kvstore.controller.planner import Planner, Who
from kvstore.controller.policy import EXACT
from kvstore.plan import Context
from kvstore.profile import ProfileSet, parse_profiles
from tests.test_profiles import a_set, level, profile, quality

WHO = Who("", "10.0.0.1/a")
CHUNK_BYTES = 1 << 20
CONTEXT = Context(chunk_bytes=CHUNK_BYTES, chunk_tokens=256)


def measured(name: str, ratio: float, codec_s_per_gb: float, kl_nats: float = 0.005) -> dict[str, object]:
    found = level(ratio=ratio, decode_s_per_gb=codec_s_per_gb, quality={"text-256": quality(kl_nats=kl_nats)})
    stages = [{"stage": name}, {"stage": "raw"}]
    return profile(name=name, pipeline=stages, encode_s_per_gb=codec_s_per_gb, levels=[found])


SET = parse_profiles(a_set(profiles=[measured("mean", 2, 1.0), measured("hadamard", 8, 20.0)]))
NONE = ProfileSet(SET.measured, ())
SETS = Sets(SET, ProfileSet(SET.measured, SET.profiles[:1]), NONE, (), Chunks("m", "00" * 16, CHUNK_BYTES, 256))


def samples(adaptive_s: float) -> dict[Point, Samples]:
    found = {}
    for setting in (REMOTE, APART):
        for number, arm in enumerate((UNCOMPRESSED, KVSERVE, ADAPTIVE)):
            took_s = adaptive_s if arm is ADAPTIVE else 0.3 - 0.1 * number
            one = found[Point(setting, 0.1, arm)] = Samples()
            for noise in (0.0, 0.01, 0.02):
                answer = {"first_s": took_s + noise, "jct_s": 2 * took_s + noise, "cached": 256, "link_bytes": 1000}
                one.add(384, answer | {"used": ["put mean", "mean/0"]})
    found[Point(REMOTE, 0.1, RECOMPUTE)] = Samples([384] * 3, [0.1] * 3, [0.2] * 3, [0] * 3, [0] * 3, ["recompute"] * 3)
    return found


@pytest.mark.parametrize(("adaptive_s", "first"), [(0.15, 4), (0.25, 0)])
def test_adaptive_is_compared_with_the_fastest_other_arm(adaptive_s: float, first: int) -> None:
    rows, aims = report_rows(samples(adaptive_s), SETS, seed=0)
    assert aims[0].value == first
    assert [aim.met for aim in aims] == [bool(first)] * 2
    firsts = [row for row in rows if row["table"] == "first"]
    assert {row["other"] for row in firsts} == {"kvserve"}
    [found] = [row for row in rows if row.get("arm") == "adaptive" and row["setting"] == REMOTE]
    assert found["ttft_of_uncompressed"] == pytest.approx(0.31 / (adaptive_s + 0.01))
    assert found["used"] == "mean/0 3"
    assert found["loss_nats"] == pytest.approx(0.005 + quality()["standard_error"])
    [computed] = [row for row in rows if row.get("arm") == "recompute"]
    assert "ttft_of_uncompressed" in computed


def test_the_page_shows_every_arm(tmp_path: Path) -> None:
    rows, aims = report_rows(samples(0.15), SETS, seed=0)
    write_result("service", rows, aims, 0, out=tmp_path / "service.json")
    report(["--results", str(tmp_path), "--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "plots" / "service.png").stat().st_size > 0
    assert all(f"| {arm.name} |" in page for arm in (UNCOMPRESSED, KVSERVE, ADAPTIVE, RECOMPUTE))


def test_sets_travel_between_processes() -> None:
    assert pickle.loads(pickle.dumps(SETS)) == SETS


def test_arms_are_told_apart_by_name() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS)


def kvserve(tmp_path: Path, gbit_per_s: float) -> tuple[Planner, Published]:
    rate = tmp_path / "rate"
    rate.write_text(f"{gbit_per_s:g}")
    policy = Published(SET, rate, CHUNK_BYTES, seed=1)
    now_s = iter(range(0, 10_000, 100))
    return Planner(Controller(lambda: float(next(now_s)), policy=policy, explores=False)), policy


@pytest.mark.parametrize(("gbit_per_s", "expected"), [(0.05, "hadamard"), (1.0, "mean"), (100.0, EXACT)])
def test_kvserve_chooses_by_the_rate_that_it_is_told(tmp_path: Path, gbit_per_s: float, expected: str) -> None:
    plans, _ = kvserve(tmp_path, gbit_per_s)
    found = [plans.plan_put(WHO, Losses(SET), 4, CONTEXT)[0].choice.arm.name for _ in range(40)]
    # One time in ten it tries another one near it.
    assert found.count(expected) > 30


def test_kvserve_corrects_itself_by_the_put_and_the_fetch(tmp_path: Path) -> None:
    _, policy = kvserve(tmp_path, 1.0)
    moment = policy._moment(4)
    before_s = policy._theirs.expected_s("mean", moment)
    plans = Planner(Controller(lambda: 0.0, policy=policy, explores=False))
    decision, _ = plans.plan_put(WHO, Losses(SET), 4, CONTEXT)
    for arm, took_s in (("mean", 0.5), ("mean/0", 0.3)):
        pending = plans.controller._tenants[""].pending[decision.id]._replace(arm=arm)
        policy.learn(pending, took_s)
    found_s = policy._theirs.expected_s("mean", moment)
    assert found_s == pytest.approx(before_s + 0.2 * (0.8 - before_s))
