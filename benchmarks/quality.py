"""What a compressed prefix costs in quality: KL, perplexity and greedy agreement against whole-frame bytes.

    make bench-quality ARGS="--model PATH --text FILE --calibration FILE"

Calibration, test text and the model's training text are different documents. Quality loss is KL(exact || compressed)
of the next-token distributions, teacher-forced, mean over 128 tokens behind the prefix.
"""

import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.cache import documents, load_text
from benchmarks.harness import Aim, Row, argument_parser, at_least, at_most, missed_for, output_path, write_result
from benchmarks.lookup import lookup_window
from benchmarks.quality_methods import CALIBRATIONS, PROMPTS, Method, low_heads, make_artefact, methods
from kvstore.calibration.model import Model
from kvstore.codecs.artefact import artefact_digest
from kvstore.demo.main import DEFAULT_MODEL, DEFAULT_TEXT
from kvstore.profiler.prompts import (
    CONTINUATION_TOKENS,
    Prompt,
    bfloat16_layout,
    decode_prompt,
    encode_prompt,
    kl_nats,
    take_prompt,
    text_windows,
)

NAME = "quality"
TARGETS = (0.003, 0.01, 0.03, 0.1)
WORKLOADS = (("text", 512), ("look-up", 512), ("text", 256), ("text", 1536))
_SURE = math.log(0.9)

Point = tuple[str, str, int]
"""Method, setting and level."""


