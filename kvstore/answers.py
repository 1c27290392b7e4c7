"""What a server's JSON answers say, checked; shapes that are none raise, see `MALFORMED`."""

import json
from collections.abc import Mapping
from typing import Any

from kvstore.backend import Ack, Copy, Held, Match, Miss, Outcome, Reason, Stored
from kvstore.errors import (
    AuthError,
    BackendError,
    BackendFullError,
    BackendUnavailableError,
    KVStoreError,
)
from kvstore.keys import ChunkKey, chunk_key

Answer = Mapping[str, Any]

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What the functions here raise where an answer does not have the shape that it must have."""


def error_classes() -> dict[str, type[KVStoreError]]:
    """Every error class by its stable code."""
    found: dict[str, type[KVStoreError]] = {}
    pending: list[type[KVStoreError]] = [KVStoreError]
    while pending:
        error_class = pending.pop()
        # A subclass that only its own module knows shares the code of its base.
        found.setdefault(error_class.code, error_class)
        pending += error_class.__subclasses__()
    return found


def error_from(backend: str, code: str, detail: str, retry_after_s: float = 1.0) -> KVStoreError:
    """The error that a problem's code stands for; an unknown code is a `BackendError`."""
    error_class = error_classes().get(code, BackendError)
    if issubclass(error_class, BackendUnavailableError):
        return error_class(backend, detail, retry_after_s)
    if issubclass(error_class, BackendFullError):
        return BackendFullError(backend, detail)
    if issubclass(error_class, BackendError) or error_class is KVStoreError:
        return BackendError(backend, detail)
    return error_class(detail)


def load_answer(text: bytes) -> dict[str, Any]:
    """A JSON object from its text.

    Raises:
        ValueError: It is no JSON.
        TypeError: It is no object.
    """
    answer = json.loads(text)
    if not isinstance(answer, dict):
        raise TypeError("the server's answer is not a JSON object")
    return answer


def problem_of(backend: str, asked: str, status: int, text: bytes, retry_after_s: float | None = None) -> KVStoreError:
    """The error that an answer tells; over HTTP a header has the time to wait, on a link a field."""
    try:
        answer = load_answer(text)
        code, detail = str(answer["code"]), str(answer["detail"])
        if retry_after_s is None:
            retry_after_s = float(answer.get("retry_after_s", 1.0))
    except (ValueError, KeyError, TypeError, RecursionError):
        return BackendError(backend, f"{asked} answered {status}")
    if status == 401:
        return AuthError(detail)
    return error_from(backend, code, detail, retry_after_s)


def parse_nothing(_: Answer) -> None:
    """An answer that says nothing."""
    return


def parse_match(keys: int, answer: Answer) -> Match:
    """The match that an answer tells about so many keys."""
    held: list[Held] = []
    for run in answer["runs"]:
        count = int(run["count"])
        if not 0 < count <= keys - len(held):
            raise ValueError(f"a run of {count} chunks is more than was asked for")
        held += [Held(None, _parse_copy(run))] * count
    if (answer["miss"] is None) != (len(held) == keys):
        raise ValueError(f"{len(held)} of {keys} chunks are said to be held, and miss is {answer['miss']!r}")
    return Match(held, None if answer["miss"] is None else Miss(_reason(answer["miss"])))


def parse_page(namespace: bytes, answer: Answer) -> list[tuple[ChunkKey, Held]]:
    """Chunks of a namespace."""
    return [
        (chunk_key(namespace, bytes.fromhex(chunk["digest"])), Held(_frame_id(chunk), _parse_copy(chunk)))
        for chunk in answer["chunks"]
    ]


def _frame_id(chunk: Answer) -> bytes | None:
    return None if chunk["frame_id"] is None else bytes.fromhex(chunk["frame_id"])


def _parse_copy(fields: Answer) -> Copy:
    copy = Copy(
        str(fields["tier"]),
        int(fields["head_bytes"]),
        tuple(int(size) for size in fields["level_bytes"]),
        int(fields["levels"]),
        bool(fields["inexact"]),
    )
    if not 0 < len(copy.level_bytes) <= copy.levels or min(copy.head_bytes, *copy.level_bytes) < 0:
        raise ValueError(f"there is no such copy: {copy}")
    return copy


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        # A newer server may know reasons that this client does not.
        return Reason.ABSENT


def parse_stored(backend: str, fields: Answer) -> Stored:
    """What became of one frame of a put."""
    ack = None if fields["ack"] is None else Ack[str(fields["ack"]).upper()]
    error = None
    if fields["code"] is not None:
        found = error_from(backend, str(fields["code"]), str(fields["detail"]))
        error = found if isinstance(found, BackendError) else BackendError(backend, str(found))
    outcome = Outcome(fields["outcome"])
    if (outcome is Outcome.FAILED) != (ack is None) or (ack is None and error is None):
        raise ValueError(f"a put cannot end so: {fields}")
    return Stored(outcome, ack, error)
