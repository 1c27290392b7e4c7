"""vLLM, LMCache's server, our L2 adapter and kvstore in a row: what is loaded, and what faults do.

One LMCache and one vLLM store 50 prompts; a fresh LMCache and a fresh vLLM read them over a link that can break. Run by
`make test-engines` in an environment with LMCache and vLLM.
"""

import asyncio
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.vllm_engine import VllmEngine
from kvstore.client import Client
from kvstore.codecs import encode, named_pipeline
from kvstore.connectors.lmcache_chunks import Codec, Shape, Shard
from kvstore.connectors.lmcache_options import LMCacheOptions
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.layout import attention_layout
from tests.engines.conftest import MODEL, kvstore_server, lookup_page
from tests.engines.lmcache_chain import CHUNK_TOKENS, LMCacheServer, Stoppable, chained_engine, resources, wait_for
from tests.engines.relay_thread import RelayThread

PROMPTS = 50
PROMPT_TOKENS = 1000
CHUNKS = PROMPT_TOKENS // CHUNK_TOKENS
LOADED_TOKENS = CHUNKS * CHUNK_TOKENS
DEADLINES = {"lookup_deadline_s": 5.0, "deadline_s": 3.0, "store_timeout_s": 5.0}
COMPUTED_S = 30.0
"""Longer than a busy machine takes to compute a prompt and its answer."""
NEAR = 0.25
"""Logits that bfloat16 cannot tell apart at these magnitudes."""
SOAK_REQUESTS = 120
NOWHERE = 9
"""A port that nobody listens at."""

pytestmark = pytest.mark.timeout(1800)


class Chain:
    """What one engine stored, and another LMCache and engine that read it over a link."""

    def __init__(self, children: list[Stoppable], folder: Path, port: int) -> None:
        self.port = port
        self.folder = folder
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.pages = [lookup_page(seed, tokenizer, PROMPT_TOKENS) for seed in range(PROMPTS + 2)]
        self.prompts = self.pages[:PROMPTS]
        writer = LMCacheServer(children, folder / "lmcache-1.log", f"http://127.0.0.1:{port}").ready()
        engine = chained_engine(children, folder / "vllm-1.log", writer.port)
        self.recomputed = generate(engine, self.prompts)
        # The same again continues from the engine's own cached KV.
        self.cached = generate(engine, self.prompts)
        wait_for(lambda: writer.adapter().get("stored_chunks") == PROMPTS * CHUNKS, writer.child)
        engine.stop()
        writer.child.stop()
        self.link = RelayThread(port)
        self.lmcache = LMCacheServer(children, folder / "lmcache-2.log", self.link.relay.url, **DEADLINES).ready()
        self.engine = chained_engine(children, folder / "vllm-2.log", self.lmcache.port)

    def forget(self) -> None:
        """Empty LMCache's and the engine's own memory."""
        self.engine.reset()
        self.lmcache.clear()

    def heal(self) -> None:
        """A link without faults to the server that has the prompts, and an adapter that has found that out."""
        self.link.set("")
        self.link.lead_to(self.port)

        def loads() -> bool:
            self.forget()
            return bool(generate(self.engine, self.prompts[-1:], 1)[0]["cached"] == LOADED_TOKENS)

        # The adapter leaves a server that failed alone for a while.
        wait_for(loads, self.lmcache.child)
        wait_for(lambda: not self.lmcache.adapter()["calls"], self.lmcache.child)
        self.forget()

    def right(self, number: int, answer: dict[str, Any]) -> bool:
        """Whether this is the answer to a prompt, or parts from it where two tokens are about as likely.

        Which rows are computed together, and how many are loaded, changes the last bits of an exact answer.
        """
        expected, found = self.recomputed[number]["tokens"], answer["tokens"]
        if found in (expected, self.cached[number]["tokens"]):
            return True
        apart = margin(self.prompts[number], expected, found)
        print(f"prompt {number}: another answer at a margin of {apart:.3f}")
        return apart < NEAR

    def store(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Have a prompt of its own computed and stored."""
        before = self.lmcache.adapter().get("stored_chunks", 0)
        [answer] = generate(self.engine, [prompt])
        wait_for(lambda: self.lmcache.adapter().get("stored_chunks", 0) == before + CHUNKS, self.lmcache.child)
        self.forget()
        return answer

    @contextmanager
    def changes(self) -> Iterator[dict[str, float]]:
        """What the adapter counts in a block, known at its end; and how long it took."""
        counts: dict[str, float] = {}
        before, started_s = self.lmcache.adapter(), time.monotonic()
        yield counts
        counts["took_s"] = round(time.monotonic() - started_s, 2)
        for name, now in self.lmcache.adapter().items():
            if name.endswith(("_chunks", "_errors")) and now != before.get(name, 0):
                counts[name] = now - before.get(name, 0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    children: list[Stoppable] = []
    try:
        with kvstore_server("--disk", "0", "--memory", "2GiB") as (url, _):
            made = Chain(children, tmp_path_factory.mktemp("chain"), port_of(url))
            yield made
            made.link.stop()
    finally:
        for child in reversed(children):
            child.stop()


@pytest.fixture
def whole(chain: Chain) -> Chain:
    """The chain, without a fault."""
    chain.heal()
    return chain


def generate(engine: VllmEngine, prompts: Sequence[Sequence[int]], tokens: int = 16) -> list[dict[str, Any]]:
    """Greedy answers, one prompt after the other."""
    return [engine.generate(prompt, tokens) for prompt in prompts]


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def margin(prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float:
    """Logits between the best token and the worse of two answers' where they part, in exact arithmetic."""
    end = next(number for number, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *one[:end]]])).logits[0, -1]
    return float(logits.max() - min(logits[one[end]], logits[other[end]]))


