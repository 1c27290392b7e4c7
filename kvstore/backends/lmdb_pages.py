"""The pages of an LMDB file, checked without LMDB, which trusts them: following a damaged one may kill the process.

Every page of every tree is read and compared with what leads to it, and so is the list of free pages; of values that
have pages of their own only the first page's header is. Values themselves carry checksums, which are verified later.

Source: the structures MDB_page, MDB_node, MDB_meta and MDB_db of LMDB 0.9 (mdb.c), data format version 1.
"""

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kvstore.errors import ConfigError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIG_VALUE, _TREE_VALUE = 1, 2

_HEADER = struct.Struct("<QHHHH")
_OVERFLOW_HEADER = struct.Struct("<QHHI")
_META_PAGE = struct.Struct("<16xIIQQ48s48sQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_NODE = struct.Struct("<HHHH")
_NUMBER = struct.Struct("<Q")


class _PageError(Exception):
    """A page is not what leads to it says."""


class _Tree(NamedTuple):
    """Where a tree begins, and how many pages lie on the way to its leaves."""

    root: int
    depth: int


class _Value(NamedTuple):
    """A value of a leaf: where it lies in its page, or the first page that it has of its own."""

    flags: int
    size_bytes: int
    data: bytes
    first_page: int | None


def check_pages(file: Path) -> None:
    """Check every page of the trees in a file of LMDB.

    A file that is none, or that is shorter than it must be, is left to LMDB and to whoever compares its length.

    Raises:
        ConfigError: A page is damaged.
    """
    with file.open("rb") as stream:
        pages = _open_pages(stream, file.stat().st_size)
        try:
            if pages is not None:
                pages.check()
        except (_PageError, struct.error) as exc:
            what = exc if isinstance(exc, _PageError) else "something in a page lies outside of it"
            raise ConfigError(
                f"{file} is damaged: {what}; nothing in it can be relied on, so use another data directory"
            ) from exc


def _open_pages(stream: BinaryIO, file_bytes: int) -> "_Pages | None":
    first = stream.read(4096)
    if len(first) < _META_PAGE.size or _META_PAGE.unpack_from(first)[:2] != (_MAGIC, _VERSION):
        return None
    page_bytes: int = _TREE.unpack(_META_PAGE.unpack_from(first)[4])[0]
    if page_bytes not in (1 << power for power in range(9, 17)):
        return None
    stream.seek(page_bytes)
    metas = [_META_PAGE.unpack_from(data) for data in (first, stream.read(page_bytes)) if len(data) >= _META_PAGE.size]
    _, _, _, _, free, main, last_page, _ = max(metas, key=lambda meta: meta[-1] if meta[0] == _MAGIC else -1)
    if (last_page + 1) * page_bytes > file_bytes:
        return None
    return _Pages(stream, page_bytes, last_page, free, main)


class _Pages:
    def __init__(self, stream: BinaryIO, page_bytes: int, last_page: int, free: bytes, main: bytes) -> None:
        self._stream = stream
        self._page_bytes = page_bytes
        self._last_page = last_page
        self._free, self._main = _tree(free), _tree(main)
        self._seen: set[int] = set()

    def check(self) -> None:
        """Check all trees, and that no free page is in use."""
        trees = [self._main]
        while trees:
            values = self._values(trees.pop(), sorted_keys=True)
            trees += [_tree(value.data) for value in values if value.flags & _TREE_VALUE]
        for value in self._values(self._free, sorted_keys=False):
            self._check_free(self._content(value))

    def _values(self, tree: _Tree, *, sorted_keys: bool) -> Iterator[_Value]:
        """The values of a tree; every page on the way is checked."""
        waiting = [] if tree.root == _NO_PAGE else [tree]
        while waiting:
            number, depth = waiting.pop()
            page = self._read_tree_page(number, _LEAF if depth == 1 else _BRANCH)
            nodes = list(self._nodes(number, page))
            if sorted_keys and any(a >= b for a, b in pairwise(key for key, *_ in nodes[depth > 1 :])):
                raise _PageError(f"the keys of page {number} are not in order")
            for _, offset, low, high, flags in nodes:
                if depth > 1:
                    waiting.append(_Tree(low | high << 16 | flags << 32, depth - 1))
                else:
                    yield self._value(number, page, offset, low | high << 16, flags)

    def _read_tree_page(self, number: int, kind: int) -> bytes:
        if not 2 <= number <= self._last_page or number in self._seen:
            raise _PageError(f"page {number} is not there, or in two places")
        self._seen.add(number)
        page = self._read(number * self._page_bytes, self._page_bytes)
        found, _, flags, lower, upper = _HEADER.unpack_from(page)
        if found != number or flags & (_BRANCH | _LEAF | _OVERFLOW | _META) != kind:
            raise _PageError(f"page {number} is another")
        if not _HEADER.size < lower <= upper <= self._page_bytes or lower % 2:
            raise _PageError(f"page {number} has no sound header")
        return page

    def _nodes(self, number: int, page: bytes) -> Iterator[tuple[bytes, int, int, int, int]]:
        """Key, offset of the data, and the words before the key of each node of a page."""
        lower = _HEADER.unpack_from(page)[3]
        for (offset,) in struct.iter_unpack("<H", page[_HEADER.size : lower]):
            low, high, flags, key_bytes = _NODE.unpack_from(page, offset)
            end = offset + _NODE.size + key_bytes
            if offset < lower or end > self._page_bytes:
                raise _PageError(f"a key of page {number} lies outside of it")
            yield page[end - key_bytes : end], end, low, high, flags

    def _value(self, number: int, page: bytes, offset: int, size_bytes: int, flags: int) -> _Value:
        if flags not in (0, _BIG_VALUE, _TREE_VALUE):
            raise _PageError(f"a value of page {number} is of no kind that is used here")
        if flags & _BIG_VALUE:
            first_page: int = _NUMBER.unpack_from(page, offset)[0]
            self._check_overflow(first_page, -(-(size_bytes + _OVERFLOW_HEADER.size) // self._page_bytes))
            return _Value(flags, size_bytes, b"", first_page)
        if offset + size_bytes > self._page_bytes:
            raise _PageError(f"a value of page {number} lies outside of it")
        return _Value(flags, size_bytes, page[offset : offset + size_bytes], None)

    def _check_overflow(self, first_page: int, count: int) -> None:
        if not 2 <= first_page <= self._last_page + 1 - count:
            raise _PageError(f"a value lies in page {first_page}, which is not there")
        header = self._read(first_page * self._page_bytes, _OVERFLOW_HEADER.size)
        number, _, flags, pages = _OVERFLOW_HEADER.unpack(header)
        if (number, flags & _OVERFLOW, pages) != (first_page, _OVERFLOW, count):
            raise _PageError(f"page {first_page} does not begin the value that it must")

    def _content(self, value: _Value) -> bytes:
        if value.first_page is None:
            return value.data
        return self._read(value.first_page * self._page_bytes + _OVERFLOW_HEADER.size, value.size_bytes)

    def _check_free(self, content: bytes) -> None:
        """Free pages are a number and so many numbers of pages, the highest first."""
        count: int = _NUMBER.unpack_from(content)[0]
        if count >= len(content) // _NUMBER.size:
            raise _PageError("a list of free pages is longer than its record")
        free = struct.unpack_from(f"<{count}Q", content, _NUMBER.size)
        if free and (free[0] > self._last_page or free[-1] < 2 or any(a <= b for a, b in pairwise(free))):
            raise _PageError("a list of free pages is not in order")
        if not self._seen.isdisjoint(free):
            raise _PageError("a page is both free and in use")

    def _read(self, offset: int, size_bytes: int) -> bytes:
        self._stream.seek(offset)
        data = self._stream.read(size_bytes)
        if len(data) < size_bytes:
            raise _PageError("the file ends too early")
        return data


def _tree(data: bytes) -> _Tree:
    if len(data) != _TREE.size:
        raise _PageError("a tree has no sound record")
    _, _, depth, _, _, _, _, root = _TREE.unpack(data)
    return _Tree(root, depth)
