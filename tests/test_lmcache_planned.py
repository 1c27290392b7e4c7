"""The LMCache connector where the server plans what is stored and loaded."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch

from kvstore.client import Client
from kvstore.connectors.lmcache_chunks import Chunk, Codec, Codecs
from kvstore.connectors.lmcache_options import LMCacheOptions, parse_options
from kvstore.connectors.lmcache_store import ChunkStore
from kvstore.controller.controller import Controller
from kvstore.errors import ConfigError
from kvstore.profile import ProfileSet, parse_profiles
from tests.conftest import Server
from tests.test_lmcache_connector import SHARD, bytes_of, chunks_of, numbers, shape_of
from tests.test_plan import measured
from tests.test_profiles import a_set, level, profile, quality


@pytest.fixture(autouse=True)
def expected_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose by what is expected: these chunks are small, and arms differ by less than what chance draws."""
    monkeypatch.setattr("kvstore.server.plan.Controller", partial(Controller, explores=False))


@asynccontextmanager
async def store(server: Server, found: ProfileSet | None, **given: Any) -> AsyncIterator[tuple[ChunkStore, Codec]]:
    """A store of a planning connector; the server has these profiles for its namespace."""
    options = LMCacheOptions(url=server.url, plan=True, store_derived=True, lookup_deadline_s=5.0, **given)
    codec = Codecs(options).of(SHARD, shape_of())
    if found is not None:
        async with Client(server.url) as client:
            await client.push_profiles(codec.namespace, found, {})
    opened = await asyncio.to_thread(ChunkStore, options)
    try:
        yield opened, codec
    finally:
        await asyncio.to_thread(opened.close)


TENSORS = [numbers(seed=number) for number in range(4)]


async def stored(opened: ChunkStore, codec: Codec) -> list[Chunk]:
    chunks = chunks_of(codec, TENSORS)
    await asyncio.wrap_future(opened.store(chunks))
    return chunks


async def loaded(opened: ChunkStore, codec: Codec) -> tuple[list[bool], list[torch.Tensor]]:
    """What a look-up finds, and what a load of it brings."""
    chunks = chunks_of(codec, [torch.zeros_like(one) for one in TENSORS])
    [found] = await asyncio.wrap_future(opened.find([[chunk.key for chunk in chunks]], codec=codec))
    if not any(found):
        return found, []
    sizes_bytes = await asyncio.wrap_future(opened.load(chunks))
    assert all(sizes_bytes)
    return found, [torch.frombuffer(chunk.data, dtype=torch.bfloat16).view_as(TENSORS[0]) for chunk in chunks]


async def test_stores_and_loads_go_as_planned(server: Server) -> None:
    async with store(server, measured()) as (opened, codec):
        await stored(opened, codec)
        found, tensors = await loaded(opened, codec)
        assert found == [True] * 4
        errors = [
            float((one - other).float().norm() / other.float().norm())
            for one, other in zip(tensors, TENSORS, strict=True)
        ]
        # The middle level of three is within the usual budget.
        assert all(0.02 < error < 0.3 for error in errors), errors
    assert await server.metric('kvstore_decisions_total{action="put",operation="put",reason="fastest"}') == 1
    assert await server.metric('kvstore_outcomes_total{result="learned"}') == 2


@pytest.mark.parametrize("pipeline", ["raw", "ladder-packed"])
async def test_a_budget_of_none_keeps_every_bit(server: Server, pipeline: str) -> None:
    async with store(server, measured(), budget_nats=0.0, pipeline=pipeline) as (opened, codec):
        await stored(opened, codec)
        found, tensors = await loaded(opened, codec)
        assert found == [True] * 4
        assert all(torch.equal(one, other) for one, other in zip(tensors, TENSORS, strict=True))


async def test_what_is_computed_sooner_is_not_found(server: Server) -> None:
    async with store(server, measured(), prefill_tokens_per_s=1e12) as (opened, codec):
        await stored(opened, codec)
        assert (await loaded(opened, codec))[0] == [False] * 4
        assert opened.counts["refused_chunks"] == 4


async def test_without_profiles_chunks_go_as_configured(server: Server) -> None:
    async with store(server, None) as (opened, codec):
        await stored(opened, codec)
        _, tensors = await loaded(opened, codec)
        assert all(torch.equal(one, other) for one, other in zip(tensors, TENSORS, strict=True))


async def test_a_profile_that_needs_positions_is_not_used(server: Server) -> None:
    levels = [level(ratio=8, decode_s_per_gb=0.001, quality={"text-256": quality(kl_nats=0.001, standard_error=0.0)})]
    stages = [{"stage": "rope"}, {"stage": "mean"}, {"stage": "raw"}]
    rotated = profile(name="rotated", pipeline=stages, encode_s_per_gb=0.001, levels=levels)
    async with store(server, parse_profiles(a_set(profiles=[rotated]))) as (opened, codec):
        await stored(opened, codec)
        async with Client(server.url) as client:
            assert all([held.copy.lossless async for _, held in client.scan(codec.namespace)])
        _, tensors = await loaded(opened, codec)
        assert all(torch.equal(one, other) for one, other in zip(tensors, TENSORS, strict=True))


async def test_chunks_of_unknown_shapes_are_not_planned(server: Server) -> None:
    options = LMCacheOptions(url=server.url, plan=True, store_derived=True)
    codec = Codecs(options).of(SHARD, shape_of((5,), "uint8"))
    assert codec.layout is None
    opened = await asyncio.to_thread(ChunkStore, options)
    try:
        data = bytes_of(torch.arange(5, dtype=torch.uint8))
        chunk = Chunk(codec.key(b"x"), codec, data)
        await asyncio.wrap_future(opened.store([chunk]))
        assert await asyncio.wrap_future(opened.find([[chunk.key]], codec=codec)) == [[True]]
    finally:
        await asyncio.to_thread(opened.close)
    assert await server.metric('kvstore_requests_total{route="/v1/plan",status="200"}') == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"plan": True}, "plan: profiles are lossy"),
        ({"plan": "maybe"}, "plan"),
        ({"plan": True, "role": "consumer", "budget_nats": -1}, "budget_nats"),
        ({"plan": True, "role": "consumer", "budget_nats": 1e6}, "budget_nats"),
        ({"workload": "a b"}, "workload"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_options({"url": "http://127.0.0.1:1"} | given, {})
