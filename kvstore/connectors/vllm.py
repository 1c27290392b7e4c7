"""kvstore as a KV connector of vLLM: prefixes are fetched from a server, and what is computed is stored there.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvstoreConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_connector_extra_config": {"url": "http://127.0.0.1:8420"}}'

This file translates between the engine's interface and the two halves that do the work, `vllm_scheduler` and
`vllm_worker`. Whatever fails, the engine computes what it did not get; docs/engines.md says what is counted.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from kvstore.backend import Backend
from kvstore.backends.host import HostBackend
from kvstore.client import Client
from kvstore.connectors.background import Background
from kvstore.connectors.guard import Guard
from kvstore.connectors.paged import Pages, packed_pages, probe_orders, strided_pages
from kvstore.connectors.vllm_bystander import Bystander
from kvstore.connectors.vllm_events import Change
from kvstore.connectors.vllm_identity import is_latent, layer_order, read_layouts
from kvstore.connectors.vllm_options import is_fail_open, read_options
from kvstore.connectors.vllm_plan import COUNTERS, Counters, Report, Step
from kvstore.connectors.vllm_scheduler import SchedulerSide
from kvstore.connectors.vllm_start import check_server, check_version, log_open, tell_namespaces
from kvstore.connectors.vllm_worker import WorkerSide
from kvstore.errors import KVStoreError
from kvstore.service import Service
from kvstore.tiers import TieredBackend

_LATENCY_S = 0.003
"""Time that a fetch takes beside arrival and decoding: the way to the workers and back, in steps of the engine."""

_MARGIN = 0.05


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers do in a step."""

    step: Step = field(default_factory=Step)


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers tell the scheduler."""

    report: Report = field(default_factory=Report)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both as one."""
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(self.report.merged(other.report))


@dataclass
class KvstoreStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last step; `data` is what crosses processes."""

    def reset(self) -> None:
        """Forget them."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both as one."""
        data = dict(self.data)
        for name, count in other.data.items():
            data[name] = data.get(name, 0) + count
        return KvstoreStats(data)

    def reduce(self) -> dict[str, int | float]:
        """What the periodic log line shows."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class KvstorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The counters in the engine's `/metrics`, as `vllm:kvstore_<name>_total`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(name=f"vllm:kvstore_{name}", documentation=text, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted."""
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)


class KvstoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The connector; one instance in the scheduler's process and one in every worker's.

    Args:
        vllm_config: The engine's configuration.
        role: Which of the two this is.
        kv_cache_config: What the engine's cache is.

    Raises:
        ConfigError: It cannot work as it is configured, and `fail_open` is false.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._counters = Counters()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | Bystander | None = None
        self._background: Background | None = None
        self._backend: Backend | None = None
        extra = self._kv_transfer_config.kv_connector_extra_config
        # Tokens that were not loaded are computed; the engine's own default would fail their requests.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        try:
            self._start(vllm_config, role, kv_cache_config, extra)
        except Exception as exc:
            self.shutdown()
            if not is_fail_open(extra):
                raise
            log_open(exc)
            if role is KVConnectorRole.WORKER:
                self._worker = Bystander(self._counters)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later on, nothing worse."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are copied after the step where graphs leave the hooks out."""
        return False

    # The scheduler's process.

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return (0, False) if self._scheduler is None else self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return StepMetadata() if self._scheduler is None else StepMetadata(self._scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.stepped()
        meta = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(meta, WorkerMetadata):
            self._scheduler.receive(meta.report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finish(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def take_events(self) -> Iterable[Any]:
        return (
            []
            if self._scheduler is None
            else [_event(one, self._block_tokens) for one in self._scheduler.take_changes()]
        )

    def has_pending_push_work(self) -> bool:
        # Only a step brings what workers have stored, so an engine that would rest makes a few more.
        return self._scheduler is not None and self._scheduler.expects_changes

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # Every worker's process.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is None:
            return
        try:
            group = self._kv_cache_config.kv_cache_groups[0]
            self._layers = {name: number for number, name in enumerate(layer_order(group.layer_names))}
            self._worker.attach(_pages([kv_caches[name] for name in self._layers], group.kv_cache_spec))
        except Exception as exc:
            if not is_fail_open(self._kv_transfer_config.kv_connector_extra_config):
                raise
            self.shutdown()
            log_open(exc)
            self._worker = Bystander(self._counters)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            step = self._step()
            self._worker.start_loads(step.loads, step.aborted)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None and self._step().saves and layer_name in self._layers:
            self._worker.stage(self._step().saves, self._layers[layer_name])

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.finish_saves(self._step().saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, (self._worker.finished(idle=self._step().idle) or None) if self._worker is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = None if self._worker is None else self._worker.take_report()
        return None if report is None else WorkerMetadata(report)

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        stats = KvstoreStats(self._counters.take())
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KvstoreStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return KvstorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._background is not None:
            if self._backend is not None:
                with suppress(TimeoutError, KVStoreError):
                    self._background.submit(self._backend.aclose()).result(1.0)
            self._background.close(1.0)
        self._scheduler = self._worker = self._background = self._backend = None

    def _start(self, config: Any, role: KVConnectorRole, cache: Any, extra: dict[str, Any]) -> None:
        self._block_tokens = block_tokens = config.cache_config.block_size
        announces = bool(getattr(config.kv_events_config, "enable_kv_cache_events", False))
        options = read_options(extra, block_tokens=block_tokens)
        check_version(vllm.__version__, options)
        layouts = read_layouts(config, cache, options)
        self._background = Background(f"kvstore-{role.name.lower()}")
        client = Client(options.url, token=options.token, timeout_s=options.deadline_s)
        self._backend = client
        if role is KVConnectorRole.WORKER:
            from vllm.distributed import get_tensor_model_parallel_rank

            rank = get_tensor_model_parallel_rank()
            if options.local_memory:
                self._backend = TieredBackend([HostBackend(options.local_memory), client])
            self._worker = WorkerSide(
                options,
                layouts[rank],
                rank,
                self._backend,
                self._background,
                self._counters,
                delivers=not self._kv_transfer_config.is_kv_consumer,
                announces=announces,
                service=Service(client) if options.plan else None,
            )
            return
        check_server(options, client, layouts[0], self._background)
        tell_namespaces(layouts)
        self._scheduler = SchedulerSide(
            options,
            layouts,
            client,
            self._background,
            Guard(latency_s=_LATENCY_S, margin=_MARGIN, explore=0),
            self._counters,
            block_tokens=block_tokens,
            blocks_of=lambda request_id: self._kv_cache_manager.get_block_ids(request_id)[0],
            consumes=self._kv_transfer_config.is_kv_consumer,
            produces=self._kv_transfer_config.is_kv_producer,
            announces=announces,
        )

    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.step


def _event(change: Change, block_tokens: int) -> Any:
    """A change as the engine's event; its blocks are in storage, and whoever shares the server finds them there."""
    from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockRemoved, BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    hashes = [maybe_convert_block_hash(one) for one in change.block_hashes]
    where = {"medium": MEDIUM_STORAGE, "group_idx": 0, "locality": "REMOTE", "ownership": "kvstore"}
    if not change.held:
        return BlockRemoved(block_hashes=hashes, **where)
    salt: list[Any] = [None if change.salt is None else (change.salt,), *[None] * (len(hashes) - 1)]
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=None if change.parent_hash is None else maybe_convert_block_hash(change.parent_hash),
        token_ids=list(change.token_ids),
        block_size=block_tokens,
        lora_id=None,
        lora_name=None,
        extra_keys=salt,
        **where,
    )


def _pages(layers: list[torch.Tensor], spec: Any) -> Pages:
    """The engine's cache as pages; on a CPU its attention packs them in an order of its own."""
    first = layers[0]
    if first.device.type == "cpu" and not is_latent(spec):
        return packed_pages(layers, probe_orders(_cpu_write(spec), first.shape, first.dtype))
    heads = 1 if is_latent(spec) else spec.num_kv_heads
    return strided_pages(layers, blocks=first.shape[0], heads=heads, dim=spec.head_size)


def _cpu_write(spec: Any) -> Any:
    """The operation by which the engine's CPU attention writes its cache."""
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(spec.dtype, spec.block_size, spec.head_size)

    def write(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor, slots: torch.Tensor) -> None:
        blocks, heads, tokens, _ = layer.shape
        key_cache, value_cache = layer.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        _custom_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)

    return write
