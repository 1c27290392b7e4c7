"""Chunks of LMCache as frames: which key they have, which planes, and how their bytes are encoded and decoded.

LMCache hands over a buffer and says its shapes: `[2, layers, tokens, hidden]` for K and V, `[layers, tokens, hidden]`
or `[1, layers, tokens, hidden]` for one plane. Those become typed planes, views of the same memory, so that every
pipeline applies. Whatever else it hands over, a last chunk with fewer tokens too, is a blob: the bytes as they are.

Keys do not say what is in a chunk, so the namespace does: model, revision, shard, dtype, shape and, where the pipeline
is lossy, its name. Clients that differ in one of them never see each other's chunks. The digest is a SHA-256 over every
field of LMCache's key.
"""

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from kvstore.backend import Miss, Reason
from kvstore.buffers import allocate
from kvstore.codecs import Pipeline, decode, encode, named_pipeline
from kvstore.codecs.context import known_specs
from kvstore.codecs.pipeline import build_pipeline
from kvstore.connectors.lmcache_options import LMCacheOptions, SinglePlane, check_usable
from kvstore.errors import FrameError, LayoutMismatchError, PipelineError
from kvstore.frame import Frame, blob_frame, blob_of, padded_bytes
from kvstore.keys import NAMESPACE_BYTES, ChunkKey, chunk_key, namespace_of
from kvstore.layout import ITEM_BYTES, Layout, PlaneSpec

_KEY_TAG = b"kvstore lmcache 1\n"
_BATCH_BYTES = 8 << 20

log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What LMCache says of a chunk's buffer.

    Args:
        parts: Shape and dtype of every tensor in it, one behind the other.
        single_plane: What one of one plane holds.
        head_dim: Dimensions of a head, 0 where unknown.
    """

    parts: tuple[tuple[tuple[int, ...], str], ...]
    single_plane: SinglePlane = SinglePlane.OPAQUE
    head_dim: int = 0


class Shard(NamedTuple):
    """Whose chunks they are: the model, and the rank whose heads or layers they hold."""

    model: str
    rank: int
    size: int


@dataclass(frozen=True)
class Chunk:
    """A chunk to store or to load.

    Args:
        key: Its key.
        codec: How its bytes are laid out.
        data: Its bytes, `codec.size_bytes` or, of a last chunk, fewer; written by a load.
    """

    key: ChunkKey
    codec: "Codec"
    data: memoryview


class Codec:
    """Encodes and decodes the chunks of one shape and shard; stateless and safe to share among threads.

    Args:
        shard: Whose chunks.
        shape: What LMCache says of them.
        options: The connector's options.

    Attributes:
        namespace: Namespace of their keys.
        layout: Their planes, None where they are unknown and chunks are blobs.
        size_bytes: Bytes of a whole chunk.
        chunk_tokens: Tokens of a whole chunk, 0 where they are unknown.
    """

    def __init__(self, shard: Shard, shape: Shape, options: LMCacheOptions) -> None:
        self.size_bytes = sum(_part_bytes(dims, dtype) for dims, dtype in shape.parts)
        self.layout = _layout(shard, shape, options)
        self.chunk_tokens = 0 if self.layout is None else self.layout.chunk_tokens
        self._shape = shape
        if self.layout is None:
            self.namespace = _blob_namespace(shard, shape, options)
        else:
            self.namespace = namespace_of(self.layout)
            self._pipeline = _pipeline(self.layout, shape, options)
            if options.plan:
                # `kvstore profiles push` must be told.
                log.info("chunks of %s, rank %d, lie in namespace %s", shard.model, shard.rank, self.namespace.hex())
        # What a server plans may be lossy, and says so.
        self._exact_only = options.lossless and not options.plan

    def key(self, *fields: bytes) -> ChunkKey:
        """Key from the fields of LMCache's key."""
        digest = hashlib.sha256(_KEY_TAG)
        for part in fields:
            digest.update(struct.pack("<I", len(part)))
            digest.update(part)
        return chunk_key(self.namespace, digest.digest())

    def check(self, pipeline: Pipeline) -> None:
        """Whether chunks can be encoded by another pipeline than the configured one.

        Raises:
            PipelineError: They cannot.
        """
        if self.layout is None or "latent" in self.layout.planes:
            raise PipelineError("LMCache does not say what these chunks hold")
        pipeline.infer(known_specs(self.layout, 1))
        check_usable(pipeline)

    def encode(self, key: ChunkKey, data: memoryview, pipeline: Pipeline | None = None) -> Frame:
        """Frame of a chunk's bytes; nothing refers to them afterwards.

        Args:
            key: The chunk's key.
            data: Its bytes.
            pipeline: How to encode it, where that is not as configured; `check` has taken it.

        Raises:
            PipelineError: The values cannot be encoded.
        """
        if self.layout is None or len(data) != self.size_bytes:
            buffer = allocate(padded_bytes(len(data)))
            buffer[: len(data)] = data
            return blob_frame(key, buffer, len(data))
        return encode(self._planes(data), self.layout, pipeline or self._pipeline, key=key)

    def decode(
        self, key: ChunkKey, frame: Frame, data: memoryview, artefacts: Mapping[str, bytes] | None = None
    ) -> int | Miss:
        """Write a chunk's bytes into a buffer of `size_bytes`: how many there are, or why there are none."""
        try:
            blob = blob_of(frame)
            if blob is not None:
                return self._copy(blob, data)
            if self.layout is None:
                return Miss(Reason.IDENTITY)
            if self._exact_only and not build_pipeline(frame.head.header.pipeline).lossless:
                return Miss(Reason.IDENTITY)
            decode(frame, self.layout, artefacts or {}, key=key, out=self._planes(data))
        except LayoutMismatchError as exc:
            log.warning("a chunk is another model's: %s", exc)
            return Miss(Reason.IDENTITY)
        except (FrameError, PipelineError) as exc:
            log.warning("a chunk cannot be decoded: %s", exc)
            return Miss(Reason.CORRUPT)
        return self.size_bytes

    def _copy(self, blob: memoryview, data: memoryview) -> int | Miss:
        if not 0 < len(blob) <= len(data):
            return Miss(Reason.CORRUPT)
        data[: len(blob)] = blob
        return len(blob)

    def _planes(self, data: memoryview) -> dict[str, torch.Tensor]:
        """The planes of a chunk as views of its bytes, `[layers, tokens, kv_heads, head_dim]` each."""
        assert self.layout is not None
        shapes = {name: spec.shape for name, spec in self.layout.planes.items()}
        dtype = getattr(torch, next(iter(self.layout.planes.values())).dtype)
        whole = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
        if len(shapes) == 1:
            return {name: whole.view(shape) for name, shape in shapes.items()}
        layers, tokens, heads, dim = shapes["k"]
        if self._shape.single_plane is SinglePlane.FUSED and _single(self._shape.parts[0][0]):
            fused = whole.view(layers, tokens, heads, 2, dim)
            return {"k": fused[:, :, :, 0], "v": fused[:, :, :, 1]}
        pair = whole.view(2, layers, tokens, heads, dim)
        return {"k": pair[0], "v": pair[1]}


