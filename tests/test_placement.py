"""The learned placement: which levels it keeps, what it learns from fetches, and that a stack and a server feed it."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.backend import Copy, Held
from kvstore.backends.history import History
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Fetched, FetchedChunk, Load, Policies, StaticPlacement, TierRead
from kvstore.config import ServerConfig
from kvstore.controller.placement import LearnedPlacement
from kvstore.errors import ConfigError
from kvstore.frame import Frame, parse_frame
from kvstore.header import profile_id
from kvstore.keys import ChunkKey
from kvstore.profile import ProfileSet, parse_profiles, profiles_json
from kvstore.testing import make_frame, make_key
from kvstore.tiers import TieredBackend
from tests.conftest import FRAME, Server, Start, path_of
from tests.frames import frame_bytes
from tests.test_profiles import NAMESPACE, a_set, level, profile, quality

TIERS = ("host", "lmdb", "s3")
PIPELINE = ({"stage": "test"},)
PROFILE = profile_id(PIPELINE)
LEVEL_BYTES = (400, 300, 200)


def pushed(losses: Sequence[float] = (0.05, 0.005, 0.0005)) -> ProfileSet:
    """A set with one profile, of the frames that `make_frame` makes."""
    ratios = [10.0 / (size + 1) for size in range(len(losses))]
    levels = [
        level(ratio=ratio, quality={"text-512": quality(kl_nats=loss)})
        for ratio, loss in zip(ratios, losses, strict=True)
    ]
    return parse_profiles(a_set(profiles=[profile(pipeline=list(PIPELINE), levels=levels)]))


def learned(tiers: Sequence[str] = TIERS) -> LearnedPlacement:
    placement = LearnedPlacement(tiers, Random(1), fallback=StaticPlacement(0))
    placement.know(b"n", pushed())
    return placement


def held(levels: int = 3, of: int = 3, profile: bytes = PROFILE) -> Held:
    return Held(None, Copy("host", 64, LEVEL_BYTES[:levels], of, profile=profile))


def fetches(level: int, count: int = 600, *, tier: str = "s3", asked: int | None = None, reads: int = 1) -> Fetched:
    return Fetched([FetchedChunk(PROFILE, level, asked, tier, reads)] * count, [])


def pressed(asked: int | None = None, reads: int = 1, again: float = 0.5, lost: float = 0.4) -> Load:
    return Load(1.1, reads, asked, again, lost)


def test_while_there_is_room_all_levels_stay() -> None:
    assert learned()(held(), "host", Load(1.0, 0)) == 2


def test_levels_that_nobody_asks_for_go_first_and_the_one_within_the_budget_stays() -> None:
    placement = learned()
    placement.fetched(fetches(1))
    assert placement(held(), "host", pressed()) == 1
    placement.fetched(fetches(0))
    assert placement(held(), "host", pressed()) == 1, "level 0 is beyond the quality budget"


def test_levels_that_are_asked_for_stay() -> None:
    placement = learned()
    placement.fetched(fetches(2))
    assert [placement(held(), tier, pressed()) for tier in ("host", "lmdb")] == [2, 2]


def test_chunks_are_told_apart_by_what_was_asked_of_them() -> None:
    placement = learned()
    for _ in range(3):
        placement.fetched(fetches(1, asked=1))
        placement.fetched(fetches(2, asked=2))
    assert [placement(held(), "host", pressed(asked)) for asked in (1, 2)] == [1, 2]


def test_what_follows_changes_the_choice() -> None:
    placement = learned()
    placement.fetched(fetches(1, 2000))
    assert placement(held(), "host", pressed()) == 1
    placement.fetched(fetches(2, 8000))
    assert placement(held(), "host", pressed()) == 2


def test_a_tier_that_saves_no_time_keeps_no_more_than_it_must() -> None:
    placement = learned(("host", "s3"))
    slow = TierRead("host", 1 << 30, 60.0)
    placement.fetched(fetches(2))
    placement.fetched(Fetched([], [slow] * 400))
    assert placement(held(), "host", pressed()) == 1


@pytest.mark.parametrize(
    "other", [held(profile=bytes(8)), held(levels=2, of=2), Held(None, Copy("host", 64, (400, 300), 2, lossless=True))]
)
def test_what_no_set_describes_is_left_to_the_static_rule(other: Held) -> None:
    assert learned()(other, "host", pressed()) == 0


def test_a_profile_without_a_choice_is_left_to_the_static_rule() -> None:
    placement = learned()
    placement.know(b"n", pushed((0.5, 0.4, 0.3)))
    assert not placement.knows(PROFILE), "no level is within the budget"
    placement.know(b"n", None)
    placement.know(b"m", pushed())
    assert placement.knows(PROFILE)
    placement.know(b"m", None)
    assert placement(held(), "host", pressed()) == 0


def test_of_two_sets_the_higher_floor_counts() -> None:
    placement = learned()
    placement.fetched(fetches(1))
    placement.know(b"m", pushed((0.5, 0.05, 0.005)))
    assert placement(held(), "host", pressed()) == 2
    placement.know(b"m", None)
    placement.fetched(fetches(1))
    assert placement(held(), "host", pressed()) == 1


chunks = st.builds(
    FetchedChunk,
    st.sampled_from([PROFILE, bytes(8)]),
    st.integers(0, 15),
    st.none() | st.integers(0, 15),
    st.sampled_from([*TIERS, "", "elsewhere"]),
    st.integers(0, 1 << 40),
)
reads = st.builds(TierRead, st.sampled_from([*TIERS, "elsewhere"]), st.integers(0, 1 << 50), st.floats(0, 1e6))
loads = st.builds(
    Load, st.floats(0, 4), st.integers(0, 1 << 40), st.none() | st.integers(0, 15), st.floats(0, 1), st.floats(0, 1)
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 0.02), min_size=3, max_size=3),
    st.lists(st.builds(Fetched, st.lists(chunks, max_size=8), st.lists(reads, max_size=3)), max_size=4),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(TIERS), loads), min_size=1, max_size=4),
)
def test_a_level_that_is_held_and_within_the_budget_is_kept(
    losses: list[float], lessons: list[Fetched], asked: list[tuple[int, str, Load]]
) -> None:
    placement = LearnedPlacement(TIERS, Random(0), fallback=StaticPlacement(2))
    placement.know(b"n", pushed(losses))
    floor = next((n for n, loss in enumerate(losses) if loss <= 0.01), 0)
    for lesson in lessons:
        placement.fetched(lesson)
    for levels, tier, load in asked:
        kept = min(placement(held(levels), tier, load), levels - 1)
        assert min(floor, levels - 1) <= kept < levels


def test_history_knows_what_was_asked_and_hands_it_on_to_what_follows() -> None:
    history, keys = History(), [make_key(number) for number in range(4)]
    history.ask(keys[0], 2)
    history.follow(keys[:3])
    assert [history.asked(key) for key in keys] == [2, 2, 2, None]
    history.ask(keys[1], 1)
    history.follow(keys[:3])
    assert history.asked(keys[1]) == 1, "it was asked for itself"


def test_history_knows_how_many_are_read_again() -> None:
    history = History()
    assert history.again(0) == 0.5
    for number in range(4000):
        key = ChunkKey(number.to_bytes(48, "big"))
        history.enter(key)
        if number % 4 == 0:
            history.read(key)
    assert history.again(0) == pytest.approx(0.25, abs=0.03)
    assert history.again(1) < 0.15


def parsed(number: int) -> tuple[ChunkKey, Frame]:
    """A frame as it comes over a wire, which says what made it."""
    key = make_key(number)
    return key, parse_frame(frame_bytes(make_frame(key, (4000, 3000, 2000))))


async def test_a_stack_learns_from_what_is_fetched_under_pressure(tmp_path: Path) -> None:
    placement = LearnedPlacement(("host", "lmdb"), Random(0), fallback=StaticPlacement(0))
    placement.know(b"n", pushed())
    policies = Policies(placement=placement, learners=[placement.fetched])
    host = HostBackend(90_000, policies=policies)
    disk = await LmdbBackend.open(tmp_path, 4 << 20, policies=policies)
    stack = TieredBackend([host, disk], policies=policies)

    keys = [make_key(number) for number in range(30)]

    async def levels_after(level: int) -> set[int]:
        """Levels in memory of what was asked for at a level, many times."""
        for _ in range(60):
            await stack.get(keys[:6], level=level)
            await asyncio.sleep(0)
        return {len((await host.match([key])).held[0].copy.level_bytes) for key in keys[:6]}

    try:
        await stack.put([parsed(number) for number in range(30)])
        assert await levels_after(1) == {2}
        assert await levels_after(2) == {3}
    finally:
        await stack.aclose()


async def test_a_get_tells_what_was_asked_and_where_it_was_found() -> None:
    told: list[Fetched] = []
    policies = Policies(learners=[told.append])
    upper, lower = HostBackend(1 << 20, policies=policies), HostBackend(1 << 20, policies=policies, name="lower")
    stack = TieredBackend([upper, lower], policies=policies)
    items = [parsed(number) for number in range(3)]
    await upper.put([(key, frame.truncated(0)) for key, frame in items[:2]])
    await lower.put(items[1:])
    for ask in (1, None):
        await stack.get([*(key for key, _ in items), make_key(9)], level=ask)
        await asyncio.sleep(0)
    first, second = told
    assert first.chunks == [
        FetchedChunk(PROFILE, 1, None, "", 0),
        FetchedChunk(PROFILE, 1, None, "lower", 1),
        FetchedChunk(PROFILE, 1, None, "lower", 0),
    ]
    assert [(chunk.level, chunk.asked) for chunk in second.chunks] == [(2, 1)] * 3
    assert {read.tier for read in first.reads} == {"host", "lower"}
    assert all(read.size_bytes > 0 and read.took_s > 0 for read in first.reads)


async def test_a_placement_that_fails_to_learn_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Fetched) -> None:
        raise ValueError("no")

    stack = TieredBackend([HostBackend(1 << 20)], policies=Policies(learners=[fail]))
    key, frame = parsed(0)
    await stack.put([(key, frame)])
    assert isinstance((await stack.get([key]))[0], Frame)
    await asyncio.sleep(0)
    assert "learning from a get failed" in caplog.text


async def sample(server: Server, name: str) -> list[str]:
    text = (await server.ask("GET", "/metrics")).body.decode()
    return [line for line in text.splitlines() if line.startswith(name)]


async def test_a_server_learns_for_the_profiles_that_are_pushed(start: Start) -> None:
    server = await start(memory_bytes=1 << 20)
    key, frame = make_key(0), frame_bytes(make_frame(make_key(0)))

    async def fetch() -> list[str]:
        assert (await server.ask("GET", path_of(key), params={"level": "1"})).status == 200
        return await sample(server, "kvstore_fetched_levels_total{")

    assert (await server.ask("PUT", path_of(key), data=frame, headers=FRAME)).status == 201
    assert await fetch() == [], "nothing is known of its profile"
    url = f"/v1/profiles/{NAMESPACE}"
    body = {"data": json.dumps(profiles_json(pushed())).encode(), "headers": {"Content-Type": "application/json"}}
    assert (await server.ask("PUT", url, **body)).status == 200
    assert await fetch() == ['kvstore_fetched_levels_total{level="1",tier="host"} 1.0']
    for number in range(1, 12):
        large = make_frame(make_key(number), (40_000, 40_000, 40_000))
        assert (await server.ask("PUT", path_of(large.key), data=frame_bytes(large), headers=FRAME)).status == 201
    assert any('tier="host"' in line for line in await sample(server, "kvstore_placements_total{"))
    await server.stop()
    server = await start(memory_bytes=1 << 20)
    assert await fetch() == ['kvstore_fetched_levels_total{level="1",tier="lmdb"} 1.0'], "the set outlives the server"
    assert (await server.ask("DELETE", url)).status == 204
    assert await fetch() == ['kvstore_fetched_levels_total{level="1",tier="lmdb"} 1.0']


async def test_a_server_with_the_static_placement_learns_nothing(start: Start) -> None:
    server = await start(placement="static")
    key = make_key(0)
    body = json.dumps(profiles_json(pushed())).encode()
    headers = {"Content-Type": "application/json"}
    assert (await server.ask("PUT", f"/v1/profiles/{NAMESPACE}", data=body, headers=headers)).status == 200
    await server.ask("PUT", path_of(key), data=frame_bytes(make_frame(key)), headers=FRAME)
    assert (await server.ask("GET", path_of(key))).status == 200
    assert await sample(server, "kvstore_fetched_levels_total{") == []


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ConfigError, match="placement must be one of static, learned"):
        ServerConfig(placement="guessed")
