"""A stack of tiers that is replayed: the tiers' own `Index` and `Policies`, moved as `TieredBackend` moves chunks."""

from collections.abc import Mapping, Sequence

from benchmarks.traces import CHUNK_TOKENS
from kvstore.backend import Copy, Held
from kvstore.backends.index import Index, copy_bytes, shortened
from kvstore.backends.policies import FetchedChunk, Origin, Placement, Policies
from kvstore.keys import ChunkKey


class Stack:
    """Tiers with budgets, the fastest first, above a store without one, if there is such a store.

    Args:
        budgets_bytes: Of the tiers, by name.
        store: Name of the store that keeps everything; empty for none.
        level_bytes: Bytes of every level of a chunk.
        profile: `Profile.id`.
        placement: How many levels a chunk keeps.
    """

    def __init__(
        self,
        budgets_bytes: Mapping[str, int],
        store: str,
        level_bytes: Sequence[int],
        profile: bytes,
        placement: Placement,
    ) -> None:
        self.policies = Policies(placement=placement)
        self.tiers = [Index(name, budget, policies=self.policies) for name, budget in budgets_bytes.items()]
        self.names = [*budgets_bytes, *([store] if store else [])]
        self._stored: set[ChunkKey] | None = set() if store else None
        self._profile = profile
        self._held: dict[str, list[Held]] = {}
        for name in budgets_bytes:
            whole = Held(None, Copy(name, 0, tuple(level_bytes), len(level_bytes), profile=profile))
            self._held[name] = [shortened(whole, levels) for levels in range(1, len(level_bytes) + 1)]
        self.sizes_bytes = [sum(level_bytes[: level + 1]) for level in range(len(level_bytes))]
        self._levels = len(level_bytes)

    def depths(self, keys: Sequence[ChunkKey], level: int) -> list[int]:
        """The tier that would serve each chunk of the leading run that is held with all levels up to `level`."""
        run: list[int] = []
        gets = [tier.get for tier in self.tiers]
        for key in keys:
            for depth, get in enumerate(gets):
                found = get(key)
                if found is not None and len(found.copy.level_bytes) > level:
                    run.append(depth)
                    break
            else:
                if self._stored is None or key not in self._stored:
                    break
                run.append(len(gets))
        if run and len(run) < len(keys):
            self.policies.history.follow(keys[len(run) - 1 : len(run) + 1])
        return run

    def get(self, keys: Sequence[ChunkKey], level: int, depths: Sequence[int]) -> list[FetchedChunk]:
        """Read chunks that are held, as `depths` says, and copy them up."""
        history = self.policies.history
        fetched = []
        for key, depth in zip(keys, depths, strict=True):
            reads = history.reads(key)
            for tier in self.tiers[: depth + 1]:
                tier.read(key)
            fetched.append(FetchedChunk(self._profile, level, history.asked(key), self.names[depth], reads))
            history.ask(key, level)
        # One tier after the other, as a stack is read.
        for below in range(1, len(self.names)):
            for position, (key, depth) in enumerate(zip(keys, depths, strict=True)):
                if depth == below:
                    for tier in self.tiers[:below]:
                        self._put(tier, key, level + 1, position)
        return fetched

    def put(self, keys: Sequence[ChunkKey], first: int) -> None:
        """Put a prompt's chunks from number `first` on, with all levels."""
        self.policies.history.follow(keys[max(0, first - 1) :])
        if self._stored is not None:
            self._stored.update(keys[first:])
        for tier in reversed(self.tiers):
            for position in range(first, len(keys)):
                self._put(tier, keys[position], self._levels, position)

    def _put(self, tier: Index, key: ChunkKey, levels: int, position: int) -> None:
        before = tier.get(key)
        have = len(before.copy.level_bytes) if before is not None else 0
        if have >= levels:
            return
        coming = self._held[tier.tier][levels - 1]
        placed = tier.placed(key, coming, copy_bytes(coming.copy))
        if placed <= have:
            return
        held = self._held[tier.tier][placed - 1]
        size_bytes = copy_bytes(held.copy)
        tier.make_room({key: size_bytes})
        origin = Origin(CHUNK_TOKENS, CHUNK_TOKENS * position, self.policies.history.parent(key))
        tier.add(key, held, size_bytes, origin)
