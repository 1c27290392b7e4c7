"""LMCache as far as the connector sees it, made from its recorded signatures, for tests that run without it.

Its base classes have the methods and abstract methods of the record; the few that do something do it here again. What
LMCache does with a connector is in the `Runner`s: the calls of its controllers, in their order.
"""

import json
import os
import re
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

RECORD = json.loads((Path(__file__).parent / "lmcache_signatures.json").read_text())
_LINE = re.compile(r"(abstract )?(async )?def (\w+)\((.*)\)")
_OURS = "kvstore.connectors.lmcache"


class Bitmap:
    """Bits by number."""

    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, number: int) -> None:
        self._bits[number] = True

    def test(self, number: int) -> bool:
        return self._bits[number]

    def bits(self) -> list[bool]:
        return list(self._bits)


class StoreResult(int):
    """Bytes that were stored, -1 for a failure."""

    def __new__(cls, success: bool, bytes_transferred: int) -> "StoreResult":
        return super().__new__(cls, bytes_transferred if success else -1)


class Notifier:
    """A file descriptor that becomes readable."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)


class Buffer:
    """A `MemoryObj`: a tensor, its description, and how many hold it."""

    def __init__(self, tensor: torch.Tensor, *, shapes: bool = False) -> None:
        self.raw_data = tensor.contiguous().view(-1).view(torch.uint8)
        self.meta = self.metadata = SimpleNamespace(
            shape=tensor.shape,
            dtype=tensor.dtype,
            shapes=[tensor.shape] if shapes else None,
            dtypes=[tensor.dtype] if shapes else None,
        )
        self.holders = 1

    @property
    def byte_array(self) -> memoryview:
        return self.raw_data.numpy().data

    @property
    def tensor(self) -> torch.Tensor:
        found: torch.Tensor = self.raw_data.view(self.meta.dtype).view(self.meta.shape)
        return found

    def ref_count_down(self) -> None:
        self.holders -= 1


class ObjectKey(SimpleNamespace):
    """Key of a chunk in MP mode."""

    def __init__(self, chunk_hash: bytes, model_name: str = "org/tiny", kv_rank: int = 0x01000100, **rest: Any) -> None:
        super().__init__(
            chunk_hash=chunk_hash,
            model_name=model_name,
            kv_rank=kv_rank,
            **{"object_group_id": 0, "cache_salt": ""} | rest,
        )


class EngineKey(SimpleNamespace):
    """Key of a chunk in LMCache's engine."""

    def __init__(self, chunk_hash: int, tag: str = "", worker_id: int = 0, world_size: int = 1) -> None:
        super().__init__(model_name="tiny", world_size=world_size, worker_id=worker_id, chunk_hash=chunk_hash, tag=tag)

    def to_string(self) -> str:
        return f"tiny@{self.world_size}@{self.worker_id}@{self.chunk_hash:x}@bfloat16" + (
            f"@{self.tag}" if self.tag else ""
        )


class Memory:
    """A `LocalCPUBackend`: hands out buffers, up to a number."""

    def __init__(self, buffers: int = 1000) -> None:
        self.left = buffers
        self.given: list[Buffer] = []
        self.closed = False

    def allocate(self, shapes: Sequence[Any], dtypes: Sequence[Any], fmt: Any) -> Buffer | None:
        if not self.left:
            return None
        self.left -= 1
        self.given.append(Buffer(torch.zeros(shapes[0], dtype=dtypes[0])))
        return self.given[-1]

    def close(self) -> None:
        self.closed = True


class _RemoteConnector:
    """What LMCache's base class of remote connectors does by itself."""

    def __init__(self, config: Any, metadata: Any) -> None:
        self.meta_shapes = metadata.get_shapes()
        self.meta_dtypes = metadata.get_dtypes()
        self.meta_fmt = MEMORY_FORMAT["KV_MLA_FMT" if metadata.use_mla else "KV_2LTD"]
        self.full_chunk_size_bytes = self.meta_shapes[0].numel() * self.meta_dtypes[0].itemsize
        self.single_token_size = self.full_chunk_size_bytes // metadata.chunk_size

    def reshape_partial_chunk(self, memory_obj: Buffer, bytes_read: int) -> Buffer:
        if not bytes_read or bytes_read % self.single_token_size or bytes_read > self.full_chunk_size_bytes:
            raise ValueError(f"{bytes_read} bytes are illegal")
        shape = list(memory_obj.meta.shape)
        shape[2] = bytes_read // self.single_token_size
        memory_obj.raw_data = memory_obj.raw_data[:bytes_read]
        memory_obj.meta.shape = torch.Size(shape)
        return memory_obj


