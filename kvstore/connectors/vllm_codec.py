"""How a worker of the vLLM connector encodes what it saves: as the server plans it, else as it is configured."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeoutError

from kvstore.backend import Backend, Stored
from kvstore.codecs import Pipeline, build_pipeline, named_pipeline
from kvstore.connectors.background import Background
from kvstore.connectors.vllm_options import Options
from kvstore.errors import KVStoreError
from kvstore.frame import Frame
from kvstore.header import profile_id
from kvstore.keys import ChunkKey, namespace_of
from kvstore.layout import Layout
from kvstore.plan import READS_BEHIND, Action, Context, Outcome, Plan
from kvstore.service import Service

_PAUSE_S = 10.0
_PIPELINES_MAX = 64

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
        self._known: dict[bytes, Pipeline] = {}
        self._paused_until_s = 0.0

    async def learn(self, digests: Sequence[str]) -> None:
        """Get the calibration artefacts that decoding needs and that are not here.

        Raises:
            KVStoreError: They cannot be had.
        """
        missing = [digest for digest in digests if digest not in self.artefacts]
        if missing and self._service is not None:
            found = await self._service.artefacts(self._namespace, missing)
            self.artefacts.update({digest: found[digest] for digest in missing})

    def ask(self, chunks: int) -> Asked | None:
        """Begin to ask how to encode chunks; None where that is not planned."""
        if self._service is None or time.monotonic() < self._paused_until_s:
            return None
        context = Context(
            self._layout.chunk_bytes,
            self._layout.chunk_tokens,
            self._options.workload,
            self._options.budget_nats,
            reads=None if self._awaited else READS_BEHIND,
        )
        return self._background.submit(self._ask(self._service, chunks, context))

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
            await self._service.observe(plan, outcome)
        return stored

    async def _ask(self, service: Service, chunks: int, context: Context) -> tuple[Pipeline, Plan]:
        plan = await service.plan_put(self._namespace, chunks, context)
        if plan.action is Action.STATIC:
            return self.configured, plan
        if plan.pipeline is None:
            return (self.configured if self.configured.lossless else named_pipeline("raw")), plan
        identity = profile_id(plan.pipeline)
        if identity not in self._known:
            await self.learn(plan.artefacts)
            if len(self._known) >= _PIPELINES_MAX:
                self._known.clear()
            self._known[identity] = build_pipeline(plan.pipeline, self.artefacts)
        return self._known[identity], plan
