"""The HTTP server: exposes one `Backend`, checks every frame and never decodes one."""

from kvstore.server.app import create_app
from kvstore.server.run import running_server, serve

__all__ = ["create_app", "running_server", "serve"]
