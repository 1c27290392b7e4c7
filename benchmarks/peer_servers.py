"""Servers of benchmarks.peers, as far as they are installed: each its own process for as long as a block runs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.peer_stores import (
    BlockingRedisStore,
    KvstoreStore,
    LmcacheStore,
    MooncakeStore,
    RedisStore,
    Store,
)
from benchmarks.servers import free_port, kvstore_process, redis_process, running, wait_for

_LMCACHE = ROOT / ".venv-lmcache" / "bin" / "lmcache_server"
_MOONCAKE = ROOT / ".venv-peers" / "bin" / "mooncake_master"
_UNTRACKED = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
_OUTPUT_BYTES = 1 << 20


@contextmanager
def kvstore_store(memory_bytes: int) -> Iterator[list[Store]]:
    """kvstore, with a memory tier of so many bytes and no other."""
    with kvstore_process(memory=str(memory_bytes)) as (url, pid):
        yield [KvstoreStore(url, [pid])]


@contextmanager
def redis_stores(_: int) -> Iterator[list[Store]]:
    """Redis, with two clients."""
    with redis_process(memory="0") as (port, pid):
        yield [RedisStore(port, [pid]), BlockingRedisStore(port, [pid])]


@contextmanager
def lmcache_store(_: int) -> Iterator[list[Store]]:
    """LMCache's server, which keeps whatever it is given in memory."""
    port = free_port()
    command = [str(program("lmcache_server", _LMCACHE)), "127.0.0.1", str(port), "cpu"]
    with running(command, environment=_UNTRACKED, quiet=True) as process:
        wait_for(port, process)
        yield [LmcacheStore(port, [process.pid])]


@contextmanager
def mooncake_store(memory_bytes: int) -> Iterator[list[Store]]:
    """Mooncake Store: its master, a process that holds the memory, and one that drives clients."""
    found = program("mooncake_master", _MOONCAKE)
    assert found is not None, "the caller has looked for it"
    python = found.parent / "python"
    port, metrics_port = free_port(), free_port()
    master = [str(found), f"--rpc_port={port}", f"--metrics_port={metrics_port}", "--default_kv_lease_ttl=60000"]
    with running(master, quiet=True) as process:
        wait_for(port, process)
        with (
            _worker(python, "hold", port, memory_bytes) as holder,
            _worker(python, "drive", port, 0) as driver,
        ):
            yield [MooncakeStore(driver, [process.pid, holder.pid])]


@contextmanager
def _worker(python: Path, role: str, master_port: int, size_bytes: int) -> Iterator["subprocess.Popen[str]"]:
    address, master = f"127.0.0.1:{free_port()}", f"127.0.0.1:{master_port}"
    command = [str(python), "-m", "benchmarks.mooncake_worker", role, address, master, str(size_bytes)]
    with running(command, environment={"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, quiet=True) as worker:
        assert worker.stdout is not None, "the worker is piped"
        for line in worker.stdout:
            if line.startswith("{"):
                break
        else:
            raise RuntimeError(f"{command!r} did not start")
        yield worker


def program(name: str, installed: Path) -> Path | None:
    """A program of its own environment, or one on the path."""
    if installed.exists():
        return installed
    found = shutil.which(name)
    return None if found is None else Path(found)


def missing() -> dict[str, str]:
    """What peers need that are not here: by peer."""
    needs = {
        "redis": ("redis-server", Path(os.devnull + "-none")),
        "lmcache": ("lmcache_server", _LMCACHE),
        "mooncake": ("mooncake_master", _MOONCAKE),
    }
    return {peer: name for peer, (name, installed) in needs.items() if program(name, installed) is None}


def versions() -> dict[str, str]:
    """Versions of the peers that are here."""
    found = {}
    if (redis := shutil.which("redis-server")) is not None:
        told = subprocess.run([redis, "--version"], capture_output=True, text=True, check=True).stdout
        found["redis-server"] = told.split("v=")[1].split()[0]
    packages = {
        "lmcache": ("lmcache_server", _LMCACHE),
        "mooncake-transfer-engine-non-cuda": ("mooncake_master", _MOONCAKE),
    }
    for package, (name, installed) in packages.items():
        if (path := program(name, installed)) is not None:
            python = path.parent / "python" if path == installed else Path(sys.executable)
            asked = f"from importlib.metadata import version; print(version({package!r}))"
            done = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                found[package] = done.stdout.strip()
    return found
