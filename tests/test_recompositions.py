"""Stages of the published methods against their definitions, and the methods against what they published."""

import inspect
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import Context, Pipeline, build_pipeline, decode, encode
from kvstore.codecs.context import known_planes, known_specs, of_group, written_planes
from kvstore.codecs.fast import ans as fast_ans
from kvstore.codecs.recompositions import RECOMPOSITIONS, cachegen, exponent_ans, kivi, kvserve, turboquant
from kvstore.codecs.ref import ans as ref_ans
from kvstore.codecs.ref.codebook import codebook
from kvstore.codecs.ref.exponent import DENSE
from kvstore.codecs.ref.hadamard import hadamard_base, hadamard_matrix, rotate, rotation, unrotate
from kvstore.codecs.registry import STAGES
from kvstore.codecs.stage import TORCH_DTYPES
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.keys import chunk_keys
from kvstore.layout import Layout, PlaneSpec, attention_layout

Planes = dict[str, torch.Tensor]
SMALL = attention_layout("m", "r", layers=3, kv_heads=2, head_dim=32, chunk_tokens=16)
LARGE = attention_layout("m", "r", layers=2, kv_heads=8, head_dim=128, chunk_tokens=256)
ALL = {**RECOMPOSITIONS, "kvserve-low": kvserve(12, 8, 6, 4, (1, 3, 4, 5)), "cachegen-2": cachegen(3, 2)}
ALL |= {f"turboquant-{bits}": turboquant(bits) for bits in (1, 3, 5)}
KEEP = {"stage": "keep", "sinks": 2, "recent": 3}
ANCHOR = {"stage": "anchor", "every": 5}
ALL |= {"keep-kivi": (KEEP, *kivi()), "anchor-cachegen": (ANCHOR, *cachegen(3)), "keep-zstd": (KEEP, *ALL["zstd"])}


def gaussian(layout: Layout, seed: int = 0) -> Planes:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(spec.shape, generator=generator).to(TORCH_DTYPES[spec.dtype])
        for name, spec in layout.planes.items()
    }


def layout_of(dtype: str, shape: tuple[int, ...], names: Sequence[str] = ("k", "v")) -> Layout:
    return Layout("m", "r", {name: PlaneSpec(dtype, shape) for name in names}, chunk_tokens=shape[1])


class Coded:
    """A pipeline run on one layer group, without a frame."""

    def __init__(
        self,
        stages: Sequence[Any],
        layout: Layout,
        planes: Planes,
        context: Context | None = None,
        first_layer: int = 0,
    ) -> None:
        context = context or Context()
        self.pipeline = build_pipeline(stages)
        self.specs = known_specs(layout, layout.layers)
        known = {**known_planes(layout, context.first_position)}
        known[".layer"] = torch.arange(first_layer, first_layer + layout.layers)
        self.known = of_group(known, 0, layout.layers)
        self.planes = dict(self.pipeline.encode({**planes, **self.known, **written_planes(context)}, self.specs))

    def decoded(self, **changed: torch.Tensor) -> Planes:
        changes = {name.replace("__", "."): x for name, x in changed.items()}
        return dict(self.pipeline.decode({**self.planes, **changes, **self.known}, self.specs))

    @property
    def size_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.planes.values())


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).square().sum() / exact.double().square().sum())


def same_bits(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.uint8), exact.contiguous().view(torch.uint8))


# Recompositions: what was published.


def frame_ratio(name: str) -> float:
    layout = attention_layout("m", "r", layers=4, kv_heads=8, head_dim=128)
    frame = encode(
        gaussian(layout), layout, build_pipeline(RECOMPOSITIONS[name]), key=chunk_keys(layout, range(256))[0]
    )
    return layout.chunk_bytes / frame.size_bytes


@pytest.mark.parametrize(
    ("name", "ratio"), [("kivi", 16 / 3), ("splitzip", 1.33), ("fp8", 2.0), ("turboquant", 16 / (4 + 16 / 128))]
)
def test_fixed_rates_are_the_published_ones_in_whole_frames(name: str, ratio: float) -> None:
    assert math.isclose(frame_ratio(name), ratio, rel_tol=0.003)


def test_kivi_takes_two_bits_and_a_pair_for_each_32_elements() -> None:
    coded = Coded(kivi(), LARGE, gaussian(LARGE))
    assert coded.size_bytes * 8 == LARGE.chunk_bytes // 2 * (2 + 2 * 16 / 32)
    assert LARGE.chunk_bytes / coded.size_bytes == 16 / 3


def entropy_bits(q: torch.Tensor) -> float:
    """Order-0 entropy of all symbols of a plane together, in bits."""
    share = torch.bincount(q.flatten()).double() / q.numel()
    return float(-(share[share > 0] * share[share > 0].log2()).sum() * q.numel())


