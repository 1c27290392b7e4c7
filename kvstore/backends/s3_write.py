"""How a frame is written to S3: in one request, or, if it is large, in parts that go at the same time."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvstore.backends.s3_calls import AbsentError, Calls, Deadline
from kvstore.backends.s3_settings import S3Settings
from kvstore.errors import BackendError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey

if TYPE_CHECKING:
    from kvstore.backends.s3_store import S3Store

_ABORT_S = 5.0

log = logging.getLogger(__name__)


async def write_frame(
    calls: Calls,
    store: "S3Store",
    settings: S3Settings,
    key: ChunkKey,
    frame: Frame,
    expected: str | None,
    deadline: Deadline,
    begun: Callable[[], None],
) -> None:
    """Write a frame; see `S3Store.write`.

    Args:
        calls: Makes the requests.
        store: The bucket.
        settings: Say what is large.
        key: Where to.
        frame: What.
        expected: The condition.
        deadline: When to give up.
        begun: Called before the request that may change the object.
    """
    views = list(frame.buffers())
    if frame.size_bytes < settings.multipart_bytes:
        await calls.run(lambda limit: store.write(key, views, expected, limit), deadline, begun=begun)
        return
    upload_id = await calls.run(partial(store.begin_parts, key), deadline)
    try:
        count = -(-frame.size_bytes // settings.part_bytes)
        parts = [
            calls.run(partial(store.write_part, key, upload_id, number, views), deadline)
            for number in range(1, count + 1)
        ]
        # All must have ended before the upload is given up, or the late ones would stay behind.
        etags = _results(await asyncio.gather(*parts, return_exceptions=True))
        await calls.run(lambda limit: store.end_parts(key, upload_id, etags, expected, limit), deadline, begun=begun)
    except BaseException:
        await _give_up(calls, store, key, upload_id)
        raise


def _results(answers: list[str | BaseException]) -> list[str]:
    """ETags of all parts, or the first error."""
    etags = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        etags.append(answer)
    return etags


async def _give_up(calls: Calls, store: "S3Store", key: ChunkKey, upload_id: str) -> None:
    try:
        await calls.run(partial(store.abort_parts, key, upload_id), Deadline(calls.tier, _ABORT_S))
    except (BackendError, AbsentError) as exc:
        log.info("%s: parts of %s stay until the bucket's lifecycle takes them: %s", calls.tier, key.hex(), exc)
