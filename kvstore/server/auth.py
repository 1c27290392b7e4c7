"""Who asks: bearer tokens name tenants, and tenants never meet.

What a tenant stores lies under a keyed hash of its name and its namespace, so nobody can reach, guess or probe
another's chunks. The default tenant's namespaces stay as they are.
"""

import hashlib
import hmac
from ipaddress import ip_address

from aiohttp import hdrs, web

from kvstore.config import ServerConfig
from kvstore.errors import AuthError
from kvstore.keys import NAMESPACE_BYTES

DEFAULT_TENANT = ""


class Tenants:
    """Tokens and namespaces of all tenants of a server."""

    def __init__(self, config: ServerConfig) -> None:
        self._tenant_of = {_digest(token): tenant for tenant, token in config.tenants.items()}
        if config.token:
            self._tenant_of[_digest(config.token)] = DEFAULT_TENANT
        self._secret = hashlib.sha256((config.tenant_secret or "").encode()).digest()
        self._check_host = config.is_loopback and not self._tenant_of and not config.insecure

    def authenticate(self, request: web.Request) -> str:
        """Tenant that a request comes from.

        Raises:
            AuthError: The token is missing or wrong, or a web page was made to ask (DNS rebinding).
        """
        if not self._tenant_of:
            if self._check_host and not _is_local(request.host):
                raise AuthError(f"without a token this server answers local names only, not {request.host!r}")
            return DEFAULT_TENANT
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        # The digest is looked up, not the token, so the time it takes says nothing about the token.
        tenant = self._tenant_of.get(_digest(token.strip()))
        if scheme.lower() != "bearer" or tenant is None:
            raise AuthError("this server needs a bearer token, and this is none of its tokens")
        return tenant

    def scope(self, tenant: str, namespace: bytes) -> bytes:
        """Namespace under which a tenant's chunks are stored."""
        if tenant == DEFAULT_TENANT:
            return namespace
        text = tenant.encode() + b"\0" + namespace
        return hmac.digest(self._secret, text, "sha256")[:NAMESPACE_BYTES]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _is_local(host: str) -> bool:
    name = host.lower() if host.endswith("]") else host.lower().rsplit(":", 1)[0]
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
