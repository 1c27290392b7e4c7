"""Prefixes of prompts as tensors: put and get the KV cache of token ids through any `Backend`.

Planes are in the engine-neutral layout `[layers, tokens, kv_heads, head_dim]`, from the prompt's first token on.
Chunks are encoded and decoded in threads while others are on their way.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import takewhile

import torch

from kvstore.ahead import Ahead
from kvstore.backend import Ack, Backend, Held, Match, Miss, Reason, Stored
from kvstore.client import Client
from kvstore.codecs import Context, Pipeline, Planes, encode
from kvstore.codecs.importance import token_importance
from kvstore.codecs.ref.predict import HISTORY
from kvstore.codecs.stage import TORCH_DTYPES
from kvstore.errors import BackendError, PipelineError
from kvstore.fetch import fetch_run
from kvstore.frame import Frame
from kvstore.keys import ChunkKey, chunk_keys
from kvstore.layout import Layout
from kvstore.stopwatch import Stopwatch
from kvstore.tiers.arrivals import Waits

_BATCH_BYTES = 8 << 20
_CONCURRENCY = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Put:
    """What became of a prefix that was put.

    Args:
        tokens: Tokens of the full chunks of the prompt.
        held_tokens: Tokens of the leading chunks that were there before and were not encoded again.
        stored: The answer for every other chunk, in order.
        size_bytes: Bytes of the frames that were sent.
        encoding_s: Seconds in which anything was encoded.
        sending_s: Seconds in which anything was being put.
    """

    tokens: int
    held_tokens: int
    stored: list[Stored]
    size_bytes: int
    encoding_s: float = 0.0
    sending_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix that was fetched.

    Args:
        tokens: Tokens that are there; the planes have as many.
        planes: `[layers, tokens, kv_heads, head_dim]` each.
        levels: Number of quality levels of every chunk.
        size_bytes: Bytes of the frames that were received for these tokens.
        miss: Why it ends before the prompt's last full chunk, None where it does not.
        arrived_s: Seconds from the start of the fetch to the last byte.
        decoding_s: Seconds of the fetch in which anything was decoded.
    """

    tokens: int
    planes: dict[str, torch.Tensor]
    levels: list[int]
    size_bytes: int
    miss: Miss | None
    arrived_s: float = 0.0
    decoding_s: float = 0.0


async def match_prefix(backend: Backend, layout: Layout, token_ids: Sequence[int], *, salt: bytes = b"") -> Match:
    """The leading chunks of a prompt that are held, and why they end.

    Raises:
        BackendError: The backend cannot be asked.
    """
    return await backend.match(chunk_keys(layout, token_ids, salt=salt))


async def put_prefix(
    backend: Backend,
    layout: Layout,
    token_ids: Sequence[int],
    planes: Planes,
    pipeline: Pipeline,
    *,
    salt: bytes = b"",
    ack: Ack = Ack.MEMORY,
) -> Put:
    """Encode and put every full chunk of a prompt that the backend does not hold.

    Args:
        backend: Where to.
        layout: What the planes are.
        token_ids: The prompt from its first token on.
        planes: `[layers, tokens, kv_heads, head_dim]` each, with at least the tokens of the full chunks.
        pipeline: How to encode.
        salt: See `kvstore.keys.chunk_keys`.
        ack: Durability to wait for.

    Raises:
        PipelineError: The planes cannot be encoded.
        BackendError: The backend cannot be reached; what was put before stays.
    """
    keys = chunk_keys(layout, token_ids, salt=salt)
    _check_tokens(planes, len(keys) * layout.chunk_tokens)
    match = await backend.match(keys)
    # What is only partly there, or stands on a lossy prefix, is put again.
    held = len(list(takewhile(lambda one: one.copy.whole and not one.copy.inexact, match.held)))
    gate = asyncio.Semaphore(_CONCURRENCY)
    tasks: list[asyncio.Task[list[Stored]]] = []
    size_bytes = 0
    batch: list[tuple[ChunkKey, Frame]] = []
    encoding, sending = Stopwatch(), Stopwatch()
    with encoding:
        encoder = await asyncio.to_thread(_Encoder, layout, planes, pipeline, token_ids, len(keys))
    async with _plain_errors(), asyncio.TaskGroup() as group:
        for number in range(held, len(keys)):
            with encoding:
                frame = await asyncio.to_thread(encoder.encode, keys[number], number)
            size_bytes += frame.size_bytes
            batch.append((keys[number], frame))
            if sum(frame.size_bytes for _, frame in batch) >= _BATCH_BYTES or number == len(keys) - 1:
                # Holding the gate here bounds the frames that are encoded but not yet stored.
                await gate.acquire()
                tasks.append(group.create_task(_put_batch(backend, batch, ack, gate, sending)))
                batch = []
    stored = [result for task in tasks for result in task.result()]
    tokens, held_tokens = len(keys) * layout.chunk_tokens, held * layout.chunk_tokens
    return Put(tokens, held_tokens, stored, size_bytes, encoding.total_s, sending.total_s)


