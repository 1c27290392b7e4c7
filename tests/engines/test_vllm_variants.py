"""The vLLM connector in engines that are set up in other ways, and where it cannot work as it is configured."""

import base64
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.vllm_engine import ROOT, VllmEngine
from tests.engines.conftest import MODEL, kvstore_server, lookup_page, start_engine
from tests.engines.relay_thread import RelayThread

CHUNK = 128
LOADED = 999 // CHUNK * CHUNK
NOISE_NATS = 0.13
"""By how much two tokens may differ in a full recompute: the model computes in bfloat16, batches in another order."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [lookup_page(200 + seed, tokenizer) for seed in range(4)]


def _wait_saved(engine: VllmEngine, tokens: int) -> None:
    for _ in range(200):
        if engine.counts()["saved_tokens"] == tokens:
            return
    raise AssertionError(engine.counts())


def _assert_right(engine: VllmEngine, ids: list[int], own: list[int], found: list[int]) -> None:
    """The same tokens, or others where the first two were as good."""
    if own == found:
        return
    position = next(i for i, (a, b) in enumerate(zip(own, found, strict=True)) if a != b)
    [line] = engine.ask({"prompts": [ids + own[:position]], "tokens": 1, "log_p": True})
    log_p = np.frombuffer(base64.b64decode(line["log_p"]), "<f4")
    assert log_p[own[position]] - log_p[found[position]] < NOISE_NATS


@pytest.mark.timeout(1800)
def test_a_server_that_is_killed_in_mid_load_costs_a_computation(tmp_path: Path, prompts: list[list[int]]) -> None:
    deadline_s = 20.0
    with kvstore_server("--disk", "0") as (url, process):
        link = RelayThread(int(url.rsplit(":", 1)[1]))
        extra = {"url": link.relay.url, "chunk_tokens": CHUNK, "deadline_s": deadline_s, "guard": False}
        engine = start_engine(tmp_path / "engine.log", extra)
        try:
            computed = engine.generate(prompts[0])
            started_s = time.monotonic()
            engine.reset()
            engine.generate(prompts[1])
            recompute_s = time.monotonic() - started_s
            _wait_saved(engine, 2 * LOADED)
            engine.reset()
            # The prefix of 2.7 MB would take more than ten seconds.
            link.relay.rate_bytes_per_s = 250_000.0
            passed = link.relay.answer_bytes
            answers: list[dict[str, Any]] = []
            request = threading.Thread(target=lambda: answers.append(engine.generate(prompts[0])))
            started_s = time.monotonic()
            request.start()
            while link.relay.answer_bytes - passed < 600_000:
                assert request.is_alive(), "the load has ended before the kill"
                time.sleep(0.01)
            process.kill()
            process.wait()
            # Its machine would have taken along what lies in buffers on the way.
            link.set("cut")
            killed_s = time.monotonic()
            request.join()
            ended_s = time.monotonic()
            counts = engine.counts()
        finally:
            engine.stop()
            link.stop()
    print(f"\nkilled {killed_s - started_s:.2f} s after the start, answered {ended_s - killed_s:.2f} s later; {counts}")
    assert answers[0]["tokens"] == computed["tokens"]
    assert answers[0]["finish"] == "length"
    assert counts["failed_unavailable"] == 1
    assert counts["failed_tokens"] > 0
    assert counts["failed_tokens"] + counts["loaded_tokens"] == LOADED
    assert ended_s - started_s < deadline_s + 5 * recompute_s + 1


def _load_elsewhere(
    folder: Path,
    prompts: list[list[int]],
    *,
    loaded: int = LOADED,
    shards: int = 1,
    chunk: int = CHUNK,
    **settings: Any,
) -> dict[str, float]:
    """Prompts that one process computed are loaded by another; what that one counted."""
    with kvstore_server("--disk", "0") as (url, _):
        extra = {"url": url, "chunk_tokens": chunk, "guard": False, "match_s": 5.0, "deadline_s": 30.0}
        writer = start_engine(folder / "writer.log", extra, max_logprobs=-1, **settings)
        try:
            computed = [writer.generate(ids) for ids in prompts]
            _wait_saved(writer, shards * len(prompts) * (len(prompts[0]) // chunk * chunk))
        finally:
            writer.stop()
        reader = start_engine(folder / "reader.log", extra, max_logprobs=-1, **settings)
        try:
            found = [reader.generate(ids) for ids in prompts]
            counts = reader.counts()
            for ids, own, other in zip(prompts, computed, found, strict=True):
                _assert_right(reader, ids, own["tokens"], other["tokens"])
        finally:
            reader.stop()
    same = sum(a["tokens"] == b["tokens"] for a, b in zip(computed, found, strict=True))
    print(f"\n{same} of {len(prompts)} as computed; {counts}")
    # Every worker counts its own shard.
    assert counts["loaded_tokens"] == shards * len(prompts) * loaded
    assert counts.get("failed_tokens", 0) == 0
    assert counts.get("saved_tokens", 0) == 0
    return counts


@pytest.mark.timeout(1800)
def test_without_prefix_caching_and_with_chunked_prefill(tmp_path: Path, prompts: list[list[int]]) -> None:
    settings = {"enable_prefix_caching": False, "enable_chunked_prefill": True, "max_num_batched_tokens": 96}
    _load_elsewhere(tmp_path, prompts, **settings)


@pytest.mark.timeout(1800)
def test_two_workers_load_a_shard_each(tmp_path: Path, prompts: list[list[int]]) -> None:
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    _load_elsewhere(tmp_path, prompts, shards=2, tensor_parallel_size=2, variables=variables)


@pytest.mark.timeout(1800)
def test_latent_attention(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    python = ROOT / ".venv-vllm" / "bin" / "python"
    subprocess.run([python, "-m", "tests.engines.tiny_mla", str(folder)], cwd=ROOT, check=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 500, 300).tolist() for _ in range(4)]
    # Its attention on a CPU works with blocks of 16 tokens, or of 32 where there is AMX.
    settings: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True, "block_size": None}
    _load_elsewhere(tmp_path, prompts, loaded=299 // 64 * 64, chunk=64, **settings)


@pytest.mark.timeout(1800)
def test_stored_and_lost_blocks_are_announced(tmp_path: Path, prompts: list[list[int]]) -> None:
    with kvstore_server("--disk", "0") as (url, _):
        link = RelayThread(int(url.rsplit(":", 1)[1]))
        extra = {"url": link.relay.url, "chunk_tokens": CHUNK, "guard": False}
        engine = start_engine(tmp_path / "engine.log", extra, events=True)
        try:
            # Who subscribes misses what was said before.
            for seed in range(100):
                engine.generate([2 + seed] * 70, 1)
                if engine.ask({"events": True}):
                    break
            else:
                raise AssertionError("the engine publishes nothing")
            engine.generate(prompts[0])
            # The engine needs no other request to say it.
            found: list[dict[str, Any]] = []
            for _ in range(100):
                found += engine.ask({"events": True})
                if len([one for one in found if one.get("medium") == "STORAGE"]) >= LOADED // CHUNK:
                    break
            engine.reset()
            link.set("flip", 500_000)
            engine.generate(prompts[0])
            lost = [one for one in engine.ask({"events": True}) if one.get("medium") == "STORAGE"]
        finally:
            engine.stop()
            link.stop()
    stored = [one for one in found if one.get("medium") == "STORAGE"]
    own = [one for one in found if one["kind"] == "BlockStored" and one.get("medium") != "STORAGE"]
    print(f"\n{len(own)} events of the engine, {len(stored)} chunks stored, {len(lost)} lost")
    assert [one["kind"] for one in stored] == ["BlockStored"] * (LOADED // CHUNK)
    known = [block for one in own for block in one["block_hashes"]]
    announced = [block for one in stored for block in one["block_hashes"]]
    assert announced == known[: len(announced)], "they are the engine's own hashes, in order"
    assert [token for one in stored for token in one["token_ids"]] == prompts[0][:LOADED]
    assert [one["parent_block_hash"] for one in stored[1:]] == [one["block_hashes"][-1] for one in stored[:-1]]
    removed = [one for one in lost if one["kind"] == "BlockRemoved"]
    assert len(removed) == 1
    assert removed[0]["block_hashes"] in [one["block_hashes"] for one in stored]


BAD = {"url": "ftp://127.0.0.1:1", "chunk_tokens": CHUNK}


@pytest.mark.timeout(1800)
def test_a_wrong_option_stops_who_wants_that(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the engine ended"):
        start_engine(tmp_path / "engine.log", BAD | {"fail_open": False})
    log = (tmp_path / "engine.log").read_text()
    assert "option 'url' cannot be 'ftp://127.0.0.1:1'" in log
    assert "it must start with http:// or https://" in log


@pytest.mark.timeout(1800)
def test_an_engine_with_a_wrong_option_runs_without_the_cache(tmp_path: Path, prompts: list[list[int]]) -> None:
    engine = start_engine(tmp_path / "engine.log", BAD)
    try:
        found = engine.generate(prompts[0])
        counts = engine.counts()
    finally:
        engine.stop()
    log = (tmp_path / "engine.log").read_text()
    assert "option 'url' cannot be 'ftp://127.0.0.1:1'" in log
    assert "because fail_open is true" in log
    assert found["finish"] == "length"
    assert not any(counts.values())
