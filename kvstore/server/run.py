"""Running a server: open the tiers, listen, and on a signal finish what is under way and flush."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from kvstore.config import ServerConfig
from kvstore.errors import ConfigError
from kvstore.metrics import Metrics
from kvstore.server.app import RUNNING, WAITING, create_app
from kvstore.server.placing import policies_of
from kvstore.tiers import open_tiers
from kvstore.wire import READ_BYTES

log = logging.getLogger(__name__)


@asynccontextmanager
async def running_server(config: ServerConfig) -> AsyncIterator[str]:
    """A server that answers at the URL this yields, until the block is left.

    Args:
        config: Its settings.

    Raises:
        ConfigError: The address or the data directory cannot be used.
    """
    metrics = Metrics()

    app = create_app(lambda: open_tiers(config, metrics, policies_of(config, metrics)), config, metrics)
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=config.shutdown_timeout_s,
        read_bufsize=READ_BYTES,
    )
    try:
        await runner.setup()
        _tell_when_lost(runner, app[WAITING].gone)
        site = web.TCPSite(runner, config.host, config.port)
        try:
            await site.start()
        except OSError as exc:
            raise ConfigError(f"cannot listen on {config.host}:{config.port}: {exc.strerror or exc}") from exc
        yield _url(runner)
        # aiohttp drops what clients are still sending as soon as it closes connections, so wait before that.
        app[RUNNING].ready = False
        app[WAITING].stop()
        await site.stop()
        await app[RUNNING].wait_idle(config.shutdown_timeout_s)
    finally:
        await runner.cleanup()


async def serve(config: ServerConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish running requests and flush.

    Args:
        config: Settings.
        announce: Called with the URL once requests are answered.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_server(config) as url:
        announce(url)
        await stop.wait()
        log.info("stopping: finishing running requests and flushing")


def _tell_when_lost(runner: web.AppRunner, lost: Callable[[object], None]) -> None:
    """Call `lost` with every connection that is lost.

    aiohttp's own `handler_cancellation` would end a put in the middle, too, and that is to be finished.
    """
    server = runner.server
    assert server is not None, "a runner that is set up has a server"
    forget = server.connection_lost

    def connection_lost(connection: web.RequestHandler, exc: BaseException | None = None) -> None:
        forget(connection, exc)
        lost(connection)

    server.connection_lost = connection_lost  # type: ignore[method-assign, assignment]


def _url(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
