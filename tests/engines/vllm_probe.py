"""The connector as it is, which on SIGUSR1 writes a JSON file about what its process holds; for tests only."""

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvstore.connectors import vllm as connector
from kvstore.connectors.vllm_worker import WorkerSide

KvstoreStats = connector.KvstoreStats


class KvstoreConnector(connector.KvstoreConnector):
    """Tells what it holds."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        folder = Path(os.environ["KVSTORE_PROBE_FOLDER"])
        self._probe = folder / f"{role.name.lower()}-{os.getpid()}.json"
        self._probe.touch()
        # Engines build connectors in the main threads of their processes.
        signal.signal(signal.SIGUSR1, self._tell)

    def _tell(self, *_: object) -> None:
        found = self._held() | {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "files": len(list(Path("/proc/self/fd").iterdir())),
        }
        fresh = self._probe.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        fresh.rename(self._probe)

    def _held(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if self._background is not None:
            found["tasks"] = len(asyncio.all_tasks(self._background._loop))
        if (scheduler := self._scheduler) is not None:
            found["free_blocks"] = self._kv_cache_manager.block_pool.get_num_free_blocks()
            found["requests"] = len(scheduler._tracked) + len(scheduler._skipped)
            found["steps"] = len(scheduler._loads) + len(scheduler._aborted)
        if isinstance(worker := self._worker, WorkerSide):
            found["loads"] = len(worker._loading) + len(worker._ended)
            found["saves"] = len(worker._in_flight) + len(worker._staged)
            found["queue_bytes"] = worker._queue.used_bytes
        return found