def test_a_fresh_lmcache_and_vllm_load_what_others_stored(chain: Chain) -> None:
    with chain.changes() as counts:
        found = generate(chain.engine, chain.prompts)
    print(f"\n{counts}")
    assert counts["loaded_chunks"] == PROMPTS * CHUNKS
    assert not [name for name in counts if name.startswith(("missed", "stored", "failed")) or name.endswith("errors")]
    assert [one["cached"] for one in found] == [LOADED_TOKENS] * PROMPTS
    assert chain.lmcache.counter("loaded_chunks") == PROMPTS * CHUNKS
    for number, (cached, computed) in enumerate(zip(chain.cached, chain.recomputed, strict=True)):
        if cached["tokens"] != computed["tokens"]:
            apart = margin(chain.prompts[number], computed["tokens"], cached["tokens"])
            print(f"prompt {number}: recomputing parts from the engine's own cache at a margin of {apart:.3f}")
    same = sum(one["tokens"] == other["tokens"] for one, other in zip(found, chain.recomputed, strict=True))
    print(f"loaded {PROMPTS * LOADED_TOKENS} of {PROMPTS * PROMPT_TOKENS} tokens; {same} answers as recomputed")
    assert [one["tokens"] for one in found] == [one["tokens"] for one in chain.cached]


# Bytes into the answers; look-ups are answered in far fewer, so it is among the chunks.
FAULTS = [
    ("flip", 500_000, {"missed_corrupt_chunks": 1}, LOADED_TOKENS),
    ("cut", 500_000, {"missed_breaker_chunks": 1, "unavailable_errors": 1}, LOADED_TOKENS),
    ("stall", 500_000, {"missed_deadline_chunks": CHUNKS, "deadline_errors": 1}, 0),
    ("slow", 0, {"missed_deadline_chunks": CHUNKS, "deadline_errors": 1}, 0),
]


