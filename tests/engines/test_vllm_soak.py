"""A real vLLM under load, with aborts, preemptions, faults and a dying server: nothing is left over, all is right."""

import asyncio
import base64
import json
import os
import random
import re
import signal
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.engines.conftest import MODEL, kvstore_server, lookup_page, start_engine, vllm_serve
from tests.tcp_relay import Relay, tcp_relay

REQUESTS = int(os.environ.get("VLLM_SOAK_REQUESTS", "300"))
SEED = int(os.environ.get("VLLM_SOAK_SEED", "1"))
TOKENS = 48
_POOLED = re.compile(r"^asyncio_|^ThreadPoolExecutor-|-codec_\d+$")
CLIENTS = 10
BLOCKS = 72
NOISE_NATS = 0.13
"""By how much two tokens may differ in a full recompute: the model computes in bfloat16, batches in another order."""


@dataclass
class Soak:
    """The load and what became of it."""

    port: int
    prompts: list[list[int]]
    rng: random.Random
    answers: dict[int, list[int]] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)
    ended: int = 0

    async def request(self, session: aiohttp.ClientSession, number: int, aborts: float) -> None:
        """One request, which its client may leave before the answer."""
        body = {"model": "m", "prompt": self.prompts[number], "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        patience_s = self.rng.uniform(0.02, 1.5) if self.rng.random() < aborts else 300.0
        try:
            async with asyncio.timeout(patience_s):
                async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body) as answer:
                    found = await answer.json()
                    assert answer.status == 200, found
            [choice] = found["choices"]
            assert choice["finish_reason"] == "length", choice
            self.answers[number] = choice["token_ids"]
            self.happened["answered"] += 1
        except TimeoutError:
            assert patience_s < 300.0, "a request hangs"
            self.happened["aborted"] += 1
        self.ended += 1

    async def run(self, numbers: list[int], aborts: float) -> None:
        """Requests, so many at a time."""
        left = iter(numbers)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client() -> None:
                for number in left:
                    await self.request(session, number, aborts)

            await asyncio.gather(*(client() for _ in range(CLIENTS)))


class Probe:
    """Asks the engine's processes what they hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ask(self) -> dict[str, dict[str, Any]]:
        """What the scheduler's and the worker's process say now."""
        found = {}
        for path in self._folder.glob("*.json"):
            role, pid = path.stem.split("-")
            before = path.stat().st_ino
            os.kill(int(pid), signal.SIGUSR1)
            end_s = time.monotonic() + 60
            while path.stat().st_ino == before:
                assert time.monotonic() < end_s, f"the {role}'s process does not answer"
                time.sleep(0.02)
            found[role] = json.loads(path.read_text())
        assert found.keys() == {"scheduler", "worker"}
        return found

    async def settle(self, wanted: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """What they hold at rest: poll until nothing is under way, and no more is there than was."""
        for _ in range(240):
            found = await asyncio.to_thread(self.ask)
            if _at_rest(found) and (wanted is None or not _more(found, wanted)):
                break
            await asyncio.sleep(0.5)
        return found


def _at_rest(found: dict[str, dict[str, Any]]) -> bool:
    busy = ("requests", "steps", "loads", "saves", "queue_bytes")
    return not any(held.get(name) for held in found.values() for name in busy)


def _more(found: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[str]:
    """What is there that was not."""
    more = []
    for role, held in found.items():
        was = before[role]
        more += [
            f"{role}: {held[name]} {name}, not {was[name]}" for name in ("files", "tasks") if held[name] > was[name]
        ]
        if held.get("free_blocks") != was.get("free_blocks"):
            more.append(f"{role}: {held['free_blocks']} free blocks, not {was['free_blocks']}")
        # Pools keep their threads, and fill up as they are used.
        names, known = ([n for n in one["threads"] if not _POOLED.search(n)] for one in (held, was))
        if names != known:
            more.append(f"{role}: threads {names}, not {known}")
    return more


async def _spoil(soak: Soak, relay: Relay, rng: random.Random) -> None:
    """Faults come and go at random."""
    while True:
        # Mostly none: while the connector leaves a server alone that failed, nothing is loaded.
        fault = rng.choice(["", "", "", "", "", "", "flip", "flip", "cut", "stall", "down"])
        soak.happened[fault or "no fault"] += 1
        if fault == "down":
            relay.fault, relay.after_bytes = "cut", 0
        else:
            relay.fault, relay.after_bytes = fault, rng.randrange(400_000)
        # On a slow link more is under way when something happens to it.
        relay.rate_bytes_per_s = rng.choice([0.0, 1e6, 4e6])
        await asyncio.sleep(rng.uniform(0.2, 1.5))


class Servers:
    """The server that there is now."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(self) -> int:
        """A server with nothing in it; its port."""
        url, _ = self._stack.enter_context(kvstore_server("--disk", "0"))
        return int(url.rsplit(":", 1)[1])

    def kill(self) -> None:
        """It dies as it stands."""
        self._stack.close()


