"""The LMCache connector in real LMCache: its L2 adapter alone, in LMCache's server behind vLLM, and in its engine.

Run by `make test-engines` in an environment with LMCache and vLLM.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tests.conftest import Serve
from tests.engines.lmcache_engine import CHUNK
from tests.engines.lmcache_signatures import record
from tests.lmcache_double import RECORD, Controllers

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = Path(os.environ.get("KVSTORE_TEST_MODEL", ROOT / "kvstore" / "demo" / "shakespeare-llama"))
CHUNK_TOKENS = 64
ENVIRON = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class Child:
    """A process of an engine, whose output goes to a file; it is stopped by its id."""

    def __init__(
        self, command: Sequence[str], log: Path, environ: Mapping[str, str] = MappingProxyType({}), **pipes: Any
    ) -> None:
        self.log = log
        engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stderr=out,
                env={**os.environ, **ENVIRON, **engine, **environ},
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

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")


Start = Callable[..., Any]


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in reversed(started):
        child.stop()


def wait_for(what: Callable[[], Any], child: Child, limit_s: float = 120.0) -> Any:
    """What a call returns as soon as it is true."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        assert child.process.poll() is None, child.text()[-3000:]
        with suppress(OSError):
            if found := what():
                return found
        time.sleep(0.2)
    raise AssertionError(f"nothing after {limit_s} s: {child.text()[-3000:]}")