@pytest.mark.parametrize(("fault", "after", "expected", "most"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_load_that_fails_is_computed(
    whole: Chain, fault: str, after: int, expected: dict[str, int], most: int
) -> None:
    number = [name for name, *_ in FAULTS].index(fault)
    with whole.changes() as counts:
        whole.link.set(fault, after)
        [answer] = generate(whole.engine, [whole.prompts[number]])
    whole.link.set("")
    print(f"\n{fault}: {counts}, {answer['cached']} tokens loaded")
    assert whole.right(number, answer)
    # What is computed is stored then, and that may fail too.
    assert all(counts.get(name, 0) >= count for name, count in expected.items())
    assert answer["cached"] < most or answer["cached"] == most == 0
    assert counts["took_s"] < sum(DEADLINES.values()) - DEADLINES["store_timeout_s"] + COMPUTED_S


def test_a_server_that_is_killed_in_mid_load_costs_a_computation(whole: Chain) -> None:
    prompt = whole.pages[PROMPTS]
    with kvstore_server("--disk", "0") as (url, process), ThreadPoolExecutor(1) as thread:
        whole.link.lead_to(port_of(url))
        expected = whole.store(prompt)
        with whole.changes() as counts:
            whole.link.set("slow")
            passed = whole.link.relay.answer_bytes
            asking = thread.submit(generate, whole.engine, [prompt])
            wait_for(lambda: whole.link.relay.answer_bytes > passed + 300_000, whole.lmcache.child)
            assert not asking.done()
            process.kill()
            # The machine is gone, and with it what it had handed to its network card.
            whole.link.drop()
            [answer] = asking.result()
    print(f"\nkilled: {counts}, {answer['cached']} tokens loaded")
    assert answer["tokens"] == expected["tokens"]
    assert answer["cached"] < LOADED_TOKENS
    assert counts["missed_breaker_chunks"] >= 1
    assert counts["unavailable_errors"] >= 1
    assert counts["took_s"] < DEADLINES["deadline_s"] + COMPUTED_S


def test_a_chunk_of_another_model_is_computed(whole: Chain) -> None:
    prompt = whole.pages[PROMPTS + 1]
    other = attention_layout("another", "model", layers=4, kv_heads=2, head_dim=32, chunk_tokens=CHUNK_TOKENS)
    zeros = {name: torch.zeros(spec.shape, dtype=torch.bfloat16) for name, spec in other.planes.items()}

    def foreign(key: ChunkKey) -> Frame:
        return encode(zeros, other, named_pipeline("raw"), key=key)

    # K and V of all heads lie side by side in a token's values, so LMCache tells of one plane.
    config = AutoConfig.from_pretrained(MODEL)
    values = 2 * config.num_key_value_heads * config.head_dim
    shape = Shape((((config.num_hidden_layers, CHUNK_TOKENS, values), "bfloat16"),))
    namespace = Codec(Shard(str(MODEL), 0, 1), shape, LMCacheOptions(url=whole.link.relay.url)).namespace
    before = set(asyncio.run(keys_at(whole.port, namespace)))
    expected = whole.store(prompt)
    keys = set(asyncio.run(keys_at(whole.port, namespace))) - before
    assert len(keys) == CHUNKS
    asyncio.run(replace(whole.port, {key: foreign(key) for key in keys}))
    with whole.changes() as counts:
        [answer] = generate(whole.engine, [prompt])
    print(f"\nanother model's chunks: {counts}")
    assert answer["tokens"] == expected["tokens"]
    assert answer["cached"] == 0
    assert counts["missed_identity_chunks"] == CHUNKS


async def keys_at(port: int, namespace: bytes) -> list[ChunkKey]:
    async with Client(f"http://127.0.0.1:{port}") as client:
        return [key async for key, _ in client.scan(namespace)]


async def replace(port: int, frames: dict[ChunkKey, Frame]) -> None:
    async with Client(f"http://127.0.0.1:{port}") as client:
        await client.delete(list(frames))
        await client.put(list(frames.items()))


def test_a_token_that_is_wrong_costs_a_computation(whole: Chain) -> None:
    with kvstore_server("--disk", "0", "--token", "another") as (url, _):
        whole.link.lead_to(port_of(url))
        with whole.changes() as counts:
            [answer] = generate(whole.engine, whole.prompts[5:6])
    print(f"\ntoken: {counts}")
    assert whole.right(5, answer)
    assert answer["cached"] == 0
    assert counts["token_errors"] >= 1
    assert counts["missed_breaker_chunks"] >= CHUNKS


def test_a_server_that_comes_late_is_used_but_not_for_another_revision(chain: Chain) -> None:
    children: list[Stoppable] = []
    link = RelayThread(NOWHERE)
    try:
        log = chain.folder / "lmcache-3.log"
        lmcache = LMCacheServer(children, log, link.relay.url, revision="another", **DEADLINES).ready()
        wait_for(lambda: "does not answer" in lmcache.child.text(), lmcache.child)
        engine = chained_engine(children, chain.folder / "vllm-3.log", lmcache.port)
        [answer] = generate(engine, chain.prompts[:1])
        assert chain.right(0, answer)
        assert answer["cached"] == 0
        assert lmcache.adapter()["unavailable_errors"] >= 1

        # There are chunks of these tokens, but of the weights before.
        link.lead_to(chain.port)
        fresh = iter(range(1, PROMPTS))

        def stored() -> bool:
            number = next(fresh)
            [answer] = generate(engine, chain.prompts[number : number + 1])
            assert chain.right(number, answer)
            assert answer["cached"] == 0
            time.sleep(1)
            return int(lmcache.adapter().get("stored_chunks", 0)) >= CHUNKS

        wait_for(stored, lmcache.child)
        assert "loaded_chunks" not in lmcache.adapter()
        number = next(fresh) - 1
        engine.reset()
        lmcache.clear()
        [answer] = generate(engine, chain.prompts[number : number + 1])
        assert chain.right(number, answer)
        assert answer["cached"] == LOADED_TOKENS, "what it stored itself is found again"
    finally:
        for child in reversed(children):
            child.stop()
        link.stop()


@pytest.mark.parametrize("given", [{"token": "wrong"}, {"token": "right", "colour": "red"}], ids=["token", "option"])
def test_lmcache_does_not_start_where_it_is_told_so(tmp_path: Path, given: dict[str, str]) -> None:
    children: list[Stoppable] = []
    try:
        with kvstore_server("--disk", "0", "--token", "right") as (url, _):
            server = LMCacheServer(children, tmp_path / "lmcache.log", url, fail_open=False, **given)
            assert server.child.process.wait(120) != 0
        assert ("set token or KVSTORE_TOKEN" if len(given) == 1 else "colour: there is no") in server.child.text()
    finally:
        for child in children:
            child.stop()


def test_many_requests_with_random_faults_leave_nothing_behind(whole: Chain) -> None:
    rng = random.Random(5)
    lmcache, pid = whole.lmcache, whole.lmcache.child.process.pid

    def settled() -> dict[str, int]:
        whole.heal()
        wait_for(lambda: not lmcache.adapter()["queued_bytes"], lmcache.child)
        return resources(pid) | {"tasks": lmcache.adapter()["tasks"]}

    with kvstore_server("--disk", "0", "--memory", "2GiB") as (url, _):
        # One of the servers has nothing at first.
        ports = [whole.port, port_of(url), NOWHERE]

        def ask_many(requests: int, fresh: Sequence[int]) -> None:
            asked = 0
            while asked < requests:
                if rng.random() < 0.3:
                    whole.link.lead_to(rng.choice(ports))
                whole.link.set(rng.choice(["", "", "flip", "cut", "stall"]), rng.randrange(2_000_000))
                numbers = rng.sample(range(PROMPTS), rng.randrange(1, 4))
                found = whole.engine.ask({"prompts": [whole.prompts[number] for number in numbers], "tokens": 16})
                for number, answer in zip(numbers, found, strict=True):
                    assert whole.right(number, answer)
                asked += len(numbers)
                if rng.random() < 0.5:
                    whole.forget()
            # What failed for a while works again.
            whole.heal()
            whole.link.lead_to(port_of(url))
            whole.store(fresh)

        # Threads of both sides start as they are needed, and memory is touched.
        ask_many(SOAK_REQUESTS // 4, whole.pages[PROMPTS])
        before, threads = settled(), lmcache.threads()
        with whole.changes() as counts:
            ask_many(SOAK_REQUESTS, whole.pages[PROMPTS + 1])
    print(f"\n{SOAK_REQUESTS} requests: {counts}")
    after = settled()
    with suppress(AssertionError):
        # Connections end a moment later; what is left then is told below.
        wait_for(lambda: resources(pid)["fds"] <= before["fds"], lmcache.child, 30)
    after = after | resources(pid)
    print(f"before {before}\nafter  {after}")
    for counted in ("loaded_chunks", "stored_chunks", "missed_corrupt_chunks", "missed_breaker_chunks"):
        assert counts.get(counted, 0) > 0, counted
    assert all(after[name] <= before[name] for name in ("fds", "tasks"))
    # Pools grow to a few threads as they are used.
    pooled = re.compile(r"^asyncio_|-codec_\d+$|-pool-\d+_\d+$")
    own = [[name for name in names if not pooled.search(name)] for names in (threads, lmcache.threads())]
    print(own[1])
    assert own[0] == own[1]
    assert [name for name in own[1] if name.startswith("kvstore")]
    memory = lmcache.storage()["l1_manager"]
    assert (memory["memory_used_bytes"], memory["write_locked_count"], memory["read_locked_count"]) == (0, 0, 0)
    assert lmcache.adapter()["calls"] == 0
    assert after["rss_mib"] < before["rss_mib"] + 128
