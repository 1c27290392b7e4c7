"""Servers and engines of benchmarks.service: the arms, and who stores, fetches and plans for each of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks.engine_hosts import KVSTORE_PORT, engine, kvstore_server, push_profiles, to_kvstore
from benchmarks.engine_link import Link
from benchmarks.service_profiles import Sets
from benchmarks.vllm_engine import VllmEngine
from kvstore.codecs.artefact import artefact_digest
from kvstore.profile import ARTEFACTS, SET_FILE, ProfileSet, profiles_json

_STARTED_AT_ONCE = 3
_BLOCKS = 512
"""Blocks of an engine's own cache: some prompts. By default each of ten engines would take a gigabyte for it."""
_WAIT_S = 20.0


class Arm(NamedTuple):
    """A way to send caches.

    Args:
        name: As it is shown.
        server: Which server keeps its chunks, and which engine fetches them.
        pipeline: What its prefill engine is configured with; None where the server plans.
        level: Level up to which is fetched; None for all.
    """

    name: str
    server: str
    pipeline: str | None = None
    level: int | None = None

    @property
    def planned(self) -> bool:
        """Whether the server plans."""
        return self.pipeline is None

    @property
    def params(self) -> dict[str, Any]:
        """`kv_transfer_params` of its requests."""
        return {} if self.level is None else {"kvstore": {"level": self.level}}


UNCOMPRESSED = Arm("uncompressed", "static", "raw")
KVSERVE = Arm("kvserve", "kvserve")
ADAPTIVE = Arm("adaptive", "adaptive")
ARMS = (
    UNCOMPRESSED,
    Arm("fp8", "static", "fp8"),
    Arm("cachegen", "static", "cachegen"),
    Arm("ladder-packed, level 1", "static", "ladder-packed", 1),
    KVSERVE,
    ADAPTIVE,
)
RECOMPUTE = Arm("recompute", "static", "raw")
"""Finds nothing: what the engine takes that fetches for the static arms."""

PORTS: Mapping[str, int] = {"static": KVSTORE_PORT, ADAPTIVE.server: KVSTORE_PORT + 1, KVSERVE.server: KVSTORE_PORT + 2}

_READERS: Mapping[str, dict[str, Any]] = {
    # An engine that is configured with a lossy pipeline takes whatever its chunks were made with.
    "static": {"plan": False, "guard": False, "pipeline": "ladder-packed"},
    ADAPTIVE.server: {"plan": True},
    # Whether to compute instead is KVServe's own decision.
    KVSERVE.server: {"plan": True, "guard": False},
}


