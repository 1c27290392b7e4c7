"""What clients and servers tell each other about plans: what is asked, what was planned, and what came of it.

Everything here may come from anywhere, so every field is checked and bounded, and errors name it.
"""

import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from kvstore.errors import RequestError
from kvstore.header import LEVELS_MAX, STAGES_MAX, StageSpec

PLAN_BYTES_MAX = 8 << 20
CHUNKS_MAX = 1 << 16
SECONDS_MAX = 1e5
NATS_MAX = 1e3
BYTES_MAX = 1 << 50
READS_MAX = 1e9
READS_BEHIND = 20.0
"""What fetches count against a put for which nobody waits."""
_CHUNK_BYTES_MAX = 1 << 40
_CHUNK_TOKENS_MAX = 1 << 16
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DECISION = re.compile(r"[0-9a-f]{16}")


class Action(StrEnum):
    """What to do."""

    FETCH = "fetch"
    RECOMPUTE = "recompute"
    PUT = "put"
    STATIC = "static"
    """Nothing was decided, as no profiles were pushed for the namespace: do what is configured."""


class Context(NamedTuple):
    """What a request says of itself.

    Args:
        chunk_bytes: Bytes of the exact cache of a chunk.
        chunk_tokens: Tokens of a chunk.
        workload: Kind of text, as in the names of the buckets that quality was measured in.
        budget_nats: Largest quality loss; None for the server's default.
        deadline_s: Time that it may take; None where it is only wanted soon.
        prefill_s: Time to compute what is asked for, all of it; None where the asker does not know.
        reads: How often what is put is going to be fetched; None where nobody knows.
    """

    chunk_bytes: int
    chunk_tokens: int
    workload: str = "text"
    budget_nats: float | None = None
    deadline_s: float | None = None
    prefill_s: float | None = None
    reads: float | None = None


class Outcome(NamedTuple):
    """What came of a plan, by the clock of the client.

    Args:
        took_s: From asking for the first byte to the cache being ready, or computed.
        size_bytes: Bytes that were sent; 0 where nothing was.
        wire_s: From asking for the first byte to the last one.
        first_byte_s: From asking to the first byte.
        codec_s: Time in which anything was decoded, or encoded.
    """

    took_s: float
    size_bytes: int = 0
    wire_s: float | None = None
    first_byte_s: float | None = None
    codec_s: float | None = None


class Plan(NamedTuple):
    """What a client is told to do.

    Args:
        action: What.
        decision: What to report under; None where nothing is to be reported.
        level: Quality level to fetch up to; None for all that are held.
        arm: Name of what was chosen.
        expected_s: What it is expected to take; None where nobody knows.
        codec_s: Time of that in which chunks are decoded, or encoded.
        loss_nats: Quality loss of what is fetched, or of the finest level of what is put.
        pipeline: How to encode; None for what is configured.
        artefacts: Digests of the calibration artefacts that encoding or decoding needs.
    """

    action: Action
    decision: str | None = None
    level: int | None = None
    arm: str | None = None
    expected_s: float | None = None
    codec_s: float = 0.0
    loss_nats: float | None = None
    pipeline: tuple[StageSpec, ...] | None = None
    artefacts: tuple[str, ...] = ()


def context_json(context: Context) -> dict[str, Any]:
    """A context as JSON; what is not said is left out."""
    return {name: value for name, value in context._asdict().items() if value is not None}


