"""The body of a message on a link: of a known length, or in parts, each behind its length."""

import struct
from collections.abc import Callable

from kvstore.errors import BodyLengthError, BodySizeError
from kvstore.link import Link

IN_PARTS = (1 << 64) - 1
"""The length of a body in parts."""

_PART = struct.Struct("<Q")
_TAKEN_BYTES_MAX = 64
_WASTE_BYTES = 4 << 20


class LinkBody:
    """The body of a message on a link, in the pieces that its reader asks for.

    Args:
        link: Where it arrives.
        size_bytes: Its length, or `IN_PARTS`.
    """

    def __init__(self, link: Link, size_bytes: int) -> None:
        self._link = link
        self._in_parts = size_bytes == IN_PARTS
        self._part_bytes = 0 if self._in_parts else size_bytes
        self._limit_bytes = IN_PARTS
        self._arrived: Callable[[int], None] | None = None
        self.read_bytes = 0

    def bound(self, limit_bytes: int, arrived: Callable[[int], None] | None = None) -> "LinkBody":
        """The same body, of which no more is accepted.

        Args:
            limit_bytes: Most bytes of it.
            arrived: Called with the number of bytes whenever some arrive; may refuse them by raising.

        Raises:
            BodySizeError: It is announced larger than the limit.
        """
        self._limit_bytes, self._arrived = limit_bytes, arrived
        self._check_limit()
        return self

    @property
    def left_bytes(self) -> int:
        """Bytes that may still come."""
        return self._limit_bytes - self.read_bytes if self._in_parts else self._part_bytes

    @property
    def open(self) -> bool:
        """Whether there are parts to come."""
        return self._in_parts

    async def at_end(self) -> bool:
        """Whether the body has ended.

        Raises:
            BodySizeError: It goes beyond the limit.
        """
        if self._in_parts and not self._part_bytes:
            (self._part_bytes,) = _PART.unpack(await self._link.take(_PART.size, expected=True))
            # The last part has been read, and nothing of the next message with it.
            self._in_parts = self._part_bytes > 0
            self._check_limit()
        return not self._part_bytes

    async def fill(self, buffer: memoryview, filled: Callable[[int], None] | None = None) -> None:
        """Fill a buffer.

        Args:
            buffer: What to fill.
            filled: Called with the number of bytes whenever some more of it are filled.

        Raises:
            BodyLengthError: The body, or a part of it, ends before the buffer is full.
        """
        if len(buffer) > self._part_bytes:
            raise BodyLengthError(f"the body ends after {self.read_bytes + self._part_bytes} bytes")

        def arrived(size_bytes: int) -> None:
            self._note(size_bytes)
            if filled is not None:
                filled(size_bytes)

        await self._link.fill(buffer, arrived)

    async def take(self, size_bytes: int) -> bytes:
        """Exactly that many bytes; the caller has bounded the number.

        Raises:
            BodyLengthError: The body, or a part of it, ends before.
        """
        if size_bytes > _TAKEN_BYTES_MAX:
            buffer = bytearray(size_bytes)
            await self.fill(memoryview(buffer))
            return bytes(buffer)
        if size_bytes > self._part_bytes:
            raise BodyLengthError(f"the body ends after {self.read_bytes + self._part_bytes} bytes")
        taken = await self._link.take(size_bytes, expected=True)
        self._note(size_bytes)
        return taken

    def taken(self) -> bytes | None:
        """All of a body that is not in parts, None where it has not arrived yet."""
        assert not self._in_parts, "a body in parts has no length"
        if (taken := self._link.taken(self._part_bytes)) is not None:
            self._note(len(taken))
        return taken

    async def rest(self) -> bytes:
        """All that is left of a body that is not in parts."""
        assert not self._in_parts, "a body in parts has no length"
        return await self.take(self._part_bytes)

    async def discard(self) -> None:
        """Read to the end and keep nothing."""
        self._arrived = None
        waste = memoryview(bytearray(min(self._part_bytes, _WASTE_BYTES)))
        while self._part_bytes:
            await self.fill(waste[: min(len(waste), self._part_bytes)])

    def _note(self, size_bytes: int) -> None:
        # Counted first: whatever is refused now, what follows on the link is known.
        self.read_bytes += size_bytes
        self._part_bytes -= size_bytes
        if self._arrived is not None:
            self._arrived(size_bytes)

    def _check_limit(self) -> None:
        if self.read_bytes + self._part_bytes > self._limit_bytes:
            raise BodySizeError(
                f"a body of {self.read_bytes + self._part_bytes} bytes is over the limit of {self._limit_bytes}"
            )


def pack_part(size_bytes: int) -> bytes:
    """What stands before a part of a body; a part of no bytes ends it."""
    return _PART.pack(size_bytes)
