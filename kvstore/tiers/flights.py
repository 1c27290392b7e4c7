"""One read for all who want the same chunk of the same tier at the same time."""

import asyncio
from collections.abc import Iterable, Sequence

from kvstore.backend import Backend, Miss
from kvstore.frame import Frame
from kvstore.keys import ChunkKey

Answers = dict[ChunkKey, Frame | Miss]


class Flights:
    """Reads of one tier that are under way.

    Args:
        tier: The tier that is read.
    """

    def __init__(self, tier: Backend) -> None:
        self._tier = tier
        self._under_way: dict[ChunkKey, tuple[int | None, asyncio.Task[Answers]]] = {}

    async def get(self, keys: Sequence[ChunkKey], level: int | None) -> tuple[Answers, set[ChunkKey]]:
        """An answer for every key, and the keys that were read for this call and not for an earlier one.

        Raises:
            KVStoreError: The read failed, this one's or the one it joined.
        """
        joined = {key: flight[1] for key in keys if (flight := self._under_way.get(key)) and _covers(flight[0], level)}
        led = list(dict.fromkeys(key for key in keys if key not in joined))
        if led:
            # A task of its own: whoever asked first may be cancelled, and the others still want the answer.
            task = asyncio.create_task(self._read(led, level))
            for key in led:
                joined[key] = task
                self._under_way[key] = (level, task)
            task.add_done_callback(lambda done: self._land(led, done))
        found: Answers = {}
        for task in dict.fromkeys(joined.values()):
            found |= await asyncio.shield(task)
        return {key: _cut(found[key], level) for key in joined}, set(led)

    def forget(self, keys: Iterable[ChunkKey]) -> None:
        """Let nobody join the reads of these chunks that are under way: what they bring may be gone by now."""
        for key in keys:
            self._under_way.pop(key, None)

    async def _read(self, keys: list[ChunkKey], level: int | None) -> Answers:
        return dict(zip(keys, await self._tier.get(keys, level=level), strict=True))

    def _land(self, keys: list[ChunkKey], task: asyncio.Task[Answers]) -> None:
        for key in keys:
            if (flight := self._under_way.get(key)) is not None and flight[1] is task:
                del self._under_way[key]
        if not task.cancelled():
            # Those who wait see the error; where nobody waits any more it is nobody's.
            task.exception()


def _covers(flown: int | None, level: int | None) -> bool:
    return flown is None or (level is not None and flown >= level)


def _cut(answer: Frame | Miss, level: int | None) -> Frame | Miss:
    return answer.truncated(level) if isinstance(answer, Frame) else answer
