"""Loads and stores of the LMCache connector as the server plans them.

LMCache looks chunks up, and loads them by a call of its own that names nothing but them. So what was planned with a
look-up is remembered by its chunks' keys.
"""

import logging
from collections.abc import Sequence

from kvstore.backend import Match
from kvstore.client import Client
from kvstore.codecs import Pipeline, build_pipeline
from kvstore.connectors.lmcache_chunks import Codec
from kvstore.connectors.lmcache_options import LMCacheOptions
from kvstore.controller.tables import renewed
from kvstore.errors import PipelineError
from kvstore.header import profile_id
from kvstore.keys import ChunkKey
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
        self._pipelines: dict[tuple[bytes, bytes], Pipeline | None] = {}
        self.artefacts: dict[str, bytes] = {}

    async def match(self, keys: Sequence[ChunkKey], codec: Codec) -> tuple[Plan, Match]:
        """The leading run that is held, and what to do about it.

        Raises:
            BackendError: The server cannot be asked.
        """
        plan, match = await self._service.plan_get(keys, self._context(codec, len(keys)))
        await self._learn(codec, plan)
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
        if plan.pipeline is None:
            return None, plan
        await self._learn(codec, plan)
        known = (codec.namespace, profile_id(plan.pipeline))
        if known not in self._pipelines:
            renewed(self._pipelines, known, _PIPELINES_MAX, lambda: None)
            self._pipelines[known] = self._built(codec, plan)
        found = self._pipelines[known]
        # What was encoded otherwise than planned says nothing of the plan.
        return found, plan if found is not None else _STATIC

    async def loaded(self, key: ChunkKey, size_bytes: int, took_s: float, arrived_s: float, decoding_s: float) -> None:
        """Report a load, which began with this chunk."""
        await self._service.observe(self.of(key), Outcome(took_s, size_bytes, arrived_s, None, decoding_s))

    async def stored(self, plan: Plan, size_bytes: int, encoding_s: float, sending_s: float) -> None:
        """Report a store."""
        await self._service.observe(plan, Outcome(encoding_s + sending_s, size_bytes, sending_s, None, encoding_s))

    async def _learn(self, codec: Codec, plan: Plan) -> None:
        """Get the calibration that a plan needs and that is not here."""
        missing = [digest for digest in plan.artefacts if digest not in self.artefacts]
        if missing:
            self.artefacts |= await self._service.artefacts(codec.namespace, missing)

    def _built(self, codec: Codec, plan: Plan) -> Pipeline | None:
        assert plan.pipeline is not None
        try:
            pipeline = build_pipeline(plan.pipeline, self.artefacts)
            codec.check(pipeline)
        except PipelineError as exc:
            log.warning("profile %s cannot be used with LMCache, which tells no positions: %s", plan.arm, exc)
            return None
        return pipeline

    def _context(self, codec: Codec, chunks: int) -> Context:
        options = self._options
        tokens_per_s = options.prefill_tokens_per_s
        prefill_s = chunks * codec.chunk_tokens / tokens_per_s if tokens_per_s else None
        asked = (codec.size_bytes, codec.chunk_tokens, options.workload, options.budget_nats)
        # LMCache goes on while it stores.
        return Context(*asked, prefill_s=prefill_s, reads=READS_BEHIND)
