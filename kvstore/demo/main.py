"""The demo: one process prefills and stores, another one, knowing token ids alone, fetches and goes on.

This process prefills a long prompt, stores its KV cache once with every named pipeline, and goes on generating from
its own cache: that is what the reader's results are held against.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file
from transformers import DynamicCache

from kvstore.calibration.model import Model, planes_of
from kvstore.client import Client
from kvstore.codecs import named_pipeline
from kvstore.demo.task import CHUNK_TOKENS, PIPELINES, Task, salt_of
from kvstore.errors import BackendUnavailableError, ConfigError, KVStoreError
from kvstore.prefix import put_prefix

DEFAULT_MODEL = Path(__file__).parent / "shakespeare-llama"
DEFAULT_TEXT = Path(__file__).parent / "prompt.txt"


@dataclass(frozen=True, slots=True)
class Reference:
    """What the storing process made of its own cache.

    Args:
        raw_bytes: Bytes of the stored tokens' K and V without compression.
        greedy: Token ids of the greedy continuation.
        logits: Logits before every token of the given continuation, `[tokens, vocabulary]` float32.
    """

    raw_bytes: int
    greedy: list[int]
    logits: torch.Tensor


def run_demo(
    *,
    model: Path | None,
    text: Path | None,
    prompt_tokens: int,
    continuation_tokens: int,
    repeats: int,
    as_json: bool,
) -> int:
    """Run the demo and print its table.

    Returns:
        Exit status: 0 where the raw pipeline gave exactly the continuation of the model's own cache.

    Raises:
        ConfigError: The model, the text or the lengths cannot be used.
    """
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as scratch, _progress(console) as progress:
        bar = progress.add_task("loading the model", total=None)
        loaded = Model(model or DEFAULT_MODEL)
        task = _task(loaded, model or DEFAULT_MODEL, text or DEFAULT_TEXT, prompt_tokens, continuation_tokens, repeats)
        progress.update(bar, description=f"prefilling {prompt_tokens} tokens")
        cache = DynamicCache()
        loaded.forward(task.stored_ids, cache)
        with _server(Path(scratch)) as url:
            progress.update(bar, description="storing their KV cache")
            reference = asyncio.run(_store(loaded, cache, task, url))
            results = _read(task, url, Path(scratch), progress)
    report = _report(task, reference, results)
    if as_json:
        print(json.dumps(report))
    else:
        console.print(_table(report))
    return 0 if all(row["identical"] for row in report["rows"] if row["pipeline"] == "raw") else 1


def _task(model: Model, folder: Path, text: Path, prompt_tokens: int, continuation_tokens: int, repeats: int) -> Task:
    if prompt_tokens <= CHUNK_TOKENS or continuation_tokens < 1 or repeats < 1:
        raise ConfigError(f"the prompt needs more than {CHUNK_TOKENS} tokens, continuation and repeats at least one")
    total = prompt_tokens + continuation_tokens
    if total > model.positions:
        raise ConfigError(f"{total} tokens are more than the {model.positions} that the model takes: use --tokens")
    try:
        token_ids = model.tokenize(text.read_text("utf-8"))[:total]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {text}: {exc}") from exc
    if len(token_ids) < total:
        raise ConfigError(f"{text} has {len(token_ids)} tokens, {total} are needed: use --text or --tokens")
    return Task(folder.resolve(), token_ids, prompt_tokens, repeats)


async def _store(model: Model, cache: DynamicCache, task: Task, url: str) -> Reference:
    """Put the prefix once with every pipeline, and go on from the model's own cache."""
    planes = planes_of(cache)
    layout = model.layout(cache, CHUNK_TOKENS)
    async with Client(url) as client:
        for name in PIPELINES:
            put = await put_prefix(client, layout, task.stored_ids, planes, named_pipeline(name), salt=salt_of(name))
            failed = [stored.error for stored in put.stored if stored.error]
            if failed:
                raise failed[0]
    greedy, logits = model.go_on(planes, task.tail_ids, task.continuation_ids)
    raw_bytes = task.stored_tokens // CHUNK_TOKENS * layout.chunk_bytes
    return Reference(raw_bytes, greedy, logits)


