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

ROOT = Path(__file__).parent.parent.parent
SHARED_MODEL = ROOT.parent / "shared" / "model"
MODEL = Path(os.environ.get("KVSTORE_TEST_MODEL", SHARED_MODEL if SHARED_MODEL.is_dir() else "")).resolve()


class VllmEngine:
    """An engine in the environment of `make test-engines`.

    Args:
        log: Where its output goes.
        extra: `kv_connector_extra_config`; None runs without a connector.
        role: The engine's `kv_role`.
        variables: Further variables of its environment.
        settings: Further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        log: Path,
        extra: dict[str, Any] | None,
        role: str = "kv_both",
        variables: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        python = ROOT / ".venv-vllm" / "bin" / "python"
        assert python.exists(), "make test-engines builds the environment"
        environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environ |= variables or {}
        self.log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, "-m", "tests.engines.vllm_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environ,
                cwd=ROOT,
                start_new_session=True,
            )
        command: dict[str, Any] = {
            "model": str(MODEL),
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_num_seqs": 8,
            "block_size": 32,
        }
        if extra is not None:
            command["kv_transfer"] = {
                "kv_connector": "KvstoreConnector",
                "kv_connector_module_path": "kvstore.connectors.vllm",
                "kv_role": role,
                "kv_connector_extra_config": extra,
            }
        try:
            self.ask(command | settings)
        except BaseException:
            self.stop()
            raise

    def ask(self, command: dict[str, Any]) -> Any:
        """The answer to a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the engine ended: {self.log.read_text()[-3000:]}"
        return json.loads(answer)

    def generate(self, token_ids: list[int], tokens: int = 16) -> dict[str, Any]:
        """The greedy continuation of one prompt."""
        [answer] = self.ask({"prompts": [token_ids], "tokens": tokens})
        return dict(answer)

    def counts(self) -> dict[str, float]:
        """The connector's counters since the engine started."""
        # Counts come with the steps, so one more is made.
        self.generate([1, 2, 3], 2)
        prefix = "vllm:kvstore_"
        return {name.removeprefix(prefix): n for name, n in self.metrics().items() if name.startswith(prefix)}

    def metrics(self) -> dict[str, float]:
        """The engine's own counters and ours."""
        return dict(self.ask({"metrics": True}))

    def versions(self) -> dict[str, str]:
        """Versions of the packages that the engine runs on."""
        return dict(self.ask({"versions": True}))

    def reset(self) -> None:
        """Empty the engine's own cache."""
        assert self.ask({"reset": True})["reset"]

    def stop(self) -> None:
        """End the engine and its children."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            with _gone():
                os.killpg(self._process.pid, 9)
            assert self._process.stdout is not None
            self._process.stdout.close()


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
            [*command, *settings], stdout=out, stderr=out, env=os.environ | own | environ, start_new_session=True
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
def _gone() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


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