class LMCacheServer:
    """`lmcache server` with our L2 adapter, started by the example."""

    def __init__(self, children: list[Child], log: Path, ports: tuple[int, int], url: str) -> None:
        self.port, self._http_port = ports
        ours = {
            "LMCACHE_PORT": str(self.port),
            "LMCACHE_HTTP_PORT": str(self._http_port),
            "CHUNK_TOKENS": str(CHUNK_TOKENS),
            # This machine may be busy with compiling vLLM's kernels.
            "LOOKUP_DEADLINE_S": "10",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.child = Child([str(ROOT / "examples" / "lmcache_server.sh"), url], log, ours)
        children.append(self.child)
        wait_for(lambda: self.ask("/healthcheck"), self.child)

    def ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def adapter(self) -> dict[str, Any]:
        """What our adapter says of itself."""
        [status] = json.loads(self.ask("/status"))["storage_manager"]["l2_adapters"]
        return dict(status)

    def counter(self, name: str) -> float:
        """Value of a counter on LMCache's `/metrics`."""
        found = re.search(rf"^kvstore_lmcache_{name}_total (\S+)$", self.ask("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0


class Engine:
    """vLLM as a process that prefills through an LMCache server."""

    def __init__(self, children: list[Child], log: Path, port: int) -> None:
        command = [sys.executable, str(HERE / "vllm_engine.py")]
        self.child = Child(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(self.child)
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
        settings = {
            "model": str(MODEL),
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

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int = 16) -> list[dict[str, Any]]:
        """Greedy answers, one prompt after the other: `tokens`, and `cached` tokens of the prompt."""
        return [self.ask({"prompts": [list(prompt)], "tokens": tokens})[0] for prompt in prompts]

    def stop(self) -> None:
        self.child.stop()


@pytest.fixture
def ports(unused_ports: Callable[[int], list[int]]) -> tuple[int, int]:
    first, second = unused_ports(2)
    return first, second


@pytest.fixture
def unused_ports() -> Callable[[int], list[int]]:
    import socket

    def find(count: int) -> list[int]:
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        found = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        return found

    return find


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 1000) for _ in range(length)] for length in lengths]


# The contract.


def test_lmcache_is_what_was_recorded() -> None:
    assert record() == RECORD


# The L2 adapter alone, made and called as LMCache's controllers do.


def real_adapter(**params: Any) -> Any:
    import argparse

    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import add_l2_adapters_args, parse_args_to_l2_adapters_config

    parser = argparse.ArgumentParser()
    add_l2_adapters_args(parser)
    plugin = {
        "type": "plugin",
        "module_path": "kvstore.connectors.lmcache",
        "class_name": "KvstoreL2Adapter",
        "adapter_params": params,
    }
    config = parse_args_to_l2_adapters_config(parser.parse_args(["--l2-adapter", json.dumps(plugin)]))
    return create_l2_adapter(config.adapters[0])


def real_buffer(tensor: torch.Tensor) -> Any:
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    raw = tensor.contiguous().view(-1).view(torch.uint8)
    metadata = MemoryObjMetadata(
        shape=tensor.shape,
        dtype=tensor.dtype,
        address=0,
        phy_size=raw.numel(),
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=[tensor.shape],
        dtypes=[tensor.dtype],
    )
    return TensorMemoryObj(raw_data=raw, metadata=metadata, parent_allocator=None)


class RealControllers(Controllers):
    """The double's controllers, with LMCache's own bitmaps."""

    def _bits(self, task: int, fd: int, query: Any) -> list[bool]:
        found = None
        while found is None:
            self._wait(fd)
            found = query(task)
        return [bool(found.test(number)) for number in range(self.asked)]

    asked = 0


@pytest.mark.parametrize(
    ("params", "error_max"),
    [
        ({}, 0.0),
        ({"pipeline": "splitzip"}, 0.0),
        ({"local_memory": "64MiB"}, 0.0),
        ({"pipeline": "ladder-packed", "store_derived": True, "head_dim": 64}, 0.05),
    ],
)
def test_the_adapter_in_real_lmcache_loads_what_it_stored(
    serve: Serve, params: dict[str, Any], error_max: float
) -> None:
    from lmcache.v1.distributed.api import ObjectKey

    url = serve().url
    truth = [torch.randn(2, 4, 256, 128).to(torch.bfloat16) for _ in range(3)]
    keys = [
        ObjectKey(chunk_hash=bytes([number]) * 32, model_name="org/tiny", kv_rank=0x01000100) for number in range(4)
    ]
    writer = real_adapter(url=url, **params)
    assert RealControllers(writer).store(keys[:3], [real_buffer(one) for one in truth]) == 3 * truth[0].nbytes
    assert writer.get_usage().total_bytes_used == 3 * truth[0].nbytes
    writer.close()
    reader = real_adapter(url=url, **params)
    calls = RealControllers(reader)
    calls.asked = 4
    assert calls.look_up(keys, {0: truth[0]}) == [True, True, True, False]
    calls.asked = 3
    buffers = [real_buffer(torch.zeros_like(one)) for one in truth]
    assert calls.load(keys[:3], buffers) == [True, True, True]
    for buffer, one in zip(buffers, truth, strict=True):
        error = (buffer.tensor.float() - one.float()).square().sum() / one.float().square().sum()
        assert error <= error_max
    reader.close()


# LMCache's engine without vLLM, a process each for storing and loading.


class Program:
    """Runs LMCache's engine over a configuration of its own."""

    def __init__(self, folder: Path, url: str, **params: Any) -> None:
        settings = "".join(
            f"  remote_storage_plugin.kvstore.{name}: {json.dumps(value)}\n"
            for name, value in ({"url": url} | params).items()
        )
        self._config = folder / "lmcache.yaml"
        self._config.write_text((ROOT / "examples" / "lmcache_engine.yaml").read_text().partition("  #")[0] + settings)
        self._log = folder / "engine.log"

    def run(self, command: str, tokens: int = 600) -> dict[str, Any]:
        """What the program answers."""
        program = [sys.executable, str(HERE / "lmcache_engine.py"), str(self._config), command, str(tokens)]
        child = Child(program, self._log, stdout=subprocess.PIPE)
        try:
            out, _ = child.process.communicate(timeout=180)
        finally:
            child.kill()
        assert child.process.returncode == 0, child.text()[-3000:]
        return dict(json.loads(out))


def test_a_fresh_engine_loads_what_another_stored_to_the_last_token(serve: Serve, tmp_path: Path) -> None:
    program = Program(tmp_path, serve().url)
    program.run("store")
    found = program.run("load")
    assert found["connected"]
    assert (found["found"], found["loaded"], found["equal"]) == (600, 600, True), "two chunks and a part of one"


def test_a_lossy_profile_in_the_engine_keeps_errors_small(serve: Serve, tmp_path: Path) -> None:
    program = Program(tmp_path, serve().url, pipeline="ladder-packed", store_derived=True)
    program.run("store", 2 * CHUNK)
    found = program.run("load", 2 * CHUNK)
    assert (found["loaded"], found["equal"]) == (2 * CHUNK, False)
    assert 0 < found["relative_error"] < 0.05


def test_the_engine_runs_without_the_server(serve: Serve, tmp_path: Path) -> None:
    process = serve()
    program = Program(tmp_path, process.url)
    program.run("store")
    process.kill()
    found = program.run("load")
    assert (found["connected"], found["loaded"]) == (True, 0)


def test_the_engine_stops_at_start_where_it_is_told_so(serve: Serve, tmp_path: Path) -> None:
    process = serve()
    process.kill()
    program = Program(tmp_path, process.url, fail_open=False)
    assert "start it with 'kvstore serve'" in program.run("load")["refused"]


# vLLM -> LMCache's server -> our adapter -> kvstore, and all but the last fresh on the reading side.


def test_vllm_reads_through_a_fresh_lmcache_what_another_stored(
    serve: Serve, children: list[Child], tmp_path: Path, ports: tuple[int, int]
) -> None:
    url = serve().url
    asked = prompts([300, 1000])
    writer = LMCacheServer(children, tmp_path / "lmcache-1.log", ports, url)
    engine = Engine(children, tmp_path / "vllm-1.log", writer.port)
    expected = engine.generate(asked)
    assert [one["cached"] for one in expected] == [0, 0]
    whole = [len(prompt) // CHUNK_TOKENS for prompt in asked]
    wait_for(lambda: writer.adapter().get("stored_chunks", 0) == sum(whole), writer.child)
    engine.stop()
    writer.child.stop()

    reader = LMCacheServer(children, tmp_path / "lmcache-2.log", ports, url)
    engine = Engine(children, tmp_path / "vllm-2.log", reader.port)
    found = engine.generate(asked)
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
    assert [one["cached"] for one in found] == [chunks * CHUNK_TOKENS for chunks in whole]
    status = reader.adapter()
    assert status["loaded_chunks"] == sum(whole)
    assert reader.counter("loaded_chunks") == sum(whole)
    assert "stored_chunks" not in status, "what was loaded is not stored again"


def test_vllm_computes_what_a_killed_server_cannot_give(
    serve: Serve, children: list[Child], tmp_path: Path, ports: tuple[int, int]
) -> None:
    process = serve()
    asked = prompts([300], seed=1)
    writer = LMCacheServer(children, tmp_path / "lmcache-1.log", ports, process.url)
    engine = Engine(children, tmp_path / "vllm-1.log", writer.port)
    expected = engine.generate(asked)
    wait_for(lambda: writer.adapter().get("stored_chunks", 0) == 300 // CHUNK_TOKENS, writer.child)
    engine.stop()
    writer.child.stop()
    process.kill()

    reader = LMCacheServer(children, tmp_path / "lmcache-2.log", ports, process.url)
    engine = Engine(children, tmp_path / "vllm-2.log", reader.port)
    found = engine.generate(asked)
    assert found[0]["tokens"] == expected[0]["tokens"]
    assert found[0]["cached"] == 0
    status = reader.adapter()
    assert status["missed_breaker_chunks"] >= 300 // CHUNK_TOKENS
    assert status["errors"] >= 1
