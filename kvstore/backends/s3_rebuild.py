"""How the S3 tier learns at its start what its bucket holds: page by page, through faults, behind everybody's back."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.backends.s3_calls import AbsentError, BreakerOpenError
from kvstore.errors import BackendError, BackendUnavailableError, FrameError
from kvstore.keys import ChunkKey

if TYPE_CHECKING:
    from kvstore.backends.s3_store import Listed

_FIRST_PAUSE_S = 0.2
_PAUSE_MAX_S = 30.0
_HEAD_TRIES = 5
_LOGGED_MAX = 10

log = logging.getLogger(__name__)


class Rebuild:
    """Lists the bucket and reads the head of every frame that is not known yet.

    Args:
        tier: Name of the tier, for the log.
        list_page: Asks for the page that a token names.
        learn: Reads a head into the index, unless the chunk is known by then.
        known: Whether a chunk is in the index.
        available: Set while the breaker is closed.
        width: Heads that are read at one time.

    Attributes:
        done: Whether everything has been seen.
        seen: Frames listed so far.
        foreign: Other objects under the prefix.
        damaged: Objects under a frame's name that are no sound frame.
        unread: Where to put chunks whose heads could not be read, however often it was tried.
        problem: What keeps it from going on; empty while nothing does.
    """

    def __init__(
        self,
        tier: str,
        list_page: Callable[[str | None], Awaitable["Listed"]],
        learn: Callable[[ChunkKey], Awaitable[None]],
        known: Callable[[ChunkKey], bool],
        available: asyncio.Event,
        width: int,
    ) -> None:
        self.done = False
        self.seen = 0
        self.foreign = 0
        self.damaged = 0
        self.unread: set[ChunkKey] = set()
        self.problem = ""
        self._tier = tier
        self._list_page = list_page
        self._learn = learn
        self._known = known
        self._available = available
        self._width = width

    async def run(self) -> None:
        """Work until everything has been seen."""
        token: str | None = None
        while not self.done:
            page = await self._next_page(token)
            if page is None:
                # The server no longer takes its token: from the start again, where most is known by now.
                token, self.seen, self.foreign = None, 0, 0
                continue
            self.seen += len(page.keys)
            self.foreign += page.foreign
            await self._learn_all([key for key in page.keys if not self._known(key)])
            token = page.token
            self.done = token is None
        log.info(
            "%s: the index is complete: %d frames; ignored: %d damaged, %d unreadable, %d other objects",
            self._tier, self.seen, self.damaged, len(self.unread), self.foreign,
        )  # fmt: skip

    async def _next_page(self, token: str | None) -> "Listed | None":
        """The page, however long it takes; None where S3 works but refuses the token."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._available.wait()
            try:
                page = await self._list_page(token)
            except BackendError as exc:
                self._trouble("listing the bucket", exc)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
                if token is not None and not isinstance(exc, BackendUnavailableError):
                    return None
            else:
                self.problem = ""
                return page

    async def _learn_all(self, keys: Sequence[ChunkKey]) -> None:
        queue = iter(keys)

        async def work() -> None:
            for key in queue:
                await self._learn_one(key)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._width, len(keys))):
                group.create_task(work())

    async def _learn_one(self, key: ChunkKey) -> None:
        """Learn one chunk; times when nothing can be asked do not count as tries."""
        tries, pause_s = 0, _FIRST_PAUSE_S
        while True:
            await self._available.wait()
            try:
                await self._learn(key)
            except AbsentError:
                pass
            except FrameError as exc:
                self.damaged += 1
                if self.damaged <= _LOGGED_MAX:
                    log.warning("%s: ignoring %s, which is no sound frame: %s", self._tier, key.hex(), exc)
            except BackendError as exc:
                self._trouble("reading a head", exc)
                tries += not isinstance(exc, BreakerOpenError)
                if tries < _HEAD_TRIES:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _PAUSE_MAX_S)
                    continue
                self.unread.add(key)
            else:
                self.problem = ""
            return

    def _trouble(self, doing: str, exc: BackendError) -> None:
        if not self.problem:
            log.warning("%s: %s for the index failed and is tried again: %s", self._tier, doing, exc.detail)
        self.problem = exc.detail