@pytest.mark.parametrize(("k_levels", "v_levels"), [(16, 12), (12, 8), (8, 6), (6, 4)])
def test_kvserve_has_its_level_counts_and_codes_them_within_one_percent_of_their_entropy(
    k_levels: int, v_levels: int
) -> None:
    spec = kvserve(k_levels, v_levels)
    planes = gaussian(LARGE)
    symbols = Coded(spec[:3], LARGE, planes).planes
    coded = Coded(spec, LARGE, planes).planes
    for name, levels in (("k.0", k_levels), ("v.0", v_levels)):
        assert (int(symbols[name].min()), int(symbols[name].max())) == (0, levels - 1)
        by_layer = sum(entropy_bits(layer) for layer in symbols[name])
        assert by_layer < 8 * len(coded[name]) < 1.01 * by_layer
    # A bfloat16 pair a channel of K, and one a token of V.
    assert len(coded["k.step"]) == len(coded["k.low"]) == 2 * 2 * 8 * 128
    assert len(coded["v.step"]) == len(coded["v.low"]) == 2 * 2 * 256


def test_cachegen_has_two_c_plus_one_codes_in_the_published_layers() -> None:
    layout = attention_layout("m", "r", layers=32, kv_heads=1, head_dim=8, chunk_tokens=32)
    planes = {name: torch.randn(spec.shape).bfloat16() for name, spec in layout.planes.items()}
    codes = Coded(cachegen()[:2], layout, planes).planes
    greatest = {name: [int(layer.max()) for layer in codes[f"{name}.0"]] for name in ("k", "v")}
    # The largest magnitude of a token is coded as 0 or 2 C, so all codes from end to end are in use.
    for name, first_layers in (("k", 20), ("v", 4)):
        assert all(14 >= code > 10 for code in greatest[name][:first_layers])
        assert all(code == 10 for code in greatest[name][first_layers:])
    spec = Pipeline(build_pipeline(cachegen()[:2]).stages).infer(known_specs(layout, 32))
    assert spec["k.0"].symbols == spec["v.0"].symbols == 15
    assert cachegen(32, 2)[0] == {"stage": "absmax", "planes": ["k"], "bins": 16, "first_bins": 32, "first_layers": 10}
    with pytest.raises(PipelineError, match="levels"):
        cachegen(32, 3)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_turboquant_has_the_published_errors(bits: int, published: float) -> None:
    # In closed form, from the bounds and values of the codebook alone.
    values = codebook(bits).double()
    middles = (values[1:] + values[:-1]) / 2
    edge = torch.tensor([math.inf], dtype=torch.float64)
    bounds = torch.cat([-edge, middles, edge])
    chance = torch.special.ndtr(bounds).diff()
    density = torch.exp(-(bounds**2) / 2) / math.sqrt(2 * math.pi)
    assert torch.allclose(-density.diff() / chance, values, atol=1e-6)
    assert math.isclose(1 - float((chance * values**2).sum()), published, rel_tol=3e-3)
    # And as it comes out of the pipeline on a source that is not Gaussian at all before the rotation.
    generator = torch.Generator().manual_seed(bits)
    layout = layout_of("float32", (1, 256, 4, 128))
    planes = {name: torch.rand(1, 256, 4, 128, generator=generator) ** 8 - 0.1 for name in ("k", "v")}
    coded = Coded(turboquant(bits), layout, planes)
    assert relative_error(coded.decoded()["k"], planes["k"]) < 1.03 * published
    assert coded.size_bytes * 8 / (2 * 256 * 4 * 128) <= bits + 16 / 128 + 0.01


def test_entropy_coded_exponents_beat_nibbles() -> None:
    planes = gaussian(LARGE)
    coded = Coded(exponent_ans(), LARGE, planes)
    assert 1.5 < LARGE.chunk_bytes / coded.size_bytes < 1.53
    assert all(same_bits(coded.decoded()[name], x) for name, x in planes.items())


# Every pipeline: `infer`, JSON, odd sizes, frames.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (2, 3, 1, 64), (3, 17, 2, 48), (1, 40, 3, 128)])
def test_infer_says_what_encode_makes_of_any_size(name: str, shape: tuple[int, ...]) -> None:
    layout = layout_of("bfloat16", shape)
    planes = gaussian(layout)
    coded = Coded(ALL[name], layout, planes, Context(last=True))
    inferred = {name: spec for name, spec in coded.pipeline.infer(coded.specs).items() if not name.startswith(".")}
    assert coded.planes.keys() == inferred.keys()
    for plane, x in coded.planes.items():
        spec = inferred[plane]
        assert x.dtype == torch.uint8
        assert x.numel() <= spec.size_bytes if spec.at_most else x.numel() == spec.size_bytes
    found = coded.decoded()
    for plane, x in planes.items():
        assert found[plane].shape == x.shape
        assert same_bits(found[plane], x) or not coded.pipeline.lossless
        assert relative_error(found[plane], x) < 0.4


