"""What the vLLM connector fetches and what it leaves to the engine: estimates, hopeless prefixes, levels by request."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.engines import KVSTORE, LMCACHE, RECOMPUTE, Point, Samples, report_rows
from benchmarks.vllm_engine import engine_python
from kvstore.connectors.background import codec_threads
from kvstore.connectors.guard import Guard, StepTimes
from kvstore.connectors.paged import KL_UNKNOWN_NATS
from kvstore.connectors.vllm_requests import LossyBlocks
from kvstore.header import Behind
from tests.conftest import Server
from tests.test_vllm_connector import engine, prompt, serve
from tests.vllm_runner import Engine, Request
from tests.vllm_stub import installed


@pytest.fixture(scope="module")
def connector() -> Iterator[Any]:
    with installed() as module:
        yield module


def test_step_times_lie_on_lines_between_what_was_seen() -> None:
    steps = StepTimes()
    assert steps.seconds(100) == 0.0
    steps.observe(1000, 0.2)
    assert steps.seconds(500) == pytest.approx(0.1), "in proportion below the only one"
    steps.observe(100, 0.05)
    assert steps.seconds(550) == pytest.approx(0.125)
    assert steps.seconds(2000) == pytest.approx(0.2 + 1000 * 0.15 / 900), "and beyond the largest"
    assert steps.seconds(20) == pytest.approx(0.01)


def test_a_first_step_that_took_long_does_not_make_the_engine_fetch_for_ever() -> None:
    steps = StepTimes()
    steps.observe(300, 2.0)
    steps.observe(550, 0.045)
    assert steps.seconds(300) <= 0.045, "a smaller step takes no longer than a larger one"
    steps.observe(2000, 5.0)
    assert steps.seconds(2000) <= 0.045 * (2000 / 550) ** 2, "nor much more than in proportion"


def test_what_was_computed_while_the_machine_was_busy_is_computed_again() -> None:
    guard = Guard(bytes_per_s=12.5e6)
    guard.observe_step(32, 0.012)
    for tokens in (300, 550, 1050, 2000):
        # Three times what it takes; nothing else is known, so every fetch seems to be worth it.
        guard.observe_step(tokens, 3 * tokens / 10_000)
    fetched = 0
    for _ in range(20):
        if guard.worth(512, 1_575_000, 32):
            fetched += 1
        else:
            guard.observe_step(544, 0.0544)
    assert fetched == 4, "one look after four fetches, and it is believed"


def test_where_fetching_is_right_it_is_looked_at_less_and_less() -> None:
    guard = Guard(bytes_per_s=125e6)
    guard.observe_step(32, 0.003)
    guard.observe_step(544, 0.2)
    looked = []
    for number in range(400):
        if not guard.worth(512, 1_575_000, 32):
            looked.append(number)
            guard.observe_step(544, 0.2)
    assert looked[:4] == [4, 13, 30, 63]
    assert all(later - earlier == 65 for earlier, later in itertools.pairwise(looked[4:]))
    # What is nearly for nothing is fetched without a look.
    assert all(guard.worth(512, 1000, 32) for _ in range(200))


def test_what_was_never_computed_is_computed_where_that_may_be_faster() -> None:
    guard = Guard(bytes_per_s=12.5e6)
    guard.observe_step(32, 0.012)
    # 512 tokens take 0.126 s to fetch: sixteen times the one step known would be slower, but part of it is fixed.
    assert not guard.worth(512, 1_575_000, 32)
    guard.observe_probe(1 << 20, 0.002)
    assert guard.worth(512, 1_575_000, 32)


def test_a_slow_step_is_believed_less_than_a_fast_one() -> None:
    steps = StepTimes()
    steps.observe(1000, 1.0)
    steps.observe(1000, 2.0)
    assert steps.seconds(1000) < 1.2
    for _ in range(20):
        steps.observe(1000, 0.5)
    assert steps.seconds(1000) == pytest.approx(0.5, rel=0.02)


def test_what_is_computed_in_any_case_is_no_gain() -> None:
    guard = Guard(bytes_per_s=1e6, latency_s=0.0, floor_s=0.0, margin=0.1)
    guard.observe_step(100, 0.1)
    guard.observe_step(1100, 0.2)
    # 1,000 tokens save 0.1 s, and a tenth of that is kept as a margin.
    assert not guard.hopeless(1000, 89_000, 100)
    assert guard.hopeless(1000, 91_000, 100)


def test_a_stalled_fetch_weighs_and_a_probe_forgives() -> None:
    guard = Guard(bytes_per_s=1e9, latency_s=0.0, explore=0)
    guard.prefill_tokens_per_s = 1000.0
    guard.observe_fetch(0, 10.0, tokens=0, arrived_s=10.0, whole=False)
    assert not any(guard.worth(1000, 10**6) for _ in range(200)), "without exploring it stays refused"
    guard.observe_probe(10**6, 0.01)
    assert guard.worth(1000, 10**6)


def test_arrival_and_decoding_are_told_apart() -> None:
    guard = Guard(latency_s=0.0)
    for _ in range(50):
        guard.observe_fetch(10**6, 0.3, tokens=1000, arrived_s=0.1)
    assert guard.fetch_s(10**6) == pytest.approx(0.1, rel=0.01)
    assert guard.fetch_s(10**5, 1000) == pytest.approx(0.21, rel=0.01), "a tenth of the bytes decodes as long"


async def _scouted(started: Engine) -> None:
    """Wait until what is learned behind a request is there."""
    scout = started.scheduler._scheduler._scout
    while scout._under_way is not None and not scout._under_way.done():
        await asyncio.sleep(0.005)


async def test_a_hopeless_prefix_is_not_looked_up_nor_stored_again(connector: Any, server: Server) -> None:
    ids = prompt(60, 40)
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", ids))
    async with engine(connector, server.url, guard=True, settings={"caching": False}) as second:
        await _assert_left(second, ids)


async def _assert_left(second: Engine, ids: list[int]) -> None:
    side = second.scheduler._scheduler
    side._guard.bytes_per_s, side._guard.prefill_tokens_per_s = 1.0, 1e6
    side._guard.observe_probe = lambda *_: None
    counts = await serve(second, Request("a", ids))
    assert (counts["queries"], counts["refused_tokens"]) == (1, 32), "nothing is known of the size yet"
    await _scouted(second)
    counts = await serve(second, Request("b", ids))
    assert counts["unasked_requests"] == 1
    assert not {"queries", "loads", "saved_tokens", "save_exists"} & counts.keys()
    assert second.computed_tokens == 80


async def test_a_link_that_became_faster_is_found_out(connector: Any, server: Server) -> None:
    ids = prompt(61, 40)
    async with engine(connector, server.url) as first:
        await serve(first, Request("a", ids))
    async with engine(connector, server.url, guard=True, settings={"caching": False}) as second:
        guard = second.scheduler._scheduler._guard
        guard.bytes_per_s, guard.prefill_tokens_per_s, guard.floor_s = 1.0, 1e6, 5.0
        assert (await serve(second, Request("a", ids)))["refused_tokens"] == 32
        await _scouted(second)
        assert (await serve(second, Request("b", ids)))["loaded_tokens"] == 32


async def test_a_request_names_its_level(connector: Any, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    ids = prompt(62, 40)
    found = {}
    async with engine(connector, server.url, pipeline="ladder-packed") as first:
        await serve(first, Request("a", ids))
    for name, asked in (("all", {}), ("0", {"level": 0}), ("1", {"level": 1}), ("bad", {"level": "high"})):
        async with engine(connector, server.url, pipeline="ladder-packed", settings={"exact": False}) as second:
            request = Request(name, ids)
            request.kv_transfer_params = {"kvstore": asked}
            counts = await serve(second, request)
            assert counts["lossy_tokens"] == counts["loaded_tokens"] == 32
            found[name] = counts["loaded_bytes"]
    assert found["0"] < found["1"] < found["all"] == found["bad"]
    assert "kvstore.level cannot be 'high'" in caplog.text


def _samples(recompute_s: float, kvstore_s: float, lmcache_s: float) -> dict[Any, Samples]:
    times = {RECOMPUTE: recompute_s, KVSTORE: kvstore_s, LMCACHE: lmcache_s}
    return {Point(1.0, 256, method): Samples([took_s] * 3, [256] * 3, [10] * 3) for method, took_s in times.items()}


@pytest.mark.parametrize(
    ("times", "met"),
    [((1.0, 1.02, 1.1), (True, False)), ((1.0, 0.5, 0.6), (True, True)), ((1.0, 1.03, 0.9), (False, False))],
)
def test_the_engines_aims_are_computed_from_medians(times: tuple[float, ...], met: tuple[bool, bool]) -> None:
    rows, aims = report_rows(_samples(*times), {"other": "more"}, 0)
    assert [aim.met for aim in aims] == list(met)
    assert {row["table"] for row in rows} == {"ttft", "ratio", "missing"}


def test_without_vllm_there_is_no_interpreter(tmp_path: Any) -> None:
    assert engine_python(tmp_path) is None


def test_blocks_that_were_forgotten_are_taken_for_lossy() -> None:
    blocks = LossyBlocks(blocks_max=2)
    blocks.add([b"a", b"b"], Behind(1, 0.5))
    assert blocks.worst([b"x"]) is None
    assert blocks.worst([b"x", b"a"]) == Behind(1, 0.5)
    blocks.add([b"c"], Behind(2, 0.1))
    assert blocks.worst([b"x"]) == Behind(0, KL_UNKNOWN_NATS)
    assert blocks.worst([]) is None
    blocks.clear()
    assert blocks.worst([b"a"]) is None


def test_codec_threads_compute_on_one_core_whatever_an_engine_made_of_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    before = torch.get_num_threads()
    with codec_threads(1, "codec") as threads:
        assert threads.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before
