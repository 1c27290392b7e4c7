"""`lmcache server` as a process, and vLLM as one that prefills through it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from benchmarks.vllm_engine import ROOT, VllmEngine, engine_environ, lmcache_transfer
from tests.engines.conftest import MODEL

CHUNK_TOKENS = 64


class Child:
    """A process of an engine, whose output goes to a file; it is stopped by its id."""

    def __init__(
        self, command: Sequence[str], log: Path, environ: Mapping[str, str] = MappingProxyType({}), **pipes: Any
    ) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stderr=out,
                env=engine_environ({"OMP_NUM_THREADS": "1", **environ}),
                cwd=log.parent,
                text=True,
                process_group=0,
                **{"stdout": out} | pipes,
            )

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.kill()

    def kill(self) -> None:
        """End it with every process that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")


class Stoppable(Protocol):
    """A process of a test."""

    def stop(self) -> None:
        """End it; safe to call twice."""
        ...


def wait_for(what: Callable[[], Any], child: Child, limit_s: float = 300.0) -> Any:
    """What a call returns as soon as it is true."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        assert child.process.poll() is None, child.text()[-3000:]
        with suppress(OSError):
            if found := what():
                return found
        time.sleep(0.1)
    raise AssertionError(f"nothing after {limit_s} s: {child.text()[-3000:]}")


def unused_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return found


class LMCacheServer:
    """`lmcache server` with our L2 adapter: started by the example or, with options of the adapter, by itself."""

    def __init__(self, children: list[Stoppable], log: Path, url: str, **params: Any) -> None:
        self.port, self._http_port = unused_ports(2)
        self.child = Child(self._command(url, params), log, self._environ())
        children.append(self.child)

    def ready(self) -> "LMCacheServer":
        """Wait until it serves."""
        wait_for(lambda: self.ask("/healthcheck"), self.child)
        return self

    def _command(self, url: str, params: Mapping[str, Any]) -> list[str]:
        if not params:
            return [str(ROOT / "examples" / "lmcache_server.sh"), url]
        plugin = {
            "type": "plugin",
            "module_path": "kvstore.connectors.lmcache",
            "class_name": "KvstoreL2Adapter",
            "adapter_params": {"url": url, **params},
        }
        settings = f"--host 127.0.0.1 --port {self.port} --http-port {self._http_port} --l1-size-gb 0.5"
        settings += f" --eviction-policy LRU --chunk-size {CHUNK_TOKENS} --supported-transfer-mode auto"
        return ["lmcache", "server", *settings.split(), "--l2-adapter", json.dumps(plugin)]

    def _environ(self) -> dict[str, str]:
        return {
            "LMCACHE_PORT": str(self.port),
            "LMCACHE_HTTP_PORT": str(self._http_port),
            "CHUNK_TOKENS": str(CHUNK_TOKENS),
            # This machine may be busy with compiling vLLM's kernels.
            "LOOKUP_DEADLINE_S": "10",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._http_port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str(answer.read().decode())

    def clear(self) -> None:
        """Empty LMCache's own memory."""
        self.ask("/cache/clear", {})

    def storage(self) -> dict[str, Any]:
        """What LMCache says of its tiers."""
        return dict(json.loads(self.ask("/status"))["storage_manager"])

    def adapter(self) -> dict[str, Any]:
        """What our adapter says of itself."""
        [status] = self.storage()["l2_adapters"]
        return dict(status)

    def threads(self) -> list[str]:
        """Names of the threads in its process, ours begin with `kvstore`."""
        return sorted(re.findall(r"<\w+\(([^,]+), started", self.ask("/threads")))

    def counter(self, name: str) -> float:
        """Value of a counter on LMCache's `/metrics`."""
        found = re.search(rf"^kvstore_lmcache_{name}_total (\S+)$", self.ask("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0


def chained_engine(children: list["Stoppable"], log: Path, port: int) -> VllmEngine:
    """vLLM as a process that prefills through an LMCache server."""
    variables = {"OMP_NUM_THREADS": "1"}
    engine = VllmEngine(Path(sys.executable), MODEL, log, lmcache_transfer("127.0.0.1", port), variables=variables)
    children.append(engine)
    return engine


def resources(pid: int) -> dict[str, int]:
    """Threads, file descriptors and resident MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(re.findall(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[0]) for name in ("Threads", "VmRSS")}
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"threads": found["Threads"], "fds": fds, "rss_mib": found["VmRSS"] >> 10}
