"""Real engines as processes, for `make test-engines`; the default run does not collect this folder."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        settings: Further arguments of `vllm.LLM`.
    """

    def __init__(self, log: Path, extra: dict[str, Any] | None, role: str = "kv_both", **settings: Any) -> None:
        python = ROOT / ".venv-vllm" / "bin" / "python"
        assert python.exists(), "make test-engines builds the environment"
        environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
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
        self.ask(command | settings)

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

    def reset(self) -> None:
        """Empty the engine's own cache."""
        assert self.ask({"reset": True})["reset"]

    def stop(self) -> None:
        """End the engine and its children."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            with _gone():
                os.killpg(self._process.pid, 9)
            assert self._process.stdout is not None
            self._process.stdout.close()


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