def parse_context(value: object) -> Context:
    """A context from its JSON.

    Raises:
        RequestError: A field is missing, unknown or out of range; the message names it.
    """
    fields = known_fields(value, "context", Context._fields)
    return Context(
        chunk_bytes=integer(fields, "chunk_bytes", 1, _CHUNK_BYTES_MAX),
        chunk_tokens=integer(fields, "chunk_tokens", 1, _CHUNK_TOKENS_MAX),
        workload=label(fields.get("workload", "text"), "workload"),
        budget_nats=_optional(fields, "budget_nats", 0.0, NATS_MAX),
        deadline_s=_optional(fields, "deadline_s", 0.0, SECONDS_MAX),
        prefill_s=_optional(fields, "prefill_s", 0.0, SECONDS_MAX),
        reads=_optional(fields, "reads", 0.0, READS_MAX),
    )


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON; what is not said is left out."""
    return {name: value for name, value in outcome._asdict().items() if value is not None}


def parse_outcome(fields: Mapping[str, Any]) -> Outcome:
    """An outcome from the fields of its JSON.

    Raises:
        RequestError: A field is missing or out of range; the message names it.
    """
    size_bytes = integer({"size_bytes": 0, **fields}, "size_bytes", 0, BYTES_MAX)
    return Outcome(
        number(fields, "took_s", 0.0, SECONDS_MAX, above=True),
        size_bytes,
        *(_optional(fields, name, 0.0, SECONDS_MAX) for name in ("wire_s", "first_byte_s", "codec_s")),
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON; `parse_plan` undoes it."""
    pipeline = None if plan.pipeline is None else [dict(stage) for stage in plan.pipeline]
    return {**plan._asdict(), "action": plan.action.value, "pipeline": pipeline, "artefacts": list(plan.artefacts)}


def parse_plan(fields: Mapping[str, Any]) -> Plan:
    """A plan from a server's answer.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is none.
    """
    level, pipeline, expected_s = fields["level"], fields["pipeline"], fields["expected_s"]
    loss_nats = fields["loss_nats"]
    if level is not None and not (type(level) is int and 0 <= level < LEVELS_MAX):
        raise ValueError(f"there is no level {level!r}")
    if pipeline is not None and not (
        0 < len(pipeline) <= STAGES_MAX and all(isinstance(one, dict) for one in pipeline)
    ):
        raise ValueError("that is no pipeline")
    return Plan(
        Action(fields["action"]),
        None if fields["decision"] is None else decision_id(fields["decision"]),
        level,
        None if fields["arm"] is None else str(fields["arm"]),
        None if expected_s is None else float(expected_s),
        float(fields["codec_s"]),
        None if loss_nats is None else float(loss_nats),
        None if pipeline is None else tuple(pipeline),
        tuple(str(digest) for digest in fields["artefacts"]),
    )


def decision_id(value: object) -> str:
    """A decision's id, as answers name it.

    Raises:
        RequestError: It is none.
    """
    if not isinstance(value, str) or not _DECISION.fullmatch(value):
        raise RequestError("decision must be the 16 hexadecimal digits that a plan names")
    return value


def known_fields(value: object, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object that has no other fields than these.

    Raises:
        RequestError: It is none, or has another one.
    """
    if not isinstance(value, dict):
        raise RequestError(f"{what} must be a JSON object")
    for name in value:
        if name not in names:
            raise RequestError(f"{what} has an unknown field {str(name)[:64]!r}; it knows {', '.join(names)}")
    return value


def integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """An integer field.

    Raises:
        RequestError: It is missing, none, or out of range.
    """
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}")
    return value


def number(fields: Mapping[str, Any], name: str, low: float, high: float, *, above: bool = False) -> float:
    """A field that is a number.

    Args:
        fields: Of a JSON object.
        name: Of the field.
        low: Least value; with `above`, it must be more than this.
        high: Largest value.
        above: See `low`.

    Raises:
        RequestError: It is missing, none, or out of range.
    """
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        value = math.nan
    if math.isnan(value) or (above and value == low):
        raise RequestError(f"{name} must be a number {'above' if above else 'from'} {low:g} up to {high:g}")
    return float(value)


def label(value: object, name: str) -> str:
    """A short name.

    Raises:
        RequestError: It is none.
    """
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise RequestError(f"{name} must match {_LABEL.pattern}")
    return value


def _optional(fields: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    if fields.get(name) is None:
        return None
    return number(fields, name, low, high, above=name != "budget_nats")
