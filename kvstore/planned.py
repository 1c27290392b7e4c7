"""Prefixes of prompts, put and got as a server plans it: which profile, which level, or computed after all.

The server decides and learns; here is what its clients do with it. Where it knows no profiles, the pipeline and the
level that the caller names are used.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.backend import Ack, Match
from kvstore.client import Client
from kvstore.codecs import Pipeline, Planes, named_pipeline
from kvstore.keys import chunk_keys, namespace_of
from kvstore.layout import Layout
from kvstore.pipelines import Pipelines
from kvstore.plan import Action, Context, Outcome, Plan
from kvstore.prefix import Prefix, Put, get_prefix, put_prefix
from kvstore.service import Service

_MARGIN = 0.05
"""Share of a deadline that is left for what nobody has reckoned with."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks of its cache, beside the tokens.

    Args:
        workload: Kind of text, as in the names of the buckets that quality was measured in.
        budget_nats: Largest quality loss; None for the server's default.
        deadline_s: Time that it may take; None where it is only wanted soon.
        prefill_s: Time to compute all of it; None where the caller does not know.
        reads: How often what is put is going to be fetched; the more often, the more encoding it is worth.
    """

    workload: str = "text"
    budget_nats: float | None = None
    deadline_s: float | None = None
    prefill_s: float | None = None
    reads: float | None = None

    def context(self, layout: Layout) -> Context:
        """What the server is told."""
        chunk = (layout.chunk_bytes, layout.chunk_tokens)
        return Context(*chunk, self.workload, self.budget_nats, self.deadline_s, self.prefill_s, self.reads)


@dataclass(frozen=True, slots=True)
class Planned:
    """What came of a planned get.

    Args:
        plan: What the server said.
        match: What it held.
        prefix: What was fetched; None where the plan says to compute. Tell the service what that took.
        took_s: Seconds from asking to the planes being ready.
    """

    plan: Plan
    match: Match
    prefix: Prefix | None
    took_s: float


@dataclass(frozen=True)
class PlannedPrefixes:
    """Puts and gets prefixes as one server plans them.

    Args:
        client: Talks to the server.
        layout: What the planes are.
        pipeline: How to encode where nothing is planned, or no compression is the plan and it is lossless.
        level: Level to fetch up to where nothing is planned.
        artefacts: Calibration artefacts by digest, beside those that the server has.
    """

    client: Client
    layout: Layout
    pipeline: Pipeline = field(default_factory=lambda: named_pipeline("raw"))
    level: int | None = None
    artefacts: Mapping[str, bytes] = field(default_factory=dict)
    service: Service = field(init=False)
    _pipelines: Pipelines = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "service", Service(self.client))
        object.__setattr__(self, "_pipelines", Pipelines(self.service, self.pipeline, dict(self.artefacts)))

    async def get(
        self, token_ids: Sequence[int], wish: Wish | None = None, *, salt: bytes = b"", wait_s: float = 0.0
    ) -> Planned:
        """Fetch and decode the longest leading run of chunks of a prompt, as far and as fine as that pays.

        Args:
            token_ids: The prompt from its first token on.
            wish: What is asked of it.
            salt: See `kvstore.keys.chunk_keys`.
            wait_s: Time to wait for chunks that somebody is about to put.

        Raises:
            BackendError: The server cannot be asked.
            PipelineError: A frame needs a stage or an artefact that is nowhere.
        """
        wish = wish or Wish()
        started_s = time.monotonic()
        keys = chunk_keys(self.layout, token_ids, salt=salt)
        plan, match = await self.service.plan_get(keys, wish.context(self.layout), wait_s=wait_s)
        planned_s = time.monotonic()
        if plan.action is Action.RECOMPUTE:
            return Planned(plan, match, None, planned_s - started_s)
        await self._pipelines.learn(namespace_of(self.layout), plan.artefacts)
        fetch_s = time.monotonic()
        prefix = await get_prefix(
            self.client,
            self.layout,
            token_ids,
            level=self.level if plan.action is Action.STATIC else plan.level,
            salt=salt,
            stop_s=None if wish.deadline_s is None else _stop_s(wish.deadline_s, fetch_s - started_s, plan.codec_s),
            match=match,
            artefacts=self._pipelines.artefacts,
        )
        ended_s = time.monotonic()
        outcome = Outcome(ended_s - fetch_s, prefix.size_bytes, prefix.arrived_s, None, prefix.decoding_s)
        if prefix.tokens == len(match.held) * self.layout.chunk_tokens:
            # What was cut short says nothing of what all of it would have taken.
            await self.service.observe(plan, outcome)
        return Planned(plan, match, prefix, ended_s - started_s)

    async def put(
        self,
        token_ids: Sequence[int],
        planes: Planes,
        wish: Wish | None = None,
        *,
        salt: bytes = b"",
        ack: Ack = Ack.MEMORY,
    ) -> tuple[Plan, Put]:
        """Encode and put every full chunk of a prompt that the server does not hold.

        Args:
            token_ids: The prompt from its first token on.
            planes: `[layers, tokens, kv_heads, head_dim]` each, with at least the tokens of the full chunks.
            wish: What will be asked of it.
            salt: See `kvstore.keys.chunk_keys`.
            ack: Durability to wait for.

        Raises:
            BackendError: The server cannot be reached; what was put before stays.
            PipelineError: The planes cannot be encoded, or the profile's artefacts are nowhere.
        """
        chunks = len(token_ids) // self.layout.chunk_tokens
        plan = Plan(Action.STATIC)
        if chunks:
            plan = await self.service.plan_put(namespace_of(self.layout), chunks, (wish or Wish()).context(self.layout))
        pipeline = await self._pipelines.of(namespace_of(self.layout), plan)
        started_s = time.monotonic()
        put = await put_prefix(self.client, self.layout, token_ids, planes, pipeline, salt=salt, ack=ack)
        took_s = time.monotonic() - started_s
        if put.stored and not put.held_tokens:
            outcome = Outcome(took_s, put.size_bytes, put.sending_s, None, put.encoding_s)
            await self.service.observe(plan, outcome)
        return plan, put


def _stop_s(deadline_s: float, passed_s: float, codec_s: float) -> float:
    """When to stop receiving, so that what came can be decoded in time."""
    return max(0.0, (1 - _MARGIN) * deadline_s - passed_s - codec_s)
