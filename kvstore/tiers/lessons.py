"""What a get of a stack found where, for those who learn from it."""

import asyncio
import logging
from collections.abc import Collection, Mapping
from time import perf_counter

from kvstore.backend import Miss
from kvstore.backends.policies import Fetched, FetchedChunk, Policies, TierRead
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.tiers.answers import satisfies

log = logging.getLogger(__name__)


class Lesson:
    """One get, as it goes on. Nothing that is done with it afterwards holds the get up, or makes it fail.

    Args:
        policies: Who learns, if anybody does, and what was asked for before.
        level: The highest level asked for; None for all.
    """

    def __init__(self, policies: Policies, level: int | None) -> None:
        self._policies = policies
        self._level = level
        self._reads: list[TierRead] = []
        self._began_s = 0.0

    def begin(self) -> None:
        """A tier is about to be read."""
        self._began_s = perf_counter()

    def read(self, tier: str, served: Mapping[ChunkKey, Frame], led: Collection[ChunkKey]) -> None:
        """A tier was read; only what was read for this get tells how fast it is."""
        if served and self._policies.learners:
            size_bytes = sum(frame.size_bytes for key, frame in served.items() if key in led)
            self._reads.append(TierRead(tier, size_bytes, perf_counter() - self._began_s))

    def end(self, found: Mapping[ChunkKey, Frame | Miss], tier_of: Mapping[ChunkKey, str]) -> None:
        """The get is answered."""
        if self._policies.learners:
            asyncio.get_running_loop().call_soon(self._tell, found, tier_of)

    def _tell(self, found: Mapping[ChunkKey, Frame | Miss], tier_of: Mapping[ChunkKey, str]) -> None:
        try:
            chunks = [self._chunk(key, frame, tier_of[key]) for key, frame in found.items() if isinstance(frame, Frame)]
            for learn in self._policies.learners:
                learn(Fetched(chunks, self._reads))
        except Exception:  # Whoever cannot learn must not cost anybody his answer.
            log.exception("learning from a get failed")

    def _chunk(self, key: ChunkKey, frame: Frame, tier: str) -> FetchedChunk:
        header, history = frame.head.header, self._policies.history
        level = header.levels - 1 if self._level is None else min(self._level, header.levels - 1)
        asked = history.asked(key)
        history.ask(key, level)
        # The tier that served it has noted this read already.
        reads = max(0, history.reads(key) - 1)
        return FetchedChunk(header.profile, level, asked, tier if satisfies(frame, level) else "", reads)
