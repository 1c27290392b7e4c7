"""What the scheduler's half of the vLLM connector asks the server: what is held, and whether and how to fetch it."""

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Any

from kvstore.backend import Held
from kvstore.client import Client
from kvstore.connectors.background import Background
from kvstore.connectors.guard import Guard
from kvstore.connectors.vllm_options import Options
from kvstore.connectors.vllm_plan import Load, Loaded
from kvstore.connectors.vllm_requests import Found, Keys, Tracked
from kvstore.errors import RequestError
from kvstore.keys import chunk_keys
from kvstore.layout import Layout
from kvstore.plan import Action, Context, Outcome, Plan, parse_context
from kvstore.service import Service

LOST = ("absent", "corrupt", "identity")
"""Reasons for which a load ended because the server does not hold a chunk."""

_SHORTEST_S = 1e-6

log = logging.getLogger(__name__)


class Inquiries:
    """Look-ups and plans.

    Args:
        options: The connector's options.
        layouts: Layout of every worker's shard, by rank.
        client: Where chunks are looked up.
        background: Where questions are asked.
        guard: Knows what computing takes.
    """

    def __init__(
        self, options: Options, layouts: Sequence[Layout], client: Client, background: Background, guard: Guard
    ) -> None:
        self._options = options
        self._layouts = tuple(layouts)
        self._client = client
        self._background = background
        self._guard = guard
        self._service = Service(client)
        self._chunk_tokens = layouts[0].chunk_tokens
        self._chunk_bytes = sum(layout.chunk_bytes for layout in layouts)

    async def ask(
        self, token_ids: Sequence[int], salt: bytes, wait_s: float = 0.0, context: Context | None = None
    ) -> Found:
        """What is held of a prompt, and where a context is given, what to do about it.

        Raises:
            TimeoutError: There is no answer in time.
            BackendError: The server cannot be asked.
        """
        keys = tuple(tuple(chunk_keys(layout, token_ids, salt=salt)) for layout in self._layouts)
        async with asyncio.timeout(self._options.match_s + wait_s):
            if context is None:
                return Found(keys, await self._held(keys, wait_s))
            planning = self._service.plan_get(keys[0], context, wait_s=wait_s)
            (plan, first), others = await asyncio.gather(planning, self._held(keys[1:], wait_s))
        return Found(keys, (first.held, *others), None if plan.action is Action.STATIC else plan)

    async def _held(self, keys: Keys, wait_s: float) -> tuple[Sequence[Held], ...]:
        """The leading run that is held of each shard."""
        matches = await asyncio.gather(*(self._client.wait(shard, wait_s) for shard in keys))
        return tuple(match.held for match in matches)

    def context(self, tracked: Tracked) -> Context | None:
        """What the server is told of a request; None where nothing is to be planned, as its level is set."""
        if not self._options.plan or tracked.level is not None:
            return None
        prefill_s = self._recompute_s(len(tracked.request.all_token_ids))
        asked: dict[str, Any] = {
            "workload": self._options.workload,
            "budget_nats": self._options.budget_nats,
            "prefill_s": max(prefill_s, _SHORTEST_S) if math.isfinite(prefill_s) else None,
            "chunk_bytes": self._chunk_bytes,
            "chunk_tokens": self._chunk_tokens,
        }
        wished = _wished(tracked.request)
        try:
            return parse_context(asked | wished)
        except RequestError as exc:
            log.warning("kv_transfer_params: kvstore.%s; using what the options say", exc)
            return parse_context(asked)

    def loaded(self, tracked: Tracked, load: Load, results: Sequence[Loaded], took_s: float) -> None:
        """Learn from a load; what all workers fetched came over one link, and the slowest one counts."""
        slowest = max(results, key=lambda result: result.took_s)
        size_bytes = sum(result.size_bytes for result in results)
        self._guard.observe_fetch(
            size_bytes,
            took_s,
            tokens=min(result.chunks for result in results) * self._chunk_tokens,
            arrived_s=slowest.arrived_s,
            whole=all(result.chunks == load.chunks or result.reason in LOST for result in results),
        )
        plan, tracked.plan = tracked.plan, None
        # A load that was cut short says nothing of what all of it would have taken.
        if plan is not None and all(result.chunks == load.chunks for result in results):
            self._tell(plan, Outcome(slowest.took_s, size_bytes, slowest.fetching_s, None, slowest.decoding_s))

    def ended(self, tracked: Tracked) -> None:
        """A request ended: where it was computed as planned, report what that took, as far as steps tell."""
        if tracked.plan is None or tracked.plan.action is not Action.RECOMPUTE:
            return
        took_s = self._recompute_s(tracked.request.num_prompt_tokens)
        if 0 < took_s < math.inf:
            self._tell(tracked.plan, Outcome(took_s))

    def _recompute_s(self, tokens: int) -> float:
        """Seconds to compute the full chunks of a prompt, which could be fetched; its last token never is."""
        whole_tokens = (tokens - 1) // self._chunk_tokens * self._chunk_tokens
        return self._guard.recompute_s(whole_tokens, tokens - whole_tokens)

    def _tell(self, plan: Plan, outcome: Outcome) -> None:
        self._background.submit(self._service.observe(plan, outcome))


def _wished(request: Any) -> dict[str, Any]:
    """What a request says of the cache it wants."""
    asked = (request.kv_transfer_params or {}).get("kvstore", {})
    names = ("workload", "budget_nats", "deadline_s")
    return {name: asked[name] for name in names if name in asked} if isinstance(asked, dict) else {}
