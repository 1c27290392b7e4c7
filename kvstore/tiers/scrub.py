"""The scrubber: reads what local tiers hold, slowly and for ever, so that damage is found before it is asked for.

A tier verifies whatever it is asked for and quarantines damage by itself, so all that is left to do is to ask. And what
the tier below lacks of a chunk, because it was down when that was put, is written there now.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import NamedTuple

from kvstore.backend import Ack, Backend, Miss, Outcome, Reason, put_outcome, state_of
from kvstore.backends.history import History
from kvstore.backends.index import copy_bytes
from kvstore.config import ServerConfig
from kvstore.errors import KVStoreError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.tiers.changes import Changes
from kvstore.tiers.stack import TieredBackend

_REST_S = 60.0

log = logging.getLogger(__name__)


class Scrubbed(NamedTuple):
    """What one pass over the tiers found.

    Args:
        chunks: Chunks that were read and are intact.
        read_bytes: Bytes of them.
        damaged: Chunks that were damaged, and are quarantined now.
        written: Chunks that were written to the tier below, which lacked them, or some of their levels.
        failed: Chunks that could not be read.
    """

    chunks: int = 0
    read_bytes: int = 0
    damaged: int = 0
    written: int = 0
    failed: int = 0


class Scrubber:
    """Walks over the tiers of a stack.

    Args:
        tiers: The tiers of the stack, the fastest first.
        local: Names of those that are read: whose reads cost nothing but time.
        durable: Names of those that must not lack what a tier above them holds.
        bytes_per_s: Rate of reading.
        history: Where reads of this kind are not to be noticed.
        changes: What the stack puts and deletes meanwhile.
        metrics: Where to count; its own by default.
    """

    def __init__(
        self,
        tiers: Sequence[Backend],
        *,
        local: Sequence[str],
        durable: Sequence[str] = (),
        bytes_per_s: float,
        history: History,
        changes: Changes | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._tiers = tiers
        self._local = frozenset(local)
        self._below = {
            upper.name: lower for upper, lower in pairwise(tiers) if upper.name in local and lower.name in durable
        }
        self._bytes_per_s = bytes_per_s
        self._history = history
        self._changes = changes or Changes()
        self._metrics = metrics or Metrics()
        self._problem = ""

    async def run(self) -> None:
        """Scrub until cancelled."""
        while True:
            try:
                passed = await self.scrub()
                if passed.damaged or passed.written:
                    log.info("scrubbed %d chunks, %d bytes: %d damaged, %d written to the tier below", *passed[:4])
                if passed.failed:
                    log.warning("%d chunks could not be scrubbed; the last: %s", passed.failed, self._problem)
            except Exception:  # Whatever it is, what is stored must still be looked after.
                log.exception("scrubbing failed, and goes on later")
            await asyncio.sleep(_REST_S)

    async def scrub(self) -> Scrubbed:
        """Read everything that the local tiers hold, once."""
        passed = Scrubbed()
        for tier in self._tiers:
            if tier.name in self._local:
                async for key, held in tier.scan():
                    found = await self._scrub(tier, key)
                    passed = Scrubbed(*map(sum, zip(passed, found, strict=True)))
                    await asyncio.sleep(copy_bytes(held.copy) / self._bytes_per_s)
        return passed

    async def _scrub(self, tier: Backend, key: ChunkKey) -> Scrubbed:
        """Read one chunk of a tier, and write it down where it is lacking."""
        with self._changes.watching([key]) as changed:
            try:
                with self._history.unnoticed(key):
                    [frame] = await tier.get([key])
            except KVStoreError as exc:
                # Not a reason to leave out those behind it.
                self._problem = str(exc)
                return Scrubbed(failed=1)
            if isinstance(frame, Miss):
                # Any other reason: it went while this pass came to it.
                return Scrubbed(damaged=int(frame.reason is Reason.CORRUPT))
            self._metrics.scrubbed_bytes.labels(tier.name).inc(frame.size_bytes)
            below = self._below.get(tier.name)
            written = below is not None and await _write_down(below, key, frame, changed)
        return Scrubbed(1, frame.size_bytes, 0, int(written))


async def _write_down(tier: Backend, key: ChunkKey, frame: Frame, changed: Collection[ChunkKey]) -> bool:
    """Put a chunk into a tier that lacks it or levels of it, if it is up; false where it cannot take it now."""
    with suppress(KVStoreError):
        held = (await tier.match([key])).held
        lacking = put_outcome(held[0] if held else None, frame) in (Outcome.WRITTEN, Outcome.EXTENDED)
        # What was put, trimmed or deleted since it was read must not come back by this.
        if lacking and state_of(tier).up and key not in changed:
            [stored] = await tier.put([(key, frame)], ack=Ack.MEMORY)
            return stored.outcome in (Outcome.WRITTEN, Outcome.EXTENDED)
    return False


@asynccontextmanager
async def running_scrubber(stack: TieredBackend, config: ServerConfig, metrics: Metrics) -> AsyncIterator[None]:
    """A scrubber of the local tiers of a server, at the rate that its configuration says, until the block is left."""
    if not config.scrub_bytes_per_s:
        yield
        return
    scrubber = Scrubber(
        stack.tiers,
        local=("host", "lmdb"),
        durable=("s3",),
        bytes_per_s=config.scrub_bytes_per_s,
        history=stack.policies.history,
        changes=stack.changes,
        metrics=metrics,
    )
    task = asyncio.create_task(scrubber.run(), name="kvstore-scrubber")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
