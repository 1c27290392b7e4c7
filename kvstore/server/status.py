"""How the server is: health, readiness, metrics, version. No token is needed; nothing here tells what is stored."""

from collections.abc import Callable

from aiohttp import web

import kvstore
from kvstore.frame import VERSION
from kvstore.metrics import Metrics
from kvstore.tiers import TieredBackend


class StatusRoutes:
    """Handlers for probes and scrapers. `stack` is set before the server is ready.

    Args:
        metrics: What `/metrics` shows.
        is_ready: Tells whether requests are welcome.
    """

    stack: TieredBackend

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
        """Requests are served, and how each tier is; a tier that is down does not make the server unready."""
        if not self._is_ready():
            return web.json_response({"ready": False}, status=503)
        states = self.stack.states()
        degraded = not all(state.up for state in states.values())
        # Why one is down may name hosts and buckets; the log has it.
        tiers = {name: "up" if state.up else "down" for name, state in states.items()}
        return web.json_response({"ready": True, "degraded": degraded, "tiers": tiers})

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def version(self, _: web.Request) -> web.Response:
        """Versions of the software and of the frame format."""
        return web.json_response({"version": kvstore.__version__, "frame_format": VERSION})
