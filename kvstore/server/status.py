"""How the server is: health, readiness, metrics, version. No token is needed; nothing here tells what is stored."""

from collections.abc import Callable

from aiohttp import web

import kvstore
from kvstore.frame import VERSION
from kvstore.metrics import Metrics


class StatusRoutes:
    """Handlers for probes and scrapers.

    Args:
        metrics: What `/metrics` shows.
        is_ready: Tells whether requests are welcome.
    """

    def __init__(self, metrics: Metrics, is_ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._is_ready = is_ready

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [
            *(web.get(path, self.health) for path in ("/healthz", "/health", "/healthcheck")),
            web.get("/readyz", self.readiness),
            web.get("/metrics", self.metrics),
            web.get("/version", self.version),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """The process lives."""
        return web.json_response({"status": "ok"})

    async def readiness(self, _: web.Request) -> web.Response:
        """Requests are served."""
        ready = self._is_ready()
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def version(self, _: web.Request) -> web.Response:
        """Versions of the software and of the frame format."""
        return web.json_response({"version": kvstore.__version__, "frame_format": VERSION})
