"""Time to the first token of a real vLLM behind a shaped link: recomputing a prefix, or fetching it from a store.

    make bench-engines ARGS="--model PATH --text FILE"

Engines and stores are on the two sides of a link whose rate the kernel holds (`benchmarks.engine_link`), which takes
root. All methods are asked for the same prompts in turns; before each request the engine's own cache is emptied.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import engine_link
from benchmarks.engine_hosts import (
    CHUNK_TOKENS,
    engine,
    has_lmcache,
    kvstore_server,
    lmcache_server,
    to_kvstore,
    to_lmcache,
)
from benchmarks.engine_link import FREE_GBIT_PER_S, Link, shaped_link
from benchmarks.harness import (
    Aim,
    Row,
    argument_parser,
    at_most,
    missed_for,
    output_path,
    percentile,
    ratio_interval,
    write_result,
)
from benchmarks.vllm_engine import VllmEngine, engine_python
from kvstore.demo.main import DEFAULT_MODEL, DEFAULT_TEXT

NAME = "engines"
PACKAGES = ("kvstore",)
PROFILE = "ladder-packed"
"""The nested pipeline that needs no calibration and is decoded fastest."""

_STORE_S = 60.0
_POLL_S = 0.1


class Method(NamedTuple):
    """What a request is asked of.

    Args:
        name: As it is shown.
        engine: Which engine.
        level: Level up to which its connector fetches; None for all.
        exact: Whether what it fetches is bit for bit what was stored.
        guarded: Whether it may decide to recompute.
    """

    name: str
    engine: str
    level: int | None = None
    exact: bool = True
    guarded: bool = False


RECOMPUTE = Method("recompute", "plain")
PLACEBO = Method("recompute, a second engine", "plain again")
"""The same once more: what engines that are alike differ by, no comparison can tell."""
KVSTORE = Method("kvstore", "kvstore", guarded=True)
LMCACHE = Method("LMCache", "lmcache")
METHODS = (
    RECOMPUTE,
    PLACEBO,
    KVSTORE,
    Method("kvstore, always fetch", "raw"),
    *(Method(f"kvstore, always fetch level {level}", PROFILE, level, exact=False) for level in range(3)),
    LMCACHE,
)
TRANSFERS: Mapping[str, Mapping[str, Any] | None] = {
    "plain": None,
    PLACEBO.engine: None,
    "kvstore": to_kvstore(),
    "raw": to_kvstore(guard=False),
    PROFILE: to_kvstore(guard=False, pipeline=PROFILE),
    "lmcache": to_lmcache(),
}
NOT_RUN = {
    "vLLM's OffloadingConnector": "a GPU: vLLM 0.32 refuses it on a CPU at start",
    "vLLM's ExampleConnector (files)": "pages whose tokens lie one behind the other, as on a GPU: vLLM's CPU attention "
    "packs a page as a whole, so that what this connector copies by token is wrong",
    "LMCache inside vLLM's process": "a GPU: LMCache 0.5.6 has no connector for vLLM on a CPU",
}
"""What users might take instead that does not run here, and what it needs."""


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        links_gbit_per_s: Rates of the link.
        prefixes_tokens: Lengths of the stored prefixes.
        question_tokens: Tokens behind a prefix that nobody has stored.
        documents: Prefixes of each length.
        passes: Times that every rate is set.
        rounds: Rounds at a rate in each pass; every method is asked once for every length in each.
        warm_rounds: Rounds before them that are not counted: connections and estimates adapt to the rate.
        engines: The engines that are started.
    """

    links_gbit_per_s: tuple[float, ...] = (0.1, 0.25, 1.0, 5.0)
    prefixes_tokens: tuple[int, ...] = (256, 512, 1024, 1920)
    question_tokens: int = 32
    documents: int = 4
    passes: int = 2
    rounds: int = 15
    warm_rounds: int = 2
    engines: tuple[str, ...] = tuple(TRANSFERS)

    @property
    def requests(self) -> int:
        """Rounds of all, warm ones too, times lengths."""
        a_link = (self.warm_rounds + self.rounds) * len(self.prefixes_tokens)
        return self.passes * len(self.links_gbit_per_s) * a_link


QUICK = Run(
    (1.0,), (256, 512), documents=1, passes=1, rounds=2, warm_rounds=1, engines=("plain", KVSTORE.engine, PROFILE)
)


class Point(NamedTuple):
    """Where a method is measured."""

    link_gbit_per_s: float
    prefix_tokens: int
    method: Method


@dataclass
class Samples:
    """Requests of one point, in the order of the rounds.

    Args:
        ttft_s: Seconds from handing the request over to its first token.
        cached_tokens: Tokens that the engine took for fetched.
        link_bytes: Bytes that came over the link.
    """

    ttft_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    link_bytes: list[int] = field(default_factory=list)


