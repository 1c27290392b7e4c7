"""The worker's half of the vLLM connector: loads into the engine's cache and saves out of it.

The engine's thread only starts loads, copies what is to be saved, and collects results. Fetching, decoding, encoding
and sending happen in threads beside it, within a bounded memory.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from threading import Condition

import torch

from kvstore.backend import Backend, Miss, Outcome, Reason, Stored
from kvstore.codecs import Context, Pipeline, Planes, decode, encode
from kvstore.connectors.background import Background, BoundedBytes, codec_threads
from kvstore.connectors.paged import Pages, derived, empty_planes, gather_layer, is_exact, scatter
from kvstore.connectors.paged_kernels import KernelDecoder, kernel_decoder
from kvstore.connectors.vllm_codec import Asked, Codec
from kvstore.connectors.vllm_options import Options
from kvstore.connectors.vllm_plan import IDLE_WAIT_S, Counters, Load, Loaded, Report, Save, worst
from kvstore.connectors.vllm_transfers import Loading, Staged
from kvstore.errors import BackendUnavailableError, FrameCorruptError, FrameError, KVStoreError, PipelineError
from kvstore.frame import Frame
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.layout import Layout
from kvstore.service import Service

_BATCH_PUT_BYTES = 8 << 20
_BATCH_GET_BYTES = 1 << 20
"""So much is fetched by one request: small enough that one batch is decoded while the next one arrives."""
_CONCURRENCY = 3
_REASONS: Mapping[Reason, str] = {
    Reason.CORRUPT: "corrupt",
    Reason.IDENTITY: "identity",
    Reason.DEADLINE: "deadline",
    Reason.BREAKER: "unavailable",
}
_PAUSE_S = 1.0

log = logging.getLogger(__name__)


class WorkerSide:
    """Moves chunks between the engine's cache and a backend.

    Args:
        options: The connector's options.
        layout: Layout of this worker's shard.
        rank: Number of the shard.
        backend: Where chunks are kept.
        background: Where it is talked to.
        counters: Where to count.
        delivers: Whether a prompt must be stored when its step ends, because another engine goes on with it.
        announces: Whether the scheduler wants to know which chunks were stored.
        service: What plans saves, and has calibration artefacts; None where everything goes as configured.
    """

    def __init__(
        self,
        options: Options,
        layout: Layout,
        rank: int,
        backend: Backend,
        background: Background,
        counters: Counters,
        *,
        delivers: bool = False,
        announces: bool = False,
        service: Service | None = None,
    ) -> None:
        self._options = options
        self._layout = layout
        self._rank = rank
        self._backend = backend
        self._background = background
        self._counters = counters
        self._delivers = delivers
        self._announces = announces
        self._saved: dict[ChunkKey, bool] = {}
        self._codec = Codec(options, layout, background, service, awaited=delivers)
        # A lossy copy is only used where the user chose a lossy pipeline or a level, or the server planned it.
        self._exact_only = self._codec.configured.lossless
        self._pages: Pages | None = None
        self._kernels: KernelDecoder | None = None
        self._chunk_blocks = 0
        self._loading: dict[str, Loading] = {}
        self._ended: list[Loading] = []
        self._ended_lock = Condition()
        self._invalid: set[int] = set()
        self._report = Report()
        self._staged: list[Staged] = []
        self._asked: list[Asked | None] = []
        self._begun = False
        self._in_flight: set[ChunkKey] = set()
        # All loads share it: it bounds what is fetched and not yet in the engine's cache.
        self._gate = asyncio.Semaphore(_CONCURRENCY)
        self._queue = BoundedBytes(options.queue_bytes)
        self._encoder = codec_threads(1, "kvstore-encode")
        self._paused_until_s = 0.0
        self._put_batch = max(1, _BATCH_PUT_BYTES // layout.chunk_bytes)
        self._get_batch = max(1, _BATCH_GET_BYTES // layout.chunk_bytes)

    def attach(self, pages: Pages) -> None:
        """Give it the engine's cache."""
        self._pages = pages
        self._kernels = kernel_decoder(pages, self._layout, self._codec.artefacts)
        self._chunk_blocks = self._layout.chunk_tokens // pages.block_tokens

    def start_loads(self, loads: Sequence[Load], aborted: Sequence[str] = ()) -> None:
        """Start loads; they go on between steps. Those of aborted requests end at once."""
        for request_id in aborted:
            if request_id in self._loading:
                self._close(self._loading[request_id], "aborted")
        for load in loads:
            loading = Loading(load, time.monotonic())
            self._loading[load.request_id] = loading
            if self._pages is None:
                self._close(loading, "error")
                continue
            loading.task = self._background.submit(self._load(loading))

    def finished(self, *, idle: bool = False) -> set[str]:
        """Requests whose load has ended since the last call; their failed blocks are known from now on.

        Args:
            idle: Whether the engine has nothing else to do: then this waits a moment for a load to end.
        """
        with self._ended_lock:
            if idle and self._loading:
                self._ended_lock.wait_for(lambda: bool(self._ended), IDLE_WAIT_S)
            ended, self._ended = self._ended, []
        for loading in ended:
            load = loading.load
            del self._loading[load.request_id]
            took_s = loading.ended_s - loading.started_s
            first_bad = max(load.skip, loading.chunks * self._chunk_blocks)
            self._invalid.update(load.block_ids[first_bad : load.end])
            arrived_s = loading.arrived_s - loading.started_s if loading.arrived_s else took_s
            ended_so = (loading.chunks, loading.behind, loading.reason, loading.size_bytes, took_s, arrived_s)
            result = Loaded(*ended_so, loading.decoding.total_s, loading.fetching.total_s)
            self._report.loads[load.request_id] = [result]
            self._count_load(loading, result)
        return {loading.load.request_id for loading in ended}

    def take_invalid(self) -> set[int]:
        """Blocks that were not loaded."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> Report | None:
        """What the scheduler must know."""
        with self._ended_lock:
            saved, self._saved = self._saved, {}
        report, self._report = Report(self._report.loads, saved), Report()
        return report if report.loads or report.saves else None

    def stage(self, saves: Sequence[Save], layer: int) -> None:
        """Copy one layer of what is saved in this step, if its turn is now; `finish_saves` copies the others."""
        self._begin(saves)
        for staged in self._staged:
            self._copy(staged, layer)

    def finish_saves(self, saves: Sequence[Save]) -> None:
        """Copy what is not copied yet, and leave the rest to the encoder."""
        self._begin(saves)
        for staged in self._staged:
            while staged.layers < self._layout.layers:
                self._copy(staged, staged.layers)
        jobs, asked, self._staged, self._asked, self._begun = self._staged, self._asked, [], [], False
        for number, start in enumerate(range(0, len(jobs), self._put_batch)):
            self._encoder.submit(self._store, jobs[start : start + self._put_batch], asked[number])
        if self._delivers and jobs and any(save.final for save in saves):
            self._queue.wait_empty(self._options.deadline_s)

    def close(self) -> None:
        """End loads, give saves a bounded time, and free everything; safe to call twice."""
        for loading in list(self._loading.values()):
            self._close(loading, "aborted")
        if not self._queue.wait_empty(self._options.flush_s):
            log.warning("%d bytes of chunks were not stored before shutdown", self._queue.used_bytes)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether loads or saves are under way."""
        return bool(self._loading or self._queue.used_bytes)

    async def _load(self, loading: Loading) -> None:
        load = loading.load
        tasks: list[asyncio.Task[str | None]] = []
        reason: str | None = "aborted"
        try:
            async with asyncio.timeout(self._options.deadline_s):
                await self._codec.learn(load.artefacts)
                for start in range(0, load.chunks, self._get_batch):
                    numbers = range(start, min(start + self._get_batch, load.chunks))
                    tasks.append(asyncio.create_task(self._load_batch(loading, numbers)))
                for task in tasks:
                    # What lies behind the first gap is of no use.
                    if reason := await task:
                        break
        except TimeoutError:
            reason = "deadline"
        except Exception:
            log.exception("loading a prefix failed")
            reason = "error"
        finally:
            for task in tasks:
                task.cancel()
            self._close(loading, reason)

    async def _load_batch(self, loading: Loading, numbers: range) -> str | None:
        """Fetch chunks and write them to their blocks; why that ended early."""
        async with self._gate:
            keys = loading.load.keys[self._rank][numbers.start : numbers.stop]
            try:
                with loading.fetching:
                    answers = await self._backend.get(keys, level=loading.load.level)
            except KVStoreError as exc:
                log.warning("fetching %d chunks failed: %s", len(keys), exc)
                return "unavailable"
            loading.arrived_s = time.monotonic()
            for number, key, answer in zip(numbers, keys, answers, strict=True):
                if isinstance(answer, Miss):
                    return _REASONS.get(answer.reason, "absent")
                with loading.decoding:
                    reason = await asyncio.to_thread(self._place, loading, number, key, answer)
                if reason:
                    return reason
        return None

    def _place(self, loading: Loading, number: int, key: ChunkKey, frame: Frame) -> str | None:
        """Decode a chunk and write it to its blocks; why that cannot be done."""
        load, header = loading.load, frame.head.header
        if header.first_position != (load.first + number) * self._layout.chunk_tokens:
            return "identity"
        exact = is_exact(frame)
        if not exact and self._exact_only and load.level is None and not load.planned:
            return "lossy"
        token_ids = load.tokens_of(number, self._layout.chunk_tokens)
        try:
            planes = None
            if self._kernels is None or not self._kernels.takes(frame):
                planes = decode(frame, self._layout, self._codec.artefacts, key=key, token_ids=token_ids)
            with loading.lock:
                if loading.closed:
                    return "aborted"
                self._write(load, number, frame, planes, token_ids)
                loading.done.add(number)
                loading.size_bytes += frame.size_bytes
                if not exact:
                    loading.lossy_chunks += 1
                    loading.behind = worst((loading.behind, Behind(frame.levels - 1, load.loss_nats)))
        except (FrameError, PipelineError) as exc:
            log.warning("chunk %d of a prefix cannot be decoded: %s", load.first + number, exc)
            return "corrupt" if isinstance(exc, FrameCorruptError) else "identity"
        return None

    def _write(self, load: Load, number: int, frame: Frame, planes: Planes | None, token_ids: Sequence[int]) -> None:
        """Write a chunk to its blocks: its planes, or without them what kernels make of the frame."""
        assert self._pages is not None
        start = number * self._chunk_blocks
        first, end = max(start, load.skip), min(start + self._chunk_blocks, load.end)
        if first >= end:
            return
        if planes is None:
            assert self._kernels is not None
            key = load.keys[self._rank][number]
            self._kernels.decode(frame, key, load.block_ids[first:end], first - start, token_ids)
            return
        blocks = torch.tensor(load.block_ids[first:end], device=self._pages.device)
        scatter(self._pages, blocks, planes, first_block=first - start)
        if blocks.is_cuda:
            torch.cuda.current_stream(blocks.device).synchronize()

    def _close(self, loading: Loading, reason: str | None) -> None:
        """End a load: from here on nothing of it is written, and the engine may have its blocks back."""
        with loading.lock:
            if loading.closed:
                return
            loading.closed = True
            loading.reason = reason
            loading.ended_s = time.monotonic()
        if loading.task is not None:
            loading.task.cancel()
        with self._ended_lock:
            self._ended.append(loading)
            self._ended_lock.notify_all()

    def _count_load(self, loading: Loading, result: Loaded) -> None:
        load, block_tokens = loading.load, self._layout.chunk_tokens // self._chunk_blocks
        loaded = max(0, min(result.chunks * self._chunk_blocks, load.end) - load.skip) * block_tokens
        self._counters.add("loads")
        self._counters.add("loaded_tokens", loaded)
        self._counters.add("loaded_bytes", result.size_bytes)
        self._counters.add("load_microseconds", int(1e6 * result.took_s))
        self._counters.add("lossy_tokens", loading.lossy_chunks * self._layout.chunk_tokens)
        self._counters.add("failed_tokens", (load.end - load.skip) * block_tokens - loaded)
        if result.reason is not None:
            self._counters.add(f"failed_{result.reason}")

    def _begin(self, saves: Sequence[Save]) -> None:
        """Make room for what is saved in this step, once; what finds none is not saved."""
        if self._begun or self._pages is None:
            return
        self._begun = True
        for save in saves:
            for number in range(save.chunks):
                key = save.keys[self._rank][number]
                if time.monotonic() < self._paused_until_s:
                    self._counters.add("save_failures")
                    self._tell([key], held=False)
                elif key in self._in_flight:
                    self._counters.add("save_exists")
                elif self._queue.take(self._layout.chunk_bytes):
                    self._in_flight.add(key)
                    self._staged.append(Staged(save, number, empty_planes(self._layout)))
                else:
                    self._counters.add("save_dropped")
                    self._tell([key], held=False)
        # The answer comes while the engine still computes.
        starts = range(0, len(self._staged), self._put_batch)
        self._asked = [self._codec.ask(min(self._put_batch, len(self._staged) - start)) for start in starts]

    def _copy(self, staged: Staged, layer: int) -> None:
        """Copy one layer, if it is the next one."""
        assert self._pages is not None
        if layer != staged.layers:
            return
        start = staged.number * self._chunk_blocks
        blocks = torch.tensor(staged.save.block_ids[start : start + self._chunk_blocks], device=self._pages.device)
        gather_layer(self._pages, layer, blocks, staged.planes)
        staged.layers += 1

    def _store(self, jobs: Sequence[Staged], asked: Asked | None) -> None:
        """Encode chunks and send them; runs in the encoder's thread."""
        try:
            pipeline, plan = self._codec.plan(asked)
            began_s = time.monotonic()
            items = [self._encode(staged, pipeline) for staged in jobs]
            for staged in jobs:
                staged.planes = {}
            sent = self._background.submit(self._codec.send(self._backend, items, plan, time.monotonic() - began_s))
        except Exception:
            # Nobody waits for this thread, so whatever happens must be counted here.
            log.exception("%d chunks cannot be encoded", len(jobs))
            self._counters.add("save_failures", len(jobs))
            self._release(jobs, ())
            return
        sent.add_done_callback(lambda done: self._stored(jobs, items, done))

    def _encode(self, staged: Staged, pipeline: Pipeline) -> tuple[ChunkKey, Frame]:
        save, tokens = staged.save, self._layout.chunk_tokens
        context = Context(
            first_position=(save.first + staged.number) * tokens, token_ids=save.tokens_of(staged.number, tokens)
        )
        key = save.keys[self._rank][staged.number]
        frame = encode(staged.planes, self._layout, pipeline, key=key, context=context)
        return key, frame if save.behind is None else derived(frame, save.behind)

    def _stored(
        self, jobs: Sequence[Staged], items: Sequence[tuple[ChunkKey, Frame]], done: "Future[list[Stored]]"
    ) -> None:
        held: list[ChunkKey] = []
        try:
            for (key, frame), stored in zip(items, done.result(), strict=True):
                if stored.outcome is Outcome.FAILED:
                    self._counters.add("save_failures")
                    continue
                held.append(key)
                if stored.outcome in (Outcome.EXISTS, Outcome.OTHER):
                    self._counters.add("save_exists")
                else:
                    self._counters.add("saved_tokens", self._layout.chunk_tokens)
                    self._counters.add("saved_bytes", frame.size_bytes)
        except (CancelledError, Exception) as exc:
            log.warning("%d chunks were not stored: %s", len(jobs), exc)
            self._counters.add("save_failures", len(jobs))
            if isinstance(exc, BackendUnavailableError):
                self._paused_until_s = time.monotonic() + _PAUSE_S
        finally:
            self._release(jobs, held)

    def _release(self, jobs: Sequence[Staged], held: Collection[ChunkKey]) -> None:
        """Forget chunks whose saving has ended, and give their memory back."""
        keys = [staged.save.keys[self._rank][staged.number] for staged in jobs]
        self._in_flight.difference_update(keys)
        self._tell(held, held=True)
        self._tell(set(keys).difference(held), held=False)
        self._queue.give(len(jobs) * self._layout.chunk_bytes)

    def _tell(self, keys: Iterable[ChunkKey], *, held: bool) -> None:
        """Let the scheduler know which chunks the server holds now."""
        if self._announces:
            with self._ended_lock:
                self._saved.update(dict.fromkeys(keys, held))
