"""The index of a tier: pure, so everything about budgets and eviction is tested without a tier."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.backend import Held, Miss, Reason
from kvstore.backends.index import Index, shared_copy
from kvstore.backends.policies import Origin
from kvstore.errors import BackendFullError
from kvstore.keys import ChunkKey
from kvstore.testing import make_key

KEYS = [make_key(number) for number in range(40)]


def held(number: int) -> Held:
    return Held(bytes([number]) * 16, shared_copy("test", 64, (100,), 1, inexact=False))


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


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "read", "delete", "corrupt", "evict"]), st.integers(0, 11), st.integers(1, 60)),
    max_size=60,
)


@settings(max_examples=200)
@given(STEPS)
def test_the_parts_of_the_index_agree_after_every_step(steps: list[tuple[str, int, int]]) -> None:
    index = Index("test", 100)
    mirror: dict[ChunkKey, int] = {}
    for step, number, size_bytes in steps:
        key = KEYS[number]
        if step == "put":
            for gone, *_ in index.make_room({key: size_bytes}):
                del mirror[gone]
            index.add(key, held(number), size_bytes, Origin())
            mirror[key] = size_bytes
        elif step == "read":
            index.read(key)
        elif step == "evict":
            for gone, *_ in index.release(size_bytes):
                del mirror[gone]
        else:
            assert index.drop(key, Reason.ABSENT if step == "delete" else Reason.CORRUPT) == (key in mirror)
            mirror.pop(key, None)
        index.validate()
        assert {found for found, _ in index.scan(None)} == mirror.keys()
        assert index.used_bytes == sum(mirror.values())
