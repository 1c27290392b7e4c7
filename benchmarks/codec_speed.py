"""Encode and decode speed of every named pipeline on a CPU, and of the decode kernels on a GPU.

    make bench-codec_speed                         on a CPU; kernels' aims are then missed for want of a GPU
    python -m benchmarks.codec_speed --gpu         on a GPU machine with triton: writes codec_speed.h200.json

A chunk is 256 tokens of Llama-3.1-8B's geometry (32 layers, 8 KV heads of 128) of synthetic values; GB/s count its
bfloat16 bytes. Calibrated pipelines use a synthetic artefact of the same shapes, or a given one. One round of all
pipelines takes minutes, so there are 5 rounds, the cases of each in an order of its own, and medians of them.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.harness import RESULTS, Aim, Row, argument_parser, missed_for, output_path, percentile, write_result
from kvstore.codecs import CALIBRATED, NAMED, Context, Pipeline, decode, encode, named_pipeline
from kvstore.codecs.artefact import Artefact, artefact_digest, load_artefact, save_artefact
from kvstore.codecs.context import known_planes
from kvstore.codecs.ref.nested import sigma_units
from kvstore.codecs.ref.rope import rotate
from kvstore.frame import Frame
from kvstore.keys import chunk_keys
from kvstore.layout import Layout, Rope, attention_layout

NAME = "codec_speed"
PACKAGES = ("kvstore", "torch", "numba", "numpy", "triton")
GPU_AIMS = (
    ("packed, 64 chunks: GB/s of bfloat16 written, kernels alone", 2500.0),
    ("rans, 64 chunks: GB/s of bfloat16 written, kernels alone", 1000.0),
    ("klt, 64 chunks: GB/s of bfloat16 written, kernels alone", 500.0),
    ("packed, 64 chunks: speed / unfused torch pipeline on the GPU", 15.0),
)
_LLAMA3 = (
    ("factor", 8.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 8192.0),
)
_NEEDS_TOKENS = ("ladder-tokens",)


@dataclass(frozen=True)
class Run:
    """How much is measured.

    Args:
        layers: Layers of the model.
        kv_heads: Its KV heads.
        tokens: Tokens of a chunk.
        rounds: Repetitions of every case on the CPU.
        gpu_rounds: On the GPU.
        chunks: Sizes of batches on the GPU.
    """

    layers: int = 32
    kv_heads: int = 8
    tokens: int = 256
    rounds: int = 5
    gpu_rounds: int = 30
    chunks: tuple[int, ...] = (1, 64)

    @property
    def layout(self) -> Layout:
        """Of the model."""
        return attention_layout(
            "llama-3.1-8b",
            "synthetic",
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=128,
            chunk_tokens=self.tokens,
            rope=Rope(500000.0, 128, "llama3", scaling=_LLAMA3),
        )


QUICK = Run(layers=1, kv_heads=1, tokens=32, rounds=2, gpu_rounds=3, chunks=(1, 2))


class Case(NamedTuple):
    """What one row measures; `level` is None for encoding."""

    pipeline: str
    level: int | None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(NAME, "Speed of the codecs on a CPU, and of their kernels on a GPU.")
    parser.add_argument("--gpu", action="store_true", help="measure the kernels; needs a GPU and triton")
    parser.add_argument("--artefact", type=Path, help="calibration artefact of Llama-3.1-8B's shapes (synthetic)")
    args = parser.parse_args(argv)
    run = QUICK if args.quick else Run()
    artefacts = artefacts_for(run.layout, args.artefact, args.seed)
    if args.gpu:
        # It needs triton, which a machine without a GPU may do without.
        from benchmarks.codec_speed_gpu import gpu_rows

        rows, aims = gpu_rows(run, artefacts, args.seed)
    else:
        rows = cpu_rows(run, artefacts, args.seed)
        aims = [missed_for(aim, target, "gpu") for aim, target in GPU_AIMS]
    write_result(NAME, rows, aims, args.seed, packages=PACKAGES, out=_output_path(args))
    _print(rows, aims)


def _output_path(args: argparse.Namespace) -> Path | None:
    out = output_path(NAME, args)
    return RESULTS / f"{NAME}.h200.json" if args.gpu and args.out is None and not args.quick else out


def artefacts_for(layout: Layout, path: Path | None, seed: int) -> dict[str, bytes]:
    """An artefact under its digest: the given one, or bases without meaning for every layer."""
    data = synthetic_artefact(layout, seed) if path is None else path.read_bytes()
    return {artefact_digest(data): data}


def synthetic_artefact(layout: Layout, seed: int) -> bytes:
    """Over the heads of each layer: a random orthonormal basis, and variances that fall steeply."""
    generator = torch.Generator().manual_seed(seed)
    layers, _, heads, dim = layout.planes["k"].shape
    n = heads * dim
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0].half()
    spectrum = torch.logspace(-0.5, -3, n)
    tensors = {"probes": torch.randn(layers, 4 * heads, 16, dim, generator=generator).half()}
    for name in ("k", "v"):
        for layer in range(layers):
            # Shared by all layers: the arithmetic does not care, and the file stays in memory.
            tensors[f"{name}.forward.{layer}"] = basis[None].clone()
            tensors[f"{name}.inverse.{layer}"] = basis.T[None].clone()
            tensors[f"{name}.sigma.{layer}"] = sigma_units(spectrum)[None]
        tensors[f"{name}.mean"] = torch.zeros(layers, heads, dim)
        tensors[f"{name}.weight"] = torch.full((layers, heads, dim), 0.05)
        tensors[f"{name}.spread"] = sigma_units(torch.full((layers, heads), 0.02))
    return save_artefact(tensors, {"model": layout.model, "group_layers": 1})


def synthetic_planes(layout: Layout, artefact: Artefact | None, seed: int) -> dict[str, torch.Tensor]:
    """Gaussian K and V with a channel that is far from zero, or what an artefact's basis and variances make of noise.

    The rank of a calibrated basis falls with the level only where the values have its variances.
    """
    generator = torch.Generator().manual_seed(seed)
    rotary = known_planes(layout, 0)
    planes = {}
    for name, spec in layout.planes.items():
        layers, tokens, heads, dim = spec.shape
        x = torch.randn(spec.shape, generator=generator)
        if artefact is None:
            x[..., 0] += 5
        else:
            for layer in range(layers):
                sigma = 3.0 ** (artefact.tensors[f"{name}.sigma.{layer}"].float() / 80)
                basis = artefact.matrix("klt", f"{name}.inverse.{layer}", (1, -1, -1))
                x[layer] = ((x[layer].view(tokens, -1) * sigma) @ basis[0]).view(tokens, heads, dim)
            if name == "k":
                x = rotate(x, rotary[".cos"], rotary[".sin"], rotary[".partner"])
        planes[name] = x.bfloat16()
    return planes


def token_ids(layout: Layout, seed: int) -> list[int]:
    """Of one chunk; some repeat, as they do in text."""
    rng = random.Random(seed)
    return [min(int(rng.paretovariate(0.7)), 100_000) for _ in range(layout.chunk_tokens)]


def pipelines(artefacts: dict[str, bytes]) -> dict[str, Pipeline]:
    """Every named pipeline but `ladder-tokens`, which is `ladder-klt` and a small product, and a larger artefact."""
    found = {name: named_pipeline(name) for name in NAMED}
    calibrated = [name for name in CALIBRATED if name not in _NEEDS_TOKENS]
    return found | {name: named_pipeline(name, artefacts) for name in calibrated}


def cpu_rows(run: Run, artefacts: dict[str, bytes], seed: int) -> list[Row]:
    """Encode and decode of every pipeline and level, interleaved."""
    layout = run.layout
    artefact = load_artefact(next(iter(artefacts.values())))
    plain, shaped = synthetic_planes(layout, None, seed), synthetic_planes(layout, artefact, seed)
    ids = token_ids(layout, seed)
    key = chunk_keys(layout, ids)[0]
    known = pipelines(artefacts)
    context = Context(token_ids=ids)
    # Calibrated pipelines get values as they expect them.
    planes = {name: shaped if pipeline.artefacts else plain for name, pipeline in known.items()}
    frames = {
        name: encode(planes[name], layout, pipeline, key=key, context=context) for name, pipeline in known.items()
    }
    cases = [Case(name, level) for name, frame in frames.items() for level in (None, *range(frame.levels))]
    rng = random.Random(seed)
    samples: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(run.rounds + 1):
        for case in rng.sample(cases, len(cases)):
            work: Callable[[], object]
            if case.level is None:
                pipeline = known[case.pipeline]
                work = partial(encode, planes[case.pipeline], layout, pipeline, key=key, context=context)
            else:
                held = frames[case.pipeline].truncated(case.level)
                work = partial(decode, held, layout, artefacts, key=key, token_ids=ids)
            taken_s = _timed(work)
            # The first round compiles and warms up.
            if number:
                samples[case].append(taken_s)
        print(f"round {number} of {run.rounds}")
    return [_row(case, taken, layout, frames[case.pipeline]) for case, taken in samples.items()]


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    result = work()
    taken_s = time.perf_counter() - start_s
    # Giving memory back is not part of the work.
    del result
    return taken_s


def _row(case: Case, taken_s: Sequence[float], layout: Layout, frame: Frame) -> Row:
    held = frame if case.level is None else frame.truncated(case.level)
    return {
        "table": "cpu",
        "pipeline": case.pipeline,
        "direction": "encode" if case.level is None else "decode",
        "level": frame.levels - 1 if case.level is None else case.level,
        "ratio": layout.chunk_bytes / held.size_bytes,
        "threads": torch.get_num_threads(),
        "gb_per_s_median": layout.chunk_bytes / median(taken_s) / 1e9,
        "gb_per_s_p10": layout.chunk_bytes / percentile(taken_s, 90) / 1e9,
        "gb_per_s_p90": layout.chunk_bytes / percentile(taken_s, 10) / 1e9,
        "samples": len(taken_s),
    }


def _print(rows: Sequence[Row], aims: Sequence[Aim]) -> None:
    for row in rows:
        words = " ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items()
        )
        print(words)
    for aim in aims:
        print(
            f"{aim.aim}: {aim.value if aim.needs is None else 'needs ' + aim.needs} ({'met' if aim.met else 'missed'})"
        )


if __name__ == "__main__":
    main()