@pytest.mark.parametrize("name", ALL)
def test_recompositions_are_their_json(name: str) -> None:
    pipeline = build_pipeline(ALL[name])
    assert build_pipeline(json.loads(json.dumps(pipeline.spec))) == pipeline
    assert build_pipeline(json.loads(json.dumps(ALL[name]))) == pipeline
    assert pipeline.stages[-1].name == "raw"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("group_layers", [0, 1, 2])
def test_frames_know_their_layers_whatever_the_groups(name: str, group_layers: int) -> None:
    planes = gaussian(SMALL)
    key = chunk_keys(SMALL, range(16))[0]
    frame = encode(planes, SMALL, build_pipeline(ALL[name]), key=key, context=Context(0, group_layers, last=True))
    frame.verify(key)
    found = decode(frame, SMALL, key=key)
    for plane, x in planes.items():
        said = frame.head.header.distortion.get(plane, (0.0,))[0]
        assert math.isclose(relative_error(found[plane], x), said, rel_tol=1e-3, abs_tol=1e-12)


@pytest.mark.parametrize(
    "stages",
    [
        [{"stage": "hadamard"}, {"stage": "minmax"}, {"stage": "ans", "tables": "channel"}],
        [{"stage": "minmax", "per": "token", "low_levels": 4, "low_heads": [1]}, {"stage": "ans"}],
        [{"stage": "absmax"}, {"stage": "ans"}],
        [{"stage": "hadamard"}, {"stage": "codebook"}, {"stage": "pack"}],
        [KEEP, ANCHOR, {"stage": "fp8"}],
        [{"stage": "exponent"}, {"stage": "pack"}],
        [{"stage": "zstd", "shuffle": True}],
    ],
)
def test_mla_planes_go_through_every_stage(stages: list[dict[str, Any]]) -> None:
    layout = layout_of("bfloat16", (2, 17, 1, 512), ["latent"])
    planes = gaussian(layout)
    found = Coded([*stages, {"stage": "raw"}], layout, planes, Context(last=True)).decoded()
    assert relative_error(found["latent"], planes["latent"]) < 0.2


@pytest.mark.parametrize("name", [name for name, stages in ALL.items() if not build_pipeline(stages).lossless])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_lossy_pipelines_refuse_what_is_not_finite(name: str, value: float) -> None:
    planes = gaussian(SMALL)
    planes["v"][1, 7, 1, 3] = value
    with pytest.raises(PipelineError, match="plane 'v' has 1 values"):
        Coded(ALL[name], SMALL, planes)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-40, 1e30])
def test_constant_planes_come_back(name: str, value: float) -> None:
    planes = {plane: torch.full(spec.shape, value).bfloat16() for plane, spec in SMALL.planes.items()}
    found = Coded(ALL[name], SMALL, planes).decoded()
    # A vector that is constant is the worst there is for a codebook behind a rotation: all of it in one coefficient.
    if not name.startswith("turboquant"):
        assert torch.allclose(found["k"].double(), planes["k"].double(), rtol=0.01, atol=1e-4)
    assert torch.isfinite(found["k"]).all()


def test_magnitudes_that_overflow_are_refused_or_stay_finite() -> None:
    for stages in ALL.values():
        planes = gaussian(SMALL)
        planes["k"][0, 3, 0] = (torch.linspace(-1, 1, 32) * 3.3e38).bfloat16()
        try:
            coded = Coded(stages, SMALL, planes)
        except PipelineError as exc:
            assert "too large" in str(exc)
            continue
        assert not torch.isnan(coded.decoded()["k"]).any()


# Stages: their definitions.


@pytest.mark.parametrize("dim", [1, 2, 12, 20, 24, 28, 40, 48, 56, 64, 96, 112, 320])
def test_hadamard_matrices_are_orthogonal(dim: int) -> None:
    matrix = hadamard_matrix(dim)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, dim * torch.eye(dim))
    x = torch.randn(3, dim)
    assert torch.allclose(unrotate(rotate(x, 5), 5), x, atol=1e-5)


def test_dimensions_without_a_factorisation_are_known() -> None:
    known = [dim for dim in range(1, 130) if hadamard_base(dim)]
    assert known == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert hadamard_base(0) == 0


def test_blocks_are_rotated_one_by_one() -> None:
    x = torch.randn(5, 36)
    y = rotate(x, 1, 12)
    assert torch.allclose(y[:, 12:24], x[:, 12:24] @ rotation(12, 1), atol=1e-6)
    assert torch.allclose(unrotate(y, 1, 12), x, atol=1e-5)
    layout = layout_of("bfloat16", (1, 4, 1, 36))
    build_pipeline([{"stage": "hadamard", "block": 12}]).infer(layout.planes)
    for block, message in ((0, "36 dimensions"), (16, "no multiple of the block 16"), (9, "9 dimensions")):
        with pytest.raises(PipelineError, match=message):
            build_pipeline([{"stage": "hadamard", "block": block}]).infer(layout.planes)


