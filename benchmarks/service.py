"""Time to the first token and to the last one of a real vLLM behind a shaped link, by how its caches are sent.

    make bench-service ARGS="--model PATH --text FILE --calibration FILE"

Two settings: prefixes that were stored before, and prefill and decode apart. In each every arm is asked for the same
prompts in turns: without compression, with a static profile, with what KVServe's controller chooses, and with what
kvstore's does. Shaping takes root, as `benchmarks.engines` says.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import engine_link
from benchmarks.engine_hosts import CHUNK_TOKENS
from benchmarks.engine_link import FREE_GBIT_PER_S, Link, shaped_link
from benchmarks.harness import argument_parser, output_path, write_result
from benchmarks.service_hosts import ADAPTIVE, ARMS, KVSERVE, RECOMPUTE, Arm, Hosts
from benchmarks.service_profiles import Depth, Sets, measure_sets
from benchmarks.service_rows import APART, REMOTE, Point, Samples, print_tables, report_rows
from benchmarks.vllm_engine import VllmEngine, engine_python
from kvstore.demo.main import DEFAULT_MODEL, DEFAULT_TEXT

NAME = "service"
PACKAGES = ("kvstore", "torch", "numba")

DEPTH = Depth()

_STORE_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        links_gbit_per_s: Rates of the link.
        prefixes_tokens: Lengths of the prefixes; rounds take turns in them.
        question_tokens: Tokens behind a prefix that nobody has stored.
        answer_tokens: Tokens that are asked for.
        documents: Stored prefixes of each length, at every rate.
        rounds: Rounds at a rate; in each every arm is asked once in either setting.
        warm_rounds: Rounds before them that are not counted: connections and estimates adapt to the rate.
        learning_rounds: As many before those, for the arms alone that plan: the link was another one for long.
        depth: How much is measured of the profiles.
        arms: Names of the arms.
    """

    links_gbit_per_s: tuple[float, ...] = (0.1, 0.25, 1.0)
    prefixes_tokens: tuple[int, ...] = (384, 640, 1024, 1536, 1920)
    question_tokens: int = 32
    answer_tokens: int = 16
    documents: int = 2
    rounds: int = 30
    warm_rounds: int = 4
    learning_rounds: int = 16
    depth: Depth = DEPTH
    arms: tuple[str, ...] = tuple(arm.name for arm in ARMS)

    @property
    def steps(self) -> int:
        """Rounds of all rates, those too that are not counted, in both settings."""
        return len(self.links_gbit_per_s) * (self.learning_rounds + 2 * (self.warm_rounds + self.rounds))


QUICK = Run(
    (1.0,),
    (256, 384),
    answer_tokens=4,
    documents=1,
    rounds=2,
    warm_rounds=1,
    learning_rounds=1,
    depth=Depth((256,), 1, 2),
    arms=("uncompressed", KVSERVE.name, ADAPTIVE.name),
)

