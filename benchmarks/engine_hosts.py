"""Processes of the engines' benchmark: the engines on one side of a link, the stores on the other."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine_link import ENGINE_ADDRESS, STORE_ADDRESS, Link
from benchmarks.harness import ROOT
from benchmarks.servers import running
from benchmarks.vllm_engine import VllmEngine, engine_environ, kvstore_transfer, lmcache_transfer

CHUNK_TOKENS = 256

KVSTORE_PORT = 8420
_LMCACHE_PORT, _LMCACHE_HTTP_PORT = 6556, 9556
_START_S = 240.0


def has_lmcache(python: Path) -> bool:
    """Whether LMCache is installed beside vLLM."""
    return (python.parent / "lmcache").exists()


@contextmanager
def engine(
    link: Link,
    python: Path,
    model: Path,
    name: str,
    transfer: Mapping[str, Any] | None,
    *,
    beside_store: bool = False,
    **settings: Any,
) -> Iterator[VllmEngine]:
    """An engine on its side of the link, or on the store's.

    Args:
        link: The link.
        python: Interpreter of its environment.
        model: The model that it serves.
        name: For its log.
        transfer: Arguments of `KVTransferConfig`; None runs without a connector.
        beside_store: On which side it runs.
        settings: Further arguments of `vllm.LLM`.
    """
    with TemporaryDirectory(prefix="kvstore-engines-") as folder:
        log = Path(folder, f"{name}.log")
        # By default vLLM binds to one logical core of each physical one.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        address, side = (STORE_ADDRESS, link.store_side) if beside_store else (ENGINE_ADDRESS, link.engine_side)
        variables = {"VLLM_HOST_IP": address, "VLLM_CPU_OMP_THREADS_BIND": cores}
        started = VllmEngine(python, model, log, transfer, before=side, variables=variables, **settings)
        try:
            yield started
        finally:
            started.stop()


def to_kvstore(port: int = KVSTORE_PORT, **options: Any) -> dict[str, Any]:
    """How an engine uses the kvstore server behind the link; see `kvstore_transfer`."""
    return kvstore_transfer(kvstore_url(port), **options)


def kvstore_url(port: int = KVSTORE_PORT) -> str:
    """Where a kvstore server behind the link listens."""
    return f"http://{STORE_ADDRESS}:{port}"


def to_lmcache() -> dict[str, Any]:
    """How an engine uses LMCache's server behind the link."""
    return lmcache_transfer(STORE_ADDRESS, _LMCACHE_PORT)


@contextmanager
def kvstore_server(
    link: Link,
    port: int = KVSTORE_PORT,
    program: Sequence[str] = ("kvstore", "serve"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A kvstore server on its side of the link, in memory.

    Args:
        link: The link.
        port: Where it listens.
        program: Module that serves, and its first arguments.
        environment: Added to this process's.
    """
    with TemporaryDirectory() as folder:
        command = [*link.store_side, sys.executable, "-m", *program, "--host", STORE_ADDRESS, "--insecure"]
        command += ["--port", str(port), "--disk", "0", "--data-dir", folder]
        with running(command, environment=environment, quiet=True) as process:
            assert process.stdout is not None, "`running` pipes it"
            if not process.stdout.readline().startswith("listening on "):
                raise RuntimeError("the kvstore server did not start")
            yield


def push_profiles(link: Link, folder: Path, namespace: str, port: int) -> None:
    """Give a server behind the link the set of profiles in a folder."""
    command = [*link.store_side, sys.executable, "-m", "kvstore", "profiles", "push", str(folder)]
    command += ["--url", f"http://{STORE_ADDRESS}:{port}", "--namespace", namespace]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the profiles were not pushed: {done.stderr.strip()}")


@contextmanager
def lmcache_server(link: Link, python: Path) -> Iterator[None]:
    """LMCache's server (MP mode) on its side of the link, in memory."""
    command = [*link.store_side, str(python.parent / "lmcache"), "server", "--host", STORE_ADDRESS]
    command += ["--port", str(_LMCACHE_PORT), "--http-host", STORE_ADDRESS, "--http-port", str(_LMCACHE_HTTP_PORT)]
    command += ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--chunk-size", str(CHUNK_TOKENS)]
    command += ["--supported-transfer-mode", "auto"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=engine_environ({"VLLM_HOST_IP": ENGINE_ADDRESS}),
        process_group=0,
    )
    try:
        probe = [*link.store_side, sys.executable, "-c", f"import {__name__} as hosts; hosts.ask_lmcache()"]
        _wait_until(lambda: subprocess.run(probe, cwd=ROOT, capture_output=True, check=False).returncode == 0)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask_lmcache() -> None:
    """Ask LMCache's server whether it is there; it can be reached from within the link only."""
    urllib.request.urlopen(f"http://{STORE_ADDRESS}:{_LMCACHE_HTTP_PORT}/healthcheck", timeout=5).close()


def _wait_until(done: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + _START_S
    while not done():
        if time.monotonic() > ends_s:
            raise RuntimeError(f"nothing after {_START_S:.0f} s")
        time.sleep(0.2)
