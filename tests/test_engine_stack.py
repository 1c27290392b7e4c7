"""An engine's stack, device memory, host memory and a server, while the server is killed and comes back."""

import asyncio
import random
from collections import Counter
from contextlib import suppress

from kvstore.backend import Ack, Miss, Outcome
from kvstore.backends.gpu import GpuBackend
from kvstore.backends.host import HostBackend
from kvstore.backends.policies import Policies
from kvstore.client import Client
from kvstore.errors import BackendUnavailableError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.testing import make_frame, make_key
from kvstore.tiers import TieredBackend
from tests.conftest import Process, Serve

KEYS = [make_key(number) for number in range(120)]
FRAMES = {key: make_frame(key, (8_000, 4_000, 4_000), first_position=256) for key in KEYS}
GPU_BYTES, HOST_BYTES = 256 << 10, 512 << 10


class Engine:
    """A stack that is smaller than what it works with, and what is known of every chunk."""

    def __init__(self, stack: TieredBackend) -> None:
        self.stack = stack
        self.on_disk: set[ChunkKey] = set()
        self.deleted: set[ChunkKey] = set()
        self.seen: Counter[str] = Counter()
        self.done = False

    async def work(self, seed: int, keys: list[ChunkKey]) -> None:
        """Random calls; only this task changes these chunks."""
        rng = random.Random(seed)
        while not self.done:
            await self._step(rng, keys)

    async def _step(self, rng: random.Random, keys: list[ChunkKey]) -> None:
        chosen = rng.sample(keys, rng.randint(1, 4))
        kind = rng.choice(["put", "put", "put", "get", "get", "match", "delete"])
        self.seen[kind] += 1
        if kind == "put":
            await self._put(chosen, rng.choice([Ack.MEMORY, Ack.DISK]))
        elif kind == "delete":
            self.on_disk -= {chosen[0]}
            with suppress(BackendUnavailableError):
                await self.stack.delete(chosen[:1])
                self.deleted.add(chosen[0])
        elif kind == "match":
            held, _ = await self.stack.match(chosen)
            assert not self.deleted & set(chosen[: len(held)])
        else:
            level = rng.choice([None, 0, 1])
            for key, answer in zip(chosen, await self.stack.get(chosen, level=level), strict=True):
                self.check(key, level, answer)

    async def _put(self, keys: list[ChunkKey], ack: Ack) -> None:
        self.deleted -= set(keys)
        stored = await self.stack.put([(key, FRAMES[key]) for key in keys], ack=ack)
        for key, result in zip(keys, stored, strict=True):
            assert result.outcome in (Outcome.WRITTEN, Outcome.EXISTS, Outcome.EXTENDED)
            assert result.ack is not None
            assert (result.error is None) == (result.ack >= ack)
            if result.ack >= Ack.DISK:
                self.on_disk.add(key)

    def check(self, key: ChunkKey, level: int | None, answer: Frame | Miss) -> None:
        """An answer is just what was put, and not what was deleted."""
        if isinstance(answer, Frame):
            assert key not in self.deleted
            assert answer == FRAMES[key].truncated(answer.levels - 1)
            assert level is None or answer.levels <= level + 1
            self.seen["hit"] += 1
        else:
            self.seen[answer.reason.value] += 1


async def test_an_engine_outlives_its_server(serve: Serve, free_port: int) -> None:
    def start() -> Process:
        return serve("--port", str(free_port), "--memory", "64MiB", "--disk", "256MiB")

    server = await asyncio.to_thread(start)
    policies = Policies()
    gpu = await GpuBackend.open(GPU_BYTES, device="cpu", policies=policies)
    host = HostBackend(HOST_BYTES, policies=policies)
    client = Client(f"http://127.0.0.1:{free_port}", timeout_s=10.0)
    stack = TieredBackend([gpu, host, client], promoted=["gpu"], policies=policies)
    engine = Engine(stack)
    tasks = [asyncio.create_task(engine.work(seed, KEYS[seed::8])) for seed in range(8)]
    while engine.seen["put"] < 60:
        await asyncio.sleep(0.001)
    server.kill()
    assert engine.on_disk
    while engine.seen["breaker"] < 10:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(start)
    before = engine.seen["put"]
    while engine.seen["put"] < before + 60:
        await asyncio.sleep(0.001)
    engine.done = True
    await asyncio.gather(*tasks)
    found = dict(zip(KEYS, await stack.get(KEYS), strict=True))
    for key in KEYS:
        engine.check(key, None, found[key])
    missing = [key for key in engine.on_disk if not isinstance(found[key], Frame)]
    assert missing == []
    await stack.aclose()