class _L2Adapter:
    """What LMCache's base class of L2 adapters does by itself."""

    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self.stored: list[Any] = []
        self.accessed: list[Any] = []
        self.deleted: list[Any] = []

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.stored += zip(keys, sizes, strict=True)

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        self.accessed += keys

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        self.deleted += zip(keys, sizes, strict=True)


class _ConnectorAdapter:
    def __init__(self, schema: str = "") -> None:
        self.schema = schema


MEMORY_FORMAT: Any = Enum(  # type: ignore[misc]
    "MemoryFormat", RECORD["members"]["lmcache.v1.memory_management:MemoryFormat"]
)


def signatures(name: str) -> Iterator[tuple[str, bool, bool, list[str]]]:
    """Name, whether it is abstract and asynchronous, and parameters of every recorded method of a class."""
    for line in RECORD["classes"][name]:
        found = _LINE.fullmatch(line)
        assert found is not None, line
        yield found[3], bool(found[1]), bool(found[2]), [part for part in found[4].split(", ") if part]


def _base(name: str, does: type) -> type:
    """A base class with the recorded abstract methods."""
    members = {method: abstractmethod(lambda self: None) for method, abstract, _, _ in signatures(name) if abstract}
    return type(name.partition(":")[2], (does, ABC), members)


@contextmanager
def installed() -> Iterator[Any]:
    """`kvstore.connectors.lmcache`, imported over the double."""
    modules: dict[str, dict[str, Any]] = {
        "lmcache.lmcache_native": {"Bitmap": Bitmap},
        "lmcache.v1.distributed.internal_api": {"L2StoreResult": StoreResult},
        "lmcache.v1.distributed.l2_adapters.base": {
            "L2AdapterInterface": _base("lmcache.v1.distributed.l2_adapters.base:L2AdapterInterface", _L2Adapter)
        },
        "lmcache.v1.platform": {"create_event_notifier": Notifier},
        "lmcache.v1.memory_management": {"MemoryFormat": MEMORY_FORMAT},
        "lmcache.v1.storage_backend.connector": {
            "ConnectorAdapter": _base("lmcache.v1.storage_backend.connector:ConnectorAdapter", _ConnectorAdapter),
            "extract_plugin_type": lambda name: name.split(".", 1)[0],
        },
        "lmcache.v1.storage_backend.connector.base_connector": {
            "RemoteConnector": _base(
                "lmcache.v1.storage_backend.connector.base_connector:RemoteConnector", _RemoteConnector
            )
        },
    }
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lmcache"}
    ours = (_OURS, f"{_OURS}_engine")
    for name in (*before, *ours):
        sys.modules.pop(name, None)
    for name, members in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(members)
    try:
        __import__(_OURS)
        yield sys.modules[_OURS]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lmcache" or name in ours]:
            del sys.modules[name]
        sys.modules.update(before)


class Controllers:
    """LMCache's store and prefetch controllers: they submit, poll the file descriptors, and ask for results."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        fds = [adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()]
        assert len(set(fds)) == 3, "LMCache tells tasks apart by their file descriptors"
        self._store_fd, self._lookup_fd, self._load_fd = fds

    def store(self, keys: Sequence[Any], buffers: Sequence[Buffer]) -> int:
        """Bytes that a store task says were stored, -1 where it failed."""
        task = self.adapter.submit_store_task(list(keys), list(buffers))
        results: dict[int, StoreResult] = {}
        while task not in results:
            self._wait(self._store_fd)
            results |= self.adapter.pop_completed_store_tasks()
        assert list(results) == [task]
        return int(results[task])

    def look_up(self, keys: Sequence[Any], shapes: Mapping[int, torch.Tensor]) -> list[bool]:
        """Which keys a look-up finds."""
        described = {group: SimpleNamespace(shapes=[like.shape], dtypes=[like.dtype]) for group, like in shapes.items()}
        task = self.adapter.submit_lookup_and_lock_task(list(keys), described)
        return self._bits(task, self._lookup_fd, self.adapter.query_lookup_and_lock_result)

    def load(self, keys: Sequence[Any], buffers: Sequence[Buffer]) -> list[bool]:
        """Which keys were loaded into their buffers."""
        task = self.adapter.submit_load_task(list(keys), list(buffers))
        bits = self._bits(task, self._load_fd, self.adapter.query_load_result)
        self.adapter.submit_unlock(list(keys))
        return bits

    def _bits(self, task: int, fd: int, query: Any) -> list[bool]:
        found = None
        while found is None:
            self._wait(fd)
            found = query(task)
        assert query(task) is None, "a result is given once"
        bits: list[bool] = found.bits()
        return bits

    @staticmethod
    def _wait(fd: int) -> None:
        assert select.select([fd], [], [], 30)[0], "no task ended within 30 s"
        os.eventfd_read(fd)