@pytest.mark.parametrize(
    ("position", "last", "kept"),
    [(0, False, [0, 1]), (0, True, [0, 1, 13, 14, 15]), (16, False, []), (16, True, [13, 14, 15])],
)
def test_sinks_and_recent_tokens_are_kept_bit_for_bit(position: int, last: bool, kept: list[int]) -> None:
    planes = gaussian(SMALL)
    coded = Coded([KEEP], SMALL, planes, Context(position, last=last))
    assert same_bits(coded.planes["k.kept"], planes["k"][:, kept])
    rest = [token for token in range(16) if token not in kept]
    assert same_bits(coded.planes["k"][:, rest], planes["k"][:, rest])
    mean = planes["k"][:, rest].float().mean(1, keepdim=True).bfloat16()
    assert same_bits(coded.planes["k"][:, kept], mean.expand(-1, len(kept), -1, -1))
    assert all(same_bits(coded.decoded()[name], x) for name, x in planes.items())


@pytest.mark.parametrize("coder", [[], [{"stage": "zstd"}]])
def test_chunks_that_keep_nothing_have_an_empty_plane(coder: list[dict[str, Any]]) -> None:
    planes = gaussian(SMALL)
    coded = Coded([KEEP, *coder, {"stage": "raw"}], SMALL, planes, Context(16))
    assert len(coded.planes["k.kept"]) < 12
    assert all(same_bits(coded.decoded()[name], x) for name, x in planes.items())


def test_bad_values_of_kept_tokens_stay_with_them() -> None:
    planes = gaussian(SMALL)
    planes["k"][0, 1, 0, 0] = math.nan
    assert same_bits(Coded([KEEP], SMALL, planes).decoded()["k"], planes["k"])
    assert torch.isfinite(Coded([KEEP, *kivi()[:2]], SMALL, planes).decoded()["k"][:, 2:]).all()


def test_kept_tokens_are_exact_behind_a_lossy_quantiser() -> None:
    planes = gaussian(SMALL)
    found = Coded(ALL["keep-kivi"], SMALL, planes, Context(last=True)).decoded()
    kept = [0, 1, 13, 14, 15]
    assert same_bits(found["k"].bfloat16()[:, kept], planes["k"][:, kept])
    assert not same_bits(found["k"].bfloat16(), planes["k"])


@pytest.mark.parametrize("tokens", [0, 1, 3, 4])
def test_other_numbers_of_kept_tokens_are_refused(tokens: int) -> None:
    coded = Coded([KEEP], SMALL, gaussian(SMALL), Context(last=True))
    with pytest.raises(FrameCorruptError, match="stage 'keep'"):
        coded.decoded(k__kept=coded.planes["k.kept"][:, :tokens])


