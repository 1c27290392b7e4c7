"""The latency model: closed forms against the max-plus recursion, and against what anyone can work out by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.controller.latency import (
    FETCH,
    Link,
    Rates,
    Terms,
    Volume,
    closed_loop_s,
    compute_terms,
    fetch_terms,
    makespan_s,
    put_terms,
)

SECONDS = st.floats(0, 10)


@given(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), st.integers(1, 40))
def test_equal_chunks_take_what_the_recursion_says(stages: tuple[float, ...], chunks: int) -> None:
    terms = Terms(FETCH, (0.0, 0.0, 0.0), stages, chunks)
    per_chunk = [seconds / chunks for seconds in terms.stages]
    assert terms.pipeline_s == pytest.approx(makespan_s([per_chunk] * chunks))


@given(st.lists(st.lists(SECONDS, min_size=3, max_size=3), min_size=1, max_size=8))
def test_a_pipeline_takes_no_less_than_any_stage_and_no_more_than_all_of_them(times: list[list[float]]) -> None:
    found = makespan_s(times)
    assert found <= sum(map(sum, times)) + 1e-9
    assert found >= max(sum(stage) for stage in zip(*times, strict=True)) - 1e-9
    assert found >= max(map(sum, times)) - 1e-9


def test_two_chunks_by_hand() -> None:
    # Chunk 1 leaves the wire at 2 and the decoder at 5; chunk 2 leaves the wire at 3 and waits for the decoder.
    assert makespan_s([[2.0, 3.0], [1.0, 1.0]]) == 6.0
    assert makespan_s([]) == 0.0


def test_a_fetch_by_hand() -> None:
    volume = Volume(raw_bytes=8e9, coded_bytes=1e9, chunks=10)
    link = Link(bytes_per_s=1e9, rtt_s=0.01, queue_s=0.02)
    rates = Rates(read_bytes_per_s=2e9, read_rtt_s=0.03, device_bytes_per_s=10e9, decode_s_per_gb=0.05)
    terms = fetch_terms(volume, link, rates)
    assert terms.stages == (0.5, 1.0, 0.1, 0.4)
    assert terms.names.stages == ("read", "wire", "copy", "decode")
    assert terms.bottleneck == "wire"
    assert terms.first_chunk_s == pytest.approx(0.2)
    assert terms.pipeline_s == pytest.approx(0.2 + 9 * 0.1)
    assert terms.total_s == pytest.approx(0.06 + 1.1)
    report = terms.report()
    assert report["total_s"] == terms.total_s
    assert report["fixed_s"] == {"queue": 0.02, "rtt": 0.01, "tier": 0.03}


def test_a_put_waits_for_its_acknowledgement() -> None:
    volume = Volume(raw_bytes=2e9, coded_bytes=1e9, chunks=1)
    terms = put_terms(volume, Link(1e9, rtt_s=0.1), Rates(encode_s_per_gb=0.5, ack_s=0.2))
    # One chunk overlaps with nothing.
    assert terms.total_s == pytest.approx(0.1 + 0.2 + 1.0 + 1.0)


def test_computing_is_one_term() -> None:
    terms = compute_terms(3.0)
    assert (terms.total_s, terms.bottleneck) == (3.0, None)


def test_more_chunks_overlap_more() -> None:
    link, rates = Link(1e9), Rates(decode_s_per_gb=1.0)
    times = [fetch_terms(Volume(1e9, 1e9, chunks), link, rates).total_s for chunks in (1, 2, 8, 64)]
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(2.0)
    assert times[-1] == pytest.approx(1.0, rel=0.02)


def test_one_stage_may_be_slower() -> None:
    terms = fetch_terms(Volume(1e9, 1e9, 4), Link(1e9), Rates(decode_s_per_gb=0.5))
    slower = terms.slower("wire", 3.0)
    assert slower == fetch_terms(Volume(1e9, 1e9, 4), Link(1e9 / 3), Rates(decode_s_per_gb=0.5))
    assert (terms.stage_s("wire"), slower.stage_s("wire"), terms.stage_s("encode")) == (1.0, 3.0, 0.0)
    assert compute_terms(1.0).slower("wire", 3.0) == compute_terms(1.0)


def test_terms_come_back_from_their_json() -> None:
    for terms in (fetch_terms(Volume(1e9, 2e8, 4), Link(1e9, 0.1), Rates()), compute_terms(1.0)):
        assert Terms.of_report(json.loads(json.dumps(terms.report()))) == terms


def test_clients_of_one_link_wait_for_one_another() -> None:
    assert closed_loop_s(0, 1.0, 5.0) == 0.0
    assert closed_loop_s(1, 1.0, 5.0) == 1.0
    # The second one finds the first one there a sixth of the time.
    assert closed_loop_s(2, 1.0, 5.0) == pytest.approx(1 + 1 / 6)
    # A link that is never idle serves one after the other.
    assert closed_loop_s(50, 1.0, 5.0) == pytest.approx(50 - 5, rel=0.01)
    assert closed_loop_s(3, 1.0, 0.0) == pytest.approx(3.0)
    assert closed_loop_s(3, 0.0, 0.0) == 0.0