class Hosts:
    """Everything that runs beside the benchmark.

    Args:
        link: Readers are on its one side, all others on the other.
        python: Interpreter of the engines' environment.
        model: The model.
        sets: What is pushed.
        folder: For files that processes share.
        arms: What is measured.
    """

    def __init__(self, link: Link, python: Path, model: Path, sets: Sets, folder: Path, arms: Sequence[Arm]) -> None:
        self._link, self._python, self._model = link, python, model
        self._sets, self._folder, self._arms = sets, folder, arms
        self._rate = folder / "rate"
        self._logs: dict[str, TextIO] = {}
        self._rest: dict[str, str] = {}
        self.readers: dict[str, VllmEngine] = {}
        """By server."""
        self.writers: dict[str, VllmEngine] = {}
        """Prefill engines, by arm."""
        self.keepers: dict[str, VllmEngine] = {}
        """Engines that store behind their own answers, by arm; where there is none, its prefill engine does."""

    @contextmanager
    def started(self) -> Iterator[None]:
        """Servers with their profiles, and engines, for as long as the block runs."""
        self.tell(1.0)
        with ExitStack() as stack:
            self._serve(stack)
            with ThreadPoolExecutor(_STARTED_AT_ONCE) as pool:
                jobs = [pool.submit(self._start, stack, *wanted) for wanted in self._wanted()]
                for job in jobs:
                    job.result()
            for started in self._engines().values():
                started.pause()
            yield
            for started in self._engines().values():
                started.resume()

    def tell(self, gbit_per_s: float) -> None:
        """Tell KVServe's controller what the link carries: it does not measure that."""
        ready = self._rate.with_suffix(".new")
        ready.write_text(f"{gbit_per_s:g}", "utf-8")
        ready.replace(self._rate)

    def used(self, server: str) -> list[str]:
        """Arms that a server has chosen since the last call, those of puts with `put` before them."""
        if server not in self._logs:
            return []
        *lines, self._rest[server] = (self._rest.get(server, "") + self._logs[server].read()).split("\n")
        records = [json.loads(line) for line in lines]
        made = [record for record in records if record["kind"] == "decision"]
        return [f"{'put ' if one['situation']['tier'] == 'put' else ''}{one['arm']}" for one in made]

    @contextmanager
    def awake(self, one: VllmEngine) -> Iterator[None]:
        """Let an engine run for as long as the block does."""
        # Engines spin for a second after each request, which a user with one engine to a machine does not feel.
        one.resume()
        try:
            yield
        finally:
            one.pause()

    def counts(self) -> dict[str, Mapping[str, float]]:
        """The connectors' counters, by engine."""
        found: dict[str, Mapping[str, float]] = {}
        for name, one in self._engines().items():
            with self.awake(one):
                found[name] = one.counts()
        return found

    def failures(self, before: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
        """Loads and saves that have failed since."""
        for name, counts in self.counts().items():
            for key, now in counts.items():
                failed = key.startswith("failed_") or key in ("save_failures", "save_dropped", "match_failures")
                if failed and (count := now - before[name].get(key, 0)):
                    yield f"the engine {name!r} counted {count:.0f} {key}"

    def _engines(self) -> dict[str, VllmEngine]:
        named = (("reader", self.readers), ("writer", self.writers), ("keeper", self.keepers))
        return {f"{kind} {name}": one for kind, held in named for name, one in held.items()}

    def _serve(self, stack: ExitStack) -> None:
        for server, port in PORTS.items():
            log = self._folder / f"{server}.jsonl"
            log.touch()
            program = ["kvstore", "serve"]
            found = {ADAPTIVE.server: self._sets.adaptive, KVSERVE.server: self._sets.kvserve}.get(server)
            if found is not None:
                where = self._write(server, found)
                self._logs[server] = stack.enter_context(log.open(encoding="utf-8"))
            if server == KVSERVE.server:
                program = ["benchmarks.kvserve_server", "--profiles", str(where), "--rate", str(self._rate)]
                program += ["--chunk-bytes", str(self._sets.chunks.chunk_bytes)]
            environment = {"KVSTORE_DECISION_LOG": str(log)} if found is not None else {}
            stack.enter_context(kvstore_server(self._link, port, program, environment))
            if found is not None:
                push_profiles(self._link, where, self._sets.chunks.namespace, port)

    def _write(self, server: str, found: ProfileSet) -> Path:
        """A folder with a set and the calibration that it needs."""
        where = self._folder / server
        (where / ARTEFACTS).mkdir(parents=True)
        (where / SET_FILE).write_text(json.dumps(profiles_json(found)), "utf-8")
        for data in self._sets.artefacts:
            (where / ARTEFACTS / artefact_digest(data)).write_bytes(data)
        return where

    def _wanted(self) -> Iterator[tuple[dict[str, VllmEngine], str, dict[str, Any]]]:
        """Engines to be started: where each goes, its name, and how it uses its server."""
        for server in dict.fromkeys(arm.server for arm in self._arms):
            options = {**_READERS[server], "wait_s": _WAIT_S}
            yield self.readers, server, to_kvstore(PORTS[server], role="kv_consumer", **options)
        for arm in self._arms:
            options = {"plan": True} if arm.pipeline is None else {"plan": False, "pipeline": arm.pipeline}
            yield self.writers, arm.name, to_kvstore(PORTS[arm.server], role="kv_producer", **options)
            if arm == ADAPTIVE:
                yield self.keepers, arm.name, to_kvstore(PORTS[arm.server], **options)

    def _start(self, stack: ExitStack, held: dict[str, VllmEngine], name: str, transfer: Mapping[str, Any]) -> None:
        beside = held is not self.readers
        where = (self._link, self._python, self._model, "engine")
        started = engine(*where, transfer, beside_store=beside, num_gpu_blocks_override=_BLOCKS)
        held[name] = stack.enter_context(started)
