"""What a server's answers say, checked; shapes that are none raise, see `MALFORMED`.

Over HTTP they are JSON. On links matches and puts are answered in binary, numbers little-endian, texts behind their
length:

    match:  reason of the miss (1 + n) | runs: count (4) | length of the copy (2) | copy
    copy:   bytes of the head (4) | levels (1) | levels held (1) | inexact (1) | lossless (1) | profile (8) |
            tier (1 + n) | bytes of each level (8)
    put:    of each frame: outcome (1 + n) | ack (1, 0 for none) | code (1 + n) | detail (2 + n)
"""

import json
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any

from kvstore.backend import Ack, Copy, Held, Match, Miss, Outcome, Reason, Stored
from kvstore.errors import (
    AuthError,
    BackendError,
    BackendFullError,
    BackendUnavailableError,
    KVStoreError,
)
from kvstore.header import PROFILE_ID_BYTES
from kvstore.keys import ChunkKey, chunk_key

Answer = Mapping[str, Any]

_RUN = struct.Struct("<IH")
_COPY = struct.Struct(f"<IBB??{PROFILE_ID_BYTES}sB")
_DETAIL_BYTES_MAX = 4096

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error)
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


def parse_nothing(_: bytes) -> None:
    """An answer that says nothing."""
    return


def parse_missing(text: bytes) -> list[str]:
    """The artefacts that a server still needs for the profiles that it was given."""
    return [str(digest) for digest in load_answer(text)["missing"]]


def parse_match(keys: int, text: bytes) -> Match:
    """The match that a JSON answer tells about so many keys."""
    return match_of_answer(keys, load_answer(text))


def match_of_answer(keys: int, answer: Answer) -> Match:
    """The same from its fields."""
    held: list[Held] = []
    for run in answer["runs"]:
        held += [Held(None, _parse_copy(run))] * _checked_run(int(run["count"]), keys - len(held))
    if (answer["miss"] is None) != (len(held) == keys):
        raise ValueError(f"{len(held)} of {keys} chunks are said to be held, and miss is {answer['miss']!r}")
    return Match(held, None if answer["miss"] is None else Miss(_reason(answer["miss"])))


def pack_match(found: Match) -> bytes:
    """What a link answers to a match."""
    parts = [_pack_text("" if found.miss is None else found.miss.reason.value)]
    for copy, run in groupby(map(attrgetter("copy"), found.held)):
        packed = _pack_copy(copy)
        parts += [_RUN.pack(len(list(run)), len(packed)), packed]
    return b"".join(parts)


def unpack_match(keys: int, packed: bytes) -> Match:
    """The match that a link's answer tells about so many keys."""
    reason, start = _unpack_text(packed, 0)
    held: list[Held] = []
    while start < len(packed):
        count, copy_bytes = _RUN.unpack_from(packed, start)
        start += _RUN.size + copy_bytes
        held += [_unpack_held(packed[start - copy_bytes : start])] * _checked_run(count, keys - len(held))
    if start > len(packed) or bool(reason) == (len(held) == keys):
        raise ValueError(f"{len(held)} of {keys} chunks are said to be held, and the miss is {reason!r}")
    return Match(held, Miss(_reason(reason)) if reason else None)


def parse_page(namespace: bytes, text: bytes) -> list[tuple[ChunkKey, Held]]:
    """Chunks of a namespace."""
    answer = load_answer(text)
    return [
        (chunk_key(namespace, bytes.fromhex(chunk["digest"])), Held(_frame_id(chunk), _parse_copy(chunk)))
        for chunk in answer["chunks"]
    ]


def _frame_id(chunk: Answer) -> bytes | None:
    return None if chunk["frame_id"] is None else bytes.fromhex(chunk["frame_id"])


def _checked_run(count: int, most: int) -> int:
    if not 0 < count <= most:
        raise ValueError(f"a run of {count} chunks is more than was asked for")
    return count


def _parse_copy(fields: Answer) -> Copy:
    return _checked_copy(
        Copy(
            str(fields["tier"]),
            int(fields["head_bytes"]),
            tuple(int(size) for size in fields["level_bytes"]),
            int(fields["levels"]),
            bool(fields["inexact"]),
            # An older server does not say.
            bool(fields.get("lossless", False)),
            bytes.fromhex(fields.get("profile", "00" * PROFILE_ID_BYTES)),
        )
    )


