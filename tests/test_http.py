"""What the HTTP API does for a client that behaves."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvstore
from kvstore.frame import Frame
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.testing import make_frame, make_key
from kvstore.wire import BATCH_TYPE, DIGESTS_TYPE, FRAME_TYPE
from tests.conftest import FRAME, Answer, Server, Start, path_of
from tests.frames import batch_bytes, checksum, forge, frame_bytes, header_fields, level_ends, random_keys

KEYS = random_keys(12)
KEY = KEYS[0]
NAMESPACE = KEY[:16].hex()
BATCH = {"Content-Type": BATCH_TYPE}
DIGESTS = {"Content-Type": DIGESTS_TYPE}


async def _in_parts(data: bytes, part_bytes: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), part_bytes):
        yield data[start : start + part_bytes]


async def _ask_batch(server: Server, route: str, keys: list[ChunkKey], **query: Any) -> Answer:
    params = {"namespace": NAMESPACE} | query
    digests = b"".join(key[16:] for key in keys)
    return await server.ask("POST", f"/v1/{route}", params=params, data=digests, headers=DIGESTS)


def _records(body: bytes) -> list[bytes]:
    """Records of a batch: frames as they are, misses as their reason."""
    records = []
    while body:
        length = int.from_bytes(body[8:16], "little")
        records.append(body[16 : 16 + length])
        body = body[16 + length :]
    return records


# Blobs


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1000, 300_001])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
async def test_a_blob_comes_back_as_it_was(server: Server, length: int, announced: bool) -> None:
    data = random.Random(length).randbytes(length)
    put = await server.ask("PUT", path_of(KEY), data=data if announced else _in_parts(data))
    assert put.status == 201
    assert put.json == {"outcome": "written", "ack": "memory"}
    got = await server.ask("GET", path_of(KEY))
    assert (got.status, got.body) == (200, data)
    assert got.headers["Content-Type"] == "application/octet-stream"
    assert got.headers["Content-Length"] == str(length)
    assert got.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_put_without_a_body_stores_an_empty_blob(server: Server) -> None:
    assert (await server.ask("PUT", path_of(KEY))).status == 201
    assert await server.bytes_of(KEY) == b""


async def test_a_blob_larger_than_memory_is_served_from_disk(start: Start) -> None:
    server = await start(memory_bytes=1 << 20)
    data = random.Random(0).randbytes(3 << 20)
    put = await server.ask("PUT", f"{path_of(KEY)}?ack=disk", data=_in_parts(data, 1 << 18))
    assert (put.status, put.headers["Kvstore-Ack"]) == (201, "disk")
    assert await server.bytes_of(KEY) == data


async def test_a_blob_is_a_frame_to_whoever_asks_for_a_batch(server: Server) -> None:
    await server.ask("PUT", path_of(KEY), data=b"hello")
    [record] = _records((await _ask_batch(server, "get", [KEY])).body)
    assert record.startswith(b"\x89KVF")
    assert record.endswith(b"hello" + bytes(11))


# Frames


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
async def test_a_frame_comes_back_as_it_was(server: Server, announced: bool) -> None:
    data = frame_bytes(make_frame(KEY))
    put = await server.ask("PUT", path_of(KEY), data=data if announced else _in_parts(data, 99), headers=FRAME)
    assert put.status == 201
    got = await server.ask("GET", path_of(KEY))
    assert (got.status, got.body) == (200, data)
    assert got.headers["Content-Type"] == FRAME_TYPE
    assert got.headers["Kvstore-Levels"] == "3/3"


@pytest.mark.parametrize("content_type", ["Application/Vnd.Kvstore.Frame", f"{FRAME_TYPE}; version=1"])
async def test_a_content_type_is_read_as_http_says(server: Server, content_type: str) -> None:
    data = frame_bytes(make_frame(KEY))
    await server.ask("PUT", path_of(KEY), data=data, headers={"Content-Type": content_type})
    assert (await server.ask("GET", path_of(KEY))).headers["Kvstore-Levels"] == "3/3"


@pytest.mark.parametrize(("level", "held"), [(0, 1), (1, 2), (2, 3), (15, 3)])
async def test_a_level_cuts_a_frame_at_its_end(server: Server, level: int, held: int) -> None:
    frame = make_frame(KEY)
    await server.put(frame)
    got = await server.ask("GET", f"{path_of(KEY)}?level={level}")
    assert got.body == frame_bytes(frame)[: level_ends(frame)[held - 1]]
    assert got.headers["Kvstore-Levels"] == f"{held}/3"


async def test_levels_that_come_later_extend_what_is_there(server: Server) -> None:
    frame = make_frame(KEY)
    short = await server.ask("PUT", path_of(KEY), data=frame_bytes(frame.truncated(0)), headers=FRAME)
    assert (short.status, short.json["outcome"]) == (201, "written")
    assert (await server.ask("GET", path_of(KEY))).headers["Kvstore-Levels"] == "1/3"
    more = await server.put(frame)
    assert (more.status, more.json["outcome"]) == (201, "extended")
    assert await server.bytes_of(KEY) == frame_bytes(frame)


async def test_an_exact_frame_replaces_an_inexact_one(server: Server) -> None:
    inexact, exact = make_frame(KEY, behind=Behind(0, 0.5)), make_frame(KEY, seed=1)
    assert (await server.put(inexact)).json["outcome"] == "written"
    assert (await server.put(exact)).json["outcome"] == "written"
    assert (await server.put(inexact)).json["outcome"] == "other"
    assert await server.bytes_of(KEY) == frame_bytes(exact)


async def test_a_frame_of_no_bytes_is_kept(server: Server) -> None:
    frame = make_frame(KEY, (0,))
    assert (await server.put(frame)).status == 201
    assert await server.bytes_of(KEY) == frame_bytes(frame)


async def test_unknown_fields_of_a_header_are_kept(server: Server) -> None:

    data = forge(header_fields(KEY, later={"x": [1, "2"]}), [(0, 16, checksum(KEY, bytes(16)))], bytes(16))
    answer = await server.ask("PUT", path_of(KEY), data=data, headers=FRAME)
    assert answer.status == 201, answer.body
    assert await server.bytes_of(KEY) == data


@pytest.mark.parametrize(("ack", "reached"), [("memory", "memory"), ("disk", "disk"), ("remote", "disk")])
async def test_the_ack_that_was_reached_is_said(server: Server, ack: str, reached: str) -> None:
    answer = await server.put(make_frame(KEY), ack)
    assert answer.status == 201
    assert answer.headers["Kvstore-Ack"] == answer.json["ack"] == reached


async def test_a_second_put_makes_a_chunk_durable(server: Server) -> None:
    frame = make_frame(KEY)
    await server.put(frame, "memory")
    answer = await server.put(frame, "disk")
    assert (answer.status, answer.headers["Kvstore-Ack"]) == (200, "disk")


# Tags and headers


async def test_a_tag_names_the_frame_and_its_levels(server: Server) -> None:
    first, second = make_frame(KEY), make_frame(KEYS[1])
    await server.put(first)
    await server.put(second)
    whole = (await server.ask("GET", path_of(KEY))).headers["ETag"]
    part = (await server.ask("GET", f"{path_of(KEY)}?level=0")).headers["ETag"]
    other = (await server.ask("GET", path_of(KEYS[1]))).headers["ETag"]
    assert len({whole, part, other}) == 3
    assert whole == f'"{first.id.hex()}-3"'


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_copy_that_the_client_has_is_not_sent_again(server: Server, method: str, form: str) -> None:
    await server.put(make_frame(KEY))
    tag = (await server.ask("HEAD", path_of(KEY))).headers["ETag"]
    answer = await server.ask(method, path_of(KEY), headers={"If-None-Match": form.format(tag)})
    assert (answer.status, answer.body) == (304, b"")
    assert answer.headers["ETag"] == tag


async def test_another_tag_is_answered_in_full(server: Server) -> None:
    frame = make_frame(KEY)
    await server.put(frame)
    answer = await server.ask("GET", path_of(KEY), headers={"If-None-Match": '"other"'})
    assert (answer.status, answer.body) == (200, frame_bytes(frame))


@pytest.mark.parametrize("query", ["", "?level=0"])
@pytest.mark.parametrize("kind", ["blob", "frame"])
async def test_a_head_has_the_headers_of_a_get(server: Server, kind: str, query: str) -> None:
    data, headers = (b"hello", {}) if kind == "blob" else (frame_bytes(make_frame(KEY)), FRAME)
    await server.ask("PUT", path_of(KEY), data=data, headers=headers)
    got = await server.ask("GET", path_of(KEY) + query)
    head = await server.ask("HEAD", path_of(KEY) + query)
    assert (head.status, head.body) == (200, b"")
    assert {**head.headers, "Date": ""} == {**got.headers, "Date": ""}


async def test_a_deleted_chunk_is_a_miss_and_may_be_put_again(server: Server) -> None:
    await server.put(make_frame(KEY))
    assert (await server.ask("DELETE", path_of(KEY))).status == 204
    assert (await server.ask("GET", path_of(KEY))).json["reason"] == "absent"
    assert (await server.ask("DELETE", path_of(KEY))).status == 204
    assert (await server.put(make_frame(KEY, seed=1))).status == 201


async def test_a_chunk_that_was_evicted_and_then_deleted_is_absent(start: Start) -> None:
    server = await start(memory_bytes=1 << 20)
    for key in random_keys(30, seed=3):
        await server.put(make_frame(key, (100_000,)), "disk")
    evicted = random_keys(1, seed=3)[0]
    assert (await server.ask("DELETE", path_of(evicted))).status == 204
    assert (await server.ask("GET", path_of(evicted))).json["reason"] == "absent"


async def test_a_connection_is_used_again_after_a_miss(server: Server) -> None:
    async with server.connection() as (reader, writer):
        request = f"GET {path_of(KEY)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        for _ in range(3):
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 404")
            await reader.readuntil(b"}")


# Batches


async def test_a_match_is_run_length_coded(server: Server) -> None:
    for key in KEYS[:3]:
        await server.put(make_frame(key))
    for key in KEYS[3:5]:
        await server.put(make_frame(key, (400,), groups=(1,)))
    answer = (await _ask_batch(server, "match", KEYS[:8])).json
    assert (answer["matched"], answer["miss"]) == (5, "absent")
    assert [run["count"] for run in answer["runs"]] == [3, 2]
    long, short = answer["runs"]
    frame = make_frame(KEY)
    assert long["tier"] == "host"
    assert long["level_bytes"] == list(frame.head.level_bytes)
    assert long["head_bytes"] == len(frame.head.raw)
    assert (long["levels"], short["levels"], long["inexact"]) == (3, 1, False)


async def test_a_match_stops_at_the_first_gap(server: Server) -> None:
    for position in (0, 2):
        await server.put(make_frame(KEYS[position]))
    answer = (await _ask_batch(server, "match", KEYS[:3])).json
    assert (answer["matched"], answer["miss"]) == (1, "absent")


async def test_a_match_of_all_or_of_no_keys_has_no_miss(server: Server) -> None:
    await server.put(make_frame(KEY))
    assert (await _ask_batch(server, "match", [KEY])).json["miss"] is None
    assert (await _ask_batch(server, "match", [])).json == {"matched": 0, "runs": [], "miss": None}


async def test_a_batch_get_answers_every_key_in_order(server: Server) -> None:
    frames = [make_frame(key) for key in KEYS]
    for frame in frames[::2]:
        await server.put(frame)
    answer = await _ask_batch(server, "get", KEYS + KEYS[:1])
    assert answer.headers["Content-Type"] == BATCH_TYPE
    expected = [frame_bytes(frame) if n % 2 == 0 else b"absent" for n, frame in enumerate(frames)]
    assert _records(answer.body) == [*expected, expected[0]]


async def test_a_batch_get_may_ask_for_a_level(server: Server) -> None:
    frame = make_frame(KEY)
    await server.put(frame)
    answer = await _ask_batch(server, "get", [KEY], level="1")
    assert _records(answer.body) == [frame_bytes(frame)[: level_ends(frame)[1]]]


async def test_a_batch_put_says_of_each_frame_what_became_of_it(server: Server) -> None:
    frames = [make_frame(key) for key in KEYS[:3]]
    await server.put(frames[1])
    body = batch_bytes(*map(frame_bytes, [*frames, make_frame(KEYS[2], seed=1)]))
    answer = await server.ask("POST", "/v1/put?ack=disk", data=body, headers=BATCH)
    assert [stored["outcome"] for stored in answer.json["stored"]] == ["written", "exists", "written", "other"]
    assert {stored["ack"] for stored in answer.json["stored"]} == {"disk"}
    for frame in frames:
        assert await server.bytes_of(frame.key) == frame_bytes(frame)


async def test_an_empty_batch_is_answered(server: Server) -> None:
    assert (await server.ask("POST", "/v1/put", data=b"", headers=BATCH)).json == {"stored": []}
    assert (await _ask_batch(server, "get", [])).body == b""
    assert (await _ask_batch(server, "delete", [])).status == 204


async def test_a_trim_keeps_the_levels_below(server: Server) -> None:
    frames = [make_frame(key) for key in KEYS[:2]]
    for frame in frames:
        await server.put(frame, "disk")
    assert (await _ask_batch(server, "trim", [KEY, KEYS[5]], level="0")).status == 204
    assert await server.bytes_of(KEY) == frame_bytes(frames[0])[: level_ends(frames[0])[0]]
    assert (await server.ask("GET", path_of(KEY))).headers["Kvstore-Levels"] == "1/3"
    assert await server.bytes_of(KEYS[1]) == frame_bytes(frames[1])
    answer = await server.put(frames[0])
    assert (answer.status, answer.json["outcome"]) == (201, "extended")


async def test_a_batch_delete_takes_only_the_keys_it_names(server: Server) -> None:
    for key in KEYS[:4]:
        await server.put(make_frame(key))
    assert (await _ask_batch(server, "delete", [KEYS[0], KEYS[2], KEYS[7]])).status == 204
    assert [await server.holds(key) for key in KEYS[:4]] == [False, True, False, True]


async def test_a_scan_lists_a_namespace_page_by_page(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.server.batch.SCAN_PAGE", 5)
    frames = {key[16:].hex(): make_frame(key) for key in KEYS}
    for frame in frames.values():
        await server.put(frame)
    await server.put(make_frame(random_keys(1, seed=9)[0]))
    listed: list[dict[str, Any]] = []
    pages = 0
    while page := (await _scan(server, listed[-1]["digest"] if listed else None)):
        listed += page
        pages += 1
    assert pages == 3
    assert [chunk["digest"] for chunk in listed] == sorted(frames)
    assert all(chunk["frame_id"] == frames[chunk["digest"]].id.hex() for chunk in listed)
    assert all(tuple(chunk["level_bytes"]) == frames[chunk["digest"]].head.level_bytes for chunk in listed)


async def _scan(server: Server, after: str | None) -> list[dict[str, Any]]:
    params = {"namespace": NAMESPACE} | ({} if after is None else {"after": after})
    page: list[dict[str, Any]] = (await server.ask("GET", "/v1/scan", params=params)).json["chunks"]
    return page


# Room


async def test_memory_alone_refuses_what_can_never_fit_and_serves_the_rest(start: Start) -> None:
    server = await start(memory_bytes=1 << 20, disk_bytes=0)
    frame = make_frame(KEY)
    await server.put(frame)
    large = make_frame(KEYS[1], (1 << 20,))
    for ack in ("memory", "disk"):
        answer = await server.refused(
            "PUT", f"{path_of(KEYS[1])}?ack={ack}", 507, "storage-full", data=frame_bytes(large), headers=FRAME
        )
        assert "1048576" in answer.json["detail"]
    assert not await server.holds(KEYS[1])
    assert await server.bytes_of(KEY) == frame_bytes(frame)


async def test_a_full_batch_says_which_frame_found_no_room(start: Start) -> None:
    server = await start(memory_bytes=1 << 20, disk_bytes=0)
    frames = [make_frame(KEYS[0]), make_frame(KEYS[1], (1 << 20,)), make_frame(KEYS[2])]
    answer = await server.ask("POST", "/v1/put", data=batch_bytes(*map(frame_bytes, frames)), headers=BATCH)
    assert [stored["outcome"] for stored in answer.json["stored"]] == ["written", "failed", "written"]
    assert [stored["code"] for stored in answer.json["stored"]] == [None, "storage-full", None]


async def test_chunks_make_room_for_each_other_and_the_miss_says_so(start: Start) -> None:
    server = await start(memory_bytes=1 << 20, disk_bytes=0)
    keys = random_keys(30, seed=3)
    for key in keys:
        assert (await server.put(make_frame(key, (100_000,)))).status == 201
    reasons = [(await server.ask("GET", path_of(key))).json for key in keys if not await server.holds(key)]
    assert len(reasons) >= 20
    assert {answer["reason"] for answer in reasons} == {"evicted"}
    assert await server.metric('kvstore_tier_bytes{tier="host"}') <= 1 << 20


async def test_what_memory_gave_up_comes_from_disk(start: Start) -> None:
    server = await start(memory_bytes=1 << 20)
    frames = [make_frame(key, (100_000,)) for key in random_keys(30, seed=3)]
    for frame in frames:
        await server.put(frame, "disk")
    for frame in frames:
        assert await server.bytes_of(frame.key) == frame_bytes(frame)
    assert await server.metric('kvstore_hits_total{tier="lmdb"}') >= 15


async def test_a_disk_budget_is_kept(start: Start) -> None:
    server = await start(memory_bytes=1 << 20, disk_bytes=1 << 20)
    frames = [make_frame(key, (100_000,)) for key in random_keys(30, seed=3)]
    for frame in frames:
        assert (await server.put(frame, "disk")).status == 201
    assert await server.metric('kvstore_tier_bytes{tier="lmdb"}') <= 1 << 20
    assert await server.bytes_of(frames[-1].key) == frame_bytes(frames[-1])


async def test_concurrent_puts_of_one_key_leave_one_frame(start: Start) -> None:
    server = await start()
    for key in KEYS:
        frames = [make_frame(key, seed=seed) for seed in range(4)]
        acks = ("disk", "memory", "memory", "disk")
        answers = await asyncio.gather(*(server.put(frame, ack) for frame, ack in zip(frames, acks, strict=True)))
        outcomes = [answer.json["outcome"] for answer in answers]
        assert sorted(outcomes) == ["other", "other", "other", "written"], outcomes
        assert await server.bytes_of(key) == frame_bytes(_winner(frames, outcomes))


def _winner(frames: list[Frame], outcomes: list[str]) -> Frame:
    return frames[outcomes.index("written")]


# Status


@pytest.mark.parametrize("path", ["/healthz", "/health", "/healthcheck"])
async def test_a_server_says_that_it_lives(server: Server, path: str) -> None:
    answer = await server.ask("GET", path)
    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_a_server_says_that_it_is_ready(server: Server) -> None:
    answer = await server.ask("GET", "/readyz")
    assert (answer.status, answer.json) == (
        200,
        {"ready": True, "degraded": False, "tiers": {"host": "up", "lmdb": "up"}},
    )


async def test_a_server_says_its_versions(server: Server) -> None:
    assert (await server.ask("GET", "/version")).json == {"version": kvstore.__version__, "frame_format": 1}


async def test_metrics_have_bounded_labels(server: Server) -> None:
    for key in random_keys(20, seed=5):
        await server.ask("GET", path_of(key))
        await server.ask("GET", f"/random/{key.hex()}")
        await server.ask("PATCH", path_of(key))
        await server.ask("GET", f"/v1/scan?namespace={key[:16].hex()}")
    text = (await server.ask("GET", "/metrics")).body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = [sample for family in families.values() for sample in family.samples]
    routes = {sample.labels["route"] for sample in samples if "route" in sample.labels}
    assert routes == {"/v1/kv/{namespace}/{digest}", "/v1/scan", "unknown"}
    requests = {s.labels["route"]: s.value for s in samples if s.name == "kvstore_requests_total" and s.value}
    assert requests["/v1/scan"] == 20
    assert len(samples) < 200


async def test_metrics_count_what_happened(server: Server) -> None:
    frame = make_frame(KEY)
    await server.put(frame)
    await server.put(frame)
    await server.bytes_of(KEY)
    await server.ask("GET", path_of(KEYS[1]))
    size_bytes = len(frame_bytes(frame))
    assert await server.metric('kvstore_puts_total{outcome="written"}') == 1
    assert await server.metric('kvstore_puts_total{outcome="exists"}') == 1
    assert await server.metric('kvstore_hits_total{tier="host"}') == 1
    assert await server.metric('kvstore_misses_total{reason="absent"}') == 1
    assert await server.metric("kvstore_received_bytes_total") == 2 * size_bytes
    assert await server.metric("kvstore_sent_bytes_total") == size_bytes
    assert await server.metric('kvstore_tier_chunks{tier="host"}') == 1


async def test_answers_do_not_tell_what_the_server_is_built_from(start: Start) -> None:
    server = await start()
    assert (await server.ask("GET", "/version")).headers["Server"] == "kvstore"


# Pins and namespaces


async def test_pinned_chunks_survive_pressure(start: Start) -> None:
    server = await start(disk_bytes=0, memory_bytes=1 << 20)
    keys = [make_key(number, namespace=KEY[:16]) for number in range(40)]
    for key in keys[:2]:
        await server.put(make_frame(key, (50_000,)))
    query = {"namespace": NAMESPACE, "ttl_s": "600"}
    body = b"".join(key[16:] for key in keys[:3])
    answer = await server.ask("POST", "/v1/pins", params=query, data=body, headers=DIGESTS)
    assert (answer.status, answer.json) == (200, {"pinned": 2, "missing": 1})
    for key in keys[2:]:
        await server.put(make_frame(key, (50_000,)))
    assert [await server.holds(key) for key in keys[:3]] == [True, True, False]
    query["ttl_s"] = "0"
    assert (await server.ask("POST", "/v1/pins", params=query, data=body, headers=DIGESTS)).json["pinned"] == 0


async def test_a_purge_takes_one_namespace(server: Server) -> None:
    other = make_key(0, namespace=b"\xee" * 16)
    keys = [make_key(number, namespace=KEY[:16]) for number in range(5)]
    for key in [*keys, other]:
        await server.put(make_frame(key), "disk")
    answer = await server.ask("DELETE", f"/v1/kv/{NAMESPACE}")
    assert (answer.status, answer.json) == (200, {"deleted": 5})
    assert not await server.holds(keys[0])
    assert await server.holds(other)
