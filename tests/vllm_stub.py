"""vLLM's connector interface without vLLM: modules made from the recorded signatures, for contract tests.

`installed` puts them in place of the engine; the base classes do what the engine's do, as far as the connector sees it.
"""

import abc
import enum
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_signatures.json").read_text())
_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_CONNECTOR = "kvstore.connectors.vllm"


class _Base(abc.ABC):  # noqa: B024
    """What `KVConnectorBase_V1` does beside its abstract methods."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._kv_cache_manager: Any = None
        self._role = role
        self._connector_metadata: Any = None

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._kv_cache_manager = kv_cache_manager

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


@dataclass
class _Stats:
    data: dict[str, Any] = field(default_factory=dict)


class _PromMetrics:
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        self._counter_cls = metric_types["counter"]


def pack(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *rest: Any,
) -> None:
    """A cache-write operation with an order of its own: K transposed within a page, V in pairs of tokens."""
    tokens, dims = key_cache.shape[2:]
    key_pages, value_pages = key_cache.view(*key_cache.shape[:2], -1), value_cache.view(*value_cache.shape[:2], -1)
    where = torch.arange(dims)
    for number, slot in enumerate(slots.tolist()):
        block, token = divmod(slot, tokens)
        key_pages[block][:, where * tokens + token] = keys[number]
        value_pages[block][:, (token // 2) * 2 * dims + where * 2 + token % 2] = values[number]


def _class(name: str, base: type) -> type:
    """A class whose abstract methods are the recorded ones."""
    methods = RECORD["classes"][name]
    abstract = {
        method: abc.abstractmethod(lambda self, *args, **kwargs: None)
        for method, found in methods.items()
        if found["abstract"]
    }
    return abc.ABCMeta(name, (base,), abstract)


def _event_class(name: str) -> type:
    """An event with the recorded fields; those without a default must be given."""
    wanted = RECORD["events"][name]
    required = [(field_name, Any) for field_name, has_default in wanted if not has_default]
    optional = [(field_name, Any, None) for field_name, has_default in wanted if has_default]
    return make_dataclass(name, [*required, *optional])


def _modules() -> dict[str, ModuleType]:
    names = ["vllm", "vllm.distributed", f"{_V1}.base", f"{_V1}.metrics", "vllm.v1.metrics.utils", "vllm._custom_ops"]
    names += ["vllm.v1.attention.backends.cpu_attn", "vllm.distributed.kv_events", "vllm.v1.core.kv_cache_utils"]
    found: dict[str, ModuleType] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    fill: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": RECORD["version"], "_custom_ops": found["vllm._custom_ops"]},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0},
        f"{_V1}.base": {
            "KVConnectorBase_V1": _class("KVConnectorBase_V1", _Base),
            "KVConnectorMetadata": object,
            "KVConnectorWorkerMetadata": _class("KVConnectorWorkerMetadata", abc.ABC),
            "SupportsHMA": _class("SupportsHMA", abc.ABC),
            "KVConnectorRole": enum.Enum("KVConnectorRole", RECORD["roles"], start=0),
        },
        f"{_V1}.metrics": {"KVConnectorStats": _Stats, "KVConnectorPromMetrics": _PromMetrics},
        "vllm.v1.metrics.utils": {
            "create_metric_per_engine": lambda metric, values: {
                index: metric.labels(*labels) for index, labels in values.items()
            }
        },
        "vllm._custom_ops": {"cpu_attn_reshape_and_cache": pack},
        "vllm.distributed.kv_events": {
            "MEDIUM_STORAGE": "STORAGE",
            **{name: _event_class(name) for name in ("BlockStored", "BlockRemoved")},
        },
        "vllm.v1.core.kv_cache_utils": {"maybe_convert_block_hash": lambda found: found},
        "vllm.v1.attention.backends.cpu_attn": {"_get_attn_isa": lambda *args: "test"},
    }
    for name, attributes in fill.items():
        vars(found[name]).update(attributes)
    return found


@contextmanager
def installed() -> Iterator[Any]:
    """The connector's module, imported on top of the recorded interface."""
    assert "vllm" not in sys.modules, "contract tests run without the engine"
    modules = _modules()
    sys.modules.update(modules)
    try:
        yield importlib.import_module(_CONNECTOR)
    finally:
        for name in [*modules, _CONNECTOR]:
            sys.modules.pop(name, None)


def config(
    *, role: str = "kv_both", block_tokens: int = 4, extra: dict[str, Any] | None = None, **changes: Any
) -> SimpleNamespace:
    """A `VllmConfig` as far as the connector reads it."""
    transfer = SimpleNamespace(
        kv_connector_extra_config=extra or {},
        kv_load_failure_policy="fail",
        kv_role=role,
        is_kv_producer=role in ("kv_both", "kv_producer"),
        is_kv_consumer=role in ("kv_both", "kv_consumer"),
    )
    model = SimpleNamespace(
        model="some/model", revision="0" * 40, quantization=None, hf_overrides={}, hf_text_config=SimpleNamespace()
    )
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    found = SimpleNamespace(
        kv_transfer_config=transfer,
        cache_config=SimpleNamespace(block_size=block_tokens),
        model_config=model,
        parallel_config=parallel,
        speculative_config=None,
        kv_events_config=None,
    )
    for path, value in changes.items():
        part, _, name = path.partition("__")
        setattr(getattr(found, part) if name else found, name or part, value)
    return found


class FullAttentionSpec(SimpleNamespace):
    """The engine's spec of plain attention, as far as the connector reads it."""


def cache_config(
    *, layers: int = 2, block_tokens: int = 4, heads: int = 2, dim: int = 8, blocks: int = 64, **changes: Any
) -> SimpleNamespace:
    """A `KVCacheConfig` with one group."""
    fields: dict[str, Any] = {
        "block_size": block_tokens,
        "num_kv_heads": heads,
        "head_size": dim,
        "dtype": torch.bfloat16,
        "sliding_window": None,
    }
    spec = FullAttentionSpec(**fields | changes)
    names = [f"model.layers.{number}.self_attn.attn" for number in range(layers)]
    return SimpleNamespace(num_blocks=blocks, kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=spec)])