Counts = Mapping[str, float]
"""A connector's counters."""

Prompts = Mapping[int, Sequence[Sequence[int]]]
"""Token ids of the prefixes, by their length."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Time to the first token of vLLM behind a shaped link.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model that the engines serve")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="text of the prompts")
    args = parser.parse_args(argv)
    python = engine_python()
    if python is None:
        sys.exit("there is no vLLM: 'make test-engines' builds environments with it (.venv-lmcache, .venv-vllm)")
    if lacks := engine_link.missing():
        sys.exit(f"a shaped link needs {lacks}")
    run = QUICK if args.quick else Run()
    bench = Bench(run, python, args.model, args.text, random.Random(args.seed))
    samples = bench.measure()
    rows, aims = report_rows(samples, bench.not_run, args.seed)
    out = output_path(NAME, args)
    if bench.problems and out is not None:
        # It took long to measure; somebody will want to see what happened.
        out = out.with_suffix(".rejected.json")
    write_result(NAME, rows, aims, args.seed, packages=PACKAGES, programs=bench.versions, out=out)
    if bench.problems:
        sys.exit("not a measurement of what was meant:\n" + "\n".join(bench.problems))
    _print_tables(rows, aims)


class Bench:
    """One run.

    Args:
        run: How much is measured.
        python: Interpreter of the engines' environment.
        model: The model.
        text: Text of the prompts.
        rng: Source of all that is random.
    """

    def __init__(self, run: Run, python: Path, model: Path, text: Path, rng: random.Random) -> None:
        self._run = run
        self._python = python
        self._model = model
        self._rng = rng
        self._source = _tokenize(model, text)
        self.not_run = dict(NOT_RUN)
        self.versions: dict[str, str] = {}
        self.problems: list[str] = []
        self.methods = tuple(method for method in METHODS if method.engine in run.engines)
        if LMCACHE not in self.methods:
            self.not_run[LMCACHE.name] = "a run that is not quick"
        elif not has_lmcache(python):
            self.not_run[LMCACHE.name] = "'make test-engines', which builds .venv-lmcache"
            self.methods = tuple(method for method in self.methods if method is not LMCACHE)

    def measure(self) -> dict[Point, Samples]:
        """Samples of every point."""
        run, samples = self._run, dict[Point, Samples]()
        with ExitStack() as stack:
            link = stack.enter_context(shaped_link())
            advance = stack.enter_context(_progress(run))
            engines = self._start(link, stack)
            self.versions = engines[RECOMPUTE.engine].versions()
            prompts = self._prefixes()
            for name in engines:
                self._store(engines[name], name, prompts)
            before = _counts(engines)
            for paused in engines.values():
                paused.pause()
            for link_gbit_per_s in run.links_gbit_per_s * run.passes:
                link.settle()
                link.shape(link_gbit_per_s)
                for number in range(-run.warm_rounds, run.rounds):
                    for tokens in self._rng.sample(run.prefixes_tokens, len(run.prefixes_tokens)):
                        prefix = prompts[tokens][number % run.documents]
                        self._round(link, engines, prefix, link_gbit_per_s, samples if number >= 0 else None)
                        advance()
            link.shape(FREE_GBIT_PER_S)
            for paused in engines.values():
                paused.resume()
            self.problems = list(_problems(samples, before, _counts(engines)))
        return samples

    def _start(self, link: Link, stack: ExitStack) -> dict[str, VllmEngine]:
        stack.enter_context(kvstore_server(link))
        if LMCACHE in self.methods:
            stack.enter_context(lmcache_server(link, self._python))
        names = dict.fromkeys(method.engine for method in self.methods)
        return {
            name: stack.enter_context(engine(link, self._python, self._model, name, TRANSFERS[name])) for name in names
        }

    def _prefixes(self) -> Prompts:
        """Pieces of the text that begin at different places."""
        lengths = [tokens for tokens in self._run.prefixes_tokens for _ in range(self._run.documents)]
        starts = self._rng.sample(range(len(self._source) - max(lengths)), len(lengths))
        found: dict[int, list[list[int]]] = {}
        for tokens, start in zip(lengths, starts, strict=True):
            found.setdefault(tokens, []).append(self._source[start : start + tokens])
        return found

    def _take(self, tokens: int) -> list[int]:
        """A piece of the text."""
        start = self._rng.randrange(len(self._source) - tokens)
        return self._source[start : start + tokens]

    def _store(self, asked: VllmEngine, name: str, prompts: Prompts) -> None:
        """Let an engine compute every prefix, and wait until it can fetch what it stored."""
        for prefix in (one for some in prompts.values() for one in some):
            prompt = [*prefix, *self._take(self._run.question_tokens)]
            if name in (RECOMPUTE.engine, PLACEBO.engine, KVSTORE.engine):
                _ask(asked, name, prompt, None)
            else:
                _poll(partial(_fetches, asked, name, prompt, _whole(len(prefix))), name)
        if name == KVSTORE.engine:
            # Whether it fetches is its own decision, so it is asked what it has stored.
            stored = sum(_whole(len(one)) for some in prompts.values() for one in some)
            _poll(lambda: _counts({name: asked})[name].get("saved_tokens", 0) >= stored, name)

    def _round(
        self,
        link: Link,
        engines: Mapping[str, VllmEngine],
        prefix: Sequence[int],
        link_gbit_per_s: float,
        samples: dict[Point, Samples] | None,
    ) -> None:
        """Ask every method for one prompt, in an order drawn anew; without `samples` to warm up.

        The two that are to be told apart by 2 % are asked twice.
        """
        prompt = [*prefix, *self._take(self._run.question_tokens)]
        asked = [*self.methods, RECOMPUTE, KVSTORE]
        for method in self._rng.sample(asked, len(asked)):
            # Engines spin for a second after each request, which a user with one engine to a machine does not feel.
            engines[method.engine].resume()
            before = link.received_bytes()
            found = _ask(engines[method.engine], method.engine, prompt, method.level)
            # What a connector does behind a request belongs to it, but for its time.
            link.settle()
            engines[method.engine].pause()
            if samples is not None:
                point = samples.setdefault(Point(link_gbit_per_s, len(prefix), method), Samples())
                point.ttft_s.append(found["took_s"])
                point.cached_tokens.append(found["cached"])
                point.link_bytes.append(link.received_bytes() - before)


def _problems(
    samples: Mapping[Point, Samples], before: Mapping[str, Counts], after: Mapping[str, Counts]
) -> Iterator[str]:
    """Where a method did not do what its name says; a benchmark of anything else would be of no use."""
    for point, found in samples.items():
        expected = {0} if point.method in (RECOMPUTE, PLACEBO) else {_whole(point.prefix_tokens)}
        if point.method.guarded:
            expected.add(0)
        if not expected.issuperset(found.cached_tokens):
            yield f"{point} fetched {sorted(set(found.cached_tokens))} tokens, not {expected}"
    for name in before:
        for key, now in after[name].items():
            if key.startswith("failed_") and (count := now - before[name].get(key, 0)):
                yield f"the engine {name!r} counted {count:.0f} {key}"


def report_rows(samples: Mapping[Point, Samples], not_run: Mapping[str, str], seed: int) -> tuple[list[Row], list[Aim]]:
    """Rows of the result, and its aims computed from them.

    Args:
        samples: What was measured; every method at every link and length.
        not_run: What was not, and what it needs.
        seed: Seed of the intervals.
    """
    rows = [_row(point, found) for point, found in samples.items()]
    rows.sort(key=lambda row: (row["link_gbit_per_s"], row["prefix_tokens"], _ORDER[row["method"]]))
    ratios = list(_ratios(samples, seed))
    rows += ratios
    rows += [{"table": "missing", "method": method, "needs": needs} for method, needs in not_run.items()]
    return rows, _aims(ratios, not_run)


_ORDER = {method.name: number for number, method in enumerate(METHODS)}


def _row(point: Point, found: Samples) -> Row:
    return {
        "table": "ttft",
        "link_gbit_per_s": point.link_gbit_per_s,
        "prefix_tokens": point.prefix_tokens,
        "method": point.method.name,
        "exact": point.method.exact,
        "median_ms": percentile(found.ttft_s, 50) * 1e3,
        "p10_ms": percentile(found.ttft_s, 10) * 1e3,
        "p90_ms": percentile(found.ttft_s, 90) * 1e3,
        "fetched_share": sum(tokens > 0 for tokens in found.cached_tokens) / len(found.cached_tokens),
        "link_bytes": percentile(found.link_bytes, 50),
        "n": len(found.ttft_s),
        "ttft_s": found.ttft_s,
    }


def _ratios(samples: Mapping[Point, Samples], seed: int) -> Iterator[Row]:
    """What users run against recomputing, and against the fastest exact cache of another project; and the placebo."""
    points = sorted({(point.link_gbit_per_s, point.prefix_tokens) for point in samples})
    pairs = ((KVSTORE, RECOMPUTE), (KVSTORE, LMCACHE), (PLACEBO, RECOMPUTE))
    for (link_gbit_per_s, tokens), (one, other) in product(points, pairs):
        ours, theirs = (samples.get(Point(link_gbit_per_s, tokens, method)) for method in (one, other))
        if ours is None or theirs is None:
            continue
        # Those that are asked twice a round are taken once.
        count = min(len(ours.ttft_s), len(theirs.ttft_s))
        mine, other_s = (found.ttft_s[:: len(found.ttft_s) // count] for found in (ours, theirs))
        ratio = ratio_interval(mine, other_s, seed)
        yield {
            "table": "placebo" if one is PLACEBO else "ratio",
            "link_gbit_per_s": link_gbit_per_s,
            "prefix_tokens": tokens,
            "against": other.name,
            "ratio": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "n": len(theirs.ttft_s),
        }


def _aims(ratios: Sequence[Row], not_run: Mapping[str, str]) -> list[Aim]:
    by_point = {
        (row["link_gbit_per_s"], row["prefix_tokens"], row["against"]): row["ratio"]
        for row in ratios
        if row["table"] == "ratio"
    }
    points = sorted({key[:2] for key in by_point})
    to_recompute = {point: by_point[*point, RECOMPUTE.name] for point in points}
    slowest = f"TTFT of kvstore / recompute, the worst of {len(points)} points"
    aims = [at_most(slowest, 1.02, max(to_recompute.values()))]
    fastest = "TTFT of kvstore / LMCache, the worst of the points where a cache beats recomputing"
    to_lmcache = {point: by_point[*point, LMCACHE.name] for point in points if (*point, LMCACHE.name) in by_point}
    if not to_lmcache:
        return [*aims, missed_for(fastest, 1.0, not_run[LMCACHE.name])]
    # Where either cache is faster than recomputing, by the same medians.
    beaten = [point for point, ratio in to_lmcache.items() if min(to_recompute[point], to_recompute[point] / ratio) < 1]
    if not beaten:
        return [*aims, missed_for(fastest, 1.0, "a link on which a cache beats recomputing")]
    return [*aims, at_most(f"{fastest} ({len(beaten)})", 1.0, max(to_lmcache[point] for point in beaten))]


def _ask(asked: VllmEngine, name: str, prompt: Sequence[int], level: int | None) -> dict[str, Any]:
    """Empty an engine's own cache and ask it for one token."""
    asked.reset()
    params = {} if level is None else {"kvstore": {"level": level}}
    # Each profile has keys of its own; LMCache and the plain engine know no salt of kvstore's.
    return asked.generate(prompt, 1, params=params, salt=name if name in ("raw", PROFILE) else None)


