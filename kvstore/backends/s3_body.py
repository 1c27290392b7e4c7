"""Bodies of objects: a frame's buffers as something to send, and a stream of bytes as a frame.

Both look at the deadline between pieces. What S3 says of lengths is checked before anything is allocated for it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from urllib3.exceptions import HTTPError

from kvstore.backend import Held, check_copy
from kvstore.backends.index import held_of
from kvstore.backends.s3_calls import ChangedError, Deadline, ForeignError
from kvstore.buffers import allocate
from kvstore.errors import BackendError, BackendUnavailableError, FrameCorruptError, LayoutMismatchError
from kvstore.frame import PREFIX_BYTES, Frame, Head, head_bytes, parse_head
from kvstore.keys import ChunkKey, split_key

_PIECE_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


class Found(NamedTuple):
    """What lies under a key.

    Args:
        frame: The frame, with the levels that were asked for.
        held: All that the object holds.
        etag: Which version of the object it is.
    """

    frame: Frame
    held: Held
    etag: str


class WriteBody:
    """Buffers as the seekable file that botocore wants for a body; nothing is copied."""

    def __init__(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        self._views = [view for view in views if view]
        self._deadline = deadline
        self._size_bytes = sum(map(len, self._views))
        self._position = 0

    def read(self, size: int = -1) -> memoryview | bytes:
        """The next bytes, all from one buffer; empty at the end."""
        self._deadline.check()
        start = self._position
        for view in self._views:
            if start < len(view):
                piece = view[start:] if size < 0 else view[start : start + size]
                self._position += len(piece)
                return piece
            start -= len(view)
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position, as files do."""
        self._position = (0, self._position, self._size_bytes)[whence] + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position


class ReadFrame:
    """One reading of an object from its start, in as many ranged requests as it takes.

    A connection that ends in the middle of a body is nothing that botocore tries again, so it is done here.

    Args:
        tier: Name of the tier, for errors.
        open_range: Sends a GET for bytes from a start to an end.
        attempts: Requests for the same bytes.
        size_bytes_max: Larger objects are none of ours.
        deadline: When to give up.

    Attributes:
        etag: Version of the object, once a request was answered.
    """

    def __init__(
        self,
        tier: str,
        open_range: Callable[[int, int], Mapping[str, Any]],
        attempts: int,
        size_bytes_max: int,
        deadline: Deadline,
    ) -> None:
        self.etag = ""
        self._tier = tier
        self._open_range = open_range
        self._attempts_left = attempts
        self._size_bytes_max = size_bytes_max
        self._deadline = deadline
        self._size_bytes = 0
        self._position = 0
        self._left_bytes = 0
        self._ahead = 0
        self._stream: Any = None

    def read(self, key: ChunkKey, guess_bytes: int, levels_max: int) -> Found:
        """The frame and what is held of it; see `S3Store.read`."""
        self._ahead = guess_bytes
        self._open(PREFIX_BYTES)
        head = self._read_head(key)
        head_end = len(head.raw)
        levels = head.held_levels(self._size_bytes - head_end)
        # The object is as long as these levels, so they are not larger than anything that S3 has.
        sizes_bytes = head.level_bytes[: min(levels, levels_max)]
        payload = [allocate(size_bytes) for size_bytes in sizes_bytes]
        end = head_end + sum(sizes_bytes)
        for view in payload:
            self._fill(view, end)
        frame = Frame(head, tuple(payload))
        if payload:
            check_copy(key, frame)
        return Found(frame, held_of(self._tier, head, levels), self.etag)

    def close(self) -> None:
        """Give the connection back; one with unread bytes is closed."""
        stream, self._stream = self._stream, None
        if stream is not None and self._left_bytes:
            stream.close()
        elif stream is not None:
            stream.drain_conn()
        self._left_bytes = 0

    def _read_head(self, key: ChunkKey) -> Head:
        prefix = memoryview(bytearray(PREFIX_BYTES))
        self._fill(prefix, PREFIX_BYTES)
        size_bytes = head_bytes(prefix)
        if size_bytes > self._size_bytes:
            raise FrameCorruptError("the object is shorter than the head of its frame")
        rest = memoryview(bytearray(size_bytes - PREFIX_BYTES))
        self._fill(rest, size_bytes)
        head = parse_head(bytes(prefix) + bytes(rest))
        if split_key(head.header.key)[1] != split_key(key)[1]:
            raise LayoutMismatchError("the frame under this name is another chunk's")
        return head

    def _fill(self, view: memoryview, end: int) -> None:
        """Read bytes into a view, asking for more up to `end` where what is under way does not reach it."""
        start = 0
        while start < len(view):
            if not self._left_bytes:
                self._open(end)
            piece = self._receive(min(self._left_bytes, len(view) - start))
            view[start : start + len(piece)] = piece
            start += len(piece)

    def _receive(self, size_bytes: int) -> bytes:
        """Whatever has arrived; nothing where the connection was cut and the rest has to be asked for."""
        self._deadline.check()
        try:
            # The body's own `read` would wait for all of it, and so never see the deadline of a slow stream.
            piece: bytes = self._stream.read1(min(size_bytes, _PIECE_BYTES))
        except (HTTPError, OSError) as exc:
            return self._cut(exc)
        if not piece:
            return self._cut(None)
        self._position += len(piece)
        self._left_bytes -= len(piece)
        return piece

    def _cut(self, exc: Exception | None) -> bytes:
        self._attempts_left -= 1
        if not self._attempts_left:
            raise BackendUnavailableError(self._tier, f"connections end before bodies do: {exc}") from exc
        self.close()
        return b""

    def _open(self, end: int) -> None:
        """Ask for the bytes from the position on; the answer tells how long the object is."""
        start = self._position
        self.close()
        answer = self._open_range(start, max(end, self._ahead))
        self._stream = answer["Body"]._raw_stream
        self._left_bytes = int(answer["ContentLength"])
        first, size_bytes = _range_of(answer)
        etag = str(answer.get("ETag", ""))
        if first != start:
            raise BackendError(self._tier, "the server does not answer ranged requests")
        if start and (etag, size_bytes) != (self.etag, self._size_bytes):
            raise ChangedError
        self.etag, self._size_bytes = etag, size_bytes
        if size_bytes > self._size_bytes_max:
            raise ForeignError(f"an object of {size_bytes} bytes is larger than frames may be here")
        if size_bytes < PREFIX_BYTES:
            raise FrameCorruptError(f"an object of {size_bytes} bytes is no frame")
        if not self._left_bytes:
            raise FrameCorruptError(f"the object has no bytes from {start} on")


def slice_views(views: Sequence[memoryview], start: int, size_bytes: int) -> list[memoryview]:
    """The bytes from `start` on of buffers that follow each other; nothing is copied."""
    end = start + size_bytes
    parts = []
    for view in views:
        parts.append(view[max(0, start) : max(0, end)])
        start -= len(view)
        end -= len(view)
    return [part for part in parts if part]


def _range_of(answer: Mapping[str, Any]) -> tuple[int, int]:
    """First byte and length of the whole object; some servers send a part with status 200."""
    if (match := _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))) is None:
        return 0, int(answer["ContentLength"])
    return int(match[1]), int(match[2])
