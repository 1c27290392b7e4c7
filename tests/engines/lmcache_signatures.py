"""What the connectors for LMCache and vLLM's offloading rely on: run it with new versions to see what has changed.

Usage: python -m tests.engines.lmcache_signatures > tests/lmcache_signatures.json
"""

import importlib
import inspect
import json
import sys
from importlib.metadata import version
from typing import Any

CLASSES = (
    "lmcache.v1.distributed.l2_adapters.base:L2AdapterInterface",
    "lmcache.v1.storage_backend.connector.base_connector:RemoteConnector",
    "lmcache.v1.storage_backend.connector:ConnectorAdapter",
    "lmcache.v1.storage_backend.connector:ConnectorContext",
    "vllm.v1.kv_offload.tiering.base:SecondaryTierManager",
    "vllm.v1.kv_offload.tiering.async_lookup:AsyncLookupManager",
)
FIELDS = (
    "lmcache.v1.distributed.api:ObjectKey",
    "lmcache.v1.distributed.api:MemoryLayoutDesc",
    "lmcache.v1.memory_management:MemoryObjMetadata",
    "vllm.v1.kv_offload.tiering.base:TransferJob",
    "vllm.v1.kv_offload.tiering.base:JobResult",
    "vllm.v1.kv_offload.config:OffloadingConfig",
    "vllm.v1.kv_offload.config:OffloadingGroupConfig",
    "vllm.v1.kv_offload.config:OffloadingCacheConfig",
    "vllm.v1.kv_offload.config:OffloadingParallelConfig",
)
MEMBERS = (
    "lmcache.v1.memory_management:MemoryFormat",
    "vllm.v1.kv_offload.base:LookupResult",
)


def record() -> dict[str, Any]:
    """Methods with their parameters, fields of dataclasses, members of enumerations."""
    return {
        "version": version("lmcache"),
        "classes": {name: _methods(_load(name)) for name in CLASSES},
        "fields": {name: list(inspect.signature(_load(name)).parameters) for name in FIELDS},
        "members": {name: [member.name for member in _load(name)] for name in MEMBERS},
    }


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _methods(found: Any) -> list[str]:
    return [_line(name, method) for name, method in sorted(vars(found).items()) if inspect.isfunction(method)]


def _line(name: str, method: Any) -> str:
    abstract = "abstract " if getattr(method, "__isabstractmethod__", False) else ""
    kind = "async def" if inspect.iscoroutinefunction(method) else "def"
    return f"{abstract}{kind} {name}({', '.join(inspect.signature(method).parameters)})"


if __name__ == "__main__":
    # LMCache writes to standard output while it is imported.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(record(), indent=1), file=answers)
