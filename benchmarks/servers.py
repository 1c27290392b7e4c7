"""Servers under test, each its own process for as long as a block runs."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_START_S = 30.0
_STOP_S = 30.0

_REDIS_CONFIG = """\
port {port}
bind 127.0.0.1
dir {directory}
save ""
appendonly no
maxmemory {memory}
maxmemory-policy allkeys-lru
io-threads 2
io-threads-do-reads yes
client-output-buffer-limit normal 0 0 0
"""


@contextmanager
def kvstore_server(*, memory: str = "2GiB") -> Iterator[str]:
    """A kvstore server without a disk tier; yields its URL.

    Args:
        memory: Budget of its memory tier.
    """
    with kvstore_process(memory=memory) as (url, _):
        yield url


@contextmanager
def kvstore_process(*, memory: str) -> Iterator[tuple[str, int]]:
    """As `kvstore_server`; yields its URL and its process id."""
    with TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "kvstore", "serve", "--port", "0", "--disk", "0"]
        command += ["--memory", memory, "--data-dir", directory]
        with running(command) as process:
            assert process.stdout is not None, "`running` pipes it"
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError(f"the server did not start: it printed {line!r}")
            yield line.removeprefix("listening on ").strip(), process.pid


@contextmanager
def redis_server() -> Iterator[int]:
    """A Redis server that persists nothing; yields its port. Needs `redis-server` on the path."""
    with redis_process() as (port, _):
        yield port


@contextmanager
def redis_process(*, memory: str = "2gb") -> Iterator[tuple[int, int]]:
    """As `redis_server`; yields its port and its process id.

    Args:
        memory: What it may take, answers that wait to be sent included; 0 is no limit.
    """
    program = shutil.which("redis-server")
    assert program is not None, "the caller has looked for it"
    with TemporaryDirectory() as directory:
        port = free_port()
        config = Path(directory) / "redis.conf"
        config.write_text(_REDIS_CONFIG.format(port=port, directory=directory, memory=memory), "utf-8")
        with running([program, str(config)]) as process:
            wait_for(port, process)
            yield port, process.pid


@contextmanager
def rclone_server(directory: Path) -> Iterator[dict[str, Any] | None]:
    """A server of S3 over files; yields settings of a bucket in it, None where there is no rclone.

    Args:
        directory: Where the files go.
    """
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        yield None
        return
    access_key, secret_key, port = "accesskey1", "secretkey12345678", free_port()
    (directory / "bench").mkdir(parents=True)
    command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{access_key},{secret_key}"]
    command += ["--vfs-cache-mode", "off", "--config", os.devnull, "--log-level", "ERROR", str(directory)]
    with running(command) as process:
        wait_for(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        yield {"bucket": "bench", "endpoint_url": endpoint, "access_key": access_key, "secret_key": secret_key}


@contextmanager
def running(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: int | None = None,
    quiet: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped when the block ends, however it ends.

    Args:
        command: What to run; its output is piped.
        environment: Added to this process's.
        stdin: As `subprocess` takes it.
        quiet: Whether what it writes to its standard error is thrown away.
    """
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        env={**os.environ, **(environment or {})},
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[str]) -> None:
    """Wait until a process listens.

    Raises:
        RuntimeError: It ends before, or takes too long.
    """
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")
