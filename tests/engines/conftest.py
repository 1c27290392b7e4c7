"""Real engines as processes, for `make test-engines`; the default run does not collect this folder."""

import json
import os
import random
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_engine import ROOT, VllmEngine, kvstore_transfer

SHARED_MODEL = ROOT.parent / "shared" / "model"
MODEL = Path(os.environ.get("KVSTORE_TEST_MODEL", SHARED_MODEL)).resolve()
if not (MODEL / "config.json").is_file():
    raise pytest.UsageError(f"{MODEL} is no model: name the folder of a trained one with KVSTORE_TEST_MODEL")


def start_engine(
    log: Path,
    extra: Mapping[str, Any] | None,
    role: str = "kv_both",
    variables: Mapping[str, str] | None = None,
    **settings: Any,
) -> VllmEngine:
    """An engine in the environment of `make test-engines`.

    Args:
        log: Where its output goes.
        extra: `kv_connector_extra_config`; None runs without a connector.
        role: The engine's `kv_role`.
        variables: Further variables of its environment.
        settings: Further arguments of `vllm.LLM`; another `model` replaces the usual one.
    """
    python = ROOT / ".venv-vllm" / "bin" / "python"
    assert python.exists(), "make test-engines builds the environment"
    transfer = None if extra is None else kvstore_transfer(role=role, **extra)
    return VllmEngine(python, Path(settings.pop("model", MODEL)), log, transfer, variables=variables, **settings)


def lookup_page(seed: int, tokenizer: Any, tokens: int = 1000) -> list[int]:
    """A look-up page of so many tokens, as the model was trained on."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(3, 8))) for _ in range(200)]
    lines = [f"The code of {word} is {rng.randrange(100, 9999)}." for word in words]
    ids: list[int] = tokenizer("Records:\n" + "\n".join(lines))["input_ids"][: tokens - 20]
    question: list[int] = tokenizer(f"\nQuestion: What is the code of {words[3]}?\nAnswer:")["input_ids"]
    return ids[: tokens - len(question)] + question


@contextmanager
def vllm_serve(command: Sequence[str], log: Path, **environ: str) -> Iterator[int]:
    """A command that runs `vllm serve`, on a free port until the block is left.

    Args:
        command: It, and its arguments; where the server listens is added to them.
        log: Where its output goes.
        environ: Variables of its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    path = f"{ROOT / '.venv-vllm' / 'bin'}:{os.environ['PATH']}"
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    settings = ["--enforce-eager", "--block-size", "32", "--dtype", "bfloat16", "--served-model-name", "m"]
    settings += ["--port", str(port), "--host", "127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *settings], stdout=out, stderr=out, env=os.environ | own | environ, process_group=0
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextmanager
def kvstore_server(*flags: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`kvstore serve` as a process: its URL, and the process."""
    with tempfile.TemporaryDirectory(prefix="kvstore-engines-") as folder:
        python = str(ROOT / ".venv" / "bin" / "python")
        command = [python, "-m", "kvstore", "serve", "--port", "0", "--json", *flags]
        process = subprocess.Popen([*command, "--data-dir", folder], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["listening"], process
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
