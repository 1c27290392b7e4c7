"""Runs prompts through a real engine, and counts what it loaded: what benchmarks.engine_quality asks of one."""

import asyncio
import base64
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.vllm_engine import VllmEngine
from kvstore.client import Client
from kvstore.keys import NAMESPACE_BYTES, ChunkKey, chunk_keys
from kvstore.layout import Layout

TOKENS = 16
"""Length of a greedy continuation."""

POSITIONS = (0, 4, 8, 12)
"""Tokens of a continuation whose distributions are compared."""

_STORED_S = 120.0
T = TypeVar("T")

LogP = npt.NDArray[np.float32]
"""Log-probabilities `[tokens, vocabulary]`."""


@dataclass(frozen=True, eq=False)
class Run:
    """What an engine made of a prompt.

    Args:
        tokens: Its greedy continuation.
        log_p: Distributions at `POSITIONS` of a given continuation.
        own_log_p: Distributions of the greedy one.
    """

    tokens: list[int]
    log_p: LogP
    own_log_p: LogP


class Reader:
    """An engine and the server that it loads from.

    Args:
        engine: Started, with `max_logprobs` -1.
        url: Its server, which holds nothing else.
        layout: Layout of its chunks.
    """

    def __init__(self, engine: VllmEngine, url: str, layout: Layout) -> None:
        self._engine = engine
        self._url = url
        self._layout = layout
        self._counts: dict[str, float] = {}
        self.token_bytes = layout.chunk_bytes // layout.chunk_tokens

    def run(self, ids: list[int], follow: Sequence[int] | None) -> Run:
        """The greedy continuation, and the distributions along `follow`; without it along the greedy one."""
        [greedy] = self._ask([ids], TOKENS)
        follow = greedy.tokens if follow is None else follow
        # As long as the tokens are the same, their distributions are those that are wanted.
        same = leading(greedy.tokens, follow)
        own = [greedy.log_p[[n]] for n in POSITIONS if n <= same]
        rest = self._ask([ids + list(follow[:n]) for n in POSITIONS if n > same], 1)
        return Run(greedy.tokens, np.concatenate([*own, *(one.log_p for one in rest)]), greedy.log_p)

    def along(self, ids: list[int], follow: Sequence[int]) -> LogP:
        """The distributions of given tokens; the first goes alone, so that the others find its prefix in the cache."""
        first, *others = [ids + list(follow[:n]) for n in POSITIONS]
        return np.concatenate([one.log_p for one in self._ask([first], 1) + self._ask(others, 1)])

    def compute(self, prompts: Sequence[list[int]]) -> None:
        """Run prompts, so that their chunks are stored."""
        self._engine.ask({"prompts": list(prompts), "tokens": 1})

    def changed(self) -> dict[str, float]:
        """What the connector counted since the last call."""
        now = self._engine.counts()
        before, self._counts = self._counts, now
        return {name: now[name] - before.get(name, 0) for name in now}

    def reset(self) -> None:
        """Empty the engine's own cache."""
        self._engine.reset()

    def trim(self, level: int) -> None:
        """Make the server drop the levels above one."""
        keys = self._held()
        self._talk(lambda client: client.trim(keys, level=level))

    def forget(self) -> None:
        """Empty the engine's own cache and the server."""
        keys = self._held()
        self._talk(lambda client: client.delete(keys))
        self.reset()

    def wait_stored(self, prompts: Sequence[Sequence[int]]) -> None:
        """Wait until every full chunk of prompts is on the server: saves go on behind the answer."""
        wanted = {key for ids in prompts for key in chunk_keys(self._layout, ids)}
        end_s = time.monotonic() + _STORED_S
        while wanted - set(self._held()):
            if time.monotonic() > end_s:
                raise RuntimeError("the engine did not store its chunks")
            time.sleep(0.02)

    def _held(self) -> list[ChunkKey]:
        namespace = self._layout.digest[:NAMESPACE_BYTES]

        async def list_all(client: Client) -> list[ChunkKey]:
            return [key async for key, _ in client.scan(namespace)]

        return self._talk(list_all)

    def _talk(self, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        async def talk() -> T:
            async with Client(self._url) as client:
                return await work(client)

        return asyncio.run(talk())

    def _ask(self, prompts: Sequence[list[int]], tokens: int) -> list[Run]:
        if not prompts:
            return []
        answers = self._engine.ask({"prompts": list(prompts), "tokens": tokens, "log_p": True})
        found = [_log_p(one["log_p"], len(one["tokens"])) for one in answers]
        return [Run(one["tokens"], log_p, log_p) for one, log_p in zip(answers, found, strict=True)]


def kl_nats(exact: LogP, found: LogP) -> float:
    """KL(exact || found), nats, mean over tokens."""
    wide, other = exact.astype(np.float64), found.astype(np.float64)
    return float((np.exp(wide) * (wide - other)).sum(1).mean())


def leading(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the leading run that two lists share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def differences(own: Run, other: Run) -> Iterator[tuple[int, float]]:
    """The first token that differs, if one does: its position, and by how many nats `own` preferred its own choice."""
    position = leading(own.tokens, other.tokens)
    if position < len(own.tokens):
        line = own.own_log_p[position]
        margin = float(line[own.tokens[position]] - line[other.tokens[position]])
        assert math.isfinite(margin)
        yield position, margin


def _log_p(text: str, tokens: int) -> LogP:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(tokens, -1)