@dataclass(frozen=True)
class Outcome:
    """One prompt under one method: bytes of frames and of the exact cache, and what became of the continuation."""

    frame_bytes: int
    raw_bytes: int
    kl: float
    loss_change: float
    agreement: float
    answers: int
    answers_kept: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Quality against bytes of every method.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model whose KV cache is compressed")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="text that nothing was trained or tuned on")
    parser.add_argument("--calibration", type=Path, default=DEFAULT_TEXT, help="other text, to calibrate on")
    parser.add_argument("--prompts", type=int, default=64, help="prompts for each workload (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    prompts, workloads = (1, WORKLOADS[:1]) if args.quick else (args.prompts, WORKLOADS)
    calibration = (2, (256,)) if args.quick else (PROMPTS, (256, 512, 1024))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        made = [pool.submit(make_artefact, name, args.model, args.calibration, *calibration) for name in CALIBRATIONS]
        for name, future in zip(CALIBRATIONS, made, strict=True):
            Path(folder, name).write_bytes(future.result())
            print(f"calibrated {name}", flush=True)
        low = pool.submit(low_heads, args.model, args.calibration, args.seed, 1 if args.quick else 8).result()
        jobs = [
            (
                _Source(args.model, args.text, Path(folder), low, args.seed, args.quick),
                workload,
                prefix,
                number,
                prompts,
            )
            for workload, prefix in workloads
            for number in range(prompts)
        ]
        results = pool.map(_evaluate, *zip(*jobs, strict=True))
        points: list[Row] = []
        for workload, prefix in workloads:
            outcomes = []
            for outcome in islice(results, prompts):
                outcomes.append(outcome)
                print(f"{workload}, {prefix} tokens: prompt {len(outcomes)} of {prompts}", flush=True)
            points += _points(workload, prefix, outcomes)
            rows = _at_targets(points) + points
            # After every workload, so that hours of work are not lost with the last one.
            packages = ("torch", "transformers", "numba")
            write_result(NAME, rows, _aims(rows), args.seed, packages=packages, out=output_path(NAME, args))
    _show(rows, _aims(rows))


@dataclass(frozen=True)
class _Source:
    """Where a process finds what it needs."""

    model: Path
    text: Path
    artefacts: Path
    low_heads: Sequence[int]
    seed: int
    quick: bool


class _Bench:
    """What a process keeps between prompts."""

    def __init__(self, source: _Source) -> None:
        torch.set_num_threads(1)
        self.model = Model(source.model, dtype="float32")
        self.layout = bfloat16_layout(self.model)
        self.documents = documents(load_text(source.text), 2 * CONTINUATION_TOKENS, self.model)
        data = {path.name: path.read_bytes() for path in source.artefacts.iterdir()}
        self.artefacts = {artefact_digest(value): value for value in data.values()}
        self.methods = methods(data, source.low_heads, first_only=source.quick)
        self.seed = source.seed

    def window(self, workload: str, prefix: int, number: int, prompts: int) -> list[int]:
        if workload == "look-up":
            return lookup_window(self.model, prefix, CONTINUATION_TOKENS, random.Random(f"{self.seed} {number}"))
        return text_windows(self.documents, prompts, prefix, self.seed)[number]


_BENCH: dict[str, _Bench] = {}


def _evaluate(source: _Source, workload: str, prefix: int, number: int, prompts: int) -> dict[Point, Outcome]:
    """All methods on one prompt."""
    if "bench" not in _BENCH:
        _BENCH["bench"] = _Bench(source)
    bench = _BENCH["bench"]
    prompt = take_prompt(bench.model, bench.window(workload, prefix, number, prompts), prefix)
    found: dict[Point, Outcome] = {}
    for method in bench.methods:
        found.update(_run(bench, method, prompt))
    return found


@torch.inference_mode()
def _run(bench: _Bench, method: Method, prompt: Prompt) -> Iterator[tuple[Point, Outcome]]:
    following = torch.tensor(prompt.token_ids[prompt.tokens :])
    exact = prompt.log_p
    # The distribution behind the last token belongs to no token of the continuation.
    own = exact[:-1].gather(1, following[1:, None])[:, 0]
    sure = (exact[:-1].argmax(-1) == following[1:]) & (own > _SURE)
    for label, pipeline in method.settings.items():
        frames = encode_prompt(prompt, bench.layout, pipeline)
        for level in range(frames[0].levels):
            cut = [frame.truncated(level) for frame in frames]
            planes = decode_prompt(cut, bench.layout, bench.artefacts, prompt)
            log_p = bench.model.log_probabilities({name: x.float() for name, x in planes.items()}, following.tolist())
            theirs = log_p[:-1].gather(1, following[1:, None])[:, 0]
            kept = sure & (log_p[:-1].argmax(-1) == following[1:])
            yield (
                (method.name, label, level),
                Outcome(
                    sum(frame.size_bytes for frame in cut),
                    prompt.raw_bytes,
                    kl_nats(exact, log_p),
                    float((own - theirs).mean()),
                    float((exact.argmax(-1) == log_p.argmax(-1)).float().mean()),
                    int(sure.sum()),
                    int(kept.sum()),
                ),
            )


def _points(workload: str, prefix: int, outcomes: Sequence[Mapping[Point, Outcome]]) -> list[Row]:
    """A row for each method, setting and level: means over prompts."""
    rows = []
    for point in outcomes[0]:
        found = [outcome[point] for outcome in outcomes]
        kls = [one.kl for one in found]
        rows.append(
            {
                "table": "points",
                "workload": workload,
                "prefix_tokens": prefix,
                "method": point[0],
                "setting": point[1],
                "level": point[2],
                "prompts": len(found),
                "ratio": _four(sum(one.raw_bytes for one in found) / sum(one.frame_bytes for one in found)),
                "kl_nats": _four(fmean(kls)),
                "kl_standard_error": _four(stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else 0.0),
                "perplexity_change": _four(math.exp(fmean(one.loss_change for one in found)) - 1),
                "greedy_agreement": _four(fmean(one.agreement for one in found)),
                "answers_kept": _four(sum(o.answers_kept for o in found) / max(1, sum(o.answers for o in found))),
            }
        )
    return rows


def _at_targets(points: Sequence[Row]) -> list[Row]:
    """Ratio of every method at given KLs, read off its best settings."""
    rows = []
    for workload, prefix in dict.fromkeys((row["workload"], row["prefix_tokens"]) for row in points):
        mine = [row for row in points if (row["workload"], row["prefix_tokens"]) == (workload, prefix)]
        for method in dict.fromkeys(row["method"] for row in mine):
            sweep = [row for row in mine if row["method"] == method]
            read = {f"ratio_at_{target}": ratio_at(sweep, target) for target in TARGETS}
            rows.append(
                {
                    "table": "ratios",
                    "workload": workload,
                    "prefix_tokens": prefix,
                    "method": method,
                    **read,
                    "answers_kept_at_0.01": _answers_at(sweep, read["ratio_at_0.01"]),
                }
            )
    return rows


def envelope(sweep: Sequence[Row]) -> list[Row]:
    """The settings that no other one beats in both bytes and KL, by rising ratio."""
    best: list[Row] = []
    for row in sorted(sweep, key=lambda row: (-row["ratio"], row["kl_nats"])):
        if not best or row["kl_nats"] < best[-1]["kl_nats"]:
            best.append(row)
    return best[::-1]


def ratio_at(sweep: Sequence[Row], target: float) -> float | None:
    """Ratio at a KL, interpolated in the logarithms of both; None outside of the sweep."""
    best = envelope(sweep)
    for finer, coarser in pairwise(best):
        if finer["kl_nats"] <= target <= coarser["kl_nats"] and finer["kl_nats"] > 0:
            share = math.log(target / finer["kl_nats"]) / math.log(coarser["kl_nats"] / finer["kl_nats"])
            return _four(finer["ratio"] * (coarser["ratio"] / finer["ratio"]) ** share)
    return None


def _answers_at(sweep: Sequence[Row], ratio: float | None) -> float | None:
    """Answers kept by the setting whose ratio is next to the given one."""
    if ratio is None:
        return None
    return float(min(envelope(sweep), key=lambda row: abs(math.log(row["ratio"] / ratio)))["answers_kept"])


def _aims(rows: Sequence[Row]) -> list[Aim]:
    """The issue's aims, at a KL of 0.01 nats."""

    def ratio(method: str, workload: str = "text") -> float:
        found = [r for r in rows if r["table"] == "ratios" and (r["workload"], r["method"]) == (workload, method)]
        row = next((r for r in found if r["prefix_tokens"] == 512), found[0] if found else {})
        # A target outside of a sweep is a miss.
        return float(row.get("ratio_at_0.01") or 0)

    def answers(method: str) -> float:
        found = [r for r in rows if r["table"] == "ratios" and (r["workload"], r["method"]) == ("look-up", method)]
        return float(found[0]["answers_kept_at_0.01"] or 0) if found else 0.0

    def bytes_of(aim: str, target: float, mine: str, other: str, workload: str = "text") -> Aim:
        if not ratio(mine, workload) or not ratio(other, workload):
            return missed_for(aim, target, "sweeps that reach the KL")
        return at_most(aim, target, ratio(other, workload) / ratio(mine, workload))

    at = "at a KL of 0.01, 512 tokens of text"
    pages = "at a KL of 0.01, look-up pages"
    return [
        bytes_of(f"bytes of ladder in those of kvserve, {at}", 0.80, "ladder", "kvserve"),
        bytes_of(f"bytes of ladder-repeats in those of kvserve, {at}", 0.80, "ladder-repeats", "kvserve"),
        bytes_of(f"bytes of ladder-klt in those of kvserve, {at}", 0.20, "ladder-klt", "kvserve"),
        bytes_of(f"bytes of ladder-klt in those of kvtc, {at}", 0.60, "ladder-klt", "kvtc"),
        at_least(f"ratio of ladder-klt to bfloat16, {at}", 30, ratio("ladder-klt")),
        at_least(f"ratio of ladder-tokens to bfloat16, {at}", 30, ratio("ladder-tokens")),
        bytes_of(f"bytes of ladder-klt in those of kvserve, {pages}", 0.25, "ladder-klt", "kvserve", "look-up"),
        at_most(
            f"share of answers that kvserve keeps and ladder-klt loses, {pages}",
            0.0,
            max(0.0, answers("kvserve") - answers("ladder-klt")),
        ),
    ]


def _show(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    for row in rows:
        if row["table"] == "ratios":
            read = "  ".join(f"{_text(row[f'ratio_at_{target}']):>7s}" for target in TARGETS)
            print(f"{row['workload']:8s} {row['prefix_tokens']:5d}  {row['method']:28s} {read}")
    for aim in aims:
        print(f"{aim.aim}: {_text(aim.value)} of {aim.target} ({'met' if aim.met else 'missed'})")


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"


def _four(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
