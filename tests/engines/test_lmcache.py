"""The LMCache connector in real LMCache: its L2 adapter alone, and its remote connector in LMCache's engine.

Run by `make test-engines` in an environment with LMCache. The adapter behind vLLM is in `test_lmcache_chain`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.vllm_engine import ROOT
from tests.conftest import Serve
from tests.engines.lmcache_chain import Child
from tests.engines.lmcache_engine import CHUNK
from tests.engines.lmcache_signatures import record
from tests.lmcache_double import RECORD, Controllers

HERE = Path(__file__).parent


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