def test_anchors_are_the_first_tokens_of_their_groups() -> None:
    layout = layout_of("float32", (1, 7, 2, 4))
    planes = gaussian(layout)
    coded = Coded([{"stage": "anchor", "every": 3}], layout, planes).planes
    assert torch.equal(coded["k.anchor"], planes["k"][:, [0, 3, 6]].bfloat16())
    for token in range(7):
        expected = planes["k"][:, token] - planes["k"][:, token // 3 * 3].bfloat16().float()
        assert torch.equal(coded["k"][:, token], expected)


def test_minmax_is_its_definition() -> None:
    layout = layout_of("float32", (2, 9, 3, 8))
    planes = gaussian(layout)
    x = planes["k"]
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"per": "channel"}, lambda t, d: (slice(None), slice(None), slice(d, d + 1))),
        (
            {"per": "channel", "group": 4},
            lambda t, d: (slice(t // 4 * 4, t // 4 * 4 + 4), slice(None), slice(d, d + 1)),
        ),
        ({"per": "token", "group": 3}, lambda t, d: (slice(t, t + 1), slice(None), slice(d // 3 * 3, d // 3 * 3 + 3))),
    ]
    for options, members in cases:
        q = Coded([{"stage": "minmax", "levels": 7, **options}], layout, planes).planes["k.0"]
        for t, d in ((0, 0), (3, 5), (8, 7), (5, 2)):
            tokens, _, dims = members(t, d)
            group = x[1, tokens, 2, dims]
            step = (group.max() - group.min()).clamp(min=1e-5) / 6
            expected = ((x[1, t, 2, d] - group.min().bfloat16().float()) / step.bfloat16().float()).round().clamp(0, 6)
            assert int(q[1, t, 2, d]) == int(expected)


def test_minmax_merges_the_heads_of_a_class() -> None:
    layout = layout_of("float32", (3, 5, 2, 4))
    planes = gaussian(layout)
    # Layers 4, 5, 6 of the model: the first has only high heads, the second one of each, the third only low ones.
    stages = [{"stage": "minmax", "levels": 9, "per": "token", "low_levels": 3, "low_heads": [11, 12, 13]}]
    coded = Coded(stages, layout, planes, first_layer=4)
    assert coded.planes["k.step"].shape == (1, 4 * 5)
    q = coded.planes["k.0"]
    assert [int(x.max()) for x in (q[0], q[1, :, 0], q[1, :, 1], q[2])] == [8, 8, 2, 2]
    pairs = coded.planes["k.step"].view(4, 5)
    heads = [planes["k"][0], planes["k"][1, :, :1], planes["k"][1, :, 1:], planes["k"][2]]
    for found, members, levels in zip(pairs, heads, (9, 9, 3, 3), strict=True):
        spread = members.amax((1, 2)) - members.amin((1, 2))
        assert torch.equal(found, (spread / (levels - 1)).bfloat16())
    assert ((coded.decoded()["k"] - planes["k"])[0].abs().amax((1, 2)) <= 0.52 * pairs[0].float() + 0.02).all()
    with pytest.raises(FrameCorruptError, match="stage 'minmax'"):
        coded.decoded(k__step=coded.planes["k.step"][:, 1:])


def test_minmax_steps_are_never_zero() -> None:
    layout = layout_of("float32", (1, 4, 1, 4))
    planes = {name: torch.full((1, 4, 1, 4), 2.0) for name in layout.planes}
    coded = Coded([{"stage": "minmax", "levels": 5}], layout, planes)
    assert torch.allclose(coded.planes["k.step"].float(), torch.tensor(1e-5 / 4), rtol=0.01)
    assert torch.equal(coded.decoded()["k"], planes["k"])


def test_absmax_is_its_definition() -> None:
    layout = layout_of("float32", (2, 6, 2, 8))
    planes = gaussian(layout)
    stages = [{"stage": "absmax", "bins": 12, "first_bins": 32, "first_layers": 4}]
    coded = Coded(stages, layout, planes, first_layer=3)
    for layer, centre in ((0, 15), (1, 5)):
        x = planes["k"][layer]
        greatest = x.abs().amax((1, 2), keepdim=True).bfloat16().float()
        expected = (x * centre / greatest + centre).round().clamp(0, 2 * centre)
        assert ((coded.planes["k.0"][layer].float() - expected).abs() <= (expected % 1 == 0.5)).all()
        assert torch.allclose(coded.decoded()["k"][layer], (expected - centre) * greatest / centre, atol=1e-5)


def test_fp8_is_scaled_by_head_and_saturates_without_a_scale() -> None:
    planes = gaussian(SMALL)
    planes["k"] *= 1000
    coded = Coded([{"stage": "fp8"}], SMALL, planes)
    assert coded.planes["k.scale"].shape == (3, 1, 2, 1)
    assert coded.planes["k.0"].float().abs().amax((1, 3)).eq(448).all()
    assert relative_error(coded.decoded()["k"], planes["k"]) < 0.001
    plain = Coded([{"stage": "fp8", "scaled": False, "planes": ["k"]}], SMALL, planes)
    assert plain.planes.keys() == {"k.0", "v"}
    assert torch.equal(plain.decoded()["k"], planes["k"].float().clamp(-448, 448).to(torch.float8_e4m3fn).float())


# Lossless stages.


def test_exponents_keep_every_bit_pattern() -> None:
    patterns = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(1, 64, 4, 256)
    layout = layout_of("bfloat16", (1, 64, 4, 256), ["k"])
    coded = Coded([{"stage": "exponent"}], layout, {"k": patterns})
    # All 256 exponents are alike here, so 15 of 16 elements are escapes: as many as there can be.
    assert int(coded.planes["k.escapes"][0]) == DENSE
    assert len(coded.planes["k.escapes"]) == (1 << 16) + 1
    assert same_bits(coded.decoded()["k"], patterns)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=60), st.integers(0, 300))
def test_exponents_are_lossless_for_any_bits(rare: list[int], common: int) -> None:
    bits = torch.tensor([*rare, *[0x3F80] * common]).to(torch.int16)
    layout = layout_of("bfloat16", (1, len(bits), 1, 1), ["k"])
    x = bits.view(torch.bfloat16).view(1, -1, 1, 1)
    assert same_bits(Coded(ALL["splitzip"], layout, {"k": x}).decoded()["k"], x)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn", "int16", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_zstd_is_lossless_for_every_dtype(dtype: str, shuffle: bool) -> None:
    layout = layout_of(dtype, (2, 3, 1, 5))
    generator = torch.Generator().manual_seed(0)
    planes = {
        name: torch.randint(0, 256, (spec.size_bytes,), generator=generator, dtype=torch.uint8)
        .view(TORCH_DTYPES[dtype])
        .view(spec.shape)
        for name, spec in layout.planes.items()
    }
    coded = Coded([{"stage": "zstd", "level": 1, "shuffle": shuffle}, {"stage": "raw"}], layout, planes)
    assert all(same_bits(coded.decoded()[name], x) for name, x in planes.items())


def zstd_frame(data: bytes, **options: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor(**options).compress(data)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (zstd_frame(bytes(1 << 26)), "claims 67108864 bytes"),
        (zstd_frame(bytes(6144), write_content_size=False), "claims -1 bytes"),
        (zstd_frame(bytes(6143)), "claims 6143 bytes"),
        (torch.cat([zstd_frame(bytes(6144))] * 2), "cannot be decompressed"),
        (zstd_frame(bytes(6144))[:-1], "cannot be decompressed"),
        (torch.zeros(9, dtype=torch.uint8), "cannot be decompressed"),
        (torch.zeros(0, dtype=torch.uint8), "cannot be decompressed"),
    ],
)
def test_zstd_frames_of_other_sizes_are_refused_before_anything_is_allocated(frame: torch.Tensor, message: str) -> None:
    coded = Coded(RECOMPOSITIONS["zstd"], SMALL, gaussian(SMALL))
    with pytest.raises(FrameCorruptError, match=f"stage 'zstd': plane 'k' {message}"):
        coded.decoded(k=frame)


# rANS.


def symbols_like(elements: int, symbols: int, seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.05, 0.5, 2.0]) * symbols / 6
    return rng.normal(symbols / 2, spread, elements).round().clip(0, symbols - 1).astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 17, 130]), st.integers(1, 2), st.integers(1, 9)),
    st.integers(2, 256),
    st.sampled_from(["plane", "layer", "channel"]),
    st.integers(0, 2**31),
)
def test_the_compiled_coder_is_the_plain_one(shape: tuple[int, ...], symbols: int, tables: str, seed: int) -> None:
    plan = ref_ans.plan_of(shape, tables)
    q = symbols_like(plan.elements, symbols, seed)
    segment = ref_ans.encode(q, symbols, plan, ref_ans.PLAIN)
    assert np.array_equal(segment, ref_ans.encode(q, symbols, plan, fast_ans.COMPILED))
    assert len(segment) <= ref_ans.bound_bytes(plan, symbols)
    for loops in (ref_ans.PLAIN, fast_ans.COMPILED):
        assert np.array_equal(ref_ans.decode(segment, symbols, plan, loops), q)


