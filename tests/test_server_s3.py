"""A server with S3 below: what it answers, what it finds again, and how an outage shows."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import ServerConfig
from kvstore.errors import ConfigError
from kvstore.fsck import run_s3_fsck
from kvstore.server import running_server
from kvstore.testing import make_frame, make_key
from tests.conftest import FRAME, Server, Start, path_of
from tests.frames import frame_bytes
from tests.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, free_port, running_moto

KEYS = [make_key(number) for number in range(4)]


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with running_moto() as server:
        yield server


def s3(moto: S3Server, prefix: str, **changed: Any) -> dict[str, Any]:
    usual = {"s3_bucket": BUCKET, "s3_endpoint": moto.url, "s3_prefix": f"{prefix}/", "s3_timeout_s": 5.0}
    return usual | {"s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY} | changed


async def readiness(server: Server) -> Any:
    return (await server.ask("GET", "/readyz")).json


async def test_what_was_put_as_remote_outlives_the_machine(start: Start, moto: S3Server, tmp_path: Path) -> None:
    server = await start(**s3(moto, "outlive"))
    for key in KEYS:
        answer = await server.put(make_frame(key), "remote")
        assert (answer.status, answer.headers["Kvstore-Ack"]) == (201, "remote")
    assert (await readiness(server))["tiers"] == {"host": "up", "lmdb": "up", "s3": "up"}
    await server.stop()
    other = await start(**s3(moto, "outlive"), data_dir=tmp_path / "another machine")
    for key in KEYS:
        assert await other.bytes_of(key) == frame_bytes(make_frame(key))
    assert await other.metric('kvstore_hits_total{tier="s3"}') == len(KEYS)
    assert await other.bytes_of(KEYS[0]) == frame_bytes(make_frame(KEYS[0]))
    assert await other.metric('kvstore_hits_total{tier="host"}') == 1


async def test_a_put_that_asks_for_less_reaches_s3_behind_the_answer(start: Start, moto: S3Server) -> None:
    server = await start(**s3(moto, "behind"))
    answer = await server.put(make_frame(KEYS[0]), "disk")
    assert answer.headers["Kvstore-Ack"] == "disk"
    while not moto.client.list_objects_v2(Bucket=BUCKET, Prefix="behind/").get("Contents"):
        await asyncio.sleep(0.02)
    assert (await server.ask("DELETE", path_of(KEYS[0]))).status == 204
    assert not moto.client.list_objects_v2(Bucket=BUCKET, Prefix="behind/").get("Contents")


async def test_without_a_disk_a_put_that_asks_for_one_waits_for_s3(start: Start, moto: S3Server) -> None:
    server = await start(**s3(moto, "diskless"), disk_bytes=0)
    for ack, reached in (("disk", "remote"), ("memory", "memory")):
        answer = await server.put(make_frame(KEYS[ack == "disk"]), ack)
        assert (answer.status, answer.headers["Kvstore-Ack"]) == (201, reached)


async def test_an_outage_is_visible_and_memory_and_disk_serve_on(start: Start, moto: S3Server) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    server = await start(**s3(moto, "outage", s3_endpoint=nobody, flush_timeout_s=0.1))
    state = await readiness(server)
    assert (state["ready"], state["degraded"], state["tiers"]["s3"]) == (True, True, "down")
    assert await server.metric('kvstore_tier_up{tier="s3"}') == 0
    assert (await server.put(make_frame(KEYS[0]), "disk")).status == 201
    answer = await server.refused(
        "PUT",
        f"{path_of(KEYS[1])}?ack=remote",
        503,
        "unavailable",
        data=frame_bytes(make_frame(KEYS[1])),
        headers=FRAME,
    )
    assert (answer.headers["Kvstore-Ack"], answer.json["ack"]) == ("disk", "disk")
    assert int(answer.headers["Retry-After"]) >= 1
    assert await server.bytes_of(KEYS[1]) == frame_bytes(make_frame(KEYS[1]))
    missing = await server.ask("GET", path_of(KEYS[2]))
    assert (missing.status, missing.json["reason"]) == (404, "breaker")


async def test_the_start_says_what_is_wrong_with_the_bucket(moto: S3Server, tmp_path: Path) -> None:
    config = ServerConfig(port=0, data_dir=tmp_path, **s3(moto, "wrong", s3_bucket="no-such-bucket"))
    with pytest.raises(ConfigError, match="no-such-bucket"):
        async with running_server(config):
            pass
    # The data directory was let go of.
    async with running_server(ServerConfig(port=0, data_dir=tmp_path)):
        pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"s3_endpoint": "http://127.0.0.1:1"}, "s3_bucket"),
        ({"s3_bucket": "b", "s3_access_key": "only one"}, "belong together"),
        ({"s3_bucket": "b", "s3_encryption": "rot13"}, "s3_encryption"),
        ({"s3_bucket": "b", "s3_kms_key": "k"}, "aws:kms"),
        ({"s3_bucket": "b", "s3_threads": 0}, "s3_threads"),
        ({"s3_write": "sometimes"}, "s3_write"),
        ({"disk_write": "never"}, "disk_write"),
        ({"gpu_bytes": 5}, "gpu"),
        ({"shrink_level": 16}, "shrink_level"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServerConfig(**wrong)


async def test_fsck_verifies_the_bucket_too(start: Start, moto: S3Server, tmp_path: Path) -> None:
    settings = s3(moto, "fsck")
    server = await start(**settings, data_dir=tmp_path / "data")
    for key in KEYS:
        await server.put(make_frame(key), "remote")
    await server.stop()
    damaged = f"fsck/{KEYS[0][:16].hex()}/{KEYS[0][16:].hex()}"
    body = bytearray(moto.client.get_object(Bucket=BUCKET, Key=damaged)["Body"].read())
    body[-20] ^= 1
    moto.client.put_object(Bucket=BUCKET, Key=damaged, Body=bytes(body))
    file = tmp_path / "kvstore.yaml"
    file.write_text(json.dumps(settings | {"data_dir": str(tmp_path / "data")}))
    command = [sys.executable, "-m", "kvstore", "fsck", "--s3", "--json", "--config", str(file)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["status"], report["chunks"]) == ("clean", len(KEYS))
    assert (report["s3"]["status"], report["s3"]["chunks"]) == ("mended", len(KEYS) - 1)
    assert report["s3"]["quarantined"] == 1
    assert report["s3"]["path"] == f"s3://{BUCKET}/fsck/"
    dry = await asyncio.to_thread(subprocess.run, [*command, "--dry-run"], capture_output=True, text=True)
    assert (dry.returncode, dry.stdout) == (2, "")
    assert "dry run" in dry.stderr


async def test_fsck_says_that_the_bucket_cannot_be_read(moto: S3Server, tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path, **s3(moto, "gone", s3_endpoint=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(ConfigError, match="cannot read s3://"):
        await run_s3_fsck(config)
    with pytest.raises(ConfigError, match="no bucket"):
        await run_s3_fsck(ServerConfig(data_dir=tmp_path))
