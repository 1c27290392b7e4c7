"""An ordered list of backends as one backend, the fastest first.

A put goes to every tier; each decides what is to be done before it answers. A get is served by the first tier that
has all levels asked for, and what a lower tier served is promoted to the tiers above it. Tiers know by themselves what
they hold and what they evict, so the stack keeps no second index that could go stale; what they must know together lies
in the `Policies` that all of them share.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, pairwise
from operator import attrgetter

from kvstore.backend import (
    Ack,
    Backend,
    Held,
    Match,
    Miss,
    Outcome,
    Reason,
    State,
    Stored,
    state_of,
)
from kvstore.backends.index import copy_bytes
from kvstore.backends.policies import PINS_MAX, Policies
from kvstore.errors import BackendBusyError, BackendError, BackendFullError, BackendUnavailableError, KVStoreError
from kvstore.frame import Frame
from kvstore.keys import NAMESPACE_BYTES, ChunkKey
from kvstore.metrics import Metrics
from kvstore.tiers.answers import WINDOW, match_of, merged, overlay, runs_of, satisfies, telling
from kvstore.tiers.arrivals import Arrivals, wait_in
from kvstore.tiers.changes import Changes
from kvstore.tiers.coders import Coders, Recode
from kvstore.tiers.flights import Flights
from kvstore.tiers.lessons import Lesson

_COPY = attrgetter("copy")
_PURGE_CHUNKS = 1024

log = logging.getLogger(__name__)


class TieredBackend:
    """The stack of tiers; it owns and closes them.

    Args:
        tiers: At least one backend, the fastest first. All but the last are caches of those below.
        promoted: Names of tiers that puts pass by: only what is read is copied there.
        policies: What the tiers share; the same that they were given.
        pins_bytes_max: Bytes that may be pinned at one time.
        recode: Gives a frame the coder that a tier wants; None where frames are kept as they come.
        metrics: Where to count; its own by default.
    """

    name = "stack"

    def __init__(
        self,
        tiers: Sequence[Backend],
        *,
        promoted: Collection[str] = (),
        policies: Policies | None = None,
        pins_bytes_max: int = 1 << 30,
        recode: Recode | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        if not tiers or all(tier.name in promoted for tier in tiers):
            raise ValueError("a stack needs at least one tier that puts reach")
        self.tiers = tuple(tiers)
        self.policies = policies or Policies()
        self._promoted = frozenset(promoted)
        self._pins_bytes_max = pins_bytes_max
        self._coders = Coders(recode)
        self._metrics = metrics or Metrics()
        self._flights = [Flights(tier) for tier in self.tiers]
        self._pinned_bytes: dict[ChunkKey, int] = {}
        self.changes = Changes()
        self.arrivals = Arrivals()

    @property
    def state(self) -> State:
        """Up while one tier is; the detail names those that are not, and what the others have to say."""
        states = {tier.name: state_of(tier) for tier in self.tiers}
        details = [f"{name}: {state.detail}" for name, state in states.items() if state.detail]
        return State(any(state.up for state in states.values()), "; ".join(details))

    def states(self) -> dict[str, State]:
        """How each tier is."""
        return {tier.name: state_of(tier) for tier in self.tiers}

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        run: list[Held] = []
        miss: Miss | None = None
        while len(run) < len(keys):
            longer, miss = await self._longest_run(keys[len(run) : len(run) + WINDOW] if run else keys)
            if not longer:
                break
            run += longer
        if len(run) == len(keys):
            miss = None
        elif run:
            # Whoever asked will put what is missing, and does not say what it stands on.
            self.policies.history.follow(keys[len(run) - 1 : len(run) + 1])
        return Match(await self._with_all_levels(keys, run), miss)

    async def wait(self, keys: Sequence[ChunkKey], wait_s: float) -> Match:
        """As `match`, but waits up to `wait_s` seconds for chunks that are about to be put."""
        return await wait_in(self.tiers, self, self.arrivals, keys, wait_s)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        found: dict[ChunkKey, Frame | Miss] = {}
        tier_of: dict[ChunkKey, str] = {}
        lesson = Lesson(self.policies, level)
        with self.changes.watching(keys) as changed:
            for depth, tier in enumerate(self.tiers):
                lesson.begin()
                served, led = await self._get_more(depth, keys, level, found, tier_of)
                lesson.read(tier.name, served, led)
                tier_of |= dict.fromkeys(served, tier.name)
                if depth:
                    await self._promote(depth, {key: served[key] for key in served if key in led}, changed)
        lesson.end(found, tier_of)
        self._count(keys, found, tier_of)
        return [found[key] for key in keys]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        self._note_order(items)
        keys = [key for key, _ in items]
        with self._changing(keys):
            try:
                stored = [merged(past, ack) for past in await self._put(items, ack)]
            finally:
                # A put that fails in one tier may be visible in another.
                self.arrivals.announce(keys)
        for result in stored:
            self._metrics.puts.labels(result.outcome.value).inc()
        return stored

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        # In the order of puts, so that a put under way is not left in the upper tiers only.
        with self._changing(keys):
            for tier in reversed(self.tiers):
                await tier.trim(keys, level=level)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        self.policies.pins.unpin(keys)
        with self._changing(keys):
            for tier in reversed(self.tiers):
                await tier.delete(keys)

    async def purge(self, namespace: bytes) -> int:
        """Delete every chunk of a namespace that is held when it is called, and say how many there were."""
        keys = [key async for key, _ in self.scan(namespace)]
        for start in range(0, len(keys), _PURGE_CHUNKS):
            await self.delete(keys[start : start + _PURGE_CHUNKS])
        return len(keys)

    async def pin(self, keys: Sequence[ChunkKey], ttl_s: float) -> list[bool]:
        """Keep chunks for `ttl_s` seconds, whatever room others need; says of each whether it is held and pinned.

        Raises:
            BackendFullError: More would be pinned than may be; nothing was.
        """
        sizes_bytes = {key: copy_bytes(held.copy) for key in keys if (held := await self._find(key)) is not None}
        pinned_bytes = {key: self._pinned_bytes[key] for key in self.policies.pins.current()} | sizes_bytes
        if sum(pinned_bytes.values()) > self._pins_bytes_max or len(pinned_bytes) > PINS_MAX:
            raise BackendFullError(
                self.name,
                f"{sum(pinned_bytes.values())} bytes in {len(pinned_bytes)} chunks would be pinned, more than "
                f"{self._pins_bytes_max} bytes or {PINS_MAX} chunks",
            )
        self._pinned_bytes = pinned_bytes
        self.policies.pins.pin(sizes_bytes, ttl_s)
        return [key in sizes_bytes for key in keys]

    async def unpin(self, keys: Sequence[ChunkKey]) -> None:
        """Let go of chunks before their time."""
        self.policies.pins.unpin(keys)

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        seen: set[ChunkKey] = set()
        for tier in self.tiers:
            async for key, held in tier.scan(namespace):
                if key not in seen:
                    seen.add(key)
                    yield key, held
                    if len(seen) % WINDOW == 0:
                        # What memory answers never waits, and others want their turn.
                        await asyncio.sleep(0)

    async def aclose(self) -> None:
        # All at one time: each may have a queue to write, and they share one deadline.
        ended = await asyncio.gather(*(tier.aclose() for tier in self.tiers), return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error

    async def _find(self, key: ChunkKey) -> Held | None:
        """What the fastest tier that has a chunk holds of it."""
        for tier in self.tiers:
            if (match := await match_of(tier, [key])).held:
                return match.held[0]
        return None

    async def _longest_run(self, keys: Sequence[ChunkKey]) -> tuple[list[Held], Miss | None]:
        """The longest run that one tier holds, each chunk as the fastest tier with an unbroken run has it."""
        run: list[Held] = []
        misses: list[Miss] = []
        for tier in self.tiers:
            match = await match_of(tier, keys)
            run = run + match.held[len(run) :] if run else match.held
            if match.miss is None:
                return run, None
            misses.append(match.miss)
        return run, telling(reversed(misses))

    async def _with_all_levels(self, keys: Sequence[ChunkKey], run: list[Held]) -> list[Held]:
        """The run with every partial copy replaced by the one of the lower tier that holds most of its levels."""
        if all(copy.whole for copy, _ in groupby(map(_COPY, run))):
            return run
        start = 0
        for copy, same in groupby(list(map(_COPY, run))):
            end = start + len(list(same))
            if not copy.whole:
                for tier in self.tiers[1:]:
                    await overlay(tier, keys, run, start, end)
            start = end
        return run

    async def _get_more(
        self,
        depth: int,
        keys: Sequence[ChunkKey],
        level: int | None,
        found: dict[ChunkKey, Frame | Miss],
        tier_of: dict[ChunkKey, str],
    ) -> tuple[dict[ChunkKey, Frame], Collection[ChunkKey]]:
        """Ask a tier for what is missing of `found` and add it there.

        Returns:
            What this tier served, and which of that was read for this call.
        """
        tier = self.tiers[depth]
        wanted = [key for key in keys if not satisfies(found.get(key), level)]
        partial = {key: frame for key in wanted if isinstance(frame := found.get(key), Frame)}
        if partial:
            more = await self._with_more(tier, partial)
            wanted = [key for key in wanted if key not in partial or key in more]
        if not wanted:
            return {}, ()
        answers, led = await self._read(depth, wanted, level)
        served: dict[ChunkKey, Frame] = {}
        for key in wanted:
            answer = answers[key]
            better = await self._better(found.get(key), answer, tier_of.get(key, ""))
            if better is answer and isinstance(answer, Frame):
                served[key] = answer
            found[key] = better
        return served, led

    async def _read(
        self, depth: int, keys: list[ChunkKey], level: int | None
    ) -> tuple[dict[ChunkKey, Frame | Miss], Collection[ChunkKey]]:
        """Read a tier; whoever wants the same of a lower tier at the same time shares one read."""
        try:
            if depth:
                return await self._flights[depth].get(keys, level)
            return dict(zip(keys, await self.tiers[0].get(keys, level=level), strict=True)), keys
        except KVStoreError as exc:
            log.warning("reading from %s failed: %s", self.tiers[depth].name, exc)
            return dict.fromkeys(keys, Miss(Reason.BREAKER)), ()

    async def _put(self, items: Sequence[tuple[ChunkKey, Frame]], ack: Ack) -> list[list[Stored]]:
        """The answers of the tiers to each put."""
        results: list[list[Stored]] = [[] for _ in items]
        for position, (key, frame) in enumerate(items):
            results[position] += await self._refusal(key, frame, ack)
        # Lowest tier first: a bounded queue that refuses must do so before anything was stored above it, and the
        # tier that outlives the others decides which of two frames stays.
        for tier in reversed(self.tiers):
            wanted = [n for n, past in enumerate(results) if not any(s.outcome is Outcome.OTHER for s in past)]
            if tier.name in self._promoted:
                await self._drop_others(tier, [items[n] for n in wanted])
                continue
            stored = await self._put_to(tier, [items[n] for n in wanted], ack)
            for position, result in zip(wanted, stored, strict=True):
                results[position].append(result)
        return results

    async def _promote(self, depth: int, served: dict[ChunkKey, Frame], changed: Collection[ChunkKey]) -> None:
        """Copy what a tier served into the tiers above it, as far as they have room and it did not change."""
        if self._coders.differ:
            # Of a part of a frame nobody can say what it would be under another coder.
            served = {key: frame for key, frame in served.items() if frame.whole}
        for tier in self.tiers[:depth] if served else ():
            # What could not be copied up is still served.
            with suppress(BackendUnavailableError):
                await self._put_to(tier, list(served.items()), Ack.MEMORY, unless=changed)

    async def _refusal(self, key: ChunkKey, frame: Frame, ack: Ack) -> list[Stored]:
        """The answer of the first tier that holds another frame under this key, if there is one.

        The lowest tier is not asked: it answers first when the frame is put.
        """
        for tier in self.tiers[:-1]:
            match = await match_of(tier, [key])
            if match.held and await self._coders.outcome(frame, tier, match.held[0]) is Outcome.OTHER:
                return await self._put_to(tier, [(key, frame)], ack)
        return []

    async def _drop_others(self, tier: Backend, items: Sequence[tuple[ChunkKey, Frame]]) -> None:
        """Take out of a tier that puts pass by what they replace."""
        for key, frame in items:
            match = await match_of(tier, [key])
            if match.held and await self._coders.outcome(frame, tier, match.held[0]) is Outcome.WRITTEN:
                await tier.delete([key])

    async def _put_to(
        self,
        tier: Backend,
        items: Sequence[tuple[ChunkKey, Frame]],
        ack: Ack,
        *,
        unless: Collection[ChunkKey] = frozenset(),
    ) -> list[Stored]:
        """Put to one tier; its failure is an answer, unless it asks to be tried again later."""
        try:
            # Looked at after coding, which takes time.
            coded = [item for item in await self._coded(tier, items) if item[0] not in unless]
            return await tier.put(coded, ack=ack) if coded else []
        except BackendBusyError:
            raise
        except KVStoreError as exc:
            error = exc if isinstance(exc, BackendError) else BackendError(tier.name, str(exc))
            return [Stored(Outcome.FAILED, None, error)] * len(items)

    async def _coded(self, tier: Backend, items: Sequence[tuple[ChunkKey, Frame]]) -> Sequence[tuple[ChunkKey, Frame]]:
        """Frames in the coder that a tier wants."""
        if not self._coders.differ:
            return items
        held = [(await match_of(tier, [key])).held for key, _ in items]
        return [
            (key, await self._coders.coded(frame, tier, one[0] if one else None))
            for one, (key, frame) in zip(held, items, strict=True)
        ]

    async def _with_more(self, tier: Backend, partial: dict[ChunkKey, Frame]) -> set[ChunkKey]:
        """Those frames that were found of which a tier holds more levels; asked from memory."""
        keys = list(partial)
        return {
            key
            async for start, run in runs_of(tier, keys)
            for key, held in zip(keys[start:], run, strict=False)
            if self._coders.may_extend(held, partial[key])
        }

    async def _better(self, before: Frame | Miss | None, after: Frame | Miss, tier: str) -> Frame | Miss:
        """The more useful of two answers, the first from `tier`; levels of different frames are never joined."""
        if before is None:
            return after
        if isinstance(before, Frame):
            longer = isinstance(after, Frame) and await self._coders.extends(after, before, tier)
            return after if longer else before
        return after if isinstance(after, Frame) else telling([after, before])

    def _note_order(self, items: Sequence[tuple[ChunkKey, Frame]]) -> None:
        """Remember which chunks of a put follow each other in their prompt."""
        for (before, first), (key, second) in pairwise(items):
            end = first.head.header.first_position + first.head.header.tokens
            same = before[:NAMESPACE_BYTES] == key[:NAMESPACE_BYTES]
            if same and first.head.header.tokens and end == second.head.header.first_position:
                self.policies.history.follow([before, key])

    @contextmanager
    def _changing(self, keys: Sequence[ChunkKey]) -> Iterator[None]:
        """Chunks change in this block: what was read before is not copied up, and nobody joins a read of it."""
        with self.changes.making(keys):
            self._forget_flights(keys)
            try:
                yield
            finally:
                self._forget_flights(keys)

    def _forget_flights(self, keys: Sequence[ChunkKey]) -> None:
        for flights in self._flights:
            flights.forget(keys)

    def _count(
        self, keys: Sequence[ChunkKey], found: dict[ChunkKey, Frame | Miss], tier_of: dict[ChunkKey, str]
    ) -> None:
        for key in keys:
            answer = found[key]
            if isinstance(answer, Miss):
                self._metrics.misses.labels(answer.reason.value).inc()
            else:
                self._metrics.hits.labels(tier_of[key]).inc()