@pytest.mark.parametrize("tables", ["plane", "layer", "channel"])
def test_several_lanes_are_coded_alike(tables: str) -> None:
    plan = ref_ans.plan_of((2, 520, 2, 6), tables)
    q = symbols_like(plan.elements, 200, 5)
    segment = ref_ans.encode(q, 200, plan, ref_ans.PLAIN)
    assert segment[0] >= 3
    assert np.array_equal(segment, ref_ans.encode(q, 200, plan, fast_ans.COMPILED))
    for loops in (ref_ans.PLAIN, fast_ans.COMPILED):
        assert np.array_equal(ref_ans.decode(segment, 200, plan, loops), q)


def test_segments_are_written_as_they_always_were() -> None:
    q = np.array([0, 1, 2, 2, 2, 1, 2, 2, 2, 2, 3, 2, 2, 1, 2, 2], np.uint8)
    found = ref_ans.encode(q, 5, ref_ans.plan_of((1, 16, 1, 1), "layer"), fast_ans.COMPILED)
    assert found.tobytes().hex() == "000105004210250001000f000130000b009b"


def test_compiled_loops_have_the_signatures_of_the_plain_ones() -> None:
    for plain, compiled in zip(ref_ans.PLAIN, fast_ans.COMPILED, strict=True):
        python: Any = getattr(compiled, "py_func", compiled)
        original: Any = plain
        assert (python.__name__, inspect.signature(python)) == (original.__name__, inspect.signature(original))


def test_lanes_cost_little_and_are_long() -> None:
    for elements, bits in ((1 << 20, 3.0), (1 << 20, 0.1), (5000, 8.0), (1, 1.0), (1 << 22, 0.0)):
        lanes = ref_ans.lanes_of(elements, elements * bits / 8)
        assert lanes == 1 or elements >= 1024 * lanes
        assert lanes * 65535 >= elements
        assert lanes <= math.ceil(elements / 65535) * 2 or lanes * 6 <= 0.02 * elements * bits / 8


def test_a_plane_of_one_symbol_costs_no_words() -> None:
    plan = ref_ans.plan_of((1, 4096, 1, 1), "plane")
    assert len(ref_ans.encode(np.full(4096, 3, np.uint8), 5, plan, fast_ans.COMPILED)) == 4 + 6 + 1


