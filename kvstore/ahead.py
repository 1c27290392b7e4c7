"""Chunks of a stream, decoded layer group by layer group while the rest of it arrives."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

import torch

from kvstore.backend import Miss, Reason
from kvstore.codecs import Decoding, by_group
from kvstore.codecs.ref.predict import HISTORY
from kvstore.errors import FrameError
from kvstore.frame import Frame, Head
from kvstore.keys import ChunkKey
from kvstore.layout import Layout
from kvstore.stopwatch import Stopwatch
from kvstore.stream import Arrived

_CONCURRENCY = 4

log = logging.getLogger(__name__)


class Ahead:
    """Decodes what a stream brings before it has ended.

    A stream brings all coarse levels before any finer one, and within a level one layer group of all chunks after the
    other. So a layer group can be decoded for good once its finest planes are there, long before the last ones come.

    Args:
        layout: What the planes are.
        keys: Keys of the prompt's chunks.
        token_ids: The prompt from its first token on.
        artefacts: Calibration artefacts by digest.
        planes: Where to write, `[layers, tokens, kv_heads, head_dim]` a plane.
        decoding: Runs while anything is decoded.
        tasks: Where layer groups are decoded while others arrive; frames that came whole need none.
    """

    def __init__(
        self,
        layout: Layout,
        keys: Sequence[ChunkKey],
        token_ids: Sequence[int],
        artefacts: Mapping[str, bytes],
        planes: Mapping[str, torch.Tensor],
        decoding: Stopwatch,
        tasks: asyncio.TaskGroup | None = None,
    ) -> None:
        self._layout = layout
        self._keys = keys
        self._token_ids = token_ids
        self._artefacts = artefacts
        self._planes = planes
        self._stopwatch = decoding
        self._gate = asyncio.Semaphore(_CONCURRENCY)
        self._tasks = tasks
        self._parts: dict[tuple[int, int], dict[str, memoryview]] = {}
        self._decoding: dict[int, Decoding | Miss] = {}
        self._decoded: set[tuple[int, int]] = set()

    def arrived(self, number: int, head: Head, levels: int, segment: Arrived) -> None:
        """A segment has arrived.

        Args:
            number: Number of its chunk in the prompt.
            head: Head of the chunk's frame.
            levels: How many levels of it come.
            segment: The segment.
        """
        place = (number, segment.group)
        self._parts.setdefault(place, {})[segment.plane] = segment.data
        last = segment.level == levels - 1 and segment.plane == head.header.planes[segment.level][-1]
        if last and self._tasks is not None:
            self._tasks.create_task(self._decode(number, head, {segment.group: self._parts.pop(place)}))

    async def finish(self, number: int, frame: Frame) -> Frame | Miss:
        """Decode what of a chunk was not decoded yet, at the levels that its frame has; or why that cannot be done."""
        left = {group: coded for group, coded in enumerate(by_group(frame)) if (number, group) not in self._decoded}
        if left:
            await self._decode(number, frame.head, left)
        found = self._decoding[number]
        return found if isinstance(found, Miss) else frame

    async def _decode(self, number: int, head: Head, groups: Mapping[int, Mapping[str, memoryview]]) -> None:
        async with self._gate:
            with self._stopwatch:
                await asyncio.to_thread(self._decode_groups, number, head, groups)

    def _decode_groups(self, number: int, head: Head, groups: Mapping[int, Mapping[str, memoryview]]) -> None:
        try:
            if number not in self._decoding:
                self._decoding[number] = self._begin(number, head)
            if not isinstance(decoding := self._decoding[number], Miss):
                for group, coded in groups.items():
                    decoding.decode(group, coded)
                    self._decoded.add((number, group))
        except FrameError as exc:
            log.warning("chunk %d of the prefix cannot be decoded: %s", number, exc)
            self._decoding[number] = Miss(Reason.CORRUPT)

    def _begin(self, number: int, head: Head) -> Decoding | Miss:
        tokens = self._layout.chunk_tokens
        start, end = number * tokens, (number + 1) * tokens
        if head.header.first_position != start:
            return Miss(Reason.IDENTITY)
        out = {name: plane[:, start:end] for name, plane in self._planes.items()}
        recent = self._token_ids[max(0, start - HISTORY) : end]
        return Decoding(head, self._layout, self._artefacts, key=self._keys[number], token_ids=recent, out=out)
