"""What prefixes from kvstore cost a real vLLM in quality: raw and at every level, and over a conversation of ten turns.

    make test-engines                                     # builds the engine's environment
    python -m benchmarks.engine_quality --model PATH --text FILE --calibration FILE

Everything is held against the same engine going on from its own cached KV; the engine gives whole distributions.
"""

import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.cache import documents, load_text
from benchmarks.engine_reader import TOKENS, LogP, Reader, Run, differences, kl_nats, leading
from benchmarks.harness import Aim, Row, argument_parser, at_least, at_most, output_path, write_result
from benchmarks.lookup import lookup_prompt
from benchmarks.quality_methods import make_artefact
from benchmarks.servers import kvstore_server
from benchmarks.vllm_engine import VllmEngine, engine_python, kvstore_transfer
from kvstore.calibration.model import Model
from kvstore.demo.main import DEFAULT_MODEL, DEFAULT_TEXT
from kvstore.layout import Layout
from kvstore.profiler.prompts import text_windows

NAME = "engine_quality"
PROMPT_TOKENS = 1000
CHUNK_TOKENS = 128
OPENING_TOKENS = 512
USER_TOKENS = 128
ANSWER_TOKENS = 16
PROFILES = {"ladder-repeats": None, "ladder-tokens": "tokens-3"}
"""Nested profiles, and the calibration that they need (of `quality_methods`)."""

