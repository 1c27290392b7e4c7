"""Chunks, layouts, calibration artefacts and pipelines that the tests of codecs share."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from kvstore.calibration.fit import basis_tensors, klt, metric_root
from kvstore.codecs import CALIBRATED, NAMED, Context, Pipeline, build_pipeline, encode, named_pipeline
from kvstore.codecs.artefact import artefact_digest, save_artefact
from kvstore.codecs.context import known_planes, known_specs, of_group, written_planes
from kvstore.codecs.named import ladder_klt, ladder_tokens
from kvstore.codecs.ref.nested import sigma_units
from kvstore.codecs.stage import TORCH_DTYPES, Specs
from kvstore.frame import Frame
from kvstore.keys import ChunkKey, chunk_keys
from kvstore.layout import Layout, Rope, attention_layout

Planes = dict[str, torch.Tensor]
Artefacts = dict[str, bytes]

FLOATS = ("bfloat16", "float16", "float32")
BARE = attention_layout("m", "r", layers=3, kv_heads=2, head_dim=32, chunk_tokens=16)
ROTARY = dataclasses.replace(BARE, rope=Rope(10000.0, 32))
TINY = attention_layout("m", "r", layers=3, kv_heads=2, head_dim=8, chunk_tokens=16, rope=Rope(10000.0, 8))
"""The layout of artefacts that are a few kilobytes."""

BFLOAT16_ONLY = ("splitzip", "exponent-ans")
NAMED_CASES = [(name, dtype) for name in NAMED for dtype in FLOATS if dtype == "bfloat16" or name not in BFLOAT16_ONLY]
VOCABULARY = 40
TOKEN_IDS = [(7 * n + 3) % VOCABULARY for n in range(32)]


def of_dtype(layout: Layout, dtype: str) -> Layout:
    """The layout with planes of another dtype."""
    specs = {name: dataclasses.replace(spec, dtype=dtype) for name, spec in layout.planes.items()}
    return dataclasses.replace(layout, planes=specs)


def layout_for(name: str, dtype: str = "bfloat16") -> Layout:
    """The layout with which a named pipeline is tested: with rotary embedding where it needs one, and only there."""
    return of_dtype(ROTARY if "rope" in stages_of(name) else BARE, dtype)


def stages_of(name: str) -> set[str]:
    """Names of the stages of a named pipeline."""
    return {stage["stage"] for stage in NAMED[name]}


def key_of(layout: Layout) -> ChunkKey:
    """Key of a first chunk."""
    return chunk_keys(layout, range(layout.chunk_tokens))[0]


def planes_like(layout: Layout, seed: int = 0) -> Planes:
    """KV-like values: Gaussian, with a channel that is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    planes = {}
    for name, spec in layout.planes.items():
        x = torch.randn(spec.shape, generator=generator)
        x[..., 0] += 20
        planes[name] = x.to(TORCH_DTYPES[spec.dtype])
    return planes


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative squared error."""
    return float((found.double() - exact.double()).square().sum() / exact.double().square().sum())


def same_bits(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return torch.equal(found.contiguous().view(torch.uint8), exact.contiguous().view(torch.uint8))


# Calibration artefacts.


def make_tensors(
    layout: Layout = TINY,
    *,
    group_layers: int = 1,
    joint: bool = False,
    by_head: bool = False,
    window: int = 0,
    seed: int = 0,
) -> Planes:
    """Tensors of an artefact as `kvstore calibrate` would make them, from nothing but a seed."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers, _, heads, dim = layout.planes["k"].shape
    # What `planes_like` makes, rotary embedding undone: a channel of V with a mean, a pair of K that turns.
    spread = torch.ones(2, heads, dim, dtype=torch.float64)
    spread[0, :, 0] = spread[0, :, dim // 2] = 200
    means = torch.zeros(2, heads, dim)
    means[1, :, 0] = 20
    tensors: Planes = {"probes": random(layers, 2 * heads, 6, dim).half()}
    for first in range(0, layers, group_layers):
        group = min(group_layers, layers - first)
        spans = {"kv": spread.repeat(group, 1, 1)} if joint else {"k": spread[:1].repeat(group, 1, 1)}
        spans |= {} if joint else {"v": spread[1:].repeat(group, 1, 1)}
        for name, variance in spans.items():
            bases = []
            for block in variance.view(-1, dim) if by_head else [variance.flatten()]:
                metric = random(len(block), len(block)).double()
                metric = torch.eye(len(block)) * 0.01 + metric @ metric.T * 0.01 / len(block)
                bases.append(klt(torch.diag(block), metric_root(metric)))
            tensors |= basis_tensors(name, first, bases)
    for n, name in enumerate(("k", "v")):
        weight = random(layers, heads, dim).abs() * 0.05 + 0.05
        tensors[f"{name}.mean"] = means[n].repeat(layers, 1, 1)
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.spread"] = sigma_units((weight.square() * spread[n]).mean(-1).sqrt())
    if window:
        tensors["tokens"] = random(VOCABULARY, 4).half()
        for n, name in enumerate(("k", "v")):
            for layer in range(layers):
                matrix = random(4 * window + 1, heads * dim) * 0.1
                matrix[-1] = means[n].flatten()
                tensors[f"{name}.predict.{layer}"] = matrix.half()
    return tensors


def artefacts_of(tensors: Planes, **card: object) -> Artefacts:
    """An artefact under its digest."""
    data = save_artefact(tensors, {"model": "m", **card})
    return {artefact_digest(data): data}


def separate_artefacts() -> Artefacts:
    """For `ladder-weighted`, `ladder-klt` and `kvtc`: a basis for each layer of K and of V."""
    return artefacts_of(make_tensors(), group_layers=1, joint=False)


def joint_artefacts() -> Artefacts:
    """For `ladder-tokens`: one basis for K and V of two layers, the last group ragged, predicted from three tokens."""
    return artefacts_of(make_tensors(group_layers=2, joint=True, window=3), group_layers=2, joint=True, window=3)


# Chunks that a pipeline has encoded.


class Case(NamedTuple):
    """A pipeline with all that it takes to use it."""

    pipeline: Pipeline
    layout: Layout
    artefacts: Artefacts
    context: Context
    key: ChunkKey

    def encode(self, planes: Planes | None = None) -> Frame:
        """The frame of a chunk, by default that of `planes_like`."""
        planes = planes_like(self.layout) if planes is None else planes
        return encode(planes, self.layout, self.pipeline, key=self.key, context=self.context)


def case_of(name: str, dtype: str = "bfloat16", artefacts: Artefacts | None = None) -> Case:
    """A named or calibrated pipeline, with a chunk for it."""
    if name in NAMED:
        layout = layout_for(name, dtype)
        token_ids = TOKEN_IDS[: layout.chunk_tokens] if "repeats" in stages_of(name) else ()
        return Case(named_pipeline(name), layout, {}, Context(token_ids=token_ids), key_of(layout))
    layout = of_dtype(TINY, dtype)
    if artefacts is None:
        artefacts = joint_artefacts() if name == "ladder-tokens" else separate_artefacts()
    context = Context(16, token_ids=TOKEN_IDS) if name == "ladder-tokens" else Context(16)
    return Case(named_pipeline(name, artefacts), layout, artefacts, context, chunk_keys(layout, TOKEN_IDS)[1])


def every_case() -> dict[str, Case]:
    """Every pipeline that has a name, and calibrated ones over several layers."""
    cases = {name: case_of(name) for name in [*NAMED, *CALIBRATED]}
    grouped = artefacts_of(make_tensors(group_layers=2), group_layers=2)
    by_head = artefacts_of(make_tensors(by_head=True, window=1), group_layers=1)
    cases["ladder-klt-groups"] = case_of("ladder-klt", artefacts=grouped)
    cases["ladder-klt-heads"] = case_of("ladder-klt", artefacts=by_head)
    cases["ladder-tokens-heads"] = case_of("ladder-tokens", artefacts=by_head)
    digest = next(iter(grouped))
    packed = [{**stage, "packed_from": 1} if stage["stage"] == "rans" else stage for stage in ladder_klt(digest)]
    packed.insert(-1, {"stage": "pack"})
    cases["ladder-klt-packed"] = cases["ladder-klt-groups"]._replace(pipeline=build_pipeline(packed, grouped))
    zstd = [*ladder_tokens(next(iter(by_head)))[:-1], {"stage": "zstd"}, {"stage": "raw"}]
    cases["ladder-tokens-zstd"] = cases["ladder-tokens-heads"]._replace(pipeline=build_pipeline(zstd, by_head))
    return cases


# What a pipeline makes, without a frame around it.


def whole_chunk(case: Case, planes: Planes | None = None) -> tuple[Specs, Planes]:
    """Specs and planes of all layers as one group, with their context."""
    layout, context = case.layout, case.context
    known = known_planes(layout, context.first_position, context.token_ids)
    chunk = planes_like(layout) if planes is None else planes
    return known_specs(layout, layout.layers), {**chunk, **known, **written_planes(context)}


def quantised(frame: Frame, case: Case) -> list[tuple[Specs, Planes]]:
    """What the coders of a pipeline give back of every layer group: indices and side planes, before any arithmetic."""
    header = frame.head.header
    # The frame's own stages: a name may stand for others by now.
    stages = [
        {**stage, "artefact": header.artefacts[stage["artefact"]]} if "artefact" in stage else stage
        for stage in header.pipeline
    ]
    lossy, coder = build_pipeline(stages, case.artefacts).split()
    known = known_planes(case.layout, header.first_position, case.context.token_ids)
    parts: list[Planes] = [{} for _ in header.groups]
    for _, group, name, view in frame.segments():
        parts[group][name] = torch.frombuffer(bytearray(view), dtype=torch.uint8)
    found, start = [], 0
    for layers, part in zip(header.groups, parts, strict=True):
        specs = known_specs(case.layout, layers)
        context = lossy.announce(specs, of_group(known, start, layers))
        made = lossy.infer(specs)
        found.append((made, dict(coder.decode({**part, **context}, made))))
        start += layers
    return found


def planes_digest(groups: Sequence[tuple[Specs, Mapping[str, torch.Tensor]]]) -> str:
    """SHA-256 of names and bytes of the planes of every layer group."""
    digest = hashlib.sha256()
    for _, planes in groups:
        for name in sorted(planes):
            digest.update(name.encode())
            digest.update(planes[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