Prompts = Mapping[int, Sequence[Sequence[int]]]
"""Token ids of the prefixes, by their length."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Service of vLLM behind a shaped link, by how its caches are sent.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model that the engines serve")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="text of the prompts")
    parser.add_argument("--calibration", type=Path, default=DEFAULT_TEXT, help="other text, to measure profiles on")
    parser.add_argument("--rounds", type=int, default=Run.rounds, help="rounds at each rate (%(default)s)")
    args = parser.parse_args(argv)
    python = engine_python()
    if python is None:
        sys.exit("there is no vLLM: 'make test-engines' builds environments with it (.venv-lmcache, .venv-vllm)")
    if lacks := engine_link.missing():
        sys.exit(f"a shaped link needs {lacks}")
    run = QUICK if args.quick else Run(rounds=args.rounds)
    sets, ids = _prepared(args.model, args.text, args.calibration, run.depth, args.seed, few=args.quick)
    bench = Bench(run, python, args.model, ids, sets, random.Random(args.seed))
    samples = bench.measure()
    rows, aims = report_rows(samples, sets, args.seed)
    out = output_path(NAME, args)
    if bench.problems and out is not None:
        # It took long to measure; somebody will want to see what happened.
        out = out.with_suffix(".rejected.json")
    write_result(NAME, rows, aims, args.seed, packages=PACKAGES, programs=bench.versions, out=out)
    print_tables(rows, aims)
    if bench.problems:
        sys.exit("not a measurement of what was meant:\n" + "\n".join(bench.problems))


class Bench:
    """One run.

    Args:
        run: How much is measured.
        python: Interpreter of the engines' environment.
        model: The model.
        ids: Token ids of the text.
        sets: What is pushed.
        rng: Source of all that is random.
    """

    def __init__(self, run: Run, python: Path, model: Path, ids: Sequence[int], sets: Sets, rng: random.Random) -> None:
        self._run, self._sets, self._rng = run, sets, rng
        self._python, self._model = python, model
        self._source = ids
        self._arms = tuple(arm for arm in ARMS if arm.name in run.arms)
        self._samples: dict[Point, Samples] = {}
        self._number = 0
        self.versions: dict[str, str] = {}
        self.problems: list[str] = []

    def measure(self) -> dict[Point, Samples]:
        """Samples of every point."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-service-")))
            link = stack.enter_context(shaped_link())
            self._asking = stack.enter_context(ThreadPoolExecutor(1))
            hosts = Hosts(link, self._python, self._model, self._sets, folder, self._arms)
            stack.enter_context(hosts.started())
            self._advance = stack.enter_context(_progress(self._run))
            reader = hosts.readers[ADAPTIVE.server]
            with hosts.awake(reader):
                self.versions = reader.versions()
            before = hosts.counts()
            self._teach(hosts)
            for gbit_per_s in self._run.links_gbit_per_s:
                link.settle()
                link.shape(gbit_per_s)
                hosts.tell(gbit_per_s)
                self._at(gbit_per_s, link, hosts)
            link.shape(FREE_GBIT_PER_S)
            self.problems = [*self._wrong(), *hosts.failures(before)]
        return self._samples

    def _teach(self, hosts: Hosts) -> None:
        """Let the engines that fetch see once what computing takes."""
        for reader in hosts.readers.values():
            with hosts.awake(reader):
                for tokens in sorted(self._run.prefixes_tokens, reverse=True):
                    reader.generate(self._take(tokens + self._run.question_tokens), 1)

    def _at(self, gbit_per_s: float, link: Link, hosts: Hosts) -> None:
        """Everything at one rate: first the prompts that adapt to it, then the stored prefixes, then all in turns."""
        run = self._run
        planned = tuple(arm for arm in self._arms if arm.planned)
        for number in range(run.learning_rounds):
            self._round(APART, number, gbit_per_s, link, hosts, None, planned, count=False)
        for number in range(run.warm_rounds):
            self._round(APART, number, gbit_per_s, link, hosts, None, self._arms, count=False)
        prompts = self._prefixes()
        for arm in self._arms:
            self._store(arm, hosts, prompts, f"{arm.name} at {gbit_per_s:g}")
        for number in range(run.warm_rounds):
            self._round(REMOTE, number, gbit_per_s, link, hosts, prompts, self._arms, count=False)
        for number in range(run.rounds):
            for setting in (REMOTE, APART):
                self._round(setting, number, gbit_per_s, link, hosts, prompts, self._arms, count=True)

    def _round(
        self,
        setting: str,
        number: int,
        gbit_per_s: float,
        link: Link,
        hosts: Hosts,
        prompts: Prompts | None,
        arms: Sequence[Arm],
        *,
        count: bool,
    ) -> None:
        """Ask arms for one prompt, in an order drawn anew."""
        run = self._run
        tokens = run.prefixes_tokens[number % len(run.prefixes_tokens)]
        prefix = self._take(tokens)
        if setting == REMOTE and prompts is not None:
            held = prompts[tokens]
            prefix = list(held[number // len(run.prefixes_tokens) % len(held)])
        prompt = [*prefix, *self._take(run.question_tokens)]
        arms = [*arms, RECOMPUTE] if setting == REMOTE else arms
        for arm in self._rng.sample(arms, len(arms)):
            if setting == REMOTE:
                found = self._read(arm, prompt, f"{arm.name} at {gbit_per_s:g}", link, hosts)
            else:
                found = self._hand_over(arm, prompt, link, hosts)
            if count:
                self._samples.setdefault(Point(setting, gbit_per_s, arm), Samples()).add(tokens, found)
        self._advance()

    def _read(self, arm: Arm, prompt: Sequence[int], salt: str, link: Link, hosts: Hosts) -> dict[str, Any]:
        """Ask for a prompt whose prefix was stored before."""
        reader = hosts.readers[arm.server]
        with hosts.awake(reader):
            reader.reset()
            before = link.received_bytes()
            hosts.used(arm.server)
            found = reader.generate(prompt, self._run.answer_tokens, params=arm.params, salt=salt)
            # What a connector does behind a request belongs to it, but for its time.
            link.settle()
        moved = link.received_bytes() - before
        return found | {"jct_s": found["took_s"], "link_bytes": moved, "used": hosts.used(arm.server)}

    def _hand_over(self, arm: Arm, prompt: Sequence[int], link: Link, hosts: Hosts) -> dict[str, Any]:
        """Ask both engines at one time: one computes and stores the prompt, the other waits for it and goes on."""
        self._number += 1
        salt = f"{arm.name} {self._number}"
        reader, writer = hosts.readers[arm.server], hosts.writers[arm.name]
        with hosts.awake(reader), hosts.awake(writer):
            reader.reset()
            writer.reset()
            before = link.received_bytes()
            hosts.used(arm.server)
            began_s = time.perf_counter()
            computing: Future[None] = self._asking.submit(_compute, writer, prompt, salt)
            params = {**arm.params, "do_remote_prefill": True}
            found = reader.generate(prompt, self._run.answer_tokens, params=params, salt=salt)
            jct_s = time.perf_counter() - began_s
            computing.result()
            link.settle()
        moved = link.received_bytes() - before
        # Both clocks run alike: the first token came as long before the last one as the engine says.
        first_s = jct_s - (found["took_s"] - found["first_s"])
        used = hosts.used(arm.server)
        return found | {"jct_s": jct_s, "first_s": first_s, "link_bytes": moved, "used": used}

    def _store(self, arm: Arm, hosts: Hosts, prompts: Prompts, salt: str) -> None:
        """Let a writer beside the store compute every prefix, and wait until all of them are held."""
        writer = hosts.keepers.get(arm.name, hosts.writers[arm.name])
        chunks = sum(len(one) // CHUNK_TOKENS for some in prompts.values() for one in some)
        with hosts.awake(writer):
            before = _saved(writer)
            for prefix in (one for some in prompts.values() for one in some):
                writer.reset()
                writer.generate([*prefix, 1], 1, salt=salt)
            _poll(lambda: _saved(writer) - before >= chunks * CHUNK_TOKENS, arm.name)

    def _prefixes(self) -> Prompts:
        """Pieces of the text that begin at different places."""
        run = self._run
        return {tokens: [self._take(tokens) for _ in range(run.documents)] for tokens in run.prefixes_tokens}

    def _take(self, tokens: int) -> list[int]:
        """A piece of the text."""
        start = self._rng.randrange(len(self._source) - tokens)
        return list(self._source[start : start + tokens])

    def _wrong(self) -> Iterator[str]:
        """Where an arm did not do what its name says; a benchmark of anything else would be of no use."""
        for point, found in self._samples.items():
            for tokens, cached in zip(found.tokens, found.cached_tokens, strict=True):
                # Of a prompt that is handed over, the question may fill a chunk, too.
                question = self._run.question_tokens - 1 if point.setting == APART else 0
                whole = (tokens + question) // CHUNK_TOKENS * CHUNK_TOKENS
                allowed = {RECOMPUTE.name: {0}}.get(point.arm.name, {0, whole} if point.arm.planned else {whole})
                if cached not in allowed:
                    yield f"{point} fetched {cached} of {tokens} tokens, not {allowed}"


def _prepared(
    model: Path, text: Path, calibration: Path, depth: Depth, seed: int, *, few: bool
) -> tuple[Sets, list[int]]:
    """What is pushed, and the token ids of the text; by a process that is gone before anything else is measured."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        sets = pool.submit(measure_sets, model.resolve(), calibration, depth, seed, few=few)
        return sets.result(), pool.submit(_tokenize, model, text).result()


def _tokenize(model: Path, text: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ids: list[int] = tokenizer(text.read_text("utf-8"), verbose=False)["input_ids"]
    return ids


def _compute(writer: VllmEngine, prompt: Sequence[int], salt: str) -> None:
    """Let a prefill engine compute and store; it would spin on while the other one goes on, on cores of its own."""
    writer.generate(prompt, 1, salt=salt)
    writer.pause()


def _saved(writer: VllmEngine) -> float:
    """Tokens whose chunks it has stored."""
    return writer.counts().get("saved_tokens", 0.0)


def _poll(done: Callable[[], bool], name: str) -> None:
    ends_s = time.monotonic() + _STORE_S
    while not done():
        if time.monotonic() > ends_s:
            raise RuntimeError(f"{name!r} has not stored its prefixes after {_STORE_S:g} s")
        time.sleep(_POLL_S)


@contextmanager
def _progress(run: Run) -> Iterator[Callable[[], None]]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=run.steps)
        yield lambda: progress.advance(task)


if __name__ == "__main__":
    main()
