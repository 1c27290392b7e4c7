"""Loads and stores of the LMCache connector as the server plans them.

LMCache looks chunks up, and loads them by a call of its own that names nothing but them. So what was planned with a
look-up is remembered by its chunks' keys.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from kvstore.backend import Match
from kvstore.client import Client
from kvstore.codecs import Pipeline
from kvstore.connectors.lmcache_chunks import Codec
from kvstore.connectors.lmcache_options import LMCacheOptions
from kvstore.controller.tables import renewed
from kvstore.errors import PipelineError
from kvstore.header import StageSpec, profile_id
from kvstore.keys import ChunkKey
from kvstore.pipelines import Pipelines
from kvstore.plan import READS_BEHIND, Action, Context, Outcome, Plan
from kvstore.service import Service

_KEYS_MAX = 1 << 16
_PIPELINES_MAX = 64
_STATIC = Plan(Action.STATIC)

log = logging.getLogger(__name__)


class Plans:
    """Plans of one connector; for its event loop.

    Args:
        client: Talks to the server.
        options: The connector's options.
    """

    def __init__(self, client: Client, options: LMCacheOptions) -> None:
        self._service = Service(client)
        self._options = options
        self._by_key: dict[ChunkKey, Plan] = {}
        self._pipelines = Pipelines(self._service, options.build_pipeline(), {})
        self._usable: dict[tuple[bytes, bytes], bool] = {}
        self._telling: set[asyncio.Task[None]] = set()

    @property
    def artefacts(self) -> Mapping[str, bytes]:
        """Calibration artefacts by digest."""
        return self._pipelines.artefacts

    async def match(self, keys: Sequence[ChunkKey], codec: Codec) -> tuple[Plan, Match]:
        """The leading run that is held, and what to do about it.

        Raises:
            BackendError: The server cannot be asked.
        """
        plan, match = await self._service.plan_get(keys, self._context(codec, len(keys)))
        await self._pipelines.learn(codec.namespace, plan.artefacts)
        for key in keys[: len(match.held)]:
            renewed(self._by_key, key, _KEYS_MAX, lambda: _STATIC)
            self._by_key[key] = plan
        return plan, match

    def of(self, key: ChunkKey) -> Plan:
        """What was planned when a chunk was last looked up."""
        return self._by_key.get(key, _STATIC)

    async def pipeline(self, codec: Codec, chunks: int) -> tuple[Pipeline | None, Plan]:
        """How to encode chunks; no pipeline where they are encoded as configured.

        Raises:
            KVStoreError: The server cannot be asked.
        """
        plan = await self._service.plan_put(codec.namespace, chunks, self._context(codec, chunks))
        if plan.action is Action.STATIC:
            return None, plan
        try:
            pipeline = await self._pipelines.of(codec.namespace, plan)
            usable = plan.pipeline is None or self._is_usable(codec, plan.pipeline, pipeline)
        except PipelineError as exc:
            log.warning("profile %s cannot be used: %s", plan.arm, exc)
            usable = False
        # What was encoded otherwise than planned says nothing of the plan.
        return (pipeline, plan) if usable else (None, _STATIC)

    def loaded(self, key: ChunkKey, size_bytes: int, took_s: float, arrived_s: float, decoding_s: float) -> None:
        """Report a load, which began with this chunk."""
        self._tell(self.of(key), Outcome(took_s, size_bytes, arrived_s, None, decoding_s))

    def stored(self, plan: Plan, size_bytes: int, encoding_s: float, sending_s: float) -> None:
        """Report a store."""
        self._tell(plan, Outcome(encoding_s + sending_s, size_bytes, sending_s, None, encoding_s))

    def _tell(self, plan: Plan, outcome: Outcome) -> None:
        """Report behind what LMCache waits for."""
        task = asyncio.create_task(self._service.observe(plan, outcome))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _is_usable(self, codec: Codec, stages: Sequence[StageSpec], pipeline: Pipeline) -> bool:
        """Whether a profile's pipeline encodes such chunks; found out once."""
        known = (codec.namespace, profile_id(stages))
        if known not in self._usable:
            try:
                codec.check(pipeline)
                usable = True
            except PipelineError as exc:
                log.warning("a profile cannot be used with LMCache, which tells no positions: %s", exc)
                usable = False
            renewed(self._usable, known, _PIPELINES_MAX, lambda: usable)
        return self._usable[known]

    def _context(self, codec: Codec, chunks: int) -> Context:
        options = self._options
        tokens_per_s = options.prefill_tokens_per_s
        prefill_s = chunks * codec.chunk_tokens / tokens_per_s if tokens_per_s else None
        asked = (codec.size_bytes, codec.chunk_tokens, options.workload, options.budget_nats)
        # LMCache goes on while it stores.
        return Context(*asked, prefill_s=prefill_s, reads=READS_BEHIND)
