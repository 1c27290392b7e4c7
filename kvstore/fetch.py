"""A run of chunks from one server, as good as a deadline allows."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.backend import Miss, Reason
from kvstore.client import Client
from kvstore.errors import BackendUnavailableError
from kvstore.frame import Head
from kvstore.keys import ChunkKey
from kvstore.stream import Arrived, Fetch, Fetched, joined


async def fetch_run(
    client: Client,
    keys: Sequence[ChunkKey],
    *,
    level: int | None = None,
    wait_ms: int = 0,
    deadline_s: float | None = None,
    arrived: Callable[[int, Head, int, Arrived], None] | None = None,
) -> Fetched:
    """Fetch the leading run of chunks; at the deadline every chunk has the levels that were complete by then.

    Args:
        client: Where from.
        keys: As many as one likes; what one stream does not bring, the next one does.
        level: Quality level to fetch up to, None for all that are held.
        wait_ms: Time that the server waits for chunks that are about to be put.
        deadline_s: When the fetch ends, wherever it is.
        arrived: Called with every segment as it has arrived: number of its chunk, the chunk's head, how many levels
            of it come, and the segment.

    Raises:
        BackendError: The server cannot be asked.
    """
    started_s = time.monotonic()
    parts: list[Fetched] = []
    while (done := sum(len(part.frames) for part in parts)) < len(keys):
        left_s = None if deadline_s is None else deadline_s - (time.monotonic() - started_s)
        seen = None if arrived is None else partial(_seen, arrived, done)
        part = await _fetch_some(client, keys[done:], level, wait_ms, left_s, seen)
        parts.append(part)
        # A server waits for all chunks at one time, and only as often as it is asked.
        wait_ms = 0
        if part.miss is not None or part.cut not in (None, Miss(Reason.CORRUPT)):
            break
    return joined(parts)


async def _fetch_some(
    client: Client,
    keys: Sequence[ChunkKey],
    level: int | None,
    wait_ms: int,
    left_s: float | None,
    seen: Callable[[Fetch, Arrived], None] | None,
) -> Fetched:
    if left_s is not None and left_s <= 0:
        return Fetched([], Miss(Reason.DEADLINE))
    ends_s = None if left_s is None else time.monotonic() + left_s
    try:
        async with client.fetch(keys, level=level, wait_ms=wait_ms, deadline_s=left_s) as fetch:
            async for segment in fetch:
                if seen is not None:
                    seen(fetch, segment)
    except BackendUnavailableError:
        if ends_s is None or time.monotonic() < ends_s:
            raise
        return Fetched([], Miss(Reason.DEADLINE))
    return fetch.fetched()


def _seen(arrived: Callable[[int, Head, int, Arrived], None], before: int, fetch: Fetch, segment: Arrived) -> None:
    """Tell of a segment by the number of its chunk among all that were asked for."""
    arrived(before + segment.chunk, *fetch.coming(segment.chunk), segment)
