"""What the vLLM connector asks before it starts, and what it says where it cannot."""

import logging
from collections.abc import Sequence

from kvstore.client import Client
from kvstore.connectors.background import Background
from kvstore.connectors.vllm_options import Options
from kvstore.errors import AuthError, ConfigError, KVStoreError
from kvstore.keys import chunk_keys, namespace_of
from kvstore.layout import Layout

TESTED = ((0, 32), (0, 33))
"""Versions of vLLM that this was tested with: from the first on, below the second."""

log = logging.getLogger("vllm.kvstore")


def check_version(version: str, options: Options) -> None:
    """Refuse versions of the engine that were not tested.

    Raises:
        ConfigError: This is one, and the option `untested_version` is not set.
    """
    first, end = (".".join(map(str, bound)) for bound in TESTED)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers < TESTED[1] and not options.untested_version:
        raise ConfigError(
            f"vLLM {version} is not among the tested versions (from {first}, below {end}): install one of them, "
            "or set option 'untested_version' to true"
        )


def check_server(options: Options, client: Client, layout: Layout, background: Background) -> None:
    """Ask the server once.

    Raises:
        ConfigError: It refuses this engine, or is not there and `fail_open` is false.
    """
    asked = background.submit(client.match(chunk_keys(layout, [0] * layout.chunk_tokens)))
    try:
        asked.result(options.match_s)
    except AuthError as exc:
        raise ConfigError(f"option 'token': {options.url} refuses it: set it to the server's token") from exc
    except (KVStoreError, TimeoutError) as exc:
        asked.cancel()
        problem = f"option 'url': {options.url} does not answer ({exc or 'no answer in time'})"
        if not options.fail_open:
            raise ConfigError(f"{problem}: start the server with 'kvstore serve', or correct the url") from exc
        log.warning("kvstore: %s; the engine computes everything until it does", problem)


def tell_namespaces(layouts: Sequence[Layout]) -> None:
    """Say where chunks lie: `kvstore profiles push` must be told."""
    names = " ".join(namespace_of(layout).hex() for layout in layouts)
    log.info("kvstore: the chunks of this model, a namespace for each rank: %s", names)


def log_open(exc: Exception) -> None:
    """Say why the engine runs without kvstore; what nobody foresaw is shown with its traceback."""
    unforeseen = None if isinstance(exc, KVStoreError) else exc
    log.error(
        "kvstore: %s. The engine runs without it, because fail_open is true.",
        repr(unforeseen) if unforeseen else exc,
        exc_info=unforeseen,
    )