def test_symbols_beyond_the_alphabet_are_refused() -> None:
    stage = build_pipeline([{"stage": "ans"}])
    specs = {"k.0": PlaneSpec("uint8", (1, 4, 1, 2), level=0, symbols=3)}
    with pytest.raises(PipelineError, match="beyond its alphabet of 3"):
        stage.encode({"k.0": torch.full((1, 4, 1, 2), 3, dtype=torch.uint8)}, specs)


# Damage.


DAMAGED = {
    "ans": [{"stage": "minmax", "levels": 11}, {"stage": "ans"}, {"stage": "raw"}],
    "ans-channel": [{"stage": "minmax", "levels": 200}, {"stage": "ans", "tables": "channel"}, {"stage": "raw"}],
    "zstd": RECOMPOSITIONS["zstd"],
    "zstd-keep": [KEEP, {"stage": "zstd"}, {"stage": "raw"}],
    "exponent": RECOMPOSITIONS["splitzip"],
    "exponent-ans": RECOMPOSITIONS["exponent-ans"],
    "keep": [KEEP, {"stage": "raw"}],
    "kvserve-low": ALL["kvserve-low"],
    "turboquant": [{"stage": "hadamard"}, {"stage": "codebook", "bits": 3}, {"stage": "raw"}],
}
SOUND = {name: Coded(stages, SMALL, gaussian(SMALL), Context(last=True)) for name, stages in DAMAGED.items()}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str, torch.Tensor]:
    """A pipeline, one of its planes, and other bytes of a length that a frame may give it."""
    name = draw(st.sampled_from(sorted(SOUND)))
    coded = SOUND[name]
    plane = draw(st.sampled_from(sorted(coded.planes)))
    spec = coded.pipeline.infer(coded.specs)[plane]
    data = bytearray(coded.planes[plane].numpy().tobytes())
    kind = draw(st.sampled_from(["flip", "cut", "random", "extend"]))
    if kind == "flip":
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, min(len(data), 64) - 1)))
            data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif kind == "random":
        data = bytearray(draw(st.binary(max_size=200)))
    else:
        data += draw(st.binary(min_size=1, max_size=20))
    if not spec.at_most:
        data = (data + bytes(spec.size_bytes))[: spec.size_bytes]
    data = data[: spec.size_bytes]
    return name, plane, torch.tensor(list(data), dtype=torch.uint8)


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_damage_is_a_typed_error_or_a_result_of_the_right_shape(case: tuple[str, str, torch.Tensor]) -> None:
    name, plane, data = case
    coded = SOUND[name]
    try:
        found = coded.decoded(**{plane: data})
    except (FrameCorruptError, PipelineError) as exc:
        assert "stage '" in str(exc)
        return
    assert all(found[plane].shape == spec.shape for plane, spec in SMALL.planes.items())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_rans_is_nearly_always_noticed_and_never_by_one_coder_alone(data: st.DataObject) -> None:
    plan = ref_ans.plan_of((2, 40, 1, 3), "layer")
    q = symbols_like(plan.elements, 9, 1)
    segment = ref_ans.encode(q, 9, plan, fast_ans.COMPILED)
    place = data.draw(st.integers(0, len(segment) - 1))
    segment[place] ^= data.draw(st.integers(1, 255))
    outcomes: list[Any] = []
    for loops in (ref_ans.PLAIN, fast_ans.COMPILED):
        try:
            outcomes.append(ref_ans.decode(segment, 9, plan, loops).tolist())
        except ValueError as exc:
            outcomes.append(str(exc))
    assert outcomes[0] == outcomes[1]


def test_every_check_of_a_segment_has_its_message() -> None:
    plan = ref_ans.plan_of((1, 3000, 1, 1), "plane")
    segment = ref_ans.encode(symbols_like(3000, 9, 1), 9, plan, fast_ans.COMPILED)
    lanes = 1 << int(segment[0])
    tables = 4 + 6 * lanes
    changes: list[tuple[dict[int, int], int, str]] = [
        ({}, 3, "header is cut off"),
        ({1: 9}, 0, "not that of this plane"),
        ({2: 8}, 0, "not that of this plane"),
        ({0: 255}, 0, "too many lanes"),
        ({0: 2}, 0, "too many lanes"),
        ({6: 0, 7: 0}, 0, "a state is too small"),
        ({}, tables + 1, "tables are cut off"),
        ({}, tables + 4, "tables are cut off"),
        ({tables + 1: 255}, 0, "symbols beyond the alphabet"),
        ({tables: 0, tables + 1: 0}, 0, "a table is empty"),
        ({tables + 2: 0, tables + 3: int(segment[tables + 3]) & 0xF0}, 0, "a frequency is zero"),
        ({tables + 2: 255, tables + 3: 255, tables + 4: 255}, 0, "add up to more"),
        ({}, len(segment) - 2, "bytes of words and says"),
        ({len(segment) - 1: int(segment[-1]) ^ 1}, 0, "does not end where it began"),
    ]
    for change, length, message in changes:
        damaged_segment = segment.copy()
        for place, value in change.items():
            damaged_segment[place] = value
        with pytest.raises(ValueError, match=message):
            ref_ans.decode(damaged_segment[: length or None], 9, plan, fast_ans.COMPILED)


