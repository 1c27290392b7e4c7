"""How a worker of the vLLM connector encodes what it saves: as the server plans it, else as it is configured."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeoutError

from kvstore.backend import Backend, Stored
from kvstore.codecs import Pipeline
from kvstore.connectors.background import Background
from kvstore.connectors.vllm_options import Options
from kvstore.errors import KVStoreError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey, namespace_of
from kvstore.layout import Layout
from kvstore.pipelines import Pipelines
from kvstore.plan import READS_BEHIND, Action, Context, Outcome, Plan
from kvstore.service import Service

_PAUSE_S = 10.0

Asked = Future[tuple[Pipeline, Plan]]
"""How to encode chunks, once the server has said so."""

log = logging.getLogger(__name__)


class Codec:
    """Pipelines and calibration artefacts of one worker.

    Args:
        options: The connector's options.
        layout: Layout of the worker's shard.
        background: Where the server is asked.
        service: What plans; None where everything goes as configured.
        awaited: Whether another engine waits for what is saved.
    """

    def __init__(
        self, options: Options, layout: Layout, background: Background, service: Service | None, *, awaited: bool
    ) -> None:
        self.configured, self.artefacts = options.codec()
        self._options = options
        self._namespace = namespace_of(layout)
        self._layout = layout
        self._background = background
        self._service = service
        self._awaited = awaited
        self._pipelines = None if service is None else Pipelines(service, self.configured, self.artefacts)
        self._paused_until_s = 0.0

    async def learn(self, digests: Sequence[str]) -> None:
        """Get the calibration artefacts that decoding needs and that are not here.

        Raises:
            KVStoreError: They cannot be had.
        """
        if self._pipelines is not None:
            await self._pipelines.learn(self._namespace, digests)

    def ask(self, chunks: int) -> Asked | None:
        """Begin to ask how to encode chunks; None where that is not planned."""
        if self._service is None or self._pipelines is None or time.monotonic() < self._paused_until_s:
            return None
        context = Context(
            self._layout.chunk_bytes,
            self._layout.chunk_tokens,
            self._options.workload,
            self._options.budget_nats,
            reads=None if self._awaited else READS_BEHIND,
        )
        return self._background.submit(self._ask(self._service, self._pipelines, chunks, context))

    def plan(self, asked: Asked | None) -> tuple[Pipeline, Plan]:
        """How to encode chunks; for a thread that may wait a moment for the answer."""
        if asked is None:
            return self.configured, Plan(Action.STATIC)
        try:
            return asked.result(self._options.match_s)
        except (KVStoreError, WaitTimeoutError) as exc:
            # What is not planned is stored as configured.
            asked.cancel()
            log.warning("no plan for chunks to be stored: %s", exc or "no answer in time")
            self._paused_until_s = time.monotonic() + _PAUSE_S
            return self.configured, Plan(Action.STATIC)

    async def send(
        self, backend: Backend, items: Sequence[tuple[ChunkKey, Frame]], plan: Plan, encoding_s: float
    ) -> list[Stored]:
        """Put what was encoded as planned, and report what that took."""
        began_s = time.monotonic()
        stored = await backend.put(items)
        if self._service is not None:
            sending_s = time.monotonic() - began_s
            size_bytes = sum(frame.size_bytes for _, frame in items)
            outcome = Outcome(encoding_s + sending_s, size_bytes, sending_s, None, encoding_s)
            # Whoever waits for the put does not wait for this.
            self._background.submit(self._service.observe(plan, outcome))
        return stored

    async def _ask(
        self, service: Service, pipelines: Pipelines, chunks: int, context: Context
    ) -> tuple[Pipeline, Plan]:
        plan = await service.plan_put(self._namespace, chunks, context)
        return await pipelines.of(self._namespace, plan), plan
