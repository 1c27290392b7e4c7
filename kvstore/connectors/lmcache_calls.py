"""Requests of the LMCache connector: each has a deadline, and after failures in a row the server is left alone."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvstore.backend import Miss, Reason
from kvstore.backends.breaker import Breaker, Permit
from kvstore.errors import AuthError, BackendError, KVStoreError

_FAILURES_MAX = 3
_COOLDOWN_MAX_S = 15.0

log = logging.getLogger(__name__)

T = TypeVar("T")


class Calls:
    """Calls to one server.

    Args:
        count: Counts a failure by its name.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self.breaker = Breaker(failures_max=_FAILURES_MAX, cooldown_max_s=_COOLDOWN_MAX_S)

    async def ask(self, call: Callable[[], Coroutine[Any, Any, T]], deadline: float) -> T | Miss:
        """The server's answer, or a miss; `deadline` is a time of the loop's clock."""
        permit = self.breaker.admit()
        if permit is None:
            return Miss(Reason.BREAKER)
        try:
            async with asyncio.timeout_at(deadline):
                answer = await call()
        except TimeoutError:
            self._failed(permit, "deadline", "no answer before the deadline")
            return Miss(Reason.DEADLINE)
        except AuthError as exc:
            self._failed(permit, "token", str(exc))
            return Miss(Reason.BREAKER)
        except BackendError as exc:
            self._failed(permit, "unavailable", str(exc))
            return Miss(Reason.BREAKER)
        except KVStoreError as exc:
            self.breaker.unused(permit)
            self._count("request_errors")
            log.warning("the server refuses a request: %s", exc)
            return Miss(Reason.IDENTITY)
        except BaseException:
            self.breaker.unused(permit)
            raise
        if isinstance(answer, list) and any(isinstance(one, Miss) and one.reason is Reason.BREAKER for one in answer):
            # What came before the connection broke is of use; the server is not well.
            self._failed(permit, "unavailable", "the connection broke in the middle of an answer")
        else:
            self.breaker.succeeded(permit)
        return answer

    def _failed(self, permit: Permit, cause: str, reason: str) -> None:
        opened = self.breaker.opened
        self.breaker.failed(permit, reason)
        self._count(f"{cause}_errors")
        if self.breaker.opened > opened:
            log.warning("the server is left alone for %.0f s: %s", self.breaker.retry_after_s, reason)
