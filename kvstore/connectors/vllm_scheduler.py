"""The scheduler's half of the vLLM connector: what is stored, what is loaded into which blocks, what is saved.

It runs in the engine's scheduling loop, so it never waits: look-ups run in the background, and until one is answered
the engine is told to ask again. It knows the engine only by the attributes that it reads.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from typing import Any

from kvstore.client import Client
from kvstore.connectors.background import Background
from kvstore.connectors.guard import Guard
from kvstore.connectors.vllm_events import Change, Events
from kvstore.connectors.vllm_inquiries import LOST, Inquiries
from kvstore.connectors.vllm_options import Options
from kvstore.connectors.vllm_plan import IDLE_WAIT_S, Counters, Load, Loaded, Report, Save, Step, pack_tokens, worst
from kvstore.connectors.vllm_requests import Found, LossyBlocks, Tracked, is_keyed, level_of
from kvstore.connectors.vllm_scout import Scout
from kvstore.header import Behind
from kvstore.keys import ChunkKey
from kvstore.layout import Layout
from kvstore.plan import Action

_REFUSED_S = 60.0
_REFUSED_MAX = 1 << 14
_STEPS_MAX = 16
_PAUSE_S = (1.0, 30.0)
"""First and longest pause after a look-up that found no server."""

log = logging.getLogger(__name__)


class SchedulerSide:
    """Decides loads and saves.

    Args:
        options: The connector's options.
        layouts: Layout of every worker's shard, by rank.
        client: Where chunks are looked up.
        background: Where look-ups run.
        guard: Judge of what is worth fetching.
        counters: Where to count.
        block_tokens: Tokens of the engine's block.
        blocks_of: The engine's block ids of a request.
        consumes: Whether this engine loads.
        produces: Whether it saves.
        announces: Whether stored and lost chunks are announced.
        clock: Seconds.
    """

    def __init__(
        self,
        options: Options,
        layouts: Sequence[Layout],
        client: Client,
        background: Background,
        guard: Guard,
        counters: Counters,
        *,
        block_tokens: int,
        blocks_of: Callable[[str], Sequence[int]],
        consumes: bool = True,
        produces: bool = True,
        announces: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._layouts = tuple(layouts)
        self._client = client
        self._background = background
        self._guard = guard
        self._counters = counters
        self._block_tokens = block_tokens
        self._chunk_tokens = options.chunk_tokens
        self._chunk_blocks = options.chunk_tokens // block_tokens
        self._blocks_of = blocks_of
        self._consumes = consumes
        self._produces = produces
        self._clock = clock
        events = Events(block_tokens=block_tokens, chunk_tokens=options.chunk_tokens, patience_s=options.deadline_s)
        self._events = events if announces else None
        self._tracked: dict[str, Tracked] = {}
        self._loads: list[Load] = []
        self._aborted: list[str] = []
        self._skipped: set[str] = set()
        self._refused: OrderedDict[ChunkKey, float] = OrderedDict()
        self._lossy = LossyBlocks()
        self._paused_until_s = 0.0
        self._pause_s = _PAUSE_S[0]
        self._inquiries = Inquiries(options, layouts, client, background, guard)
        self._scout = Scout(client, background, guard, clock)
        self._token_bytes: dict[int | None, float] = {}
        self._ask_s = 0.0
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS_MAX)
        self._step_ended_s = 0.0

    def add(self, request: Any) -> None:
        """A request came: start to look it up."""
        tracked = self._track(request)
        if tracked is None or not self._consumes:
            return
        self._scout.collect()
        if self._hopeless(tracked):
            self._counters.add("unasked_requests")
            tracked.found, tracked.left = Found(), True
        else:
            self._look_up(tracked)

    def match(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind `computed_tokens`, and whether that is done between steps; None: ask again.

        The last token of a prompt is never loaded, because its logits are needed.
        """
        tracked = self._track(request)
        if tracked is None:
            return 0, False
        tracked.behind = self._behind_local(request, computed_tokens) or tracked.behind
        if not self._consumes or not tracked.may_load or request.skip_reading_prefix_cache:
            return 0, False
        found = self._answer(tracked)
        if found is None:
            return None, False
        if tracked.offer is None or tracked.offer[0] != computed_tokens:
            tracked.offer = (computed_tokens, self._offer(tracked, found, computed_tokens))
        return tracked.offer[1], tracked.offer[1] > 0

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """Blocks were allocated for what `match` offered; 0 tokens: nothing is to be loaded."""
        tracked = self._tracked.get(request.request_id)
        if not external_tokens or tracked is None or tracked.offer is None:
            return
        start = tracked.offer[0]
        end = start + external_tokens
        first, last = start // self._chunk_tokens, -(-end // self._chunk_tokens)
        run = self._run(tracked, first, last, block_ids)
        skip = (start - first * self._chunk_tokens) // self._block_tokens
        stop = (end - first * self._chunk_tokens) // self._block_tokens
        tracked.loading = Load(**run, skip=skip, end=stop, **tracked.planned)
        tracked.load_began_s = self._clock()
        self._loads.append(tracked.loading)
        self._counters.add("matched_tokens", external_tokens)
        # Until the workers say otherwise, what is loaded must not be taken for exact.
        tracked.saved = last
        tracked.found, tracked.offer = None, None

    def step(self, output: Any) -> Step:
        """What the workers do in the step that the engine has scheduled."""
        computed_tokens = sum(output.num_scheduled_tokens.values())
        self._counters.add("computed_tokens", computed_tokens)
        if computed_tokens:
            self._steps.append((self._clock(), computed_tokens))
        scheduled = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        scheduled |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        saves = [
            save
            for request_id, before in scheduled.items()
            if (save := self._save(request_id, before + output.num_scheduled_tokens[request_id])) is not None
        ]
        if not computed_tokens and not self._loads:
            self._await_answers()
        step = Step(tuple(self._loads), tuple(saves), tuple(self._aborted), idle=not computed_tokens)
        self._loads, self._aborted = [], []
        return step

    def _await_answers(self) -> None:
        """Wait a moment for the answer of a look-up."""
        lookups = [tracked.lookup for tracked in self._tracked.values() if tracked.lookup is not None]
        if lookups:
            wait(lookups, IDLE_WAIT_S, FIRST_COMPLETED)

    def receive(self, report: Report) -> None:
        """Learn what became of loads, before the engine goes on with their requests, and of saves."""
        if self._events is not None:
            self._events.ended(report.saves)
        for request_id, results in report.loads.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.loading is not None:
                tracked.results += results
                if len(tracked.results) == len(self._layouts):
                    self._settle(tracked, tracked.loading)

    def finish(self, request: Any) -> None:
        """A request ended: a load of it need not go on."""
        self._skipped.discard(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and tracked.lookup is not None:
            tracked.lookup.cancel()
        if tracked is not None and tracked.loading is not None:
            self._aborted.append(request.request_id)
        if tracked is not None and tracked.left and self._clock() >= self._paused_until_s:
            token_ids = list(request.all_token_ids[: request.num_prompt_tokens])
            self._scout.look(partial(self._inquiries.ask, token_ids, tracked.salt), tracked.level)
        if tracked is not None:
            self._inquiries.ended(tracked)

    def take_changes(self) -> list[Change]:
        """What is to be announced."""
        return [] if self._events is None else self._events.take()

    @property
    def expects_changes(self) -> bool:
        """Whether chunks are on their way to the server whose arrival is to be announced."""
        return self._events is not None and self._events.pending(self._clock())

    def reset(self) -> None:
        """The engine emptied its own cache: nothing in it is lossy any more."""
        self._lossy.clear()

    def _track(self, request: Any) -> Tracked | None:
        """The state of a request that may be stored and served; None for others."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None and request.request_id not in self._skipped:
            if not is_keyed(request):
                self._counters.add("skipped_requests")
                self._skipped.add(request.request_id)
                return None
            salt = b"" if request.cache_salt is None else b"vllm salt " + request.cache_salt.encode()
            level = level_of(request, self._options.level)
            tracked = self._tracked[request.request_id] = Tracked(request, salt, level=level)
        return tracked

    def _hopeless(self, tracked: Tracked) -> bool:
        """Whether a fetch would not pay if all of a prompt were held, going by the bytes of those that were."""
        token_bytes = self._token_bytes.get(tracked.level)
        if not self._options.guard or token_bytes is None or self._wait_s(tracked.request):
            return False
        tokens = (tracked.request.num_prompt_tokens - 1) // self._chunk_tokens * self._chunk_tokens
        rest_tokens = tracked.request.num_prompt_tokens - tokens
        size_bytes = int(tokens * token_bytes)
        return bool(tokens) and self._guard.hopeless(tokens, size_bytes, rest_tokens, ask_s=self._ask_s)

    def _look_up(self, tracked: Tracked) -> None:
        # One token is left to the engine, and only full chunks have keys.
        token_ids = list(tracked.request.all_token_ids[:-1])
        if len(token_ids) < self._chunk_tokens or self._clock() < self._paused_until_s:
            tracked.found = Found()
            return
        self._counters.add("queries")
        tracked.asked_s = self._clock()
        asked = (tracked.salt, self._wait_s(tracked.request), self._inquiries.context(tracked))
        tracked.lookup = self._background.submit(self._inquiries.ask(token_ids, *asked))

    def _wait_s(self, request: Any) -> float:
        """How long to wait for chunks that another engine is about to put: only where the request says one is."""
        return self._options.wait_s if (request.kv_transfer_params or {}).get("do_remote_prefill") else 0.0

    def _answer(self, tracked: Tracked) -> Found | None:
        """The answer of the look-up; None while there is none."""
        if tracked.found is None and tracked.lookup is None:
            self._look_up(tracked)
        if tracked.lookup is None:
            return tracked.found
        if not tracked.lookup.done():
            return None
        try:
            tracked.found = tracked.lookup.result()
            if not self._wait_s(tracked.request):
                self._ask_s += (self._clock() - tracked.asked_s - self._ask_s) / 4
            self._pause_s = _PAUSE_S[0]
        except Exception as exc:
            # Whatever it is, the engine can compute the prompt.
            self._counters.add("match_failures")
            log.warning("kvstore does not say what it holds, next try in %g s: %s", self._pause_s, exc or "no answer")
            self._paused_until_s = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])
            tracked.found = Found()
        tracked.lookup = None
        tracked.keys = tracked.found.keys
        return tracked.found

    def _offer(self, tracked: Tracked, found: Found, computed_tokens: int) -> int:
        """Tokens worth loading behind those that are computed."""
        first = computed_tokens // self._chunk_tokens
        end = self._usable(found, first)
        tracked.saved = max(tracked.saved, found.exact)
        tokens = end * self._chunk_tokens - computed_tokens
        if tokens <= 0:
            return 0
        tracked.plan = found.plan
        size_bytes = found.size_bytes(first, end, tracked.fetch_level)
        self._token_bytes[tracked.level] = size_bytes / ((end - first) * self._chunk_tokens)
        rest_tokens = len(tracked.request.all_token_ids) - computed_tokens - tokens
        if found.plan is not None:
            leaves, counter = found.plan.action is Action.RECOMPUTE, "planned_tokens"
        else:
            leaves = self._options.guard and not self._guard.worth(tokens, size_bytes, rest_tokens)
            counter = "refused_tokens"
        if leaves:
            self._counters.add(counter, tokens)
            tracked.left = True
        return 0 if leaves else tokens

    def _usable(self, found: Found, first: int) -> int:
        """End of the leading run without a chunk that could not be used a little while ago."""
        now = self._clock()
        for number in range(first, found.chunks):
            if any(self._refused.get(shard[number], 0.0) > now for shard in found.keys):
                return number
        return found.chunks

    def _run(self, tracked: Tracked, first: int, last: int, block_ids: Sequence[int]) -> dict[str, Any]:
        tokens = self._chunk_tokens
        return {
            "request_id": tracked.request.request_id,
            "first": first,
            "keys": tuple(shard[first:last] for shard in tracked.keys_to(last, self._layouts)),
            "block_ids": tuple(block_ids[first * self._chunk_blocks : last * self._chunk_blocks]),
            "token_ids": pack_tokens(tracked.request.all_token_ids, first * tokens, last * tokens),
        }

    def _save(self, request_id: str, computed_tokens: int) -> Save | None:
        """Chunks of a request that are full after this step and not yet stored."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return None
        request = tracked.request
        # Behind the prompt the last token's KV may belong to a draft that was rejected.
        known_tokens = max(request.num_prompt_tokens, len(request.all_token_ids) - 1)
        last = min(computed_tokens, known_tokens) // self._chunk_tokens
        if tracked.behind is not None:
            self._mark(tracked, computed_tokens)
        if tracked.left and tracked.saved < last:
            tracked.saved = max(tracked.saved, self._scout.held(tracked.keys_to(last, self._layouts)[0][:last]))
        first, tracked.saved = tracked.saved, max(tracked.saved, last)
        if last <= first or not self._produces:
            return None
        if tracked.behind is not None and not self._options.store_derived:
            self._counters.add("derived_tokens", (last - first) * self._chunk_tokens)
            return None
        run = self._run(tracked, first, last, self._blocks_of(request_id))
        final = first < request.num_prompt_tokens // self._chunk_tokens <= last
        save = Save(**run, behind=tracked.behind, final=final)
        if self._events is not None:
            self._events.saving(request, save, self._clock())
        return save

    def _settle(self, tracked: Tracked, load: Load) -> None:
        """Settle a load by what its workers reported: what is saved next, and what that stands on."""
        results, tracked.results = tracked.results, []
        tracked.loading = None
        chunks = min(result.chunks for result in results)
        self._scout.fetched()
        self._counters.add("planned_loads", int(load.planned))
        self._inquiries.loaded(tracked, load, results, self._clock() - tracked.load_began_s)
        tracked.saved = load.first + chunks
        # A load that failed once is not tried again, or a request could wait for ever.
        tracked.may_load = chunks == load.chunks
        if chunks < load.chunks:
            self._refuse(load, chunks, results)
            if self._events is not None and any(result.reason in LOST for result in results):
                self._events.lost(tracked.request, load, chunks)
        behind = worst(result.behind for result in results)
        if behind is not None and chunks:
            tracked.behind = worst((tracked.behind, behind))
            tracked.marked = load.first * self._chunk_blocks + load.skip
            self._mark(tracked, (load.first + chunks) * self._chunk_tokens)

    def _refuse(self, load: Load, chunks: int, results: Sequence[Loaded]) -> None:
        """Leave a chunk alone for a while that was found damaged, or not to be what it should."""
        if all(result.reason in (None, "absent", "deadline", "unavailable", "aborted") for result in results):
            return
        until_s = self._clock() + _REFUSED_S
        for shard in load.keys:
            self._refused[shard[chunks]] = until_s
        while len(self._refused) > _REFUSED_MAX:
            self._refused.popitem(last=False)

    def _behind_local(self, request: Any, computed_tokens: int) -> Behind | None:
        """What the engine's own cached blocks stand on."""
        return self._lossy.worst(request.block_hashes[: computed_tokens // self._block_tokens])

    def _mark(self, tracked: Tracked, computed_tokens: int) -> None:
        """Remember that blocks in the engine's own cache are not exact: other requests may find them there."""
        assert tracked.behind is not None
        end = computed_tokens // self._block_tokens
        self._lossy.add(tracked.request.block_hashes[tracked.marked : end], tracked.behind)
        tracked.marked = max(tracked.marked, min(end, len(tracked.request.block_hashes)))

    def stepped(self) -> None:
        """A step that computed tokens is over; they end in the order in which they were scheduled."""
        if self._steps:
            began_s, tokens = self._steps.popleft()
            now = self._clock()
            self._guard.observe_step(tokens, now - max(began_s, self._step_ended_s))
            self._step_ended_s = now
