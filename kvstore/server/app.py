"""The application: routes, middlewares and the life of the backend that it exposes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from kvstore.config import ServerConfig
from kvstore.metrics import Metrics
from kvstore.server.auth import Tenants
from kvstore.server.batch import BatchRoutes
from kvstore.server.chunk import ChunkRoutes
from kvstore.server.fetch import FetchRoutes
from kvstore.server.linked import LinkRoutes
from kvstore.server.plan import PlanRoutes
from kvstore.server.problems import Handler, problems
from kvstore.server.profiles import ProfileRoutes, ProfileStore
from kvstore.server.receive import Receiver
from kvstore.server.send import Sender
from kvstore.server.stack import StackRoutes
from kvstore.server.status import StatusRoutes
from kvstore.server.waiting import Waiting
from kvstore.tiers import TieredBackend, running_scrubber


class Running:
    """Whether requests are welcome, and how many are being answered."""

    def __init__(self) -> None:
        self.ready = False
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if self.count == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> None:
        """Wait until none is left, but not longer than that."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)


RUNNING = web.AppKey("RUNNING", Running)
WAITING = web.AppKey("WAITING", Waiting)


def create_app(
    open_stack: Callable[[], Awaitable[TieredBackend]], config: ServerConfig, metrics: Metrics
) -> web.Application:
    """Application around the stack of tiers that `open_stack` opens at start; it is closed at shutdown.

    Args:
        open_stack: Called once when the application starts.
        config: Limits, tokens and addresses.
        metrics: What `/metrics` shows.
    """
    running = Running()
    app = web.Application(middlewares=[_measure(metrics, running), problems], client_max_size=config.body_bytes_max)
    app[RUNNING] = running
    tenants = Tenants(config)
    receiver = Receiver(config, metrics)
    sender = Sender(config, metrics)
    status = StatusRoutes(metrics, lambda: running.ready)
    whole = StackRoutes(tenants, receiver)
    waiting = app[WAITING] = Waiting(config, metrics)
    chunk = ChunkRoutes(tenants, receiver, sender, waiting)
    batch = BatchRoutes(tenants, receiver, sender, waiting)
    fetch = FetchRoutes(tenants, receiver, sender, waiting, config, metrics)
    store = ProfileStore(config.data_dir / "profiles")
    profiles = ProfileRoutes(tenants, receiver, store)
    plans = PlanRoutes(tenants, receiver, waiting, store, config, metrics, lambda: running.count)
    links = LinkRoutes(tenants, receiver, batch, config, metrics, running)

    async def life(_: web.Application) -> AsyncIterator[None]:
        stack = await open_stack()
        chunk.backend = batch.backend = stack
        fetch.stack = waiting.stack = whole.stack = status.stack = plans.stack = stack
        stack.policies.learners.append(plans.learn)
        await profiles.place(stack.policies.placement)
        async with running_scrubber(stack, config, metrics), plans.running():
            running.ready = True
            yield
        await stack.aclose()

    async def sign(_: web.Request, response: web.StreamResponse) -> None:
        # Versions of what the server is built from are nobody's business.
        response.headers[hdrs.SERVER] = "kvstore"

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(links.shutdown)
    app.on_response_prepare.append(sign)
    for group in (status, chunk, batch, fetch, whole, profiles, plans, links):
        app.add_routes(group.routes())
    return app


def _measure(metrics: Metrics, running: Running) -> Middleware:
    """Middleware that counts requests by route, never by path."""

    @web.middleware
    async def measure(request: web.Request, handler: Handler) -> web.StreamResponse:
        started_s = time.perf_counter()
        with running:
            response = await handler(request)
        resource = request.match_info.route.resource
        route = "unknown" if resource is None else resource.canonical
        metrics.requests.labels(route, str(response.status)).inc()
        metrics.request_seconds.labels(route).observe(time.perf_counter() - started_s)
        return response

    return measure