def _part_bytes(dims: tuple[int, ...], dtype: str) -> int:
    return PlaneSpec(dtype, dims).size_bytes if dtype in ITEM_BYTES else 0


def _single(dims: tuple[int, ...]) -> bool:
    """Whether a buffer of this shape has one plane."""
    return len(dims) == 3 or (len(dims) == 4 and dims[0] == 1)


def _layout(shard: Shard, shape: Shape, options: LMCacheOptions) -> Layout | None:
    """Layout of a chunk, None where its shape is none that is known or that a layout can have."""
    if len(shape.parts) != 1:
        return None
    dims, dtype = shape.parts[0]
    head_dim = shape.head_dim or options.head_dim
    if len(dims) == 4 and dims[0] == 2:
        planes = _split(dims, dtype, head_dim, ("k", "v"))
    elif _single(dims) and shape.single_plane is SinglePlane.FUSED:
        if dims[-1] % (2 * head_dim):
            raise PipelineError(f"head_dim: {dims[-1]} values a token are no K and V of {head_dim} dimensions")
        planes = _split((*dims[:-1], dims[-1] // 2), dtype, head_dim, ("k", "v"))
    elif _single(dims):
        planes = _split(dims, dtype, 0, ("latent",))
    else:
        return None
    rank, size = (shard.rank, shard.size) if 0 <= shard.rank < shard.size else (0, 1)
    try:
        return Layout(shard.model, _revision(options), planes, dims[-2], rank, size)
    except ValueError as exc:
        log.warning("chunks of LMCache are stored as they are: %s", exc)
        return None


def _split(dims: tuple[int, ...], dtype: str, head_dim: int, names: tuple[str, ...]) -> Mapping[str, PlaneSpec]:
    layers, tokens, hidden = dims[-3:]
    heads, rest = divmod(hidden, head_dim or hidden)
    if rest:
        raise PipelineError(f"head_dim: {hidden} values a token are no heads of {head_dim} dimensions")
    return dict.fromkeys(names, PlaneSpec(dtype, (layers, tokens, heads, hidden // heads)))


def _revision(options: LMCacheOptions) -> str:
    """Everything beside model, shard and planes in which clients must agree."""
    quality = "planned" if options.plan else "exact" if options.lossless else options.pipeline
    return f"lmcache {quality} {options.single_plane} {options.revision}"


def _pipeline(layout: Layout, shape: Shape, options: LMCacheOptions) -> Pipeline:
    """The pipeline of the options, or the raw one where it does not apply to such planes."""
    pipeline = options.build_pipeline()
    if not pipeline.lossless and "latent" in layout.planes and shape.single_plane is SinglePlane.OPAQUE:
        log.warning(
            "pipeline: %r is not used, as LMCache does not say what these chunks of %d values a token hold: say "
            "single_plane: latent (MLA) or fused (K beside V)",
            options.pipeline,
            layout.planes["latent"].shape[-1],
        )
        return named_pipeline("raw")
    try:
        pipeline.infer(known_specs(layout, 1))
    except PipelineError as exc:
        log.warning("pipeline: %r is not used for chunks of this shape: %s", options.pipeline, exc)
        return named_pipeline("raw")
    return pipeline


def _blob_namespace(shard: Shard, shape: Shape, options: LMCacheOptions) -> bytes:
    identity = {"kvstore_lmcache": 1, "shard": shard, "parts": shape.parts, "revision": _revision(options)}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()[:NAMESPACE_BYTES]


class Codecs:
    """The codecs of one connector, each made once."""

    def __init__(self, options: LMCacheOptions) -> None:
        self._make = lru_cache(maxsize=1024)(lambda shard, shape: Codec(shard, shape, options))

    def of(self, shard: Shard, shape: Shape) -> Codec:
        """The codec of a shard's chunks of one shape.

        Raises:
            PipelineError: `head_dim` does not divide them.
        """
        return self._make(shard, shape)


def batches(chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    """Runs of chunks that one request each is for."""
    start, size_bytes = 0, 0
    for number, chunk in enumerate(chunks):
        size_bytes += len(chunk.data)
        if size_bytes >= _BATCH_BYTES or number == len(chunks) - 1:
            yield chunks[start : number + 1]
            start, size_bytes = number + 1, 0
