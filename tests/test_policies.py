"""What tiers share: history, pins, placement; and what the index is made of: forest, parking, warmth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import tiers_hits
from benchmarks.eviction import Lru, S3Fifo
from benchmarks.tiers_hits import BUDGET, SHRINK, aims, measure, read_profile
from benchmarks.traces import made_trace
from kvstore.backend import Held
from kvstore.backends.forest import Forest
from kvstore.backends.history import History, Past
from kvstore.backends.index import shared_copy
from kvstore.backends.parking import Parking
from kvstore.backends.policies import Load, Origin, Pins, StaticPlacement
from kvstore.backends.warmth import ATTENTION_TOKENS, Chunk, Warmth
from kvstore.keys import ChunkKey
from kvstore.testing import make_key

KEYS = [make_key(number) for number in range(12)]


def test_time_stands_still_while_cold_data_comes_in() -> None:
    history = History()
    for key in KEYS:
        history.enter(key)
    assert history.time == 0
    history.read(KEYS[0])
    assert (history.time, history.past(KEYS[0]), history.past(KEYS[1])) == (1, Past(1, 1), Past(0, 0))


def test_a_chunk_that_comes_back_was_asked_for_unless_another_tier_noted_that() -> None:
    history = History()
    history.enter(KEYS[0])
    history.enter(KEYS[0])
    assert history.reads(KEYS[0]) == 0, "the same put reaches two tiers"
    history.enter(KEYS[0], gone_at=0)
    assert history.past(KEYS[0]) == Past(1, 1)
    history.enter(KEYS[0], gone_at=0)
    assert history.reads(KEYS[0]) == 1, "the other tier let go of it before that, too"


def test_the_gap_follows_what_is_measured() -> None:
    history = History()
    for _ in range(1000):
        for key in KEYS[:10]:
            history.read(key)
    assert history.gap == pytest.approx(10, rel=0.01)


def test_history_is_bounded_and_forgets_the_oldest() -> None:
    history = History(chunks_max=3)
    for key in KEYS:
        history.read(key)
    history.follow(KEYS)
    assert [history.reads(key) for key in KEYS] == [0] * 9 + [1] * 3
    assert [history.parent(key) for key in KEYS] == [None] * 9 + KEYS[8:11]


def test_the_static_placement_grants_all_levels_while_there_is_room() -> None:
    held = Held(None, shared_copy("test", 64, (100, 100, 100), 3))
    placement = StaticPlacement(level=1)
    assert [placement(held, "test", Load(share, 0)) for share in (0.0, 1.0, 1.001)] == [2, 2, 1]


def test_pins_say_when_they_end() -> None:
    now_s = 5.0
    pins = Pins(lambda: now_s)
    pins.pin(KEYS[:1], ttl_s=10)
    pins.pin(KEYS[:1], ttl_s=1)
    assert (pins.until_s(KEYS[0]), pins.until_s(KEYS[1])) == (15.0, 0.0)
    before = pins.unpins
    pins.unpin(KEYS[:1])
    assert (KEYS[0] in pins, pins.unpins) == (False, before + 1)


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["park", "pin", "unpin", "leave", "wait"]), st.integers(0, 5), st.integers(1, 9)),
        max_size=40,
    )
)
def test_parked_chunks_are_given_back_when_their_pins_end(steps: list[tuple[str, int, int]]) -> None:
    now_s = 0.0
    pins = Pins(lambda: now_s)
    parking = Parking(pins)
    parked: set[ChunkKey] = set()
    for step, number, amount in steps:
        key = KEYS[number]
        if step == "pin":
            pins.pin([key], amount)
        elif step == "unpin":
            pins.unpin([key])
        elif step == "wait":
            now_s += amount
        elif step == "leave":
            parking.leave(key)
            parked.discard(key)
        elif key in pins:
            parking.park(key)
            parked.add(key)
        over = parking.take_unpinned()
        parking.validate()
        assert set(over) == {key for key in parked if key not in pins}
        parked -= set(over)
        assert set(parking) == parked
        first = parking.first()
        assert (first is None) == (not parked)
        assert first is None or pins.until_s(first) == min(map(pins.until_s, parked))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.none() | st.integers(0, 7)), max_size=40))
def test_the_forest_knows_leaves_and_orphans(steps: list[tuple[bool, int, int | None]]) -> None:
    forest = Forest()
    parents: dict[ChunkKey, ChunkKey | None] = {}
    for put, number, parent in steps:
        key = KEYS[number]
        if put:
            parents[key] = KEYS[parent] if parent not in (None, number) else None
            forest.put(key, None if parent is None else KEYS[parent])
        elif key in parents:
            before = parents.pop(key)
            freed = before if before in parents and before not in parents.values() else None
            assert forest.remove(key) == freed
        forest.validate()
        assert {key for key in KEYS if not forest.is_leaf(key)} == set(parents.values()) - {None}
        orphans = {key for key, before in parents.items() if before is not None and before not in parents}
        orphan = forest.orphan()
        assert orphan in orphans if orphans else orphan is None


def test_cost_grows_with_position_and_a_blob_is_worth_the_mean() -> None:
    near, far = Chunk(100, Origin(256, 0)), Chunk(100, Origin(256, ATTENTION_TOKENS))
    assert far.cost == 2 * near.cost
    history = History()
    warmth = Warmth(history)
    blob = Chunk(5, Origin())
    chunks = dict(zip(KEYS, (near, far, blob), strict=False))
    for chunk in chunks.values():
        warmth.count(chunk, 1)
    for _ in range(100):
        for key in chunks:
            history.read(key)
    for key, chunk in chunks.items():
        warmth.rank(key, chunk)
    warmth.validate(chunks)
    bonus = {key: chunk.rank[0] - chunk.asked_at for key, chunk in chunks.items()}
    assert bonus[KEYS[1]] == pytest.approx(2**0.5 * bonus[KEYS[0]])
    assert bonus[KEYS[0]] < bonus[KEYS[2]] < bonus[KEYS[1]]


def test_frequency_weighs_less_where_all_that_is_asked_for_again_is_held() -> None:
    history = History()
    warmth = Warmth(history)
    chunk = Chunk(100, Origin(256))
    warmth.count(chunk, 1)
    history.read(KEYS[0])
    warmth.rank(KEYS[0], chunk)
    before = chunk.rank
    for _ in range(10_000):
        warmth.note(missed=False)
    warmth.rank(KEYS[0], chunk)
    assert before[0] > 100
    assert chunk.rank[0] - chunk.asked_at < 1


@pytest.mark.parametrize("cache", [Lru, S3Fifo])
def test_the_policies_compared_with_shrink_before_they_evict(cache: type[Lru]) -> None:
    tested = cache(100, (5, 3, 2), 1)
    for key in KEYS[:10]:
        tested.put([key], 0)
    assert (tested.used_bytes, tested.evictions) == (100, 0)
    tested.read(KEYS[:1])
    tested.put(KEYS[10:11], 0)
    assert (tested.used_bytes, tested.evictions) == (100, 0)
    tested.put([make_key(number) for number in range(100, 200)], 0)
    assert (tested.used_bytes, tested.evictions) == (100, 91)


def test_the_lowest_level_within_the_quality_budget_is_found() -> None:
    profile = read_profile("ladder")
    assert profile.kl_nats[profile.budget_levels - 1] <= 0.01 < profile.kl_nats[0]
    assert len(profile.cut().level_bytes) == profile.budget_levels < len(profile.level_bytes)


def test_the_hits_benchmark_runs_and_counts_what_it_says() -> None:
    rows = measure(None, quick=True)
    assert len(rows) == 2 * 4 * 3
    lookups = sum(map(len, made_trace(tiers_hits._QUICK_SEED, tiers_hits._QUICK_REQUESTS)))
    for row in rows:
        assert row["lookups"] == lookups
        assert 0 < row["hits"] < lookups
        assert row["used_bytes"] <= row["capacity_bytes"]
    kl_nats = {
        (row["compression"], row["capacity_share"]): row["mean_kl_nats"] for row in rows if row["policy"] == "ours"
    }
    assert all(kl_nats[SHRINK, share] < kl_nats[BUDGET, share] for share in (0.02, 0.1))
    assert len(aims(rows)) == 5
