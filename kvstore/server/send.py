"""Bodies on their way out: written from views, and not for ever to somebody who does not read them."""

import asyncio
from collections.abc import Iterable, Mapping

from aiohttp import web

from kvstore.config import ServerConfig
from kvstore.metrics import Metrics
from kvstore.server.receive import SLOWEST_BYTES_PER_S
from kvstore.wire import send_views


class Sender:
    """Answers requests with views."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._timeout_s = config.body_timeout_s
        self._metrics = metrics

    async def send(
        self,
        request: web.Request,
        status: int,
        headers: Mapping[str, str],
        views: Iterable[memoryview],
        size_bytes: int,
    ) -> web.StreamResponse:
        """Send an answer of `size_bytes`; a client that goes away or takes it too slowly loses its connection."""
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = size_bytes
        try:
            async with asyncio.timeout(self._timeout_s + response.content_length / SLOWEST_BYTES_PER_S):
                await response.prepare(request)
                await send_views(response.write, views)
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            # The answer has begun, so there is no other way to say that it ends here.
            if request.transport is not None:
                request.transport.abort()
        else:
            self._metrics.sent_bytes.inc(response.content_length)
        return response
