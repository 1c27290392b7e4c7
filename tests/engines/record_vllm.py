"""Writes tests/vllm_signatures.json: the connector interface of the installed vLLM, which the contract tests use.

Run it in the engine's environment: `.venv-vllm/bin/python -m tests.engines.record_vllm`.
"""

import inspect
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "vllm_signatures.json"


def record() -> dict[str, Any]:
    """Signatures of the classes that the connector derives from, by module and class."""
    import vllm
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
    from vllm.distributed.kv_transfer.kv_connector.v1 import base, metrics
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    classes = [
        base.KVConnectorBase_V1,
        base.SupportsHMA,
        base.KVConnectorMetadata,
        base.KVConnectorWorkerMetadata,
        metrics.KVConnectorStats,
        metrics.KVConnectorPromMetrics,
    ]
    read = [SchedulerOutput, NewRequestData, CachedRequestData, KVConnectorOutput]
    return {
        "version": vllm.__version__.split("+")[0],
        "roles": [role.name for role in base.KVConnectorRole],
        "classes": {found.__name__: _methods(found) for found in classes},
        "events": {found.__name__: _parameters(found) for found in (BlockStored, BlockRemoved)},
        "fields": {found.__name__: sorted(found.__annotations__) for found in read}
        | {"Request": sorted(_request_attributes(Request))},
    }


def _methods(found: type) -> dict[str, Any]:
    methods = {}
    for name, value in vars(found).items():
        kind = type(value).__name__
        function = value.__func__ if kind == "classmethod" else value.fget if kind == "property" else value
        if not inspect.isfunction(function) or (name.startswith("_") and name != "__init__"):
            continue
        parameters = [
            [p.name, p.kind.name, p.default is not p.empty] for p in inspect.signature(function).parameters.values()
        ]
        methods[name] = {
            "kind": kind,
            "abstract": getattr(function, "__isabstractmethod__", False),
            "parameters": parameters,
        }
    return methods


def _parameters(found: type) -> list[list[Any]]:
    """Names of what a class is made of, and whether they have a default."""
    return [[p.name, p.default is not p.empty] for p in inspect.signature(found).parameters.values()]


def _request_attributes(request: Any) -> set[str]:
    source = inspect.getsource(request)
    words = {line.split("self.")[1].split(":")[0].split(" ")[0] for line in source.splitlines() if "self." in line}
    properties = {name for name, value in vars(request).items() if isinstance(value, property)}
    return {word for word in words if word.isidentifier()} | properties


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
