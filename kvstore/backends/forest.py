"""Which of the chunks that a tier holds come before which in a prompt; every step takes O(1)."""

from collections import OrderedDict

from kvstore.keys import ChunkKey


class Forest:
    """Chunks below the chunks that go before them in a prompt."""

    def __init__(self) -> None:
        self._parents: dict[ChunkKey, ChunkKey | None] = {}
        self._children: dict[ChunkKey, dict[ChunkKey, None]] = {}
        # Parents that are not in the forest while children of theirs are.
        self._lost: OrderedDict[ChunkKey, None] = OrderedDict()

    def is_leaf(self, key: ChunkKey) -> bool:
        """Whether a chunk has no children in the forest."""
        return key not in self._children

    def orphan(self) -> ChunkKey | None:
        """A chunk whose parent is not in the forest, of the parent that has been gone longest; None without any."""
        if not self._lost:
            return None
        siblings = self._children[next(iter(self._lost))]
        # Not the first: to find that, a dictionary has to walk over all that were taken out before.
        key, _ = siblings.popitem()
        siblings[key] = None
        return key

    def put(self, key: ChunkKey, parent: ChunkKey | None) -> ChunkKey | None:
        """Put a chunk below its parent, or without one on the ground; or move it there.

        Returns:
            The former parent, where it has become a leaf.
        """
        if parent == key:
            parent = None
        before = self._parents.get(key)
        if key in self._parents and before == parent:
            return None
        freed = self._leave(key, before)
        self._parents[key] = parent
        self._lost.pop(key, None)
        if parent is not None:
            self._children.setdefault(parent, {})[key] = None
            if parent not in self._parents:
                self._lost[parent] = None
        return freed

    def remove(self, key: ChunkKey) -> ChunkKey | None:
        """Take a chunk out; its children become orphans.

        Returns:
            Its parent, where that has become a leaf.
        """
        freed = self._leave(key, self._parents.pop(key))
        if key in self._children:
            self._lost[key] = None
        return freed

    def validate(self) -> None:
        """Check that the parts agree."""
        children = {(parent, key) for parent, keys in self._children.items() for key in keys}
        assert children == {(parent, key) for key, parent in self._parents.items() if parent is not None}
        assert all(self._children.values())
        assert self._lost.keys() == self._children.keys() - self._parents.keys()

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, key: object) -> bool:
        return key in self._parents

    def _leave(self, key: ChunkKey, parent: ChunkKey | None) -> ChunkKey | None:
        if parent is None:
            return None
        siblings = self._children[parent]
        del siblings[key]
        if siblings:
            return None
        del self._children[parent]
        self._lost.pop(parent, None)
        return parent if parent in self._parents else None