async def get_prefix(
    backend: Backend,
    layout: Layout,
    token_ids: Sequence[int],
    *,
    level: int | None = None,
    salt: bytes = b"",
    wait_s: float = 0.0,
    deadline_s: float | None = None,
    stop_s: float | None = None,
    match: Match | None = None,
    artefacts: Mapping[str, bytes] | None = None,
) -> Prefix:
    """Fetch and decode the longest leading run of chunks of a prompt.

    Args:
        backend: Where from.
        layout: What the planes are.
        token_ids: The prompt from its first token on.
        level: Quality level to fetch up to, None for all that are held.
        salt: See `kvstore.keys.chunk_keys`.
        wait_s: Time to wait for chunks that somebody is about to put, such as a prefill node; backends that cannot
            wait are asked at once.
        deadline_s: After this many seconds what is complete so far is returned, with the miss `deadline`.
        stop_s: After this many seconds nothing more is received, and every chunk is decoded at the levels that are
            complete by then; only from a server, which sends coarse levels first.
        match: What is held, where that is known already.
        artefacts: Calibration artefacts by digest.

    Raises:
        BackendError: The backend cannot be asked what it holds.
        PipelineError: A frame needs a stage or an artefact that is not here.
    """
    keys = chunk_keys(layout, token_ids, salt=salt)
    fetch = _Fetch(backend, layout, keys, token_ids, level, artefacts or {})
    try:
        async with asyncio.timeout(deadline_s):
            await fetch.run(match or await fetch.match(wait_s), stop_s)
    except TimeoutError:
        fetch.give_up(Miss(Reason.DEADLINE))
    return fetch.result()


class _Fetch:
    """One fetch under way: which chunks are complete, and the tensors that they are decoded into."""

    def __init__(
        self,
        backend: Backend,
        layout: Layout,
        keys: Sequence[ChunkKey],
        token_ids: Sequence[int],
        level: int | None,
        artefacts: Mapping[str, bytes],
    ) -> None:
        self._backend = backend
        self._layout = layout
        self._keys = keys
        self._token_ids = token_ids
        self._level = level
        self._artefacts = artefacts
        self._gate = asyncio.Semaphore(_CONCURRENCY)
        self._done: list[Frame | Miss | None] = []
        self._end: Miss | None = None
        self._planes: dict[str, torch.Tensor] = {}
        self._started_s = self._arrived_s = time.monotonic()
        self._decoding = Stopwatch()

    async def run(self, match: Match, stop_s: float | None) -> None:
        """Fetch and decode what is held."""
        held, self._end = match
        self._started_s = time.monotonic()
        self._done = [None] * len(held)
        self._planes = _empty(self._layout, len(held) * self._layout.chunk_tokens)
        async with _plain_errors(), asyncio.TaskGroup() as group:
            if stop_s is not None and isinstance(self._backend, Client):
                group.create_task(self._stream(self._backend, len(held), stop_s))
            else:
                decoder = self._decoder()
                for batch in _batches(held, self._level):
                    group.create_task(self._fetch(batch, decoder))

    async def match(self, wait_s: float) -> Match:
        """What is held, after waiting for it."""
        if wait_s and isinstance(self._backend, Waits):
            return await self._backend.wait(self._keys, wait_s)
        return await self._backend.match(self._keys)

    def give_up(self, miss: Miss) -> None:
        """End the prefix at the first chunk that is not complete."""
        self._done = [miss if answer is None else answer for answer in self._done]
        self._end = self._end if self._done else miss

    def result(self) -> Prefix:
        frames: list[Frame] = []
        for answer in self._done:
            if not isinstance(answer, Frame):
                self._end = answer
                break
            frames.append(answer)
        tokens = len(frames) * self._layout.chunk_tokens
        return Prefix(
            tokens,
            {name: plane[:, :tokens] for name, plane in self._planes.items()},
            [frame.levels for frame in frames],
            sum(frame.size_bytes for frame in frames),
            self._end,
            self._arrived_s - self._started_s,
            self._decoding.total_s,
        )

    async def _fetch(self, batch: range, decoder: Ahead) -> None:
        async with self._gate:
            keys = [self._keys[number] for number in batch]
            try:
                answers = await self._backend.get(keys, level=self._level)
            except BackendError as exc:
                log.warning("fetching %d chunks failed: %s", len(keys), exc)
                answers = [Miss(Reason.BREAKER)] * len(keys)
            self._arrived_s = time.monotonic()
            for number, answer in zip(batch, answers, strict=True):
                await self._take(number, answer, decoder)

    async def _stream(self, client: Client, held: int, stop_s: float) -> None:
        """Fetch coarse levels of all chunks first, stop at a time, and decode layer groups while others arrive."""
        async with asyncio.TaskGroup() as group:
            ahead = self._decoder(group)
            fetched = await fetch_run(
                client, self._keys[:held], level=self._level, deadline_s=stop_s, arrived=ahead.arrived
            )
            # Before what is still being decoded has ended.
            self._arrived_s = time.monotonic()
        missing = held - len(fetched.frames)
        self._done[len(fetched.frames) :] = [fetched.miss or Miss(Reason.DEADLINE)] * missing
        async with asyncio.TaskGroup() as group:
            for number, frame in enumerate(fetched.frames):
                group.create_task(self._take(number, frame, ahead))

    async def _take(self, number: int, answer: Frame | Miss, decoder: Ahead) -> None:
        """Decode what of a chunk was not decoded while it arrived."""
        self._done[number] = answer if isinstance(answer, Miss) else await decoder.finish(number, answer)

    def _decoder(self, tasks: asyncio.TaskGroup | None = None) -> Ahead:
        return Ahead(self._layout, self._keys, self._token_ids, self._artefacts, self._planes, self._decoding, tasks)


