"""Identity: what differs in any one field never meets, and the bytes of keys never change."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.backends.host import HostBackend
from kvstore.errors import KeyFormatError
from kvstore.keys import chunk_key, chunk_keys, namespace_of, parse_hex, split_key
from kvstore.layout import Layout, PlaneSpec, Rope, attention_layout
from kvstore.testing import make_frame

GOLDEN = json.loads((Path(__file__).parent / "golden" / "keys.json").read_text())
ROPE = Rope(10000.0, 4)
TINY = attention_layout("tiny", "r1", layers=2, kv_heads=1, head_dim=4, chunk_tokens=2, rope=ROPE)
PLANE = TINY.planes["k"]

CHANGES: dict[str, dict[str, Any]] = {
    "model": {"model": "tinier"},
    "revision": {"revision": "r2"},
    "plane name": {"planes": {"k": PLANE, "w": PLANE}},
    "plane missing": {"planes": {"k": PLANE}},
    "dtype": {"planes": {"k": PLANE, "v": dataclasses.replace(PLANE, dtype="float16")}},
    "layers": {"planes": dict.fromkeys("kv", dataclasses.replace(PLANE, shape=(3, 2, 1, 4)))},
    "kv_heads": {"planes": dict.fromkeys("kv", dataclasses.replace(PLANE, shape=(2, 2, 2, 4)))},
    "head_dim": {"planes": dict.fromkeys("kv", dataclasses.replace(PLANE, shape=(2, 2, 1, 8)))},
    "chunk_tokens": {"planes": dict.fromkeys("kv", dataclasses.replace(PLANE, shape=(2, 1, 1, 4))), "chunk_tokens": 1},
    "shard_rank": {"shard_rank": 1, "shard_size": 2},
    "shard_size": {"shard_size": 2},
    "no rope": {"rope": None},
    "rope theta": {"rope": dataclasses.replace(ROPE, theta=10000.000001)},
    "rope rotary_dim": {"rope": dataclasses.replace(ROPE, rotary_dim=2)},
    "rope kind": {"rope": dataclasses.replace(ROPE, kind="llama3")},
    "rope interleaved": {"rope": dataclasses.replace(ROPE, interleaved=True)},
    "rope scaling": {"rope": dataclasses.replace(ROPE, scaling=(("factor", 8.0),))},
}


def test_keys_are_the_golden_ones() -> None:
    assert TINY.digest.hex() == GOLDEN["layout_digest"]
    for salt, keys in GOLDEN["keys"].items():
        assert [key.hex() for key in chunk_keys(TINY, GOLDEN["token_ids"], salt=salt.encode())] == keys


def test_the_chain_is_what_the_page_says() -> None:
    root = hashlib.sha256(b"kvstore chain 1\n" + TINY.digest + struct.pack("<I", 0)).digest()
    first = hashlib.sha256(root + struct.pack("<2I", 1, 2)).digest()
    second = hashlib.sha256(first + struct.pack("<2I", 3, 4)).digest()
    assert [split_key(key)[1] for key in chunk_keys(TINY, [1, 2, 3, 4, 5])] == [first, second]


@pytest.mark.parametrize("field", CHANGES)
async def test_a_layout_that_differs_in_one_field_never_hits(field: str) -> None:
    other = dataclasses.replace(TINY, **CHANGES[field])
    assert namespace_of(other) != namespace_of(TINY)
    backend = HostBackend(1 << 20)
    mine, theirs = chunk_keys(TINY, range(8)), chunk_keys(other, range(8))
    await backend.put([(key, make_frame(key)) for key in mine])
    assert (await backend.match(theirs)).held == []
    assert not {split_key(key)[1] for key in mine} & {split_key(key)[1] for key in theirs}


def test_every_field_of_the_identity_is_tried() -> None:
    fields = {field.name for kind in (Layout, Rope) for field in dataclasses.fields(kind)}
    tried = {name for change in CHANGES.values() for name in change}
    tried |= {word for name in CHANGES if name.startswith("rope ") for word in name.split()[1:]}
    assert fields <= tried


def test_another_salt_never_hits() -> None:
    assert not set(chunk_keys(TINY, range(8))) & set(chunk_keys(TINY, range(8), salt=b"x"))


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_keys_are_equal_exactly_where_prefixes_are(left: list[int], right: list[int]) -> None:
    for number, (mine, theirs) in enumerate(zip(chunk_keys(TINY, left), chunk_keys(TINY, right), strict=False), 1):
        assert (mine == theirs) == (left[: 2 * number] == right[: 2 * number])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_only_full_chunks_have_keys(ids: list[int]) -> None:
    assert len(chunk_keys(TINY, ids)) == len(ids) // 2


@pytest.mark.parametrize("ids", [[-1, 0], [2**32, 0], ["a", "b"], [1.5, 2]])
def test_token_ids_that_are_none_are_refused(ids: list[Any]) -> None:
    with pytest.raises(ValueError, match="token ids"):
        chunk_keys(TINY, ids)


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 31 + "\n", "\u0660" * 32])
def test_malformed_namespaces_are_refused(text: str) -> None:
    with pytest.raises(KeyFormatError):
        parse_hex(text, 16, "namespace")


def test_a_key_has_two_parts_of_fixed_length() -> None:
    key = chunk_key(b"n" * 16, b"d" * 32)
    assert split_key(key) == (b"n" * 16, b"d" * 32)
    with pytest.raises(KeyFormatError):
        chunk_key(b"n" * 15, b"d" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"planes": {}},
        {"planes": {"K": PLANE}},
        {"planes": {"k": PlaneSpec("float64", (2, 2, 1, 4))}},
        {"planes": {"k": PlaneSpec("bfloat16", (2, 2, 4))}},
        {"planes": {"k": PlaneSpec("bfloat16", (2, 2, 0, 4))}},
        {"planes": {"k": PlaneSpec("bfloat16", (2, 4, 1, 4))}},
        {"planes": {"k": PlaneSpec("bfloat16", (2, 2, 1 << 18, 1 << 18))}},
        {"planes": {"k": PLANE, "v": PlaneSpec("bfloat16", (3, 2, 1, 4))}},
        {"chunk_tokens": 0},
        {"shard_rank": 2, "shard_size": 2},
    ],
)
def test_impossible_layouts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        dataclasses.replace(TINY, **change)


def test_an_mla_layout_has_one_latent_plane() -> None:
    layout = Layout("mla", "r", {"latent": PlaneSpec("bfloat16", (4, 256, 1, 576))})
    assert layout.chunk_bytes == 4 * 256 * 576 * 2
