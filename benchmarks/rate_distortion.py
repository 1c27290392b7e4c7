"""Bits per element and signal to noise of every pipeline and level, on a Gaussian source and on a model's KV cache.

    make bench-rate_distortion ARGS="--model PATH --text FILE --calibration FILE"

Bits count whole frames: header, segment table, padding, side planes, lanes. The bound of a Gaussian source at a signal
to noise ratio S is half of log2(S) bits.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cache import documents, gaussian_cache, load_text, snr_db
from benchmarks.harness import Aim, Row, argument_parser, at_most, output_path, write_result
from kvstore.calibration.calibrate import calibrate
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.codecs import NAMED, Context, Pipeline, build_pipeline, decode, encode, named_pipeline
from kvstore.codecs.artefact import artefact_digest
from kvstore.codecs.named import CALIBRATED, ladder
from kvstore.codecs.recompositions import kvserve
from kvstore.demo.main import DEFAULT_MODEL, DEFAULT_TEXT
from kvstore.errors import PipelineError
from kvstore.keys import chunk_keys
from kvstore.profiler.prompts import bfloat16_layout, decode_prompt, encode_prompt, take_prompt, text_windows

NAME = "rate_distortion"
_STEPS = (48, 64)
"""Base steps of the ladder, 1.9 and 2.4 standard deviations."""
_LEVELS = 3
_STEP_OF_A_LEVEL = 80


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Bits and signal to noise of every pipeline and level.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model whose KV cache is coded")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="text that it was not trained on")
    parser.add_argument("--calibration", type=Path, default=DEFAULT_TEXT, help="other text, to calibrate on")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = gaussian_rows(args.seed)
    aims = gaussian_aims(rows)
    rows += model_rows(args.model, args.text, args.calibration, args.seed, prompts=1 if args.quick else 8)
    for row in rows:
        print(
            f"{row['source']:10s} {row['pipeline']:24s} level {row['level']}: "
            f"{row['bits']:7.3f} b {row['snr_db'] or math.inf:7.2f} dB"
        )
    for aim in aims:
        print(f"{aim.aim}: {aim.value:.3f} ({'met' if aim.met else 'missed'})")
    write_result(NAME, rows, aims, args.seed, packages=("torch", "numpy", "numba"), out=output_path(NAME, args))


def gaussian_rows(seed: int) -> list[Row]:
    """Every pipeline without calibration on the Gaussian, and each level of the ladder coded alone."""
    pipelines = {name: named_pipeline(name) for name in NAMED}
    for step in _STEPS:
        pipelines[f"ladder, step {step}"] = build_pipeline(ladder(_LEVELS, step, 0))
        for level in range(_LEVELS):
            alone = ladder(1, step - level * _STEP_OF_A_LEVEL, 0)
            pipelines[f"ladder, step {step}, level {level} alone"] = build_pipeline(alone)
    for levels in (6, 12, 24):
        pipelines[f"kvserve {levels}/{levels}"] = build_pipeline(kvserve(levels, levels))
    return [row for name, pipeline in pipelines.items() for row in _gaussian(name, pipeline, seed)]


def gaussian_aims(rows: Sequence[Row]) -> list[Aim]:
    """Nested levels against the bound and against coding that level alone at the same quality."""
    nested = [row for row in rows if row["pipeline"] in [f"ladder, step {step}" for step in _STEPS]]
    alone = {row["pipeline"]: row for row in rows if row["pipeline"].endswith("alone")}
    over = []
    for row in nested:
        other = alone[f"{row['pipeline']}, level {row['level']} alone"]
        # Where qualities differ a little, bits are compared at the same one: 6.02 dB are a bit.
        over.append(row["bits"] - other["bits"] - (row["snr_db"] - other["snr_db"]) / (20 * math.log10(2)))
    gap = max(row["bits_over_bound"] for row in nested)
    return [
        at_most("Gaussian: bits of a nested level above the rate-distortion bound, worst level", 0.30, gap),
        at_most("Gaussian: bits of a nested level above coding that level alone, worst level", 0.06, max(over)),
    ]


def _gaussian(name: str, pipeline: Pipeline, seed: int) -> list[Row]:
    layout, planes = gaussian_cache(seed)
    key = chunk_keys(layout, range(layout.chunk_tokens))[0]
    try:
        frame = encode(planes, layout, pipeline, key=key, context=Context())
    except PipelineError:
        # Some only take bfloat16.
        return []
    elements = sum(spec.elements for spec in layout.planes.values())
    rows = []
    for level in range(frame.levels):
        cut = frame.truncated(level)
        rows.append(
            _row("gaussian", name, level, cut.size_bytes * 8 / elements, snr_db(planes, decode(cut, layout, key=key)))
        )
    return rows


def model_rows(folder: Path, text: Path, calibration: Path, seed: int, prompts: int) -> list[Row]:
    """Every pipeline on prompts of 512 tokens."""
    model = Model(folder, dtype="float32")
    layout = bfloat16_layout(model)
    settings = Settings(prompts=8 if prompts == 1 else 96, prefix_tokens=(256, 512), joint=True, window=2, seed=seed)
    data = calibrate(model, [calibration], settings)
    artefacts = {artefact_digest(data): data}
    pipelines = {name: named_pipeline(name, artefacts) for name in [*NAMED, *CALIBRATED]}
    windows = text_windows(documents(load_text(text), 1024, model), prompts, 512, seed)
    cases = [take_prompt(model, window, 512) for window in windows]
    rows = []
    for name, pipeline in pipelines.items():
        encoded = [encode_prompt(case, layout, pipeline) for case in cases]
        elements = sum(x.numel() for case in cases for x in case.planes.values())
        for level in range(encoded[0][0].levels):
            cut = [[frame.truncated(level) for frame in frames] for frames in encoded]
            size_bytes = sum(frame.size_bytes for frames in cut for frame in frames)
            found = [decode_prompt(frames, layout, artefacts, case) for frames, case in zip(cut, cases, strict=True)]
            exact = {f"{name}{n}": x for n, case in enumerate(cases) for name, x in case.planes.items()}
            mine = {f"{name}{n}": x for n, planes in enumerate(found) for name, x in planes.items()}
            rows.append(_row("model", name, level, size_bytes * 8 / elements, snr_db(exact, mine)))
    return rows


def _row(source: str, pipeline: str, level: int, bits: float, snr: float) -> Row:
    exact = math.isinf(snr)
    bound = None if exact else max(0.0, snr) / (20 * math.log10(2))
    return {
        "table": source,
        "source": source,
        "pipeline": pipeline,
        "level": level,
        "bits": round(bits, 4),
        "snr_db": None if exact else round(snr, 3),
        "bound_bits": None if bound is None else round(bound, 4),
        "bits_over_bound": None if bound is None else round(bits - bound, 4),
    }


if __name__ == "__main__":
    main()
