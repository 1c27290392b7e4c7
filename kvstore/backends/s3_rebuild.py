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
        unsure: Takes the chunks whose heads could not be read.
        available: Set while the breaker is closed.
        width: Heads that are read at one time.

    Attributes:
        done: Whether everything has been seen.
        seen: Frames listed so far.
        foreign: Other objects under the prefix.
        damaged: Objects under a frame's name that are no sound frame.
        unreadable: Frames whose heads could not be read, however often it was tried.
        problem: What keeps it from going on; empty while nothing does.
    """

    def __init__(
        self,
        tier: str,
        list_page: Callable[[str | None], Awaitable["Listed"]],
        learn: Callable[[ChunkKey], Awaitable[None]],
        known: Callable[[ChunkKey], bool],
        unsure: set[ChunkKey],
        available: asyncio.Event,
        width: int,
    ) -> None:
        self.done = False
        self.seen = 0
        self.foreign = 0
        self.damaged = 0
        self.unreadable = 0
        self.problem = ""
        self._tier = tier
        self._list_page = list_page
        self._learn = learn
        self._known = known
        self._unsure = unsure
        self._available = available
        self._width = width

    async def run(self) -> None:
        """Work until everything has been seen."""
        restarts = 0
        while not self.done:
            try:
                await self._see_all()
            except Exception as exc:  # Whatever it is, an index that stays incomplete in silence is worse.
                log.warning("%s: the rebuilding of the index begins again: %r", self._tier, exc)
                self.problem = str(exc)
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2**restarts, _PAUSE_MAX_S))
                restarts += 1
        log.info(
            "%s: the index is complete: %d frames; ignored: %d damaged, %d unreadable, %d other objects",
            self._tier, self.seen, self.damaged, self.unreadable, self.foreign,
        )  # fmt: skip

    async def _see_all(self) -> None:
        """One pass over the bucket; what is known from a pass before is not read again."""
        self.seen = self.foreign = self.damaged = self.unreadable = 0
        token: str | None = None
        while not self.done:
            page = await self._next_page(token)
            self.seen += len(page.keys)
            self.foreign += page.foreign
            await self._learn_all([key for key in page.keys if not self._known(key)])
            token = page.token
            self.done = token is None

    async def _next_page(self, token: str | None) -> "Listed":
        """The page, however long it takes, unless S3 works and refuses its own token."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._available.wait()
            try:
                page = await self._list_page(token)
            except BackendError as exc:
                if token is not None and not isinstance(exc, BackendUnavailableError):
                    raise
                self._trouble("listing the bucket", exc)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
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
                self.unreadable += 1
                self._unsure.add(key)
            else:
                self.problem = ""
            return

    def _trouble(self, doing: str, exc: BackendError) -> None:
        if not self.problem:
            log.warning("%s: %s for the index failed and is tried again: %s", self._tier, doing, exc.detail)
        self.problem = exc.detail
