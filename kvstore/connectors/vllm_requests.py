"""What the scheduler's half of the vLLM connector knows of each request."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvstore.backend import Held
from kvstore.connectors.paged import KL_UNKNOWN_NATS
from kvstore.connectors.vllm_plan import Load, Loaded, worst
from kvstore.header import Behind
from kvstore.keys import ChunkKey, chunk_keys
from kvstore.layout import Layout
from kvstore.plan import Plan

log = logging.getLogger(__name__)

Keys = tuple[tuple[ChunkKey, ...], ...]
"""Keys of a prompt's leading chunks, for every shard."""


@dataclass(frozen=True)
class Found:
    """The answer of a look-up.

    Args:
        keys: Keys of the full chunks that were asked for.
        held: The leading run that each shard's store holds.
        plan: What the server says to do; None where that is left to the connector.
    """

    keys: Keys = ()
    held: tuple[Sequence[Held], ...] = ()
    plan: Plan | None = None

    @property
    def chunks(self) -> int:
        """Leading chunks that are held of every shard."""
        return min((len(held) for held in self.held), default=0)

    @property
    def exact(self) -> int:
        """Leading chunks that need not be stored again."""
        return min((_exact_run(held) for held in self.held), default=0)

    def size_bytes(self, first: int, end: int, level: int | None) -> int:
        """Bytes of a fetch of chunks of all shards, up to a level."""
        levels = None if level is None else level + 1
        return sum(
            copy.head_bytes + sum(copy.level_bytes[:levels]) for held in self.held for _, copy in held[first:end]
        )


@dataclass
class Tracked:
    """A request that the engine has not finished.

    Args:
        request: The engine's request.
        salt: What its keys depend on beside the token ids.
        keys: Keys of its leading chunks, as far as they were needed.
        lookup: The look-up under way.
        found: The answer of the last one.
        offer: Tokens that were offered for loading, and the computed ones behind which they were.
        loading: The load under way.
        results: What workers have reported of it.
        may_load: Whether another load may be tried; false after one that failed.
        saved: Leading chunks that need not be saved.
        behind: What its chunks stand on, where that is not exact.
        marked: Leading blocks that are known as lossy because of it.
        asked_s: When it was looked up.
        load_began_s: When the load under way was decided.
        level: Highest quality level to load; None for all that are held.
        left: Whether it was left to the engine, before it was looked up or behind that.
        plan: What the server said to do.
    """

    request: Any
    salt: bytes
    keys: Keys = ()
    lookup: "Future[Found] | None" = None
    found: Found | None = None
    offer: tuple[int, int] | None = None
    loading: Load | None = None
    results: list[Loaded] = field(default_factory=list)
    may_load: bool = True
    saved: int = 0
    behind: Behind | None = None
    marked: int = 0
    asked_s: float = 0.0
    load_began_s: float = 0.0
    level: int | None = None
    left: bool = False
    plan: Plan | None = None

    @property
    def planned(self) -> dict[str, Any]:
        """What a load as it is planned has beside its run."""
        if self.plan is None:
            return {"level": self.level}
        loss_nats = KL_UNKNOWN_NATS if self.plan.loss_nats is None else self.plan.loss_nats
        return {"level": self.plan.level, "planned": True, "loss_nats": loss_nats, "artefacts": self.plan.artefacts}

    @property
    def fetch_level(self) -> int | None:
        """Highest level to load now."""
        return self.level if self.plan is None else self.plan.level

    def keys_to(self, last: int, layouts: Sequence[Layout]) -> Keys:
        """Keys of at least `last` leading chunks."""
        if not self.keys or len(self.keys[0]) < last:
            token_ids = list(self.request.all_token_ids)
            self.keys = tuple(tuple(chunk_keys(layout, token_ids, salt=self.salt)) for layout in layouts)
        return self.keys


class LossyBlocks:
    """Blocks in the engine's own cache that are not exact, by the engine's hashes.

    Args:
        blocks_max: Beyond so many it forgets which they are, and takes every block for one.
    """

    def __init__(self, blocks_max: int = 1 << 20) -> None:
        self._blocks_max = blocks_max
        self._known: dict[bytes, Behind] = {}
        self._forgot = False

    def add(self, hashes: Sequence[bytes], behind: Behind) -> None:
        """Remember blocks, and what they stand on."""
        self._known.update((bytes(found), behind) for found in hashes)
        if len(self._known) > self._blocks_max:
            self._known.clear()
            self._forgot = True

    def worst(self, hashes: Sequence[bytes]) -> Behind | None:
        """The worst of what blocks stand on; None where all are exact."""
        if hashes and self._forgot:
            return Behind(0, KL_UNKNOWN_NATS)
        return worst(self._known.get(bytes(found)) for found in hashes) if self._known else None

    def clear(self) -> None:
        """The engine emptied its cache."""
        self._known.clear()
        self._forgot = False


def is_keyed(request: Any) -> bool:
    """Whether the token ids and the salt are all that a request's KV depends on."""
    return not (
        request.lora_request is not None
        or request.mm_features
        or request.prompt_embeds is not None
        or request.prompt_token_ids is None
        or request.pooling_params is not None
        or request.resumable
    )


def level_of(request: Any, level: int | None) -> int | None:
    """The highest level that a request asks for in its `kv_transfer_params`, else the one that was set.

    Args:
        request: The engine's request.
        level: What the connector's options say.
    """
    asked = (request.kv_transfer_params or {}).get("kvstore", {})
    wanted = asked.get("level", level) if isinstance(asked, dict) else level
    if wanted is None or (type(wanted) is int and wanted >= 0):
        return wanted
    log.warning("kv_transfer_params: kvstore.level cannot be %r; using %r", wanted, level)
    return level


def _exact_run(held: Sequence[Held]) -> int:
    return next((number for number, (_, copy) in enumerate(held) if not copy.whole or copy.inexact), len(held))