CALIBRATION_PROMPTS = 32
_LEVELS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Quality of prefixes that a real engine loads.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model that the engine serves")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="text that nothing was trained or tuned on")
    parser.add_argument("--calibration", type=Path, default=DEFAULT_TEXT, help="other text, to calibrate on")
    parser.add_argument("--prompts", type=int, default=50, help="prompts, half of them look-up pages (%(default)s)")
    parser.add_argument("--conversations", type=int, default=8, help="conversations (%(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="turns of each (%(default)s)")
    args = parser.parse_args(argv)
    python = engine_python()
    if python is None:
        sys.exit("there is no vLLM: 'make test-engines' builds environments with it (.venv-lmcache, .venv-vllm)")
    if args.quick:
        args.prompts, args.conversations, args.turns = 4, 1, 3
    bench = _Bench(args, python)
    with bench:
        bench.run()
    aims = _aims(bench.rows, args.prompts)
    write_result(
        NAME,
        bench.rows,
        aims,
        args.seed,
        packages=("torch", "transformers", "numba"),
        programs=bench.versions,
        out=output_path(NAME, args),
    )
    for aim in aims:
        print(f"{aim.aim}: {aim.value:.4g} of {aim.target:g} ({'met' if aim.met else 'missed'})")


class _Bench:
    """The prompts, the engines one after the other, and the rows that they fill."""

    def __init__(self, args: Any, python: Path) -> None:
        self._python = python
        self._model_path: Path = args.model.resolve()
        model = Model(self._model_path)
        self._layout: Layout = model.layout_of([0, 1], CHUNK_TOKENS)
        rng = random.Random(args.seed)
        total = OPENING_TOKENS + ANSWER_TOKENS + (args.turns - 1) * (USER_TOKENS + ANSWER_TOKENS)
        texts = documents(load_text(args.text), PROMPT_TOKENS // 4, model)
        windows = text_windows(texts, args.prompts, PROMPT_TOKENS, args.seed)
        half = args.prompts // 2
        pages = [lookup_prompt(model, window, PROMPT_TOKENS, rng) for window in windows[:half]]
        self._prompts = [ids for ids, _ in pages] + [window[:PROMPT_TOKENS] for window in windows[half:]]
        self._answers = [answer for _, answer in pages]
        self._conversations = [ids[:total] for ids in text_windows(texts, args.conversations, total, args.seed + 1)]
        self._turns: int = args.turns
        self._calibration: Path = args.calibration
        self._quick: bool = args.quick
        self._own: list[Run] = []
        self._exact: list[list[LogP]] = []
        self.rows: list[Row] = []
        self.versions: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Bench":
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._progress = self._stack.enter_context(Progress(console=Console(stderr=True), disable=self._quick))
        passes = 3 + _LEVELS * len(PROFILES)
        work = passes * len(self._prompts) + 5 * self._turns * len(self._conversations)
        self._bar = self._progress.add_task("start", total=work)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Everything, one engine at a time but for the first two."""
        profiles = dict(list(PROFILES.items())[:1]) if self._quick else PROFILES
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            made = {name: self._calibrated(pool, profile) for name, profile in profiles.items()}
            with kvstore_server() as url:
                self._run_raw(url)
            for name, artefact in made.items():
                with kvstore_server() as url:
                    self._run_levels(name, url, None if artefact is None else artefact.result())
        first = next(iter(profiles))
        with kvstore_server() as url, self._reader(url, "derived", pipeline=first, store_derived=True) as reader:
            self._converse("store_derived on", reader)

    def _calibrated(self, pool: ProcessPoolExecutor, name: str | None) -> "Future[bytes] | None":
        lengths = (256, 512, 1024)
        if name is None:
            return None
        return pool.submit(make_artefact, name, self._model_path, self._calibration, CALIBRATION_PROMPTS, lengths)

    @contextmanager
    def _reader(self, url: str, name: str, **extra: Any) -> Iterator[Reader]:
        patient: dict[str, Any] = {"guard": False, "deadline_s": 60.0, "match_s": 60.0}
        transfer = kvstore_transfer(url, chunk_tokens=CHUNK_TOKENS, **patient, **extra)
        self._progress.update(self._bar, description=f"start the engine: {name}")
        log = self._folder / f"{name}.log"
        engine = VllmEngine(self._python, self._model_path, log, transfer, max_logprobs=-1)
        try:
            self.versions |= engine.versions()
            yield Reader(engine, url, self._layout)
        finally:
            engine.stop()

    def _run_raw(self, url: str) -> None:
        """One engine computes and stores, and goes on from its own cache; a second one loads."""
        with self._reader(url, "writer") as writer:
            recomputed = self._pass("recompute", writer, None)
            self._own = self._pass("own cache", writer, None)
            self._tell(recomputed)
            self._exact = [self._exact_turns(writer, ids) for ids in self._conversations]
            writer.wait_stored(self._prompts + self._conversations)
        with self._reader(url, "reader") as reader:
            found = self._pass("raw", reader, self._own)
            self._add("raw", None, reader, found)
            self._converse("raw", reader)

    def _run_levels(self, pipeline: str, url: str, artefact: bytes | None) -> None:
        """An engine computes and stores; then its own cache is emptied, and it loads what is held, level by level."""
        extra: dict[str, Any] = {"pipeline": pipeline}
        if artefact is not None:
            extra["artefact"] = str(self._folder / pipeline)
            Path(extra["artefact"]).write_bytes(artefact)
        with self._reader(url, pipeline, **extra) as reader:
            reader.compute(self._prompts)
            reader.wait_stored(self._prompts)
            for level in reversed(range(_LEVELS)):
                reader.trim(level)
                reader.reset()
                found = self._pass(f"{pipeline}, level {level}", reader, self._own)
                self._add(pipeline, level, reader, found)
            if pipeline == next(iter(PROFILES)):
                self._converse("one lossy load", reader)
                self._converse("store_derived off", reader)

    def _pass(self, what: str, reader: Reader, follow: list[Run] | None) -> list[Run]:
        """Every prompt once."""
        reader.changed()
        found = []
        for number, ids in enumerate(self._prompts):
            self._progress.update(self._bar, description=what, advance=1)
            found.append(reader.run(ids, None if follow is None else follow[number].tokens))
        return found

    def _tell(self, recomputed: list[Run]) -> None:
        """What the engine's own cache changes, without any connector's doing."""
        for number, (own, other) in enumerate(zip(self._own, recomputed, strict=True)):
            for position, margin in differences(own, other):
                row = {
                    "prompt": number,
                    "workload": self._workload(number),
                    "position": position,
                    "margin_nats": margin,
                }
                self.rows.append({"table": "recompute"} | row)
        for workload, numbers in self._by_workload():
            computed = self._quality([recomputed[n] for n in numbers], numbers)
            # It went its own way behind the first difference, so its distributions there say nothing.
            computed["kl_nats"] = None
            self.rows.append({"table": "levels", "workload": workload, "pipeline": "recomputed", **computed})
            alone = self._quality([self._own[n] for n in numbers], numbers)
            self.rows.append({"table": "levels", "workload": workload, "pipeline": "own cache", **alone})

    def _add(self, pipeline: str, level: int | None, reader: Reader, found: list[Run]) -> None:
        counts = reader.changed()
        loaded = {
            "loaded_tokens": int(counts["loaded_tokens"]),
            "ratio": counts["loaded_tokens"] * reader.token_bytes / counts["loaded_bytes"],
        }
        for workload, numbers in self._by_workload():
            quality = self._quality([found[n] for n in numbers], numbers)
            row = {"workload": workload, "pipeline": pipeline, "level": level, **loaded, **quality}
            self.rows.append({"table": "levels"} | row)

    def _by_workload(self) -> Iterator[tuple[str, list[int]]]:
        for workload in ("look-up", "text"):
            yield workload, [n for n in range(len(self._prompts)) if self._workload(n) == workload]

    def _workload(self, number: int) -> str:
        return "look-up" if number < len(self._answers) else "text"

    def _quality(self, found: Sequence[Run], numbers: Sequence[int]) -> Row:
        own = [self._own[n] for n in numbers]
        pairs = list(zip(own, found, strict=True))
        asked = [(one, self._answers[n]) for one, n in zip(found, numbers, strict=True) if n < len(self._answers)]
        right = [one.tokens[: len(answer)] == answer for one, answer in asked]
        return {
            "prompts": len(found),
            "identical": sum(a.tokens == b.tokens for a, b in pairs),
            "agreement": fmean(leading(a.tokens, b.tokens) / TOKENS for a, b in pairs),
            "answers_right": sum(right) if asked else None,
            "kl_first_nats": fmean(kl_nats(a.log_p[:1], b.log_p[:1]) for a, b in pairs),
            "kl_nats": fmean(kl_nats(a.log_p, b.log_p) for a, b in pairs),
        }

    def _ends(self) -> Iterator[tuple[int, int]]:
        """Where the user's text of each turn ends, and where its answer does."""
        for turn in range(self._turns):
            start = OPENING_TOKENS + turn * (USER_TOKENS + ANSWER_TOKENS)
            yield start, start + ANSWER_TOKENS

    def _exact_turns(self, writer: Reader, ids: list[int]) -> list[LogP]:
        """Every turn behind the engine's own cache, which is never emptied."""
        found = []
        for start, end in self._ends():
            self._progress.update(self._bar, description="conversations", advance=1)
            found.append(writer.along(ids[:start], ids[start:end]))
            writer.compute([ids[:end]])
        return found

    def _converse(self, variant: str, reader: Reader) -> None:
        """Every turn behind what the store holds, the engine's own cache emptied before it."""
        kls: list[list[float]] = [[] for _ in range(self._turns)]
        loaded = [0.0] * self._turns
        for ids, exact in zip(self._conversations, self._exact, strict=True):
            if variant != "raw":
                reader.forget()
            before = 0
            for turn, (start, end) in enumerate(self._ends()):
                self._progress.update(self._bar, description=f"conversations, {variant}", advance=1)
                if variant == "one lossy load" and turn:
                    reader.forget()
                    reader.compute([ids[:before]])
                    reader.wait_stored([ids[:before]])
                if variant != "raw" and turn:
                    reader.trim(0)
                reader.reset()
                reader.changed()
                found = reader.along(ids[:start], ids[start:end])
                loaded[turn] += reader.changed().get("loaded_tokens", 0)
                kls[turn].append(kl_nats(exact[turn], found))
                reader.compute([ids[:end]])
                if variant == "store_derived on" or (variant == "store_derived off" and not turn):
                    reader.wait_stored([ids[:end]])
                before = end
        for turn in range(self._turns):
            row = {"variant": variant, "turn": turn + 1, "loaded_tokens": loaded[turn] / len(self._conversations)}
            row |= {"kl_nats": fmean(kls[turn]), "kl_worst_nats": max(kls[turn])}
            self.rows.append({"table": "conversation"} | row)


def _aims(rows: Sequence[Row], prompts: int) -> list[Aim]:
    """What the issue asks for, and what follows from it for levels and conversations."""
    levels = [row for row in rows if row["table"] == "levels"]
    raw = [row for row in levels if row["pipeline"] == "raw"]
    own = [row for row in levels if row["pipeline"] == "own cache"]
    turns = {
        variant: [
            r["kl_nats"] for r in rows if r["table"] == "conversation" and r["variant"] == variant and r["turn"] > 1
        ]
        for variant in ("raw", "one lossy load", "store_derived off", "store_derived on")
    }
    possible = prompts * ((PROMPT_TOKENS - 1) // CHUNK_TOKENS * CHUNK_TOKENS)
    identical = sum(row["identical"] for row in raw)
    finest = [row for row in levels if row.get("level") == _LEVELS - 1]
    once = "that of one lossy load of the whole prefix, mean of turns"
    return [
        at_least("raw: outputs identical to those from the engine's own cache", prompts, identical),
        at_least("raw: tokens loaded of those that are stored", possible, raw[0]["loaded_tokens"]),
        at_least("raw: look-up answers right", own[0]["answers_right"], raw[0]["answers_right"]),
        at_most("finest level: KL, nats, worst profile and workload", 0.01, max(row["kl_nats"] for row in finest)),
        at_most("raw: KL, nats, in the worst turn of a conversation", 1e-3, max(turns["raw"])),
        at_most(
            f"store_derived off: KL at level 0 in {once}",
            1.0,
            fmean(turns["store_derived off"]) / fmean(turns["one lossy load"]),
        ),
    ]


if __name__ == "__main__":
    main()
