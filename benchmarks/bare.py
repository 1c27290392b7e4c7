"""HTTP over one blocking socket with nothing in between: how fast a server can be driven from Python.

Requests are written from views, answers read into one buffer that is reused, so the client adds no copy of its own.
"""

import re
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

_HEAD_BYTES_MAX = 4096
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Answer(NamedTuple):
    """Status and body of a response; the body is overwritten by the next one."""

    status: int
    body: memoryview


class BareHttp:
    """One keep-alive connection.

    Args:
        url: Root of the server.
        body_bytes_max: Largest body of an answer.
    """

    def __init__(self, url: str, body_bytes_max: int) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "a server's URL names its host"
        assert parts.port is not None, "a server's URL names its port"
        self._host = parts.netloc
        self._buffer = memoryview(bytearray(_HEAD_BYTES_MAX + body_bytes_max))
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "BareHttp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(self, method: str, target: str, content_type: str = "", views: Sequence[memoryview] = ()) -> Answer:
        """Send a request and read its answer."""
        self.send(self.head(method, target, content_type, sum(len(view) for view in views)), *views)
        return self.receive()

    def head(self, method: str, target: str, content_type: str, body_bytes: int) -> bytes:
        """Bytes of a request up to its body."""
        body = f"Content-Type: {content_type}\r\nContent-Length: {body_bytes}\r\n" if content_type else ""
        return f"{method} {target} HTTP/1.1\r\nHost: {self._host}\r\n{body}\r\n".encode("ascii")

    def send(self, *views: bytes | memoryview) -> None:
        """Send bytes; the socket has taken all of them when this returns."""
        for view in views:
            self._socket.sendall(view)

    def receive(self) -> Answer:
        """Read one answer to its last byte."""
        end = body_start = filled = 0
        while not end or filled < end:
            got = self._socket.recv_into(self._buffer[filled:])
            if not got:
                raise ConnectionError("the server closed the connection within an answer")
            filled += got
            if not end:
                body_start, end = self._find_end(filled)
        status = int(bytes(self._buffer[9:12]))
        return Answer(status, self._buffer[body_start:end])

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _find_end(self, filled: int) -> tuple[int, int]:
        """Where the body starts and ends; zeros where the head has not arrived whole."""
        head, blank, _ = bytes(self._buffer[: min(filled, _HEAD_BYTES_MAX)]).partition(b"\r\n\r\n")
        if not blank:
            return 0, 0
        length = _LENGTH.search(head)
        body_start = len(head) + len(blank)
        return body_start, body_start + (int(length[1]) if length else 0)
