"""The index of a tier: pure, so everything about budgets and eviction is tested without a tier."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.backend import Held, Miss, Reason
from kvstore.backends.index import Index, Move, copy_bytes, shared_copy, shortened
from kvstore.backends.policies import Load, Origin, Pins, Policies, StaticPlacement
from kvstore.errors import BackendFullError
from kvstore.keys import ChunkKey
from kvstore.testing import make_key

KEYS = [make_key(number) for number in range(40)]
LEVELS = shared_copy("test", 1, (4, 3, 2), 3)


def held(number: int) -> Held:
    return Held(bytes([number]) * 16, shared_copy("test", 64, (100,), 1, inexact=False))


def whole(number: int) -> Held:
    """A chunk of 10 bytes: levels up to 0, 1 and 2 take 5, 8 and 10."""
    return Held(bytes([number]) * 16, LEVELS)


def put(index: Index, number: int, origin: Origin = Origin()) -> list[tuple[int, int]]:  # noqa: B008 (immutable)
    """Put a chunk of three levels as a tier does: the chunks that moved, each with the levels left of it."""
    found = whole(number)
    found = shortened(found, index.placed(KEYS[number], found, copy_bytes(found.copy)))
    size_bytes = copy_bytes(found.copy)
    moves = index.make_room({KEYS[number]: size_bytes})
    index.add(KEYS[number], found, size_bytes, origin)
    index.validate()
    return [(KEYS.index(move.key), len(move.after.copy.level_bytes) if move.after else 0) for move in moves]


def in_prompt(number: int, first: int = 0) -> Origin:
    """Where chunk `number` stands in a prompt that starts with chunk `first`."""
    return Origin(256, 256 * (number - first), KEYS[number - 1] if number > first else None)


def numbers(index: Index) -> set[int]:
    return {KEYS.index(key) for key, _ in index.scan(None)}


def fill(index: Index, numbers: range, size_bytes: int = 10) -> list[ChunkKey]:
    """Add chunks, making room for each; the keys that had to go."""
    gone = []
    for number in numbers:
        gone += [key for key, *_ in index.make_room({KEYS[number]: size_bytes})]
        index.add(KEYS[number], held(number), size_bytes, Origin())
        index.validate()
    return gone


def test_chunks_that_were_read_survive_a_scan_over_cold_ones() -> None:
    index = Index("test", 100)
    fill(index, range(10))
    for key in KEYS[:4]:
        index.read(key)
    fill(index, range(10, 40))
    assert all(index.get(key) for key in KEYS[:4])


def test_the_oldest_unread_chunk_goes_first() -> None:
    index = Index("test", 100)
    assert fill(index, range(12)) == KEYS[:2]
    assert index.miss(KEYS[0]) == Miss(Reason.EVICTED)
    assert index.miss(KEYS[30]) == Miss(Reason.ABSENT)


def test_a_chunk_that_comes_back_soon_is_kept_longer() -> None:
    index = Index("test", 100)
    fill(index, range(11))
    fill(index, range(1))
    fill(index, range(11, 30))
    assert index.get(KEYS[0])


def test_nothing_is_given_up_for_what_never_fits() -> None:
    index = Index("test", 100)
    fill(index, range(10))
    with pytest.raises(BackendFullError, match="101 bytes"):
        index.make_room({KEYS[20]: 101})
    assert len(index) == 10


def test_a_chunk_that_grows_keeps_its_place_and_is_not_evicted_for_itself() -> None:
    index = Index("test", 100)
    fill(index, range(10))
    gone = [key for key, *_ in index.make_room({KEYS[0]: 60})]
    index.add(KEYS[0], held(0), 60, Origin())
    index.validate()
    assert gone == KEYS[1:6]


def test_eviction_ends_when_only_what_must_stay_is_left() -> None:
    index = Index("test", 100)
    fill(index, range(3))
    for key in KEYS[:3]:
        index.read(key)
    assert {key for key, *_ in index.release(1000, keep=KEYS[:1])} == set(KEYS[1:3])
    assert index.release(1000, keep=KEYS[:1]) == []


def test_match_tells_why_it_ends() -> None:
    index = Index("test", 100)
    fill(index, range(3))
    index.drop(KEYS[1], Reason.CORRUPT)
    assert index.match(KEYS[:3]) == ([held(0)], Miss(Reason.CORRUPT))
    assert index.match([]) == ([], None)


def test_chunks_of_one_shape_share_their_copy() -> None:
    one, two = held(1), held(2)
    assert one.copy is two.copy


def test_a_prompt_is_given_up_from_its_end() -> None:
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(2)))
    for number in range(10):
        put(index, number, in_prompt(number))
    assert [put(index, number) for number in (20, 21, 22)] == [[(9, 0)], [(8, 0)], [(7, 0)]]


def test_a_chunk_whose_parent_is_gone_goes_first_unless_it_comes_back() -> None:
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(2)))
    for number in range(3):
        put(index, number + 20)
    for number in range(7):
        put(index, number, in_prompt(number))
    for number in range(7):
        index.read(KEYS[number])
    index.drop(KEYS[4], Reason.CORRUPT)
    index.drop(KEYS[1], Reason.CORRUPT)
    put(index, 4, in_prompt(4))
    assert put(index, 30) == []
    assert put(index, 31) == [(2, 0)]
    assert put(index, 32) == [(3, 0)]
    put(index, 1, in_prompt(1))
    assert numbers(index) >= {0, 1, 5, 6}, "chunk 5 was an orphan only while chunk 4 was gone"


def test_what_cannot_be_used_without_its_parent_does_not_push_out_what_can() -> None:
    index = Index("test", 50, policies=Policies(placement=StaticPlacement(2)))
    for number in range(20):
        put(index, number, in_prompt(number))
    assert numbers(index) >= {0, 1, 2, 3}


def test_dear_chunks_stay_longer_than_cheap_ones_that_were_read_as_often() -> None:
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(2)))
    for number in range(10):
        put(index, number, Origin(256, 60_000 if number % 2 else 0, None))
    for number in reversed(range(10)):
        index.read(KEYS[number])
    assert {move.key for move in index.release(50)} == set(KEYS[0:10:2])


def test_levels_go_before_chunks_and_the_coldest_lose_theirs_first() -> None:
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(0)))
    for number in range(10):
        assert put(index, number) == []
    index.read(KEYS[0])
    assert [put(index, number) for number in range(10, 19)] == [[(number, 1)] for number in range(1, 10)]
    assert put(index, 19) == [(0, 1)]
    assert put(index, 20) == [(1, 0)], "only now that none has levels to lose"


def test_the_warmest_keep_their_levels_where_that_costs_next_to_nothing() -> None:
    index = Index("test", 2000, policies=Policies(placement=StaticPlacement(0)))
    keys = [make_key(number) for number in range(1000, 1600)]
    moved = []
    for number, key in enumerate(keys):
        size_bytes = copy_bytes(shortened(whole(0), index.placed(KEYS[0], whole(0), 10)).copy)
        moved += index.make_room({key: size_bytes})
        index.add(key, shortened(whole(0), 3 if size_bytes == 10 else 1), size_bytes, Origin())
        for hot in keys[: min(2, number)]:
            index.read(hot)
    index.validate()
    levels = {key: len(found.copy.level_bytes) for key, found in index.scan(None)}
    assert sum(moved_one.after is None for moved_one in moved) > 100
    assert sorted(key for key in levels if levels[key] == 3) == sorted(keys[:2]), "10 bytes are half a percent"


def test_a_placement_that_grants_all_levels_is_asked_for_each_chunk_only_a_few_times() -> None:
    asked = []

    def placement(found: Held, tier: str, load: Load) -> int:
        asked.append(found.frame_id)
        return 2

    index = Index("test", 100, policies=Policies(placement=placement))
    for number in range(40):
        put(index, number)
    assert len(asked) <= 4 * 40


def test_pinned_chunks_are_neither_shrunk_nor_evicted_while_there_is_anything_else() -> None:
    now_s = 0.0
    pins = Pins(lambda: now_s)
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(0), pins=pins))
    for number in range(3):
        put(index, number, in_prompt(number))
    pins.pin(KEYS[1:3], ttl_s=10)
    for number in range(10, 40):
        put(index, number)
    assert [len(index._held[key].copy.level_bytes) for key in KEYS[1:3]] == [3, 3]
    assert 0 not in numbers(index), "what is not pinned is not protected by what is"
    pins.unpin(KEYS[1:2])
    moved = index.release(1000)
    index.validate()
    assert [(move.key, move.after is None) for move in moved][-2:] == [(KEYS[2], False), (KEYS[2], True)]


def test_the_pin_that_ends_first_gives_way_when_only_pinned_chunks_are_left() -> None:
    pins = Pins(lambda: 0.0)
    index = Index("test", 30, policies=Policies(placement=StaticPlacement(2), pins=pins))
    for number, ttl_s in enumerate((30, 10, 20)):
        put(index, number)
        pins.pin([KEYS[number]], ttl_s)
    assert put(index, 3) == [(1, 0)]
    pins.pin([KEYS[2]], ttl_s=40)
    pins.pin([KEYS[3]], ttl_s=99)
    assert put(index, 4) == [(0, 0)]


def test_a_pin_that_has_ended_protects_no_longer() -> None:
    now_s = 0.0
    pins = Pins(lambda: now_s)
    index = Index("test", 30, policies=Policies(placement=StaticPlacement(2), pins=pins))
    for number in range(3):
        put(index, number)
    pins.pin(KEYS[:2], ttl_s=10)
    assert [put(index, number) for number in (3, 4)] == [[(2, 0)], [(3, 0)]]
    now_s = 11.0
    assert {moved for number in (5, 6, 7) for moved, _ in put(index, number)} >= {0, 1}


def test_reads_in_another_tier_keep_a_chunk_warm() -> None:
    policies = Policies(placement=StaticPlacement(2))
    upper, lower = (Index(name, 30, policies=policies) for name in ("upper", "lower"))
    for number in range(3):
        put(lower, number)
        put(upper, number)
    upper.read(KEYS[0])
    assert put(lower, 3) == [(1, 0)]
    assert policies.history.reads(KEYS[0]) == 1, "a put into two tiers is not a read"


def test_parents_that_go_round_in_a_circle_can_be_evicted() -> None:
    index = Index("test", 30, policies=Policies(placement=StaticPlacement(2)))
    for number in range(3):
        put(index, number, Origin(256, 256, KEYS[(number + 1) % 3]))
    assert len(put(index, 3)) == 1
    assert len(index.release(1000)) == 3


def test_queues_do_not_grow_with_reads() -> None:
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(2)))
    for number in range(10):
        put(index, number)
    for _ in range(100):
        for key in KEYS[:10]:
            index.read(key)
        moves = index.release(1)
        index.undo(moves)
        index.validate()
    assert len(index._leaves) <= 2 * 10 + 65


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "read", "delete", "corrupt", "evict", "undo", "pin", "unpin", "wait"]),
        st.integers(0, 11),
        st.integers(1, 60),
    ),
    max_size=60,
)
PROMPTS = [0, 0, 1, 2, 1, 4, 4, 6, None, None, 9, 10]
"""Number of the chunk before each; None for a blob."""


def origin_of(number: int) -> Origin:
    parent = PROMPTS[number]
    return Origin() if parent is None else Origin(256, 256 * number, KEYS[parent])


@settings(max_examples=200)
@given(STEPS, st.sampled_from([0, 1, 2]))
def test_the_parts_of_the_index_agree_after_every_step(steps: list[tuple[str, int, int]], level: int) -> None:
    now_s = 0.0
    pins = Pins(lambda: now_s)
    index = Index("test", 100, policies=Policies(placement=StaticPlacement(level), pins=pins))
    mirror: dict[ChunkKey, int] = {}

    def follow(moves: list[Move], keep: set[ChunkKey] | None = None) -> None:
        shrunk = set()
        for move in moves:
            assert move.before_bytes == mirror[move.key]
            assert move.key not in (keep or ())
            pinned_before = {key for key in mirror if key in pins}
            if move.key in pinned_before:
                assert mirror.keys() <= pinned_before | (keep or set()), "nothing else is left"
            if move.after is None:
                del mirror[move.key]
            else:
                assert move.key not in shrunk
                shrunk.add(move.key)
                mirror[move.key] -= copy_bytes(move.before.copy) - copy_bytes(move.after.copy)

    for step, number, amount in steps:
        key = KEYS[number]
        if step == "put":
            found = shortened(whole(number), amount % 3 + 1)
            size_bytes = copy_bytes(found.copy) + amount // 3
            follow(index.make_room({key: size_bytes}), {key})
            index.add(key, found, size_bytes, origin_of(number))
            mirror[key] = size_bytes
        elif step == "read":
            index.read(key)
        elif step == "evict":
            follow(index.release(amount))
        elif step == "undo":
            before = index.used_bytes, dict(index.scan(None))
            index.undo(index.release(amount))
            assert before == (index.used_bytes, dict(index.scan(None)))
        elif step == "pin":
            pins.pin([key], amount)
        elif step == "unpin":
            pins.unpin([key])
        elif step == "wait":
            now_s += amount
        else:
            assert index.drop(key, Reason.ABSENT if step == "delete" else Reason.CORRUPT) == (key in mirror)
            mirror.pop(key, None)
        index.validate()
        assert {found for found, _ in index.scan(None)} == mirror.keys()
        assert index.used_bytes == sum(mirror.values())
    follow(index.release(index.used_bytes))
    assert len(index) == 0