@contextmanager
def _server(scratch: Path) -> Iterator[str]:
    """A server of its own on a free port, stopped in the end."""
    command = [sys.executable, "-m", "kvstore", "serve", "--port", "0", "--json", "--data-dir", str(scratch / "data")]
    with (scratch / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            detail = (scratch / "server.log").read_text("utf-8")[-500:]
            raise BackendUnavailableError("server", f"did not start: {detail}")
        yield json.loads(line)["listening"]
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _read(task: Task, url: str, scratch: Path, progress: Progress) -> dict[str, Any]:
    """Run the reader as a process of its own; what it found, by row, with the logits."""
    task.dump(scratch / "task.json")
    command = [sys.executable, "-m", "kvstore.demo.reader", str(scratch / "task.json"), url, str(scratch / "out")]
    bar = progress.add_task("a second process: recomputing the prompt", total=None)
    with (scratch / "reader.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            progress.update(bar, advance=1, description=f"a second process: {line.strip()}")
    if process.wait() != 0:
        raise KVStoreError(f"the second process failed: {(scratch / 'reader.log').read_text('utf-8')[-2000:]}")
    progress.update(bar, total=1, completed=1)
    results: dict[str, Any] = json.loads((scratch / "out.json").read_text("utf-8"))
    return results | {"logits": load_file(scratch / "out.safetensors")}


def _report(task: Task, reference: Reference, results: dict[str, Any]) -> dict[str, Any]:
    """The figures of the table."""
    rows = []
    for row in results["rows"]:
        logits = results["logits"][f"{row['pipeline']} {row['level']}"]
        same = [a == b for a, b in zip(row["greedy"], reference.greedy, strict=True)]
        rows.append(
            {
                "pipeline": row["pipeline"],
                "level": row["level"],
                "size_bytes": row["size_bytes"],
                "ratio": reference.raw_bytes / row["size_bytes"],
                "ttft_s": row["ttft_s"],
                "speedup": results["recompute_ttft_s"] / row["ttft_s"],
                "identical": all(same),
                "same_tokens": same.index(False) if False in same else len(same),
                "kl_nats": _kl_nats(reference.logits, logits),
            }
        )
    return {
        "model": task.folder.name,
        "prompt_tokens": task.prompt_tokens,
        "stored_tokens": task.stored_tokens,
        "continuation_tokens": len(task.continuation_ids),
        "raw_bytes": reference.raw_bytes,
        "recompute_ttft_s": results["recompute_ttft_s"],
        "rows": rows,
    }


def _kl_nats(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of the next-token distributions, exact from found, nats a token."""
    p, q = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def _table(report: dict[str, Any]) -> Table:
    tokens = report["continuation_tokens"]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{report['model']}: prompt of {report['prompt_tokens']:,} tokens, {report['stored_tokens']:,} stored",
        caption=f"TTFT: median time to first token. Greedy text and KL: {tokens} tokens behind\n"
        "the prompt, against going on from the model's own cache.",
    )
    table.add_column("pipeline", no_wrap=True)
    for heading in ("level", "MB", "ratio", "TTFT", "faster", "greedy text", "KL, nats"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("(recompute)", "", "", "", f"{1e3 * report['recompute_ttft_s']:.1f} ms", "1.0x", "", "")
    for row in report["rows"]:
        table.add_row(
            row["pipeline"],
            str(row["level"]),
            f"{row['size_bytes'] / 1e6:.2f}",
            f"{row['ratio']:.2f}x",
            f"{1e3 * row['ttft_s']:.1f} ms",
            f"{row['speedup']:.1f}x",
            "identical" if row["identical"] else f"{row['same_tokens']} of {tokens}",
            "0" if row["kl_nats"] == 0 else f"{row['kl_nats']:.2g}",
        )
    return table


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
