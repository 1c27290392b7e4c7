"""What the vLLM connector announces, so that routers know which blocks the server holds.

It is pure: keys, requests and times come in as arguments, and `Change`s come out, which the connector turns into the
engine's own events.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.connectors.vllm_plan import Load, Save
from kvstore.keys import ChunkKey

_PENDING_MAX = 1 << 14


@dataclass(frozen=True)
class Change:
    """Blocks that the server holds from now on, or does not hold any more.

    Args:
        held: Which of the two.
        block_hashes: The engine's hashes of the blocks.
        parent_hash: Hash of the block before them; None at the start of a prompt.
        token_ids: Their tokens.
        salt: Cache salt of the request, where the first of them carries it.
    """

    held: bool
    block_hashes: tuple[bytes, ...]
    parent_hash: bytes | None = None
    token_ids: tuple[int, ...] = ()
    salt: str | None = None


@dataclass
class _Saving:
    """A chunk on its way to the server, until every worker has stored its shard."""

    change: Change
    missing: set[ChunkKey]
    since_s: float


class Events:
    """Changes to announce.

    Args:
        block_tokens: Tokens of the engine's block.
        chunk_tokens: Tokens of a chunk.
        patience_s: Time after which a chunk is given up that no worker said anything about.
    """

    def __init__(self, *, block_tokens: int, chunk_tokens: int, patience_s: float) -> None:
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._patience_s = patience_s
        self._saving: OrderedDict[ChunkKey, _Saving] = OrderedDict()
        self._changes: list[Change] = []

    def saving(self, request: Any, save: Save, now_s: float) -> None:
        """Chunks of a request are about to be stored."""
        for number in range(save.chunks):
            shards = [shard[number] for shard in save.keys]
            change = self._change(request, save.first + number, held=True)
            if change is not None:
                saving = _Saving(change, set(shards), now_s)
                self._saving.update(dict.fromkeys(shards, saving))
        while len(self._saving) > _PENDING_MAX:
            self._saving.popitem(last=False)

    def ended(self, stored: Mapping[ChunkKey, bool]) -> None:
        """A worker says of shards of chunks whether the server holds them now."""
        for key, held in stored.items():
            saving = self._saving.pop(key, None)
            if saving is None:
                continue
            saving.missing.discard(key)
            if not held:
                for other in saving.missing:
                    self._saving.pop(other, None)
            elif not saving.missing:
                self._changes.append(saving.change)

    def lost(self, request: Any, load: Load, chunk: int) -> None:
        """A chunk that should have been there could not be loaded."""
        change = self._change(request, load.first + chunk, held=False)
        if change is not None:
            self._changes.append(change)

    def take(self) -> list[Change]:
        """What is to be announced."""
        changes, self._changes = self._changes, []
        return changes

    def pending(self, now_s: float) -> bool:
        """Whether something is still to be heard of, so that the engine should go on stepping."""
        while self._saving:
            key, saving = next(iter(self._saving.items()))
            if now_s - saving.since_s < self._patience_s:
                return True
            del self._saving[key]
        return bool(self._changes)

    def _change(self, request: Any, number: int, *, held: bool) -> Change | None:
        """A chunk by the engine's names; None where the engine has none."""
        blocks = self._chunk_tokens // self._block_tokens
        first, start = number * blocks, number * self._chunk_tokens
        hashes: Sequence[bytes] = request.block_hashes[first : first + blocks]
        if len(hashes) < blocks:
            return None
        found = tuple(bytes(one) for one in hashes)
        if not held:
            return Change(False, found)
        return Change(
            True,
            found,
            bytes(request.block_hashes[first - 1]) if first else None,
            tuple(request.all_token_ids[start : start + self._chunk_tokens]),
            request.cache_salt if number == 0 else None,
        )