async def _kill(soak: Soak, relay: Relay, servers: Servers, times: int) -> None:
    """The server is killed and another one started, so many times over the requests; in mid-load, if there is one."""
    for number in range(times):
        due = REQUESTS * (number + 1) // (times + 1)
        while soak.ended < due:
            await asyncio.sleep(0.005)
        passed = relay.answer_bytes
        while relay.answer_bytes - passed < 100_000 and soak.ended < due + REQUESTS // 12:
            await asyncio.sleep(0.005)
        loading = relay.answer_bytes - passed >= 100_000
        await asyncio.to_thread(servers.kill)
        soak.happened["killed in mid-load" if loading else "killed at rest"] += 1
        await asyncio.sleep(soak.rng.uniform(0.2, 1.5))
        relay.port = await asyncio.to_thread(servers.start)


@pytest.fixture
def probe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "probe"
    folder.mkdir()
    monkeypatch.setenv("KVSTORE_PROBE_FOLDER", str(folder))
    return folder


@pytest.mark.timeout(3600)
async def test_a_storm_leaves_nothing_over(tmp_path: Path, probe_folder: Path) -> None:
    rng = random.Random(SEED)
    prompts = _prompts(rng)
    servers = Servers()
    with ExitStack() as stack:
        stack.callback(servers.kill)
        async with tcp_relay(await asyncio.to_thread(servers.start)) as relay:
            transfer = {
                "kv_connector": "KvstoreConnector",
                "kv_connector_module_path": "tests.engines.vllm_probe",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "url": relay.url, "chunk_tokens": 64, "deadline_s": 2.0, "match_s": 1.0, "guard": False,
                },
            }  # fmt: skip
            command = ["vllm", "serve", str(MODEL), "--kv-transfer-config", json.dumps(transfer)]
            command += ["--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "1024", "--max-num-seqs", "8"]
            serve = vllm_serve(command, tmp_path / "vllm.log")
            port = await asyncio.to_thread(stack.enter_context, serve)
            soak = Soak(port, prompts, rng)
            probe = Probe(probe_folder)
            await _storm(soak, relay, servers, probe)
            counts = await asyncio.to_thread(_counts, port)
            stack.pop_all().close()
    print(f"\n{dict(soak.happened)}\n{ {name: n for name, n in counts.items() if n} }")
    assert soak.happened["killed in mid-load"] > 0
    assert soak.happened["killed in mid-load"] + soak.happened["killed at rest"] >= 3
    assert soak.happened["aborted"] > REQUESTS // 20
    assert counts["preemptions"] > 0
    assert counts["loaded_tokens"] > 0
    assert counts["failed_tokens"] > 0
    await asyncio.to_thread(_judge, soak, tmp_path)


async def _storm(soak: Soak, relay: Relay, servers: Servers, probe: Probe) -> None:
    """Load in calm, then in the storm; what is held at rest is the same before and afterwards."""
    warm_up = list(range(0, REQUESTS, 8))
    await soak.run(warm_up, 0.0)
    before = await probe.settle()
    assert _at_rest(before), before
    soak.ended = 0
    spoiling = asyncio.create_task(_spoil(soak, relay, random.Random(SEED)))
    killing = asyncio.create_task(_kill(soak, relay, servers, 4))
    try:
        await soak.run(list(range(REQUESTS)), 0.2)
        await killing
    finally:
        for task in (spoiling, killing):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    relay.fault, relay.rate_bytes_per_s = "", 0.0
    # A request brings the engine to report what ended meanwhile.
    await soak.run([0], 0.0)
    after = await probe.settle(before)
    print(f"\nbefore {before}\nafter  {after}")
    assert _at_rest(after), after
    assert not _more(after, before)


def _counts(port: int) -> Counter[str]:
    """The connector's counters and the engine's preemptions."""
    found: Counter[str] = Counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        for line in answer.read().decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(("vllm:kvstore_", "vllm:num_preemptions")) and "_total" in name:
                short = name.partition("{")[0].removesuffix("_total")
                found[short.removeprefix("vllm:kvstore_").removeprefix("vllm:num_")] += int(float(value))
    return found


def _judge(soak: Soak, folder: Path) -> None:
    """Every answer is that of an engine without a connector, or leaves it where two tokens are as good."""
    engine = start_engine(folder / "plain.log", None, max_model_len=1024, max_logprobs=-1)
    try:
        numbers = sorted(soak.answers)
        plain = engine.ask({"prompts": [soak.prompts[n] for n in numbers], "tokens": TOKENS})
        margins = []
        for number, one in zip(numbers, plain, strict=True):
            own, found = one["tokens"], soak.answers[number]
            if own != found:
                position = next(i for i, (a, b) in enumerate(zip(own, found, strict=True)) if a != b)
                ids = soak.prompts[number] + own[:position]
                [line] = engine.ask({"prompts": [ids], "tokens": 1, "log_p": True})
                log_p = np.frombuffer(base64.b64decode(line["log_p"]), "<f4")
                margins.append(float(log_p[own[position]] - log_p[found[position]]))
    finally:
        engine.stop()
    print(f"{len(numbers)} answers, {len(margins)} differ; margins {sorted(round(m, 4) for m in margins)}")
    assert all(margin < NOISE_NATS for margin in margins), margins


def _prompts(rng: random.Random) -> list[list[int]]:
    """Prompts of 40 to 700 tokens that share prefixes."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pages = [lookup_page(seed, tokenizer, 900) for seed in range(8)]
    tails = [lookup_page(100 + seed, tokenizer, 200) for seed in range(20)]
    return [
        rng.choice(pages)[: rng.randrange(20, 600)] + rng.choice(tails)[-rng.randrange(20, 100) :]
        for _ in range(REQUESTS)
    ]
