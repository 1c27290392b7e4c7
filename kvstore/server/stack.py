"""What only a stack of tiers does: pins, and deleting a whole namespace."""

from aiohttp import web

from kvstore.server.auth import Tenants
from kvstore.server.query import namespace_of, ttl_of, url_namespace, with_namespace
from kvstore.server.receive import Receiver
from kvstore.tiers import TieredBackend


class StackRoutes:
    """Handlers for the stack as a whole. `stack` is set before the first request."""

    stack: TieredBackend

    def __init__(self, tenants: Tenants, receiver: Receiver) -> None:
        self._tenants = tenants
        self._receiver = receiver

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [web.post("/v1/pins", self.pin), web.delete("/v1/kv/{namespace}", self.purge)]

    async def pin(self, request: web.Request) -> web.Response:
        """Keep chunks for `?ttl_s=` seconds; 0 lets go of them."""
        tenant = self._tenants.authenticate(request)
        namespace, ttl_s = namespace_of(request), ttl_of(request)
        keys = with_namespace(self._tenants.scope(tenant, namespace), await self._receiver.digests(request))
        if ttl_s == 0:
            await self.stack.unpin(keys)
            return web.json_response({"pinned": 0, "missing": 0})
        pinned = await self.stack.pin(keys, ttl_s)
        return web.json_response({"pinned": sum(pinned), "missing": len(pinned) - sum(pinned)})

    async def purge(self, request: web.Request) -> web.Response:
        """Delete every chunk of a namespace."""
        tenant = self._tenants.authenticate(request)
        deleted = await self.stack.purge(self._tenants.scope(tenant, url_namespace(request)))
        return web.json_response({"deleted": deleted})
