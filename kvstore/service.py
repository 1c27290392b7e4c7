"""What a server does for its clients beside holding chunks: it plans their transfers, and hands out calibration."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from secrets import token_hex
from typing import Any, TypeVar

from kvstore.answers import load_answer, match_of_answer, parse_nothing
from kvstore.backend import Match
from kvstore.client import Client
from kvstore.controller.tables import renewed
from kvstore.errors import BackendError, BackendUnavailableError, KVStoreError, PipelineError
from kvstore.keys import NAMESPACE_BYTES, ChunkKey
from kvstore.plan import Action, Context, Outcome, Plan, context_json, outcome_json, parse_plan
from kvstore.questions import WAIT_MS_MAX, json_of

_OLD_SERVER_S = 60.0
_NAMESPACES_MAX = 256
_ARTEFACT_BYTES_MAX = 4 << 30

T = TypeVar("T")

log = logging.getLogger(__name__)


class Service:
    """Asks one server for plans and tells it what came of them.

    A server that knows no plans (one before they came, or one without profiles for the namespace) makes no
    difference: its plans say to do what is configured.

    Args:
        client: Talks to the server; stays the caller's.
        name: What tells this client from others at its address; made up by default.
        static_s: How long a namespace is believed to have no profiles.
    """

    def __init__(self, client: Client, *, name: str | None = None, static_s: float = 10.0) -> None:
        self._client = client
        self._name = name or token_hex(8)
        self._static_s = static_s
        self._static_until_s: dict[str, float] = {}
        self._artefacts: dict[str, bytes] = {}
        self._fetching = asyncio.Lock()

    async def plan_get(self, keys: Sequence[ChunkKey], context: Context, *, wait_s: float = 0.0) -> tuple[Plan, Match]:
        """How to come by the leading chunks of a prompt, and which of them are held.

        Args:
            keys: Of one namespace.
            context: What the request says of itself.
            wait_s: Time that the server waits for chunks that are about to be put.

        Raises:
            BackendError: The server cannot be asked.
        """
        if not keys:
            return Plan(Action.RECOMPUTE), Match([], None)
        question = {
            "op": "get",
            "namespace": keys[0][:NAMESPACE_BYTES].hex(),
            "digests": "".join([key[NAMESPACE_BYTES:].hex() for key in keys]),
            "wait_ms": min(round(1000 * wait_s), WAIT_MS_MAX),
        }
        answer = await self._ask(question, context, partial(_planned_get, len(keys)), wait_s)
        if answer is None:
            return Plan(Action.STATIC), await self._client.wait(keys, wait_s)
        self._note(question, answer[0])
        return answer

    async def plan_put(self, namespace: bytes, chunks: int, context: Context) -> Plan:
        """How to encode chunks that are about to be put.

        Raises:
            BackendError: The server cannot be asked.
        """
        question = {"op": "put", "namespace": namespace.hex(), "chunks": chunks}
        plan = await self._ask(question, context, _planned_put, 0.0)
        if plan is not None:
            self._note(question, plan)
        return plan or Plan(Action.STATIC)

    async def observe(self, plan: Plan, outcome: Outcome) -> None:
        """Tell the server what came of a plan. What cannot be told is only not learned from."""
        if plan.decision is None:
            return
        body = {"decision": plan.decision, **outcome_json(outcome)}
        try:
            await self._client.ask("POST", "/v1/observe", {}, json_of(body), parse_nothing)
        except KVStoreError as exc:
            log.debug("an outcome could not be told: %s", exc)

    async def artefacts(self, namespace: bytes, digests: Iterable[str]) -> dict[str, bytes]:
        """Calibration artefacts of a namespace's profiles by digest; each is asked for once.

        Raises:
            BackendError: The server cannot be asked.
            PipelineError: It does not have one, or has other bytes under its digest.
        """
        async with self._fetching:
            for digest in digests:
                if digest not in self._artefacts:
                    self._artefacts[digest] = await self._artefact(namespace, digest)
            return dict(self._artefacts)

    def _note(self, question: dict[str, Any], plan: Plan) -> None:
        """Where nothing is planned, a look-up on a link is faster than asking for a plan."""
        if plan.action is Action.STATIC:
            self._pause(question["namespace"], self._static_s)

    async def _artefact(self, namespace: bytes, digest: str) -> bytes:
        path = f"/v1/profiles/{namespace.hex()}/artefacts/{digest}"
        try:
            data = await self._client.ask("GET", path, {}, None, bytes, answer_bytes_max=_ARTEFACT_BYTES_MAX)
        except BackendError:
            raise
        except KVStoreError as exc:
            raise PipelineError(f"the server has no calibration artefact {digest}: {exc}") from exc
        if hashlib.sha256(data).hexdigest() != digest:
            raise PipelineError(f"what the server has as calibration artefact {digest} is another one")
        return data

    async def _ask(
        self, question: dict[str, Any], context: Context, parse: Callable[[bytes], T], wait_s: float
    ) -> T | None:
        """An answer; None from a server that plans nothing for this namespace, which is not asked again for a while."""
        namespace = question["namespace"]
        if time.monotonic() < self._static_until_s.get(namespace, 0.0):
            return None
        body = {**question, "client": self._name, "context": context_json(context)}
        try:
            return await self._client.ask("POST", "/v1/plan", {}, json_of(body), parse, more_s=wait_s)
        except BackendUnavailableError:
            raise
        except BackendError as exc:
            log.warning("the server does not plan, and is not asked to for a minute: %s", exc)
            self._pause(namespace, _OLD_SERVER_S)
            return None

    def _pause(self, namespace: str, pause_s: float) -> None:
        renewed(self._static_until_s, namespace, _NAMESPACES_MAX, float)
        self._static_until_s[namespace] = time.monotonic() + pause_s


def _planned_get(keys: int, text: bytes) -> tuple[Plan, Match]:
    answer = load_answer(text)
    return parse_plan(answer), match_of_answer(keys, answer["match"])


def _planned_put(text: bytes) -> Plan:
    return parse_plan(load_answer(text))
