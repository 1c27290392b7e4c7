"""The demo's second process: matches, fetches, decodes and goes on, from token ids and a URL alone.

`python -m kvstore.demo.reader TASK URL OUT` writes `OUT.json` and `OUT.safetensors`, and prints a line for every step
that is done.
"""

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from kvstore.calibration.model import Model, cache_of
from kvstore.client import Client
from kvstore.demo.task import CHUNK_TOKENS, PIPELINES, Task, salt_of
from kvstore.errors import BackendError
from kvstore.layout import Layout
from kvstore.prefix import Prefix, get_prefix, match_prefix


def main(argv: list[str]) -> int:
    """Run the reader."""
    task, url, out = Task.load(Path(argv[0])), argv[1], argv[2]
    model = Model(task.folder)
    probe = DynamicCache()
    model.forward(task.token_ids[:1], probe)
    layout = model.layout(probe, CHUNK_TOKENS)
    recompute_s = _recompute_s(model, task)
    print("the prompt recomputed", flush=True)
    rows, logits = asyncio.run(_fetch_all(model, task, layout, url))
    Path(f"{out}.json").write_text(json.dumps({"recompute_ttft_s": recompute_s, "rows": rows}), "utf-8")
    save_file(logits, f"{out}.safetensors")
    return 0


def _recompute_s(model: Model, task: Task) -> float:
    """Median seconds to the first token without a store."""
    samples_s = []
    for _ in range(task.repeats + 1):
        started_s = time.perf_counter()
        model.forward(task.stored_ids + task.tail_ids, DynamicCache())[-1].argmax().item()
        samples_s.append(time.perf_counter() - started_s)
    return statistics.median(samples_s[1:])


async def _fetch_all(
    model: Model, task: Task, layout: Layout, url: str
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """One row, and the logits of the given continuation, for every pipeline and level."""
    rows: list[dict[str, Any]] = []
    logits: dict[str, torch.Tensor] = {}
    async with Client(url) as client:
        for pipeline in PIPELINES:
            match = await match_prefix(client, layout, task.stored_ids, salt=salt_of(pipeline))
            for level in range(match.held[0].copy.levels if match.held else 0):
                prefix, ttft_s = await _fetch(model, task, layout, client, pipeline, level)
                row, logits[f"{pipeline} {level}"] = _go_on(model, task, prefix)
                rows.append({"pipeline": pipeline, "level": level, "ttft_s": ttft_s} | row)
                print(f"{pipeline}, level {level}, fetched", flush=True)
    return rows, logits


async def _fetch(
    model: Model, task: Task, layout: Layout, client: Client, pipeline: str, level: int
) -> tuple[Prefix, float]:
    """The prefix, and the median seconds to the first token with it: match, fetch, decode, forward of the tail."""
    samples_s = []
    for _ in range(task.repeats + 1):
        started_s = time.perf_counter()
        prefix = await get_prefix(client, layout, task.stored_ids, level=level, salt=salt_of(pipeline))
        if prefix.tokens < task.stored_tokens:
            raise BackendError(client.name, f"only {prefix.tokens} of {task.stored_tokens} tokens came: {prefix.miss}")
        model.forward(task.tail_ids, cache_of(prefix.planes))[-1].argmax().item()
        samples_s.append(time.perf_counter() - started_s)
    return prefix, statistics.median(samples_s[1:])


def _go_on(model: Model, task: Task, prefix: Prefix) -> tuple[dict[str, Any], torch.Tensor]:
    """The greedy continuation behind a fetched prefix, and the logits of the given one."""
    greedy, logits = model.go_on(prefix.planes, task.tail_ids, task.continuation_ids)
    return {"size_bytes": prefix.size_bytes, "greedy": greedy}, logits


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