def _batches(held: Sequence[Held], level: int | None) -> Iterator[range]:
    """Runs of chunks that are fetched by one request each: small enough to overlap, large enough to be few."""
    start, size_bytes = 0, 0
    for number, (_, copy) in enumerate(held):
        levels = len(copy.level_bytes) if level is None else level + 1
        size_bytes += copy.head_bytes + sum(copy.level_bytes[:levels])
        if size_bytes >= _BATCH_BYTES or number == len(held) - 1:
            yield range(start, number + 1)
            start, size_bytes = number + 1, 0


async def _put_batch(
    backend: Backend, batch: Sequence[tuple[ChunkKey, Frame]], ack: Ack, gate: asyncio.Semaphore, sending: Stopwatch
) -> list[Stored]:
    try:
        with sending:
            return await backend.put(batch, ack=ack)
    finally:
        gate.release()


class _Encoder:
    """Encodes the chunks of one prompt, of which it knows more than a chunk does: the whole prefix and its tokens."""

    def __init__(
        self, layout: Layout, planes: Planes, pipeline: Pipeline, token_ids: Sequence[int], chunks: int
    ) -> None:
        self._layout = layout
        self._planes = planes
        self._pipeline = pipeline
        self._token_ids = token_ids
        self._chunks = chunks
        self._importance: torch.Tensor | None = None
        if pipeline.importance is not None and chunks:
            keys = planes["k"][:, : chunks * layout.chunk_tokens]
            self._importance = token_importance(keys, layout, pipeline.importance)

    def encode(self, key: ChunkKey, number: int) -> Frame:
        tokens = self._layout.chunk_tokens
        start, end = number * tokens, (number + 1) * tokens
        context = Context(
            first_position=start,
            importance=None if self._importance is None else self._importance[:, start:end],
            last=number == self._chunks - 1,
            token_ids=self._token_ids[max(0, start - HISTORY) : end],
        )
        chunk = {name: plane[:, start:end] for name, plane in self._planes.items()}
        return encode(chunk, self._layout, self._pipeline, key=key, context=context)


def _check_tokens(planes: Planes, tokens: int) -> None:
    for name, plane in planes.items():
        if plane.ndim != 4 or plane.shape[1] < tokens:
            raise PipelineError(
                f"plane {name!r} is {list(plane.shape)}; the full chunks of the prompt have {tokens} tokens"
            )


def _empty(layout: Layout, tokens: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty((spec.shape[0], tokens, *spec.shape[2:]), dtype=TORCH_DTYPES[spec.dtype])
        for name, spec in layout.planes.items()
    }


@asynccontextmanager
async def _plain_errors() -> AsyncIterator[None]:
    """Raise the first error of a task group as it was raised there."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
