"""`POST /v1/plan` and `POST /v1/observe`: what a transfer should be like, and what came of it.

A plan for a get looks up what is held, too, so that a client needs no other request before it fetches. Where no
profiles were pushed for the namespace nothing is decided, and clients do what they are configured to.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from kvstore.backend import Match
from kvstore.backends.policies import Fetched, FetchedChunk
from kvstore.config import ServerConfig
from kvstore.controller.controller import Controller, Decision, Ignored
from kvstore.controller.decisions import DecisionLog, line_of, outcome_line
from kvstore.controller.losses import Losses
from kvstore.controller.planner import Planner, Who
from kvstore.controller.policy import RECOMPUTE
from kvstore.errors import RequestError
from kvstore.files import write_whole
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, parse_hex
from kvstore.metrics import Metrics
from kvstore.plan import (
    CHUNKS_MAX,
    PLAN_BYTES_MAX,
    Action,
    Context,
    Outcome,
    Plan,
    decision_id,
    integer,
    known_fields,
    label,
    parse_context,
    parse_outcome,
    plan_json,
)
from kvstore.server.auth import Tenants
from kvstore.server.batch import match_json
from kvstore.server.profiles import ProfileStore
from kvstore.server.query import WAIT_MS_MAX, with_namespace
from kvstore.server.receive import Receiver
from kvstore.server.waiting import Waiting
from kvstore.tiers import TieredBackend

_JSON = "application/json"
_DIGESTS = re.compile(rf"([0-9a-f]{{{2 * DIGEST_BYTES}}})+")
_REPORT_BYTES_MAX = 4096
_STATE = "controller.json"
_KEPT_S = 60.0
_PLAN_FIELDS = ("op", "namespace", "digests", "chunks", "context", "client", "wait_ms", "explain")
_REPORT_FIELDS = ("decision", *Outcome._fields)

log = logging.getLogger(__name__)


class PlanRoutes:
    """Handlers for plans and outcomes. `stack` is set before the first request.

    Args:
        tenants: Who may ask.
        receiver: Limits of bodies.
        waiting: Requests that wait for chunks.
        store: Sets of profiles.
        config: Budget and log.
        metrics: Where to count.
        busy: Number of requests under way.
    """

    stack: TieredBackend

    def __init__(
        self,
        tenants: Tenants,
        receiver: Receiver,
        waiting: Waiting,
        store: ProfileStore,
        config: ServerConfig,
        metrics: Metrics,
        busy: Callable[[], int],
    ) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._waiting = waiting
        self._store = store
        self._config = config
        self._metrics = metrics
        self._busy = busy
        self._log: DecisionLog | None = None
        self.planner = Planner(Controller(time.monotonic), config.quality_budget_nats)

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [web.post("/v1/plan", self.plan), web.post("/v1/observe", self.observe)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What was learned is known in this block, and kept behind it."""
        file = self._config.data_dir / _STATE
        self._restore(file)
        if self._config.decision_log is not None:
            self._log = DecisionLog(self._config.decision_log, self._config.decision_log_bytes)
        keeping = asyncio.create_task(self._keep(file))
        try:
            yield
        finally:
            keeping.cancel()
            self._save(file, self._learned())
            if self._log is not None:
                self._log.close()

    def learn(self, fetched: Fetched) -> None:
        """Learn from a get how fast tiers are."""
        for tier, size_bytes, took_s in fetched.reads:
            self.planner.observe_read(tier, size_bytes, took_s)

    async def plan(self, request: web.Request) -> web.Response:
        """What a get or put should be like: the decision, its terms, and what is held."""
        tenant = self._tenants.authenticate(request)
        fields = known_fields(await self._json(request, PLAN_BYTES_MAX), "the plan", _PLAN_FIELDS)
        operation = fields.get("op")
        if operation not in ("get", "put"):
            raise RequestError("op must be get or put")
        namespace = parse_hex(str(fields.get("namespace")), NAMESPACE_BYTES, "namespace")
        context = parse_context(fields.get("context"))
        who = _who(request, tenant, fields)
        if operation == "put":
            return self._plan_put(who, namespace, context, fields)
        keys = with_namespace(self._tenants.scope(tenant, namespace), _digests(fields))
        wait_s = integer({"wait_ms": 0, **fields}, "wait_ms", 0, WAIT_MS_MAX) / 1000
        await self._waiting.until_held(request, tenant, keys, wait_s)
        return await self._plan_get(who, namespace, keys, context, fields)

    async def observe(self, request: web.Request) -> web.Response:
        """Learn what came of a plan; what is not known, or not plausible, is counted and ignored."""
        tenant = self._tenants.authenticate(request)
        fields = known_fields(await self._json(request, _REPORT_BYTES_MAX), "the outcome", _REPORT_FIELDS)
        number, outcome = int(decision_id(fields.get("decision")), 16), parse_outcome(fields)
        decided = self.planner.observe(tenant, number, outcome)
        result = decided.value if isinstance(decided, Ignored) else "learned"
        self._metrics.outcomes.labels(result).inc()
        self._metrics.given_up.set(self.planner.controller.given_up)
        if self._log is not None and not isinstance(decided, Ignored):
            self._log.write(outcome_line(number, outcome.took_s))
        return web.json_response({"result": result})

    async def _plan_get(
        self, who: Who, namespace: bytes, keys: list[ChunkKey], context: Context, fields: dict[str, Any]
    ) -> web.Response:
        match = await self.stack.match(keys)
        losses = self._losses(who, namespace)
        if not match.held:
            return self._answer("get", Plan(Action.RECOMPUTE), None, match, fields)
        if losses is None:
            return self._answer("get", Plan(Action.STATIC), None, match, fields)
        started_s = self._begin()
        decision, level = self.planner.plan_get(who, losses, match.held, context, len(keys))
        self._metrics.decision_seconds.observe(time.perf_counter() - started_s)
        action = Action.RECOMPUTE if decision.choice.arm.name == RECOMPUTE else Action.FETCH
        if action is Action.RECOMPUTE:
            self._tell_missing(losses, keys, match, context)
        made = map(losses.profile, {held.copy.profile for held in match.held})
        artefacts = tuple({digest: None for profile in made if profile for digest in profile.artefacts})
        plan = _plan(action, decision)._replace(level=level, artefacts=artefacts)
        return self._answer("get", plan, decision, match, fields)

    def _tell_missing(self, losses: Losses, keys: list[ChunkKey], match: Match, context: Context) -> None:
        """Let who learns from fetches know of levels within the budget that no tier has: nobody will ask for them."""
        history = self.stack.policies.history
        missing = []
        for key, held in zip(keys, match.held, strict=False):
            level = self.planner.coarsest(losses, held.copy, context, len(match.held))
            if level is not None and level >= len(held.copy.level_bytes):
                missing.append(FetchedChunk(held.copy.profile, level, history.asked(key), "", history.reads(key)))
        for learn in self.stack.policies.learners if missing else ():
            learn(Fetched(missing, []))

    def _plan_put(self, who: Who, namespace: bytes, context: Context, fields: dict[str, Any]) -> web.Response:
        chunks = integer(fields, "chunks", 1, CHUNKS_MAX)
        losses = self._losses(who, namespace)
        if losses is None:
            return self._answer("put", Plan(Action.STATIC), None, None, fields)
        started_s = self._begin()
        decision, profile = self.planner.plan_put(who, losses, chunks, context)
        self._metrics.decision_seconds.observe(time.perf_counter() - started_s)
        plan = _plan(Action.PUT, decision)
        if profile is not None:
            plan = plan._replace(pipeline=profile.pipeline, artefacts=profile.artefacts)
        return self._answer("put", plan, decision, None, fields)

    def _begin(self) -> float:
        """A decision begins: when."""
        self.planner.load.observe(self._busy(), time.monotonic())
        return time.perf_counter()

    def _answer(
        self, operation: str, plan: Plan, decision: Decision | None, match: Match | None, fields: dict[str, Any]
    ) -> web.Response:
        reason = "none" if decision is None else decision.choice.reason
        self._metrics.decisions.labels(operation, plan.action.value, reason).inc()
        answer = plan_json(plan)
        if match is not None:
            answer["match"] = match_json(match)
        if decision is not None:
            answer |= {"reason": reason, "terms": decision.choice.arm.terms.report()}
            if self._log is not None:
                self._log.write(line_of(decision))
            if fields.get("explain"):
                answer["explanation"] = decision.report()
        return web.json_response(answer)

    def _losses(self, who: Who, namespace: bytes) -> Losses | None:
        """What is known of the profiles of a namespace, None where none were pushed."""
        return self._store.losses(self._tenants.scope(who.tenant, namespace))

    async def _json(self, request: web.Request, limit_bytes: int) -> object:
        body = await self._receiver.body(request, _JSON, limit_bytes)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise RequestError(f"the body is not JSON: {exc}") from exc

    def _restore(self, file: Path) -> None:
        """Learn what an earlier run knew. Without it the model decides, so a server starts all the same."""
        try:
            self.planner.controller.restore(json.loads(file.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            log.warning("what was learned before is lost, %s cannot be read: %s", file, exc)

    async def _keep(self, file: Path) -> None:
        """Write what was learned now and then: a server may be killed."""
        while True:
            await asyncio.sleep(_KEPT_S)
            await asyncio.to_thread(self._save, file, self._learned())

    def _learned(self) -> bytes:
        return json.dumps(self.planner.controller.save()).encode()

    @staticmethod
    def _save(file: Path, data: bytes) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, data)
        except OSError as exc:
            log.warning("what was learned is lost, %s cannot be written: %s", file, exc)


def _plan(action: Action, decision: Decision) -> Plan:
    name, loss_nats, terms, _ = decision.choice.arm
    codec_s = terms.stage_s("decode") + terms.stage_s("encode")
    return Plan(action, f"{decision.id:016x}", None, name, terms.total_s, codec_s, loss_nats)


def _digests(fields: dict[str, Any]) -> bytes:
    text = fields.get("digests")
    if not isinstance(text, str) or not _DIGESTS.fullmatch(text) or len(text) > 2 * DIGEST_BYTES * CHUNKS_MAX:
        raise RequestError(f"digests must be those of 1 to {CHUNKS_MAX} chunks in lower-case hexadecimal, joined")
    return bytes.fromhex(text)


def _who(request: web.Request, tenant: str, fields: dict[str, Any]) -> Who:
    """A client is told apart from others behind its address by a name that it makes up."""
    return Who(tenant, f"{request.remote}/{label(fields.get('client', '-'), 'client')}")
