"""Loads and saves of a worker of the vLLM connector that are under way."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

import torch

from kvstore.connectors.vllm_plan import Load, Save
from kvstore.header import Behind
from kvstore.stopwatch import Stopwatch


@dataclass
class Loading:
    """A load under way. Under its lock, nothing is written to the engine's blocks any more once it is closed."""

    load: Load
    started_s: float
    ended_s: float = 0.0
    task: "Future[None] | None" = None
    lock: Lock = field(default_factory=Lock)
    closed: bool = False
    done: set[int] = field(default_factory=set)
    behind: Behind | None = None
    reason: str | None = None
    size_bytes: int = 0
    arrived_s: float = 0.0
    lossy_chunks: int = 0
    fetching: Stopwatch = field(default_factory=Stopwatch)
    decoding: Stopwatch = field(default_factory=Stopwatch)

    @property
    def chunks(self) -> int:
        """Leading chunks that are written."""
        return next(number for number in range(self.load.chunks + 1) if number not in self.done)


@dataclass
class Staged:
    """A chunk on its way out of the engine's cache: its planes fill layer by layer."""

    save: Save
    number: int
    planes: dict[str, torch.Tensor]
    layers: int = 0
