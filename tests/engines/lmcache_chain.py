"""vLLM and `lmcache server` as processes, and a link between LMCache and kvstore that can be slow or break."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.engines.conftest import ROOT
from tests.tcp_relay import Relay

HERE = Path(__file__).parent
CHUNK_TOKENS = 64
ENVIRON = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


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
                env={**os.environ, **ENVIRON, **environ},
                cwd=log.parent,
                text=True,
                start_new_session=True,
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

    def __init__(self, children: list[Child], log: Path, url: str, **params: Any) -> None:
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


class Engine:
    """vLLM as a process that prefills through an LMCache server."""

    def __init__(self, children: list[Child], log: Path, port: int, model: Path) -> None:
        command = [sys.executable, str(HERE / "vllm_engine.py")]
        self.child = Child(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(self.child)
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
        settings = {
            "model": str(model),
            "dtype": "bfloat16",
            "max_model_len": 2048,
            "enforce_eager": True,
            "block_size": 32,
            "max_num_seqs": 8,
            "kv_transfer": transfer,
        }
        assert self.ask(settings) == {"ready": True}

    def ask(self, command: dict[str, Any]) -> Any:
        assert self.child.process.stdin is not None
        assert self.child.process.stdout is not None
        self.child.process.stdin.write(json.dumps(command) + "\n")
        self.child.process.stdin.flush()
        line = self.child.process.stdout.readline()
        assert line, self.child.text()[-3000:]
        return json.loads(line)

    def generate(self, prompts: Iterable[Sequence[int]], tokens: int = 16) -> list[dict[str, Any]]:
        """Greedy answers, one prompt after the other: `tokens`, and `cached` tokens of the prompt."""
        return [self.ask({"prompts": [list(prompt)], "tokens": tokens})[0] for prompt in prompts]

    def reset(self) -> None:
        """Empty the engine's own cache."""
        assert self.ask({"reset": True})["reset"]

    def stop(self) -> None:
        self.child.stop()


class _Link(Relay):
    """A relay that can also be slow, and lead to another port."""

    bytes_per_s = 1_000_000

    def lead_to(self, port: int) -> None:
        self._port = port

    async def _spoil(self, piece: bytes) -> bytes:
        if self.fault != "slow":
            return await super()._spoil(piece)
        await asyncio.sleep(len(piece) / self.bytes_per_s)
        return piece


class Link:
    """A relay in a loop of its own, so that tests need none."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._relay = _Link(port)
        self._server = self._run(asyncio.start_server(self._relay.serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def answer_bytes(self) -> int:
        """Bytes of answers that passed."""
        return self._relay.answer_bytes

    @property
    def fault(self) -> str:
        """What happens to answers."""
        return self._relay.fault

    def set(self, fault: str, after_bytes: int = 0) -> None:
        """What happens to answers from now on, once so many bytes have passed."""
        self._relay.after_bytes = after_bytes
        self._relay.fault = fault

    def lead_to(self, port: int) -> None:
        """End every connection; new ones lead to another port."""
        self._relay.lead_to(port)
        self.drop()

    def drop(self) -> None:
        """End every connection, and lose what is on its way."""
        self._run(self._relay.stop())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self.drop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


def page(seed: int, tokenizer: Any, tokens: int) -> list[int]:
    """A look-up page of so many tokens, as the model was trained on."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(3, 8))) for _ in range(200)]
    lines = [f"The code of {word} is {rng.randrange(100, 9999)}." for word in words]
    ids: list[int] = tokenizer("Records:\n" + "\n".join(lines))["input_ids"][: tokens - 20]
    question: list[int] = tokenizer(f"\nQuestion: What is the code of {words[3]}?\nAnswer:")["input_ids"]
    return ids[: tokens - len(question)] + question


def resources(pid: int) -> dict[str, int]:
    """Threads, file descriptors and resident MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(re.findall(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[0]) for name in ("Threads", "VmRSS")}
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"threads": found["Threads"], "fds": fds, "rss_mib": found["VmRSS"] >> 10}
