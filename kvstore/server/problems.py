"""Errors as RFC 9457 problem+json: one table from error class to status, applied by one middleware."""

import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvstore.backend import Reason
from kvstore.errors import (
    AuthError,
    BackendError,
    BackendFullError,
    BackendUnavailableError,
    BodySizeError,
    FrameError,
    KVStoreError,
    MediaTypeError,
    NoProfilesError,
    ProfileError,
    RangeError,
    RequestError,
)

STATUS: Mapping[type[KVStoreError], int] = {
    RequestError: 400,
    AuthError: 401,
    BodySizeError: 413,
    MediaTypeError: 415,
    RangeError: 416,
    FrameError: 400,
    NoProfilesError: 404,
    ProfileError: 400,
    BackendUnavailableError: 503,
    BackendFullError: 507,
    BackendError: 500,
    KVStoreError: 500,
}
"""Status of every error; a class that is not listed has the status of its nearest base."""

PROBLEM_TYPE = "application/problem+json"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


def status_of(error: KVStoreError) -> int:
    """Status by which an error is answered."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: str
) -> web.Response:
    """A problem+json answer."""
    body = {"type": "about:blank", "title": code, "status": status, "code": code, "detail": detail, **extra}
    return web.Response(status=status, text=json.dumps(body), content_type=PROBLEM_TYPE, headers=dict(headers or {}))


def miss_problem(reason: Reason) -> web.Response:
    """The answer for a chunk that is not served."""
    return problem(404, "miss", f"no such chunk: {reason.value}", reason=reason.value)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into problem+json."""
    try:
        return await handler(request)
    except KVStoreError as exc:
        return _answer(request, exc)
    except web.HTTPException as exc:
        return problem(exc.status, exc.reason.lower().replace(" ", "-"), exc.text or exc.reason, headers=_kept(exc))
    except (HttpProcessingError, web.RequestPayloadError, ConnectionError) as exc:
        # Where the connection is gone nobody reads this answer.
        return _closing(problem(400, "body-length", f"the body could not be read: {exc}"))
    except Exception as exc:
        return _closing(failure(f"{request.method} {request.path}", exc))


def failure(request: str, exc: Exception) -> web.Response:
    """The answer to a request that ended with an exception; what is not the client's doing is logged.

    Args:
        request: What was asked, in a word or two.
        exc: What it ended with.
    """
    if isinstance(exc, KVStoreError):
        response = error_problem(exc)
        if response.status >= 500:
            log.warning("%s: %s", request, exc)
        return response
    if isinstance(exc, TimeoutError):
        return problem(408, "body-timeout", "the body did not arrive in time")
    log.error("%s failed", request, exc_info=exc)
    return problem(500, KVStoreError.code, "something failed here that should not; see the server's log")


def error_problem(error: KVStoreError, *, headers: Mapping[str, str] | None = None, **extra: str) -> web.Response:
    """The answer by which an error is told."""
    own = {}
    if isinstance(error, BackendUnavailableError):
        own["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, RangeError):
        own["Content-Range"] = f"bytes */{error.full_bytes}"
    if isinstance(error, AuthError):
        own["WWW-Authenticate"] = 'Bearer realm="kvstore"'
    return problem(status_of(error), error.code, str(error), headers=own | dict(headers or {}), **extra)


def _answer(request: web.Request, error: KVStoreError) -> web.Response:
    response = failure(f"{request.method} {request.path}", error)
    return response if request.content.at_eof() else _closing(response)


def _closing(response: web.Response) -> web.Response:
    """Close the connection after the answer: the rest of the body is not worth reading."""
    response.force_close()
    return response


def _kept(exc: web.HTTPException) -> dict[str, str]:
    return {"Allow": exc.headers["Allow"]} if "Allow" in exc.headers else {}
