"""Prefixes as tensors, through a real server: what comes back, how far, and why it ends."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from kvstore.backend import Ack, Backend, Miss, Outcome, Reason
from kvstore.backends.host import HostBackend
from kvstore.client import Client
from kvstore.codecs import Context, encode, named_pipeline
from kvstore.config import ServerConfig
from kvstore.errors import BackendError, BackendUnavailableError, PipelineError
from kvstore.keys import chunk_keys
from kvstore.layout import Layout, PlaneSpec, attention_layout
from kvstore.prefix import get_prefix, match_prefix, put_prefix
from kvstore.server import running_server
from kvstore.stream import Arrived, Fetch
from kvstore.testing import FaultyBackend
from kvstore.tiers import TieredBackend

LAYOUT = attention_layout("m", "r", layers=2, kv_heads=2, head_dim=16, chunk_tokens=8)
IDS = list(range(100, 143))
RAW, LADDER = named_pipeline("raw"), named_pipeline("ladder-packed")


def planes_of(layout: Layout, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn((spec.shape[0], tokens, *spec.shape[2:]), generator=generator).bfloat16()
        for name, spec in layout.planes.items()
    }


PLANES = planes_of(LAYOUT, len(IDS))


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with running_server(ServerConfig(port=0, data_dir=tmp_path)) as url, Client(url) as client:
        yield client


async def test_raw_comes_back_bit_for_bit_and_the_tail_is_not_stored(client: Client) -> None:
    put = await put_prefix(client, LAYOUT, IDS, PLANES, RAW, ack=Ack.DISK)
    assert (put.tokens, put.held_tokens, {stored.ack for stored in put.stored}) == (40, 0, {Ack.DISK})
    prefix = await get_prefix(client, LAYOUT, IDS)
    assert (prefix.tokens, prefix.miss, prefix.levels) == (40, None, [1] * 5)
    assert prefix.size_bytes == put.size_bytes
    for name, plane in PLANES.items():
        assert torch.equal(prefix.planes[name], plane[:, :40])


@pytest.mark.parametrize("level", [None, 0, 1])
async def test_a_stream_decodes_to_the_same_while_it_arrives(client: Client, level: int | None) -> None:
    await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
    plain = await get_prefix(client, LAYOUT, IDS, level=level)
    streamed = await get_prefix(client, LAYOUT, IDS, level=level, stop_s=30.0)
    assert (streamed.tokens, streamed.levels, streamed.miss) == (plain.tokens, plain.levels, None)
    assert streamed.size_bytes == plain.size_bytes
    for name, plane in plain.planes.items():
        assert torch.equal(streamed.planes[name], plane)
    assert 0 < streamed.arrived_s < 30
    assert streamed.decoding_s > 0


async def test_a_stream_that_is_stopped_is_decoded_at_the_levels_that_came(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
    coarse = await get_prefix(client, LAYOUT, IDS, level=0)
    segments = Fetch._segments

    async def cut(self: Fetch) -> AsyncIterator[Arrived]:
        # One layer group of one chunk has its second level, as if the time were over then.
        async for segment in segments(self):
            yield segment
            if segment.level == 1:
                return

    monkeypatch.setattr(Fetch, "_segments", cut)
    stopped = await get_prefix(client, LAYOUT, IDS, stop_s=30.0)
    assert (stopped.tokens, stopped.levels) == (40, [1] * 5)
    for name, plane in coarse.planes.items():
        assert torch.equal(stopped.planes[name], plane)


async def test_a_stream_of_another_prompts_chunk_ends_there(client: Client) -> None:
    frames = [
        encode({name: plane[:, :8] for name, plane in PLANES.items()}, LAYOUT, RAW, key=chunk_keys(LAYOUT, IDS)[0])
    ]
    moved = Context(first_position=8)
    frames.append(
        encode(
            {name: plane[:, 8:16] for name, plane in PLANES.items()},
            LAYOUT,
            RAW,
            key=chunk_keys(LAYOUT, IDS)[1],
            context=dataclasses.replace(moved, first_position=16),
        )
    )
    await client.put([(frame.key, frame) for frame in frames])
    prefix = await get_prefix(client, LAYOUT, IDS, stop_s=30.0)
    assert (prefix.tokens, prefix.miss) == (8, Miss(Reason.IDENTITY))


async def test_each_level_costs_more_and_is_closer(client: Client) -> None:
    await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
    prefixes = [await get_prefix(client, LAYOUT, IDS, level=level) for level in range(3)]
    errors = [float((prefix.planes["k"].float() - PLANES["k"][:, :40].float()).square().sum()) for prefix in prefixes]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    sizes = [prefix.size_bytes for prefix in prefixes]
    assert sizes == sorted(sizes)
    assert [prefix.levels for prefix in prefixes] == [[level] * 5 for level in (1, 2, 3)]


async def test_a_longer_prompt_reuses_the_common_prefix_and_stores_only_the_rest(client: Client) -> None:
    await put_prefix(client, LAYOUT, IDS[:24], PLANES, RAW)
    other = IDS[:24] + [7] * 16
    assert len((await match_prefix(client, LAYOUT, other)).held) == 3
    prefix = await get_prefix(client, LAYOUT, other)
    assert (prefix.tokens, prefix.miss) == (24, Miss(Reason.ABSENT))
    put = await put_prefix(client, LAYOUT, IDS, PLANES, RAW)
    assert (put.held_tokens, len(put.stored)) == (24, 2)
    assert (await get_prefix(client, LAYOUT, IDS)).tokens == 40


async def test_a_prompt_that_nobody_stored_is_an_empty_prefix(client: Client) -> None:
    prefix = await get_prefix(client, LAYOUT, IDS)
    assert (prefix.tokens, prefix.miss, prefix.planes["k"].shape) == (0, Miss(Reason.ABSENT), (2, 0, 2, 16))
    assert (await get_prefix(client, LAYOUT, IDS[:5])).miss is None, "a prompt without a full chunk misses nothing"


async def test_another_salt_finds_nothing(client: Client) -> None:
    await put_prefix(client, LAYOUT, IDS, PLANES, RAW, salt=b"mine")
    assert (await get_prefix(client, LAYOUT, IDS, salt=b"yours")).tokens == 0
    assert (await get_prefix(client, LAYOUT, IDS, salt=b"mine")).tokens == 40


async def test_mla_has_one_latent_plane(client: Client) -> None:
    layout = Layout("mla", "r", {"latent": PlaneSpec("bfloat16", (2, 8, 1, 64))}, chunk_tokens=8)
    planes = planes_of(layout, 16)
    await put_prefix(client, layout, IDS[:16], planes, RAW)
    assert torch.equal((await get_prefix(client, layout, IDS)).planes["latent"], planes["latent"])


async def test_many_chunks_travel_in_several_requests(client: Client) -> None:
    layout = attention_layout("m", "r", layers=8, kv_heads=4, head_dim=128, chunk_tokens=64)
    planes, ids = planes_of(layout, 64 * 48), list(range(64 * 48))
    put = await put_prefix(client, layout, ids, planes, RAW)
    assert {stored.outcome for stored in put.stored} == {Outcome.WRITTEN}
    prefix = await get_prefix(client, layout, ids)
    assert prefix.tokens == len(ids)
    assert torch.equal(prefix.planes["v"], planes["v"])


async def test_a_deadline_returns_what_is_complete() -> None:
    slow = FaultyBackend(HostBackend(1 << 20))
    await put_prefix(slow, LAYOUT, IDS, PLANES, RAW)
    slow.gate.clear()
    prefix = await get_prefix(slow, LAYOUT, IDS, deadline_s=0.05)
    assert (prefix.tokens, prefix.miss) == (0, Miss(Reason.DEADLINE))


async def test_a_decode_node_waits_for_what_a_prefill_node_puts(client: Client) -> None:
    stack = TieredBackend([HostBackend(1 << 20), client])
    for backend, ids in ((client, IDS), (stack, IDS[:-16])):
        other = dataclasses.replace(LAYOUT, revision=f"r of {type(backend).__name__}")
        asked = asyncio.create_task(get_prefix(backend, other, ids, wait_s=60))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await put_prefix(client, other, ids, PLANES, RAW)
        async with asyncio.timeout(20):
            prefix = await asked
        assert (prefix.tokens, prefix.miss) == (len(ids) // 8 * 8, None)
    assert (await get_prefix(client, LAYOUT, IDS, wait_s=0.02)).miss == Miss(Reason.ABSENT)
    assert (await get_prefix(client, LAYOUT, IDS, wait_s=60, deadline_s=0.05)).miss == Miss(Reason.DEADLINE)


async def test_a_fetch_that_fails_is_a_miss_and_a_match_that_fails_an_error() -> None:
    broken = FaultyBackend(HostBackend(1 << 20))
    await put_prefix(broken, LAYOUT, IDS, PLANES, RAW)
    broken.error = BackendError("host", "broken on purpose")
    prefix = await get_prefix(broken, LAYOUT, IDS)
    assert (prefix.tokens, prefix.miss) == (0, Miss(Reason.BREAKER))
    async with Client("http://127.0.0.1:9") as nobody:
        with pytest.raises(BackendUnavailableError, match=r"127\.0\.0\.1:9"):
            await get_prefix(nobody, LAYOUT, IDS)


async def test_a_chunk_at_another_position_is_not_used() -> None:
    backend: Backend = HostBackend(1 << 20)
    keys = chunk_keys(LAYOUT, IDS)
    for number, position in enumerate((0, 16)):
        chunk = {name: plane[:, 8 * number : 8 * number + 8] for name, plane in PLANES.items()}
        frame = encode(chunk, LAYOUT, RAW, key=keys[number], context=Context(first_position=position))
        await backend.put([(keys[number], frame)])
    prefix = await get_prefix(backend, LAYOUT, IDS)
    assert (prefix.tokens, prefix.miss) == (8, Miss(Reason.IDENTITY))


async def test_planes_that_are_too_short_are_refused(client: Client) -> None:
    with pytest.raises(PipelineError, match="40 tokens"):
        await put_prefix(client, LAYOUT, IDS, {name: plane[:, :39] for name, plane in PLANES.items()}, RAW)


async def test_infinite_values_are_refused_by_name_and_nothing_is_stored(client: Client) -> None:
    planes = {name: plane.clone() for name, plane in PLANES.items()}
    planes["v"][0, 3] = torch.inf
    with pytest.raises(PipelineError, match="plane 'v'"):
        await put_prefix(client, LAYOUT, IDS, planes, LADDER)
    assert (await match_prefix(client, LAYOUT, IDS)).held == []


async def test_a_layout_of_another_model_finds_nothing(client: Client) -> None:
    await put_prefix(client, LAYOUT, IDS, PLANES, RAW)
    assert (await get_prefix(client, dataclasses.replace(LAYOUT, revision="r2"), IDS)).tokens == 0


async def test_chunks_that_are_only_partly_there_are_put_again(client: Client) -> None:
    await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
    keys = chunk_keys(LAYOUT, IDS)
    await client.trim(keys[1:2], level=0)
    put = await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
    assert (put.held_tokens, put.stored[0].outcome) == (8, Outcome.EXTENDED)
    assert (await get_prefix(client, LAYOUT, IDS)).levels == [3] * 5
