"""Keys that a request asks for: one namespace in the query, digests in the body."""

from typing import NamedTuple

from aiohttp import web

from kvstore.keys import ChunkKey
from kvstore.server.auth import Tenants
from kvstore.server.query import namespace_of, with_namespace
from kvstore.server.receive import Receiver


class Asked(NamedTuple):
    """Keys of a request.

    Args:
        tenant: Who asks.
        keys: Keys that the client means.
        stored: Those under which its chunks are stored.
    """

    tenant: str
    keys: list[ChunkKey]
    stored: list[ChunkKey]


async def asked_of(request: web.Request, tenants: Tenants, receiver: Receiver) -> Asked:
    """The keys of a request.

    Raises:
        AuthError: The token is missing or wrong.
        KeyFormatError: The namespace is malformed, or the body is not a sequence of digests.
    """
    tenant = tenants.authenticate(request)
    namespace = namespace_of(request)
    digests = await receiver.digests(request)
    keys = with_namespace(namespace, digests)
    scoped = tenants.scope(tenant, namespace)
    return Asked(tenant, keys, keys if scoped == namespace else with_namespace(scoped, digests))
