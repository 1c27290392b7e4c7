"""What the scheduler's half of the vLLM connector learns while nobody waits: behind requests that were not looked up.

Where the guard expects that no fetch could pay, a look-up would only delay the request. Its answer is still of use:
what is held need not be stored again. And a link may have become faster, which is found out by fetching a chunk.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from kvstore.backend import Miss
from kvstore.client import Client
from kvstore.connectors.background import Background
from kvstore.connectors.guard import Guard
from kvstore.connectors.vllm_requests import Found
from kvstore.errors import KVStoreError
from kvstore.keys import ChunkKey

_HELD_S = 300.0
_HELD_MAX = 1 << 16
_LATER_S = 0.005
"""The engine hands its answer on before anything else is done."""

_PROBE_BYTES = 1 << 20
_PROBE_S = 2.0
_PROBE_SHARE = 20
"""A probe that took a while is followed by a pause of so many times that."""

log = logging.getLogger(__name__)


class _Learned(NamedTuple):
    """What came of one look behind a request."""

    found: Found
    probe_bytes: int
    probe_s: float


class Scout:
    """Looks up what was not looked up, and probes the link; at most one at a time.

    Args:
        client: Where chunks are.
        background: Where it runs.
        guard: Who wants to know how fast the link is.
        clock: Seconds.
    """

    def __init__(self, client: Client, background: Background, guard: Guard, clock: Callable[[], float]) -> None:
        self._client = client
        self._background = background
        self._guard = guard
        self._clock = clock
        self._held: OrderedDict[ChunkKey, float] = OrderedDict()
        self._next_probe_s = 0.0
        self._under_way: Future[_Learned] | None = None

    def look(self, asked: Callable[[], Coroutine[Any, Any, Found]], level: int | None) -> None:
        """Start to learn, if nothing is under way.

        Args:
            asked: Makes the look-up.
            level: Level up to which the request would have fetched.
        """
        self.collect()
        if self._under_way is None:
            probes = self._clock() >= self._next_probe_s
            self._under_way = self._background.submit(self._learn(asked, level, probes=probes))

    def held(self, keys: Sequence[ChunkKey]) -> int:
        """Leading chunks that were held, exact and whole, a while ago."""
        self.collect()
        now = self._clock()
        return next((number for number, key in enumerate(keys) if self._held.get(key, 0.0) <= now), len(keys))

    def fetched(self) -> None:
        """A request has fetched, so nothing needs to be probed for a while."""
        self._next_probe_s = self._clock() + _PROBE_S

    async def _learn(
        self, asked: Callable[[], Coroutine[Any, Any, Found]], level: int | None, *, probes: bool
    ) -> _Learned:
        await asyncio.sleep(_LATER_S)
        found = await asked()
        if not probes or not found.chunks:
            return _Learned(found, 0, 0.0)
        chunk_bytes = max(1, found.size_bytes(0, 1, level) // len(found.held))
        keys = found.keys[0][: min(found.chunks, max(1, _PROBE_BYTES // chunk_bytes))]
        start_s = self._clock()
        frames = [frame for frame in await self._client.get(keys, level=level) if not isinstance(frame, Miss)]
        return _Learned(found, sum(frame.size_bytes for frame in frames), self._clock() - start_s)

    def collect(self) -> None:
        """Take what was learned, if anything was."""
        if self._under_way is None or not self._under_way.done():
            return
        done, self._under_way = self._under_way, None
        try:
            learned = done.result()
        except (KVStoreError, TimeoutError) as exc:
            log.debug("nothing learned behind a request: %s", exc)
            return
        until_s = self._clock() + _HELD_S
        for key in learned.found.keys[0][: learned.found.exact]:
            self._held[key] = until_s
        while len(self._held) > _HELD_MAX:
            self._held.popitem(last=False)
        if learned.probe_bytes:
            self._guard.observe_probe(learned.probe_bytes, learned.probe_s)
            self._next_probe_s = self._clock() + max(_PROBE_S, _PROBE_SHARE * learned.probe_s)
