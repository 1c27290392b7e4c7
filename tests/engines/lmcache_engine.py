"""LMCache's engine as a process, without vLLM: stores or loads the KV cache of a prompt through its own calls.

Usage: lmcache_engine.py CONFIG_YAML store|load TOKENS [SALT]

The cache is made from a seed, so that a second process knows what the first one stored. The answer is one line of JSON.
"""

import json
import os
import sys
from typing import Any

import torch

CHUNK, LAYERS, HEADS, HEAD_DIM = 256, 4, 2, 64


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # LMCache prints; what it prints must not come between the answers.
    os.dup2(2, 1)
    path, command, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    from lmcache.v1.cache_engine import LMCacheEngineBuilder

    try:
        engine, memory = _build(path)
    except (Exception, SystemExit) as exc:
        # Threads of LMCache that have been started by now would keep the process alive.
        print(json.dumps({"refused": repr(exc)}), file=answers)
        os._exit(0)
    ids = torch.arange(tokens) * 7 % 1000
    generator = torch.Generator().manual_seed(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    truth = torch.randn(2, LAYERS, tokens, HEADS * HEAD_DIM, generator=generator).to(torch.bfloat16)
    answer: dict[str, Any] = {}
    if command == "store":
        memory.kv[:, :, :tokens] = truth
        engine.store(ids, kvcaches=None, slot_mapping=torch.arange(tokens))
        # Closing LMCache must see through what is still on its way to the server.
    else:
        answer["found"] = engine.lookup(ids)
        loaded = int(engine.retrieve(ids, kvcaches=None, slot_mapping=torch.arange(tokens)).sum())
        error = (memory.kv[:, :, :loaded].float() - truth[:, :, :loaded].float()).square().sum()
        answer["loaded"] = loaded
        answer["equal"] = torch.equal(memory.kv[:, :, :loaded], truth[:, :, :loaded])
        answer["relative_error"] = float(error / truth[:, :, :loaded].float().square().sum()) if loaded else 0.0
    answer["backends"] = list(engine.storage_manager.storage_backends)
    answer["connected"] = _remote(engine).connection is not None
    LMCacheEngineBuilder.destroy("test")
    print(json.dumps(answer), file=answers)


def _build(path: str) -> tuple[Any, Any]:
    from lmcache.utils import mock_up_broadcast_fn, mock_up_broadcast_object_fn
    from lmcache.v1.cache_engine import LMCacheEngineBuilder
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector
    from lmcache.v1.metadata import LMCacheMetadata

    class Memory(MockGPUConnector):  # type: ignore[misc]
        """In the place of a GPU: one tensor in host memory."""

        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__(shape)
            self.kv = torch.zeros(2, LAYERS, 1 << 14, HEADS * HEAD_DIM, dtype=torch.bfloat16)

        def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
            for buffer, start, end in zip(memory_objs, starts, ends, strict=True):
                buffer.tensor.copy_(self.kv[:, :, start:end])

        def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
            for buffer, start, end in zip(memory_objs, starts, ends, strict=True):
                self.kv[:, :, start:end].copy_(buffer.tensor)

    config = LMCacheEngineConfig.from_file(path)
    metadata = LMCacheMetadata(
        model_name="tiny",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, HEAD_DIM),
        chunk_size=CHUNK,
        role="worker",
    )
    memory = Memory(metadata.kv_shape)
    engine = LMCacheEngineBuilder.get_or_create(
        "test", config, metadata, memory, mock_up_broadcast_fn, mock_up_broadcast_object_fn
    )
    engine.post_init()
    return engine, memory


def _remote(engine: Any) -> Any:
    return next(one for name, one in engine.storage_manager.storage_backends.items() if "Remote" in name)


if __name__ == "__main__":
    main()
