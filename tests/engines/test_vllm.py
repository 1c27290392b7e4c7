"""Two processes of a real vLLM and one server: what the first computes, the second loads."""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.vllm_engine import ROOT
from kvstore.client import Client
from kvstore.codecs import encode, named_pipeline
from kvstore.connectors.paged import empty_planes
from kvstore.keys import chunk_keys
from kvstore.layout import Layout, attention_layout
from tests.engines.conftest import MODEL, kvstore_server, lookup_page, start_engine, vllm_serve
from tests.engines.relay_thread import RelayThread
from tests.test_benchmarks import check_result

PROMPTS = 50
CHUNK = 128
TOKENS = 16


class Pair:
    """A server, an engine that stored, what it said, and an engine that reads through a relay."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.prompts = [lookup_page(seed, tokenizer) for seed in range(PROMPTS)]
        writer = start_engine(folder / "writer.log", {"url": url, "chunk_tokens": CHUNK})
        try:
            self.recomputed = [writer.generate(ids) for ids in self.prompts]
            # The same again continues from the engine's own cached KV.
            self.cached = [writer.generate(ids) for ids in self.prompts]
            self.written = writer.counts()
        finally:
            writer.stop()
        self.relay = RelayThread(int(url.rsplit(":", 1)[1]))
        extra = {"url": self.relay.relay.url, "chunk_tokens": CHUNK, "deadline_s": 5.0, "match_s": 5.0, "guard": False}
        self.reader = start_engine(folder / "reader.log", extra)
        self._before = self.reader.counts()

    def changed(self) -> dict[str, float]:
        """What the reader counted since the last call."""
        now = self.reader.counts()
        before, self._before = self._before, now
        return {name: now[name] - before[name] for name in now if now[name] != before[name]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with kvstore_server("--disk", "0", "--memory", "2GiB") as (url, _):
        started = Pair(url, tmp_path_factory.mktemp("engines"))
        yield started
        started.reader.stop()
        started.relay.stop()


@pytest.mark.timeout(1200)
def test_the_recorded_interface_is_the_installed_one() -> None:
    python = ROOT / ".venv-vllm" / "bin" / "python"
    code = "import json; from tests.engines.record_vllm import record; print(json.dumps(record(), sort_keys=True))"
    out = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    recorded = json.loads((ROOT / "tests" / "vllm_signatures.json").read_text())
    assert json.loads(out.splitlines()[-1]) == recorded


@pytest.mark.timeout(1800)
def test_prefixes_of_one_engine_are_loaded_by_another(pair: Pair) -> None:
    assert pair.written["saved_tokens"] == PROMPTS * (1000 // CHUNK * CHUNK)
    found = [pair.reader.generate(ids) for ids in pair.prompts]
    counts = pair.changed()
    loaded = 999 // CHUNK * CHUNK
    assert counts["loaded_tokens"] == PROMPTS * loaded
    # Forward passes run over the rest of each prompt and what is generated. Schedulers run ahead, so the last steps of
    # a prompt may be counted or not.
    rest = PROMPTS * (1000 - loaded)
    assert rest <= counts["computed_tokens"] <= rest + PROMPTS * (TOKENS + 2)
    assert counts.get("failed_tokens", 0) == 0
    assert counts.get("saved_tokens", 0) == 0
    sources = pair.reader.metrics()
    load_ms = counts["load_microseconds"] / 1e3 / PROMPTS
    print(f"\nloaded {counts['loaded_tokens']:.0f} tokens in {load_ms:.1f} ms a prompt")
    print({name: value for name, value in sources.items() if "prompt_tokens" in name})
    same = [a["tokens"] == b["tokens"] for a, b in zip(found, pair.cached, strict=True)]
    recomputed = [a["tokens"] == b["tokens"] for a, b in zip(pair.recomputed, pair.cached, strict=True)]
    print(f"{sum(same)} of {PROMPTS} as from the engine's own cache; recomputing gives {sum(recomputed)}")
    assert [one["cached"] for one in found] == [loaded] * PROMPTS
    assert all(same)


FAULTS = [("flip", 200_000, "corrupt"), ("cut", 200_000, "unavailable"), ("stall", 200_000, "deadline")]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("fault", "after", "reason"), FAULTS, ids=[fault for fault, _, _ in FAULTS])
def test_a_load_that_fails_is_computed(pair: Pair, fault: str, after: int, reason: str) -> None:
    number = [case[0] for case in FAULTS].index(fault)
    pair.reader.reset()
    pair.changed()
    pair.relay.set(fault, after)
    found = pair.reader.generate(pair.prompts[number])
    pair.relay.set("")
    counts = pair.changed()
    print(f"\n{fault}: {counts}")
    assert counts[f"failed_{reason}"] == 1
    assert counts["failed_tokens"] > 0
    assert found["finish"] == "length"
    assert found["tokens"] in (pair.recomputed[number]["tokens"], pair.cached[number]["tokens"])


def _layout(pair: Pair, chunk_tokens: int) -> Layout:
    """The layout that the connector has for the model, as anybody can make it."""
    from kvstore.calibration.model import Model

    return Model(MODEL).layout_of([1], chunk_tokens)


@pytest.mark.timeout(1800)
def test_a_chunk_of_another_model_is_computed(pair: Pair) -> None:
    layout = _layout(pair, CHUNK)
    # The same tokens with another salt: nothing is stored there but what this test forges.
    ids = pair.prompts[4][::-1]
    [key, *_] = chunk_keys(layout, ids)
    other = attention_layout("another", "model", layers=4, kv_heads=2, head_dim=32, chunk_tokens=CHUNK)
    planes = {name: plane.zero_() for name, plane in empty_planes(other).items()}
    frame = encode(planes, other, named_pipeline("raw"), key=key)

    async def forge() -> None:
        async with Client(pair.url) as client:
            await client.put([(key, frame)])

    asyncio.run(forge())
    pair.changed()
    found = pair.reader.generate(ids)
    counts = pair.changed()
    print(f"\nanother model's chunk: {counts}")
    assert counts["failed_identity"] + counts.get("failed_corrupt", 0) == 1
    assert found["finish"] == "length"
    pair.reader.reset()
    assert pair.reader.generate(ids)["tokens"] == found["tokens"]


@pytest.mark.timeout(1800)
def test_a_server_that_was_killed_costs_a_computation(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = lookup_page(77, tokenizer)
    with kvstore_server("--disk", "0") as (url, process):
        # Its own cache is emptied between, so one engine is enough.
        engine = start_engine(tmp_path / "engine.log", {"url": url, "chunk_tokens": CHUNK, "deadline_s": 2.0})
        try:
            computed = engine.generate(ids)
            assert engine.counts()["saved_tokens"] > 0
            engine.reset()
            process.kill()
            process.wait()
            started_s = time.monotonic()
            again = engine.generate(ids)
            took_s = time.monotonic() - started_s
            counts = engine.counts()
        finally:
            engine.stop()
    print(f"\nserver killed: {took_s:.2f} s, {counts}")
    assert again["tokens"] == computed["tokens"]
    assert counts["match_failures"] == 1
    assert counts.get("loaded_tokens", 0) == 0
    assert took_s < 2.0 + 1.0 + 5.0, "look-up and load are bounded, and computing takes less than this"


@pytest.mark.timeout(1800)
def test_the_example_serves_prefill_and_decode_apart(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    body = {"prompt": lookup_page(78, tokenizer), "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with kvstore_server("--disk", "0") as (url, _), ExitStack() as stack:
        ports = {}
        for role in ("kv_producer", "kv_consumer"):
            ports[role] = stack.enter_context(serving(url, role, tmp_path / f"{role}.log"))
        first = _post(ports["kv_producer"], body | {"max_tokens": 16})
        second = _post(ports["kv_consumer"], body | {"max_tokens": 16})
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{ports['kv_consumer']}/metrics").read().decode()
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
    loaded = [line for line in metrics.splitlines() if line.startswith("vllm:kvstore_loaded_tokens_total")]
    print("\n", loaded)
    assert float(loaded[0].split()[-1]) == 999 // CHUNK * CHUNK


@contextmanager
def serving(url: str, role: str, log: Path) -> Iterator[int]:
    """`examples/vllm_serve.sh` on a free port, until the block is left."""
    command = [str(ROOT / "examples" / "vllm_serve.sh"), str(MODEL), url]
    with vllm_serve(command, log, KV_ROLE=role, CHUNK_TOKENS=str(CHUNK)) as port:
        yield port


@pytest.mark.timeout(1800)
def test_the_quality_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    command = [sys.executable, "-m", "benchmarks.engine_quality", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads(out.read_text())
    check_result(result)
    assert {row["table"] for row in result["rows"]} >= {"levels", "conversation"}
    raw = [row for row in result["rows"] if row.get("pipeline") == "raw"]
    assert [row["identical"] for row in raw] == [row["prompts"] for row in raw]


def _post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"model": "m"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return dict(json.loads(answer.read()))
