"""A real vLLM as a child process: for the benchmarks, and for the tests of `make test-engines`."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK_TOKENS = 32

_ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONPATH": str(ROOT),
}
_COUNTERS = "vllm:kvstore_"
_STOP_S = 60.0


def engine_python(root: Path = ROOT) -> Path | None:
    """Interpreter of an environment with vLLM, preferably one with LMCache beside it; None where there is none."""
    found = (root / name / "bin" / "python" for name in (".venv-lmcache", ".venv-vllm"))
    return next((path for path in found if path.exists()), None)


def kvstore_transfer(url: str, role: str = "kv_both", **options: Any) -> dict[str, Any]:
    """Arguments of `KVTransferConfig` for an engine that uses kvstore.

    Args:
        url: The server.
        role: The engine's `kv_role`.
        options: Further ones of the connector.
    """
    return {
        "kv_connector": "KvstoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"url": url, **options},
    }


def lmcache_transfer(host: str, port: int) -> dict[str, Any]:
    """Arguments of `KVTransferConfig` for an engine that uses `lmcache server`."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": f"tcp://{host}", "lmcache.mp.port": port},
    }


def engine_environ(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of an engine's processes."""
    # Engines choose their number of threads by themselves.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return inherited | _ENVIRON | dict(variables or {})


class VllmEngine:
    """An engine that answers one command after the other; see `benchmarks.vllm_worker`.

    Args:
        python: Interpreter of its environment.
        model: The model that it serves.
        log: Where its output goes.
        transfer: Arguments of `KVTransferConfig`; None runs without a connector.
        before: What its command line begins with, such as `ip netns exec NAME`.
        variables: Further variables of its environment.
        settings: Further arguments of `vllm.LLM`.

    Raises:
        RuntimeError: It does not start; the message has the end of its log.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        log: Path,
        transfer: Mapping[str, Any] | None = None,
        *,
        before: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.log = log
        with log.open("w") as out:
            # In this session: Linux may share cores by session, and then an engine whose processes spin on every core
            # keeps the server and everybody else from them for seconds.
            self._process = subprocess.Popen(
                [*before, str(python), "-m", "benchmarks.vllm_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env=engine_environ(variables),
                cwd=ROOT,
                process_group=0,
            )
        command: dict[str, Any] = {
            "model": str(model.resolve()),
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_num_seqs": 8,
            "block_size": BLOCK_TOKENS,
        }
        if transfer is not None:
            command["kv_transfer"] = dict(transfer)
        try:
            self.ask(command | settings)
        except BaseException:
            self.stop()
            raise

    def ask(self, command: Mapping[str, Any]) -> Any:
        """The answer to a command.

        Raises:
            RuntimeError: The engine has ended; the message has the end of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended:\n{self.log.read_text('utf-8', 'replace')[-3000:]}")
        return json.loads(line)

    def generate(self, token_ids: Sequence[int], tokens: int = 16, **wanted: Any) -> dict[str, Any]:
        """The greedy continuation of one prompt.

        Args:
            token_ids: The prompt.
            tokens: Tokens to generate.
            wanted: Further fields of the command, such as `salt`.
        """
        [answer] = self.ask({"prompts": [list(token_ids)], "tokens": tokens, **wanted})
        return dict(answer)

    def counts(self) -> dict[str, float]:
        """The connector's counters since the engine started."""
        # Counts come with the steps, so one more is made.
        self.generate([1, 2, 3], 2)
        return {name.removeprefix(_COUNTERS): n for name, n in self.metrics().items() if name.startswith(_COUNTERS)}

    def metrics(self) -> dict[str, float]:
        """The engine's own counters and ours."""
        return dict(self.ask({"metrics": True}))

    def versions(self) -> dict[str, str]:
        """Versions of the packages that the engine runs on."""
        return dict(self.ask({"versions": True}))

    def reset(self) -> None:
        """Empty the engine's own cache.

        Raises:
            RuntimeError: It does not do so.
        """
        if not self.ask({"reset": True})["reset"]:
            raise RuntimeError("the engine does not empty its cache")

    def pause(self) -> None:
        """Take the processor away from it until `resume`: it spins for a second after each request."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the engine and its children; safe to call twice."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(ProcessLookupError):
            self.resume()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdout.close()