# Chunks of one shape share their copy, so a few are packed and unpacked over and over.
@lru_cache(maxsize=4096)
def _pack_copy(copy: Copy) -> bytes:
    tier = copy.tier.encode()
    flags = copy.inexact, copy.lossless
    head = _COPY.pack(copy.head_bytes, copy.levels, len(copy.level_bytes), *flags, copy.profile, len(tier))
    return head + tier + struct.pack(f"<{len(copy.level_bytes)}Q", *copy.level_bytes)


@lru_cache(maxsize=4096)
def _unpack_held(packed: bytes) -> Held:
    head_bytes, levels, held_levels, inexact, lossless, profile, tier_bytes = _COPY.unpack_from(packed)
    end = _COPY.size + tier_bytes
    level_bytes = struct.unpack(f"<{held_levels}Q", packed[end:])
    tier = packed[_COPY.size : end].decode()
    return Held(None, _checked_copy(Copy(tier, head_bytes, level_bytes, levels, inexact, lossless, profile)))


def _checked_copy(copy: Copy) -> Copy:
    sizes = len(copy.level_bytes), len(copy.profile)
    if not 0 < sizes[0] <= copy.levels or sizes[1] != PROFILE_ID_BYTES or min(copy.head_bytes, *copy.level_bytes) < 0:
        raise ValueError(f"there is no such copy: {copy}")
    return copy


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        # A newer server may know reasons that this client does not.
        return Reason.ABSENT


def parse_puts(backend: str, frames: int, text: bytes) -> list[Stored]:
    """What a JSON answer says became of so many frames."""
    results = load_answer(text)["stored"]
    return _checked_number(frames, [_parse_stored(backend, fields) for fields in results])


def pack_puts(stored: Iterable[Stored]) -> bytes:
    """What a link answers to a put."""
    parts = []
    for outcome, ack, error in stored:
        detail = b"" if error is None else str(error).encode()[:_DETAIL_BYTES_MAX]
        parts += [_pack_text(outcome.value), bytes([ack or 0]), _pack_text("" if error is None else error.code)]
        parts += [len(detail).to_bytes(2, "little"), detail]
    return b"".join(parts)


def unpack_puts(backend: str, frames: int, packed: bytes) -> list[Stored]:
    """What a link's answer says became of so many frames."""
    results, start = [], 0
    while start < len(packed):
        outcome, start = _unpack_text(packed, start)
        ack = packed[start]
        code, start = _unpack_text(packed, start + 1)
        end = start + 2 + int.from_bytes(packed[start : start + 2], "little")
        detail = packed[start + 2 : end].decode("utf-8", "replace")
        results.append(_stored(backend, outcome, Ack(ack) if ack else None, code or None, detail))
        start = end
    if start > len(packed):
        raise ValueError("the answer to a put is cut off")
    return _checked_number(frames, results)


def _checked_number(frames: int, stored: list[Stored]) -> list[Stored]:
    if len(stored) != frames:
        raise ValueError(f"{len(stored)} answers to {frames} frames")
    return stored


def _parse_stored(backend: str, fields: Answer) -> Stored:
    ack = None if fields["ack"] is None else Ack[str(fields["ack"]).upper()]
    code = None if fields["code"] is None else str(fields["code"])
    return _stored(backend, fields["outcome"], ack, code, str(fields["detail"]))


def _stored(backend: str, outcome: str, ack: Ack | None, code: str | None, detail: str) -> Stored:
    error = None
    if code is not None:
        found = error_from(backend, code, detail)
        error = found if isinstance(found, BackendError) else BackendError(backend, str(found))
    stored = Stored(Outcome(outcome), ack, error)
    if (stored.outcome is Outcome.FAILED) != (ack is None) or (ack is None and error is None):
        raise ValueError(f"a put cannot end so: {stored}")
    return stored


def _pack_text(text: str) -> bytes:
    encoded = text.encode()
    return bytes([len(encoded)]) + encoded


def _unpack_text(packed: bytes, start: int) -> tuple[str, int]:
    """A text behind its length, and where it ends."""
    if start >= len(packed) or (end := start + 1 + packed[start]) > len(packed):
        raise ValueError("the answer is cut off")
    return packed[start + 1 : end].decode(), end
