"""Prompts as runs of chunk keys: recorded ones, and made ones that come from a seed."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey

Trace = list[list[ChunkKey]]
"""Requests in order, each as the keys of its prompt's chunks."""

CHUNK_TOKENS = 512

_NAMESPACE = bytes(NAMESPACE_BYTES)
_SYSTEM_CHUNKS = (1, 4, 8)
_SYSTEM_WEIGHTS = (6, 3, 1)
_TURNS_MORE = 0.6
_SCANS = 0.1


def read_trace(path: Path) -> Trace:
    """A trace of JSON lines with `hash_ids`, one id for every `CHUNK_TOKENS` tokens of prefix."""
    with path.open(encoding="utf-8") as lines:
        return [_keys(json.loads(line)["hash_ids"]) for line in lines]


def made_trace(seed: int, requests: int, *, open_max: int = 60) -> Trace:
    """Conversations that take turns, behind a few shared system prompts, and long prompts that are asked once.

    A conversation goes on with probability 0.6 after each turn, and any of those that are open comes next; a turn adds
    1 to 8 chunks. One request in ten is a document of 20 to 60 chunks that nobody asks about again.

    Args:
        seed: Seed of everything random.
        requests: Number of requests.
        open_max: Conversations that are open at one time.
    """
    rng = random.Random(seed)
    fresh = iter(range(1 << 40))
    systems = [[next(fresh) for _ in range(chunks)] for chunks in _SYSTEM_CHUNKS]
    conversations: list[list[int]] = []
    trace: Trace = []
    while len(trace) < requests:
        if rng.random() < _SCANS:
            trace.append(_keys([next(fresh) for _ in range(rng.randint(20, 60))]))
            continue
        if len(conversations) < open_max:
            conversations.append(list(rng.choices(systems, _SYSTEM_WEIGHTS)[0]))
        conversation = conversations[rng.randrange(len(conversations))]
        conversation += [next(fresh) for _ in range(rng.randint(1, 8))]
        trace.append(_keys(conversation))
        if rng.random() > _TURNS_MORE:
            conversations.remove(conversation)
    return trace


def _keys(ids: Sequence[int]) -> list[ChunkKey]:
    return [ChunkKey(_NAMESPACE + number.to_bytes(DIGEST_BYTES, "big")) for number in ids]