# Options.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"stage": "hadamard", "seed": True}, "seed must be"),
        ({"stage": "hadamard", "block": -1}, "block must be"),
        ({"stage": "keep", "sinks": True}, "sinks must be"),
        ({"stage": "keep", "recent": -1}, "recent must be"),
        ({"stage": "anchor", "every": 0}, "every must be"),
        ({"stage": "minmax", "levels": 1}, "levels must be"),
        ({"stage": "minmax", "levels": 257}, "levels must be"),
        ({"stage": "minmax", "levels": 2.0}, "levels must be"),
        ({"stage": "minmax", "per": "head"}, "per must be one of channel, token"),
        ({"stage": "minmax", "per": ["channel"]}, "per must be"),
        ({"stage": "minmax", "group": -1}, "group must be"),
        ({"stage": "minmax", "low_heads": [1]}, "go together"),
        ({"stage": "minmax", "low_levels": 4}, "go together"),
        ({"stage": "minmax", "low_levels": 1, "low_heads": [1]}, "go together"),
        ({"stage": "minmax", "low_levels": 4, "low_heads": [True]}, "low_heads must be"),
        ({"stage": "minmax", "low_levels": 4, "low_heads": [2, 2]}, "a number twice"),
        ({"stage": "minmax", "low_levels": 4, "low_heads": 3}, "low_heads must be"),
        ({"stage": "minmax", "planes": "k"}, "planes must be a list"),
        ({"stage": "minmax", "planes": [1]}, "planes must be a list"),
        ({"stage": "minmax", "planes": ["k", "k"]}, "one plane twice"),
        ({"stage": "absmax", "bins": 3}, "bins must be"),
        ({"stage": "absmax", "first_bins": 16}, "go together"),
        ({"stage": "absmax", "first_bins": 2, "first_layers": 1}, "go together"),
        ({"stage": "absmax", "first_layers": 1}, "go together"),
        ({"stage": "codebook", "bits": 6}, "bits must be"),
        ({"stage": "codebook", "bits": True}, "bits must be"),
        ({"stage": "fp8", "scaled": 1}, "scaled must be"),
        ({"stage": "zstd", "level": 0}, "level must be"),
        ({"stage": "zstd", "shuffle": 1}, "shuffle must be"),
        ({"stage": "exponent", "names": 16}, "no option 'names'"),
        ({"stage": "ans", "tables": "token"}, "tables must be one of plane, layer, channel"),
    ],
)
def test_options_that_cannot_be_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=f"stage '{spec['stage']}'.*{message}"):
        build_pipeline([spec])


@pytest.mark.parametrize(
    ("spec", "dtype", "message"),
    [
        ({"stage": "exponent"}, "float16", "not a bfloat16 plane"),
        ({"stage": "minmax", "planes": ["q"]}, "bfloat16", "no plane 'q'"),
        ({"stage": "keep", "sinks": 1}, "int8", "not a float plane"),
        ({"stage": "keep", "sinks": 1}, "float32", "need the positions"),
        ({"stage": "minmax", "low_levels": 3, "low_heads": [0]}, "float32", "need the numbers of the layers"),
        ({"stage": "absmax", "first_bins": 8, "first_layers": 2}, "float32", "need the numbers of the layers"),
        *(
            ({"stage": stage}, "int8", "not a float plane")
            for stage in ("anchor", "minmax", "absmax", "codebook", "fp8")
        ),
    ],
)
def test_planes_that_a_stage_cannot_handle_are_refused_without_data(
    spec: dict[str, Any], dtype: str, message: str
) -> None:
    with pytest.raises(PipelineError, match=f"stage '{spec['stage']}'.*{message}"):
        build_pipeline([spec]).infer(layout_of(dtype, (1, 4, 1, 8)).planes)


def test_alphabets_without_layers_or_channels_have_no_such_tables() -> None:
    for tables in ("layer", "channel"):
        with pytest.raises(PipelineError, match=f"no tables by {tables}"):
            build_pipeline([{"stage": "ans", "tables": tables}]).infer({"k.0": PlaneSpec("uint8", (9,), 0, symbols=3)})


def test_every_stage_of_a_recomposition_is_listed() -> None:
    assert {stage["stage"] for stages in RECOMPOSITIONS.values() for stage in stages} <= STAGES.keys()
