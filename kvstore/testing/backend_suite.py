"""The conformance suite of `Backend`: what every implementation must do, and nothing that only one does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.backend import Ack, Backend, Miss, Outcome, Reason
from kvstore.errors import BackendFullError
from kvstore.frame import Frame
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.testing.frames import NAMESPACE, make_frame, make_key

KEYS = [make_key(number) for number in range(8)]
FRAMES = [make_frame(key) for key in KEYS]
OTHER = [make_frame(key, seed=1) for key in KEYS]
ITEMS = list(zip(KEYS, FRAMES, strict=True))

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 3), st.sampled_from([FRAMES, OTHER]), st.integers(1, 3)),
        st.tuples(st.just("trim"), st.integers(0, 3), st.integers(0, 2)),
        st.tuples(st.just("delete"), st.integers(0, 3)),
        st.tuples(st.just("get"), st.integers(0, 3), st.none() | st.integers(0, 4)),
        st.tuples(st.just("match")),
    ),
    max_size=25,
)


class BackendSuite:
    """Inherit it, override `open_backend`, and pytest runs it.

    Attributes:
        budget_bytes: The backend is opened with about this budget; it holds at most this much, whatever is put.
        bounded: Whether it has a budget at all; without one it gives nothing up and refuses nothing for its size.
        examples: Number of random histories that are tried.
    """

    budget_bytes = 4 << 20
    bounded = True
    examples = 40

    def open_backend(self) -> AbstractAsyncContextManager[Backend]:
        """A fresh, empty backend that is closed when the context ends."""
        raise NotImplementedError

    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        """The backend of one test."""
        async with self.open_backend() as backend:
            yield backend

    async def test_get_returns_what_was_put(self, backend: Backend) -> None:
        stored = await backend.put(ITEMS)
        assert [result.outcome for result in stored] == [Outcome.WRITTEN] * len(ITEMS)
        assert all(result.ack is not None and result.error is None for result in stored)
        assert [contents(frame) for frame in await backend.get(KEYS)] == [contents(frame) for frame in FRAMES]

    async def test_get_answers_in_the_order_of_the_keys(self, backend: Backend) -> None:
        await backend.put(ITEMS[:2])
        found = await backend.get([KEYS[1], KEYS[5], KEYS[0], KEYS[1]])
        assert [isinstance(answer, Frame) for answer in found] == [True, False, True, True]
        assert found[1] == Miss(Reason.ABSENT)
        assert [contents(found[0]), contents(found[2])] == [contents(FRAMES[1]), contents(FRAMES[0])]

    async def test_empty_batches_are_fine(self, backend: Backend) -> None:
        assert await backend.get([]) == []
        assert await backend.put([]) == []
        assert await backend.match([]) == ([], None)
        await backend.trim([], level=0)
        await backend.delete([])

    async def test_match_stops_at_the_first_gap(self, backend: Backend) -> None:
        await backend.put([ITEMS[0], ITEMS[1], ITEMS[3]])
        held, miss = await backend.match(KEYS)
        assert [one.copy.level_bytes for one in held] == [FRAMES[0].head.level_bytes] * 2
        assert [one.copy.levels for one in held] == [3, 3]
        assert all(one.frame_id in (frame.id, None) for one, frame in zip(held, FRAMES, strict=False))
        assert miss == Miss(Reason.ABSENT)

    async def test_match_of_all_keys_has_no_miss(self, backend: Backend) -> None:
        await backend.put(ITEMS)
        held, miss = await backend.match(KEYS)
        assert (len(held), miss) == (len(KEYS), None)

    @pytest.mark.parametrize("level", [0, 1, 2, 7])
    async def test_get_returns_the_levels_asked_for(self, backend: Backend, level: int) -> None:
        await backend.put(ITEMS)
        found = await backend.get(KEYS, level=level)
        assert [contents(frame) for frame in found] == [contents(frame.truncated(level)) for frame in FRAMES]

    async def test_a_second_put_changes_nothing_and_says_so(self, backend: Backend) -> None:
        await backend.put(ITEMS[:1])
        [same] = await backend.put(ITEMS[:1])
        [other] = await backend.put([(KEYS[0], OTHER[0])])
        [fewer] = await backend.put([(KEYS[0], FRAMES[0].truncated(0))])
        assert [same.outcome, other.outcome, fewer.outcome] == [Outcome.EXISTS, Outcome.OTHER, Outcome.EXISTS]
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])

    async def test_more_levels_of_the_same_frame_extend_it(self, backend: Backend) -> None:
        await backend.put([(KEYS[0], FRAMES[0].truncated(0))])
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0].truncated(0))
        [stored] = await backend.put(ITEMS[:1])
        assert stored.outcome is Outcome.EXTENDED
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])

    async def test_levels_of_another_frame_are_never_joined(self, backend: Backend) -> None:
        await backend.put([(KEYS[0], FRAMES[0].truncated(0))])
        [stored] = await backend.put([(KEYS[0], OTHER[0])])
        assert stored.outcome is Outcome.OTHER
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0].truncated(0))

    async def test_an_exact_frame_replaces_an_inexact_one_and_not_the_reverse(self, backend: Backend) -> None:
        inexact = make_frame(KEYS[0], (500, 500, 500), seed=2, behind=Behind(0, 0.1))
        await backend.put([(KEYS[0], inexact)])
        assert (await backend.match(KEYS[:1])).held[0].copy.inexact
        [replaced] = await backend.put(ITEMS[:1])
        [kept] = await backend.put([(KEYS[0], inexact)])
        assert [replaced.outcome, kept.outcome] == [Outcome.WRITTEN, Outcome.OTHER]
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])

    async def test_trim_drops_the_levels_above(self, backend: Backend) -> None:
        await backend.put(ITEMS[:2])
        await backend.trim([KEYS[0], KEYS[5]], level=1)
        found = await backend.get(KEYS[:2])
        assert [contents(frame) for frame in found] == [contents(FRAMES[0].truncated(1)), contents(FRAMES[1])]
        assert (await backend.match(KEYS[:1])).held[0].copy.level_bytes == FRAMES[0].head.level_bytes[:2]
        assert (await backend.put(ITEMS[:1]))[0].outcome is Outcome.EXTENDED
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])

    async def test_deleted_chunks_are_absent_and_can_come_back(self, backend: Backend) -> None:
        await backend.put(ITEMS[:2])
        await backend.delete([KEYS[0], KEYS[5]])
        assert (await backend.get(KEYS[:1]))[0] == Miss(Reason.ABSENT)
        assert (await backend.match(KEYS[:1])).miss == Miss(Reason.ABSENT)
        [stored] = await backend.put([(KEYS[0], OTHER[0])])
        assert stored.outcome is Outcome.WRITTEN
        assert [contents(frame) for frame in await backend.get(KEYS[:2])] == [contents(OTHER[0]), contents(FRAMES[1])]

    async def test_scan_lists_one_namespace(self, backend: Backend) -> None:
        foreign = make_key(0, namespace=b"\xff" * 16)
        await backend.put([*ITEMS, (foreign, make_frame(foreign))])
        found = {key: held async for key, held in backend.scan(NAMESPACE)}
        assert found.keys() == set(KEYS)
        assert found[KEYS[0]].copy.level_bytes == FRAMES[0].head.level_bytes

    async def test_namespaces_are_apart(self, backend: Backend) -> None:
        foreign = make_key(0, namespace=b"\xff" * 16)
        await backend.put(ITEMS[:1])
        assert (await backend.get([foreign]))[0] == Miss(Reason.ABSENT)
        await backend.delete([foreign])
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(FRAMES[0])

    async def test_old_chunks_make_room_for_new_ones(self, backend: Backend) -> None:
        keys = [make_key(number) for number in range(100, 150)]
        each_bytes = self.budget_bytes // 10
        for key in keys:
            # Waiting for the disk, where there is one, keeps a bounded queue from refusing.
            [stored] = await backend.put([(key, make_frame(key, (each_bytes,)))], ack=Ack.DISK)
            assert stored.outcome is Outcome.WRITTEN
        held = {key: one async for key, one in backend.scan(NAMESPACE)}
        assert keys[-1] in held
        gone = [answer for answer in await backend.get(keys) if isinstance(answer, Miss)]
        if not self.bounded:
            assert (set(held), len(gone)) == (set(keys), 0)
            return
        assert 3 * each_bytes <= sum(sum(one.copy.level_bytes) for one in held.values()) <= self.budget_bytes
        assert gone
        assert {miss.reason for miss in gone} <= {Reason.EVICTED, Reason.ABSENT}

    async def test_a_frame_that_never_fits_is_refused_and_nothing_else_is_lost(self, backend: Backend) -> None:
        await backend.put(ITEMS)
        large = make_key(99)
        [stored] = await backend.put([(large, make_frame(large, (2 * self.budget_bytes,)))])
        assert stored.outcome is (Outcome.FAILED if self.bounded else Outcome.WRITTEN)
        assert isinstance(stored.error, BackendFullError) == self.bounded
        assert [contents(frame) for frame in await backend.get(KEYS)] == [contents(frame) for frame in FRAMES]

    async def test_what_was_read_stays_whole_when_it_is_deleted(self, backend: Backend) -> None:
        await backend.put(ITEMS)
        found = await backend.get(KEYS)
        await backend.delete(KEYS)
        await backend.put([(key, frame) for key, frame in zip(KEYS, OTHER, strict=True)])
        assert [contents(frame) for frame in found] == [contents(frame) for frame in FRAMES]

    async def test_of_racing_puts_one_wins_and_readers_see_whole_frames(self, backend: Backend) -> None:
        racing = asyncio.gather(*(backend.put([(KEYS[0], make_frame(KEYS[0], seed=seed))]) for seed in range(6)))
        reading = asyncio.gather(*(backend.get(KEYS[:1]) for _ in range(6)))
        outcomes = [stored[0].outcome for stored in await racing]
        assert sorted(outcomes) == [Outcome.OTHER] * 5 + [Outcome.WRITTEN]
        winner = make_frame(KEYS[0], seed=outcomes.index(Outcome.WRITTEN))
        assert contents((await backend.get(KEYS[:1]))[0]) == contents(winner)
        assert {contents(found[0]) for found in await reading} <= {"absent", contents(winner)}

    async def test_closing_twice_is_fine(self, backend: Backend) -> None:
        await backend.put(ITEMS)
        await backend.aclose()
        await backend.aclose()

    def test_it_behaves_like_a_dictionary(self) -> None:
        @given(OPERATIONS)
        @settings(max_examples=self.examples, deadline=None, suppress_health_check=list(HealthCheck))
        def check(operations: list[tuple[object, ...]]) -> None:
            asyncio.run(self._follow(operations))

        check()

    async def _follow(self, operations: list[tuple[object, ...]]) -> None:
        """Do the same to the backend and to a dictionary, and compare."""
        model: dict[ChunkKey, Frame] = {}
        async with self.open_backend() as backend:
            for operation in operations:
                match operation:
                    case ("put", int(n), list(frames), int(levels)):
                        frame: Frame = frames[n].truncated(levels - 1)
                        [stored] = await backend.put([(KEYS[n], frame)])
                        assert stored.outcome is _put_into(model, KEYS[n], frame)
                    case ("trim", int(n), int(level)):
                        await backend.trim([KEYS[n]], level=level)
                        if KEYS[n] in model:
                            model[KEYS[n]] = model[KEYS[n]].truncated(level)
                    case ("delete", int(n)):
                        await backend.delete([KEYS[n]])
                        model.pop(KEYS[n], None)
                    case ("get", int(n), (int() | None) as wanted):
                        [found] = await backend.get([KEYS[n]], level=wanted)
                        expected = model.get(KEYS[n])
                        assert contents(found) == (
                            "absent" if expected is None else contents(expected.truncated(wanted))
                        )
                    case _:
                        held, _ = await backend.match(KEYS)
                        run = next((n for n, key in enumerate(KEYS) if key not in model), len(KEYS))
                        assert [len(one.copy.level_bytes) for one in held] == [model[key].levels for key in KEYS[:run]]


def contents(answer: Frame | Miss) -> str:
    """The bytes of a frame as text, or the reason of a miss: what tests compare."""
    if isinstance(answer, Miss):
        return answer.reason.value
    return b"".join(bytes(view) for view in answer.buffers()).hex()


def _put_into(model: dict[ChunkKey, Frame], key: ChunkKey, frame: Frame) -> Outcome:
    held = model.get(key)
    if held is None:
        model[key] = frame
        return Outcome.WRITTEN
    if held.id != frame.id:
        return Outcome.OTHER
    if held.levels >= frame.levels:
        return Outcome.EXISTS
    model[key] = frame
    return Outcome.EXTENDED
