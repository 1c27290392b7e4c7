"""What must be equal for two engines to share a chunk of KV cache.

A layout is an identity, not a description: every field takes part in its digest, so engines that differ in any one
of them never see each other's chunks. docs/keys.md gives the digest byte for byte.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "uint8": 1,
        "int8": 1,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "int16": 2,
        "int32": 4,
        "float16": 2,
        "bfloat16": 2,
        "float32": 4,
    }
)
"""Bytes of one element of every dtype that a plane may have."""

CHUNK_BYTES_MAX = 1 << 30
"""Largest uncompressed chunk; it caps every allocation that a frame can ask for."""

_PLANE_NAME = re.compile(r"[a-z][a-z0-9_.]{0,31}")


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """A tensor of a chunk without its data.

    Args:
        dtype: A name from `ITEM_BYTES`.
        shape: Lengths of the axes. The planes of a layout are `[layers, tokens, kv_heads, head_dim]`.
        level: The quality level that a coded plane belongs to; None for planes that are not coded yet.
        symbols: Number of values that an integer plane may take, 0 where it is not an alphabet.
        at_most: Whether the token axis (axis 1; of bytes axis 0) may be shorter than `shape` says.
    """

    dtype: str
    shape: tuple[int, ...]
    level: int | None = None
    symbols: int = 0
    at_most: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, as far as it is known.

    Args:
        theta: Base of the rotation frequencies.
        rotary_dim: Number of head dimensions that are rotated.
        kind: `default`, `llama3`, `yarn`, ... as Hugging Face configurations name it.
        interleaved: Whether the rotated pairs are neighbours (GPT-J) and not halves (Llama).
        scaling: Parameters of the kind by name, sorted.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    interleaved: bool = False
    scaling: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Identity of the KV cache of one model on one shard.

    Args:
        model: Name of the model.
        revision: Digest or revision of its weights (and of whatever else changes its KV: adapter, quantisation).
        planes: Planes of one chunk by name: `k` and `v`, each `[layers, tokens, kv_heads, head_dim]`, or one
            `latent` plane `[layers, tokens, 1, latent_dim]` for MLA.
        chunk_tokens: Tokens of a chunk; a multiple of the engine's block.
        shard_rank: Tensor-parallel rank whose heads these planes hold.
        shard_size: Tensor-parallel size.
        rope: Rotary embedding of K, None where unknown.

    Raises:
        ValueError: A field is out of range or a plane does not fit the chunk.
    """

    model: str
    revision: str
    planes: Mapping[str, PlaneSpec]
    chunk_tokens: int = 256
    shard_rank: int = 0
    shard_size: int = 1
    rope: Rope | None = field(default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "planes", MappingProxyType(dict(self.planes)))
        if not 1 <= self.chunk_tokens <= 1 << 16:
            raise ValueError(f"chunk_tokens must be 1 to 65536, not {self.chunk_tokens}")
        if not 0 <= self.shard_rank < self.shard_size:
            raise ValueError(f"shard_rank {self.shard_rank} is not below shard_size {self.shard_size}")
        if not self.planes:
            raise ValueError("a layout needs at least one plane")
        for name, spec in self.planes.items():
            _check_plane(name, spec, self.chunk_tokens)
        if len({spec.shape[0] for spec in self.planes.values()}) > 1:
            raise ValueError("all planes of a layout must have the same number of layers")
        if self.chunk_bytes > CHUNK_BYTES_MAX:
            raise ValueError(f"a chunk of {self.chunk_bytes} bytes is over the limit of {CHUNK_BYTES_MAX}")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return next(iter(self.planes.values())).shape[0]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk without compression."""
        return sum(spec.size_bytes for spec in self.planes.values())

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON of every field, 32 bytes."""
        text = json.dumps(self._identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).digest()

    def group_specs(self, layers: int) -> dict[str, PlaneSpec]:
        """Planes of a group of `layers` layers: `[layers, tokens, kv_heads, head_dim]` each."""
        return {name: replace(spec, shape=(layers, *spec.shape[1:])) for name, spec in self.planes.items()}

    def _identity(self) -> dict[str, object]:
        """The value whose canonical JSON is hashed; docs/keys.md documents it."""
        return {
            "kvstore_layout": 1,
            "model": self.model,
            "revision": self.revision,
            "chunk_tokens": self.chunk_tokens,
            "shard": [self.shard_rank, self.shard_size],
            "planes": {name: [spec.dtype, *spec.shape] for name, spec in self.planes.items()},
            "rope": None if self.rope is None else _rope_identity(self.rope),
        }


def attention_layout(
    model: str,
    revision: str,
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
    chunk_tokens: int = 256,
    shard_rank: int = 0,
    shard_size: int = 1,
    rope: Rope | None = None,
) -> Layout:
    """Layout of a model with K and V planes (MHA, GQA or MQA)."""
    plane = PlaneSpec(dtype, (layers, chunk_tokens, kv_heads, head_dim))
    return Layout(model, revision, {"k": plane, "v": plane}, chunk_tokens, shard_rank, shard_size, rope)


def _check_plane(name: str, spec: PlaneSpec, chunk_tokens: int) -> None:
    if not _PLANE_NAME.fullmatch(name):
        raise ValueError(f"plane name {name!r} must match {_PLANE_NAME.pattern}")
    if spec.dtype not in ITEM_BYTES:
        raise ValueError(f"plane {name!r}: unknown dtype {spec.dtype!r}; known: {', '.join(ITEM_BYTES)}")
    if len(spec.shape) != 4 or min(spec.shape) < 1 or max(spec.shape) > 1 << 20:
        raise ValueError(f"plane {name!r}: shape {spec.shape} is not [layers, tokens, kv_heads, head_dim]")
    if spec.shape[1] != chunk_tokens:
        raise ValueError(f"plane {name!r} has {spec.shape[1]} tokens, the chunk {chunk_tokens}")
    if spec.level is not None or spec.symbols:
        raise ValueError(f"plane {name!r}: the planes of a layout are not coded")


def _rope_identity(rope: Rope) -> dict[str, object]:
    return {
        "kind": rope.kind,
        "theta": _float_hex(rope.theta),
        "rotary_dim": rope.rotary_dim,
        "interleaved": rope.interleaved,
        "scaling": {name: _float_hex(value) for name, value in rope.scaling},
    }


def _float_hex(value: float) -> str:
    """IEEE-754 double, big-endian, as hexadecimal: the same text in every language."""
    return struct.pack(">d", value).hex()