def _fetches(asked: VllmEngine, name: str, prompt: Sequence[int], tokens: int) -> bool:
    return bool(_ask(asked, name, prompt, None)["cached"] >= tokens)


def _poll(done: Callable[[], bool], name: str) -> None:
    ends_s = time.monotonic() + _STORE_S
    while not done():
        if time.monotonic() > ends_s:
            raise RuntimeError(f"the engine {name!r} has not stored its prefixes after {_STORE_S:g} s")
        time.sleep(_POLL_S)


def _counts(engines: Mapping[str, VllmEngine]) -> dict[str, Counts]:
    """The connectors' counters."""
    return {name: asked.counts() for name, asked in engines.items()}


def _whole(tokens: int) -> int:
    """Tokens of the full chunks of a prefix."""
    return tokens // CHUNK_TOKENS * CHUNK_TOKENS


def _tokenize(model: Path, text: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ids: list[int] = tokenizer(text.read_text("utf-8"), verbose=False)["input_ids"]
    return ids


@contextmanager
def _progress(run: Run) -> Iterator[Callable[[], None]]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=run.requests)
        yield lambda: progress.advance(task)


def _print_tables(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    console = Console()
    found = [row for row in rows if row["table"] == "ttft"]
    methods = list(dict.fromkeys(row["method"] for row in found))
    table = Table("Gb/s", "prefix", *methods, title="Time to the first token, ms (medians)")
    for link_gbit_per_s, tokens in dict.fromkeys((row["link_gbit_per_s"], row["prefix_tokens"]) for row in found):
        medians = {
            row["method"]: f"{row['median_ms']:.1f}"
            for row in found
            if (row["link_gbit_per_s"], row["prefix_tokens"]) == (link_gbit_per_s, tokens)
        }
        table.add_row(f"{link_gbit_per_s:g}", str(tokens), *(medians[method] for method in methods))
    console.print(table)
    for aim in aims:
        value = "not measured" if aim.value is None else f"{aim.value:.3f}"
        console.print(f"{'met' if aim.met else 'missed'}: {aim.aim}: {value} (target {aim.target:g})")


if __name__ == "__main__":
    main()
