"""Stages against their definitions, pipelines against `infer`, frames against golden ones, bad values by name."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore.codecs import NAMED, Context, Pipeline, build_pipeline, decode, encode, named_pipeline
from kvstore.codecs.ref.hadamard import rotate, rotation, unrotate
from kvstore.codecs.ref.pack import digits_per_byte, pack, packed_bytes, unpack
from kvstore.codecs.ref.step import digit, quantise, scale_of
from kvstore.codecs.registry import STAGES
from kvstore.codecs.stage import TORCH_DTYPES
from kvstore.errors import FrameCorruptError, LayoutMismatchError, PipelineError
from kvstore.frame import Frame, blob_frame, pack_frame, parse_frame
from kvstore.keys import chunk_keys
from kvstore.layout import ITEM_BYTES, Layout, PlaneSpec, attention_layout

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = attention_layout("m", "r", layers=3, kv_heads=2, head_dim=32, chunk_tokens=16)
KEY = chunk_keys(LAYOUT, range(16))[0]
FLOATS = ("bfloat16", "float16", "float32")
LADDER = named_pipeline("ladder-packed")


def planes_like(layout: Layout, seed: int = 0) -> dict[str, torch.Tensor]:
    """KV-like values: Gaussian, with a few channels that are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    planes = {}
    for name, spec in layout.planes.items():
        x = torch.randn(spec.shape, generator=generator)
        x[..., 0] += 20
        planes[name] = x.to(TORCH_DTYPES[spec.dtype])
    return planes


def layout_of(dtype: str) -> Layout:
    specs = {name: dataclasses.replace(spec, dtype=dtype) for name, spec in LAYOUT.planes.items()}
    return dataclasses.replace(LAYOUT, planes=specs)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative squared error."""
    return float((found.double() - exact.double()).square().sum() / exact.double().square().sum())


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("group_layers", [0, 1, 2, 3])
def test_raw_gives_back_every_bit(dtype: str, group_layers: int) -> None:
    layout = layout_of(dtype)
    key = chunk_keys(layout, range(16))[0]
    generator = torch.Generator().manual_seed(1)
    planes = {
        name: torch.randint(0, 256, (spec.size_bytes,), generator=generator, dtype=torch.uint8)
        .view(TORCH_DTYPES[dtype])
        .view(spec.shape)
        for name, spec in layout.planes.items()
    }
    frame = encode(planes, layout, named_pipeline("raw"), key=key, context=Context(group_layers=group_layers))
    frame.verify(key)
    found = decode(frame, layout, key=key)
    for name, plane in planes.items():
        assert torch.equal(found[name].view(torch.uint8), plane.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_layers", [0, 1, 2])
def test_every_level_has_the_distortion_that_its_header_says(dtype: str, group_layers: int) -> None:
    layout = layout_of(dtype)
    key = chunk_keys(layout, range(16))[0]
    planes = planes_like(layout)
    frame = encode(planes, layout, LADDER, key=key, context=Context(512, group_layers))
    assert frame.head.header.first_position == 512
    assert frame.levels == 3
    for level in range(3):
        found = decode(frame.truncated(level), layout, key=key)
        for name, plane in planes.items():
            assert found[name].dtype == plane.dtype
            said = frame.head.header.distortion[name][level]
            assert math.isclose(error(found[name], plane), said, rel_tol=1e-3)


def test_each_level_gains_more_than_nine_decibels() -> None:
    layout = attention_layout("m", "r", layers=2, kv_heads=2, head_dim=64, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    planes = {name: torch.randn(spec.shape, generator=generator) for name, spec in layout.planes.items()}
    key = chunk_keys(layout, range(256))[0]
    frame = encode(planes, layout, LADDER, key=key)
    decibels = [-10 * math.log10(level) for level in frame.head.header.distortion["k"]]
    assert decibels[0] > 6.2
    assert decibels[1] - decibels[0] > 8.8
    assert decibels[2] - decibels[1] > 9.2


def test_one_stored_copy_is_much_smaller_at_its_lower_levels() -> None:
    layout = attention_layout("m", "r", layers=4, kv_heads=2, head_dim=64)
    key = chunk_keys(layout, range(256))[0]
    frame = encode(planes_like(layout), layout, LADDER, key=key)
    ratios = [layout.chunk_bytes / frame.truncated(level).size_bytes for level in range(3)]
    assert [round(ratio, 1) for ratio in ratios] == [8.2, 4.5, 3.1]


@pytest.mark.parametrize("pipeline", NAMED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_golden_frames_decode_to_what_was_encoded(pipeline: str, dtype: str) -> None:
    frame = parse_frame(bytearray((GOLDEN / f"{pipeline}-{dtype}-v1.kvf").read_bytes()))
    layout = layout_of(dtype)
    key = chunk_keys(layout, range(16))[0]
    frame.verify(key)
    for level in range(frame.levels):
        found = decode(frame.truncated(level), layout, key=key)
        for name, plane in planes_like(layout).items():
            errors = frame.head.header.distortion.get(name)
            assert error(found[name], plane) <= (1.001 * errors[level] if errors else 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_raw_frames_are_written_again_byte_for_byte(dtype: str) -> None:
    layout = layout_of(dtype)
    frame = encode(planes_like(layout), layout, named_pipeline("raw"), key=chunk_keys(layout, range(16))[0])
    assert (GOLDEN / f"raw-{dtype}-v1.kvf").read_bytes() == b"".join(frame.buffers())


def test_an_mla_layout_goes_through_every_pipeline() -> None:
    layout = Layout("mla", "r", {"latent": PlaneSpec("bfloat16", (2, 16, 1, 512))}, chunk_tokens=16)
    planes, key = planes_like(layout), chunk_keys(layout, range(16))[0]
    for name in NAMED:
        found = decode(encode(planes, layout, named_pipeline(name), key=key), layout, key=key)
        assert error(found["latent"], planes["latent"]) < 0.01


@pytest.mark.parametrize("pipeline", NAMED)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-38, 1e30])
def test_constant_planes_survive(pipeline: str, value: float) -> None:
    planes = {name: torch.full(spec.shape, value).bfloat16() for name, spec in LAYOUT.planes.items()}
    found = decode(encode(planes, LAYOUT, named_pipeline(pipeline), key=KEY), LAYOUT, key=KEY)
    for name, plane in planes.items():
        assert torch.allclose(found[name].double(), plane.double(), rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plane", ["k", "v"])
def test_values_that_no_lossy_pipeline_can_encode_are_refused_by_name(value: float, plane: str) -> None:
    planes = planes_like(LAYOUT)
    planes[plane][1, 2, 1, 3] = value
    with pytest.raises(PipelineError, match=f"plane '{plane}' has 1 values"):
        encode(planes, LAYOUT, LADDER, key=KEY)
    found = decode(encode(planes, LAYOUT, named_pipeline("raw"), key=KEY), LAYOUT, key=KEY)
    assert torch.equal(found[plane].view(torch.uint8), planes[plane].view(torch.uint8))


@settings(max_examples=60, deadline=None)
@example([0.0, 0.0, 0.0, 0.0, 0.0, 2.3049897744527852e38, 3.399026599307485e38, 4.005827363335574e37], 0)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8), st.integers(0, 99))
def test_any_finite_values_decode_to_finite_ones_or_are_refused(values: list[float], seed: int) -> None:
    layout = attention_layout("m", "r", layers=1, kv_heads=1, head_dim=8, dtype="float32", chunk_tokens=4)
    key = chunk_keys(layout, range(4))[0]
    planes = planes_like(layout, seed)
    planes["k"][0, 1, 0] = torch.tensor(values)
    try:
        frame = encode(planes, layout, LADDER, key=key)
    except PipelineError:
        # Near the largest float32 the arithmetic itself overflows.
        assert max(map(abs, values)) > 1e37
        return
    assert torch.isfinite(decode(frame, layout, key=key)["k"]).all()


def test_the_rotation_is_orthonormal_and_its_signs_are_fixed() -> None:
    for dim in (1, 2, 64, 128):
        matrix = rotation(dim, 0)
        assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-5)
    assert not torch.equal(rotation(64, 0), rotation(64, 1))
    minus = hashlib.shake_256(b"kvstore signs 1 0 8").digest(1)[0]
    assert (rotation(8, 0)[:, 0] < 0).tolist() == [bool(minus >> bit & 1) for bit in range(8)]
    x = torch.randn(3, 64)
    assert torch.allclose(unrotate(rotate(x, 5), 5), x, atol=1e-5)


def test_a_prefix_of_the_digits_is_the_coarser_quantisation() -> None:
    x = torch.randn(500, 16)
    scale = scale_of(x, 3)
    fine = quantise(x, scale, 3).int() - 13
    coarse = digit(quantise(x, scale, 3), 0, 3).int() - 1
    assert torch.equal(coarse, (fine / 9).round().int())
    assert int(fine.abs().max()) == 13


@settings(deadline=None)
@given(st.integers(2, 256), st.integers(0, 70), st.integers(0, 2**31))
def test_packing_is_exact_and_dense(symbols: int, elements: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, symbols, (elements,), generator=generator, dtype=torch.uint8)
    packed = pack(digits, symbols)
    assert len(packed) == packed_bytes(elements, symbols)
    assert torch.equal(unpack(packed, symbols, elements), digits)


def test_bits_trits_and_nibbles_fill_a_byte() -> None:
    assert [digits_per_byte(symbols) for symbols in (2, 3, 4, 16, 17, 256)] == [8, 5, 4, 2, 1, 1]


@pytest.mark.parametrize("name", NAMED)
def test_infer_says_what_encode_makes(name: str) -> None:
    pipeline = named_pipeline(name)
    specs = LAYOUT.group_specs(3)
    planes = pipeline.encode(planes_like(LAYOUT), specs)
    inferred = pipeline.infer(specs)
    assert planes.keys() == inferred.keys()
    for plane, x in planes.items():
        assert (tuple(x.shape), x.dtype) == (inferred[plane].shape, TORCH_DTYPES[inferred[plane].dtype])


@pytest.mark.parametrize("name", NAMED)
def test_a_pipeline_is_its_json(name: str) -> None:
    pipeline = named_pipeline(name)
    assert build_pipeline(json.loads(json.dumps(pipeline.spec))) == pipeline


def test_a_pipeline_is_a_stage_of_another() -> None:
    outer = Pipeline((Pipeline(LADDER.stages[:3]), Pipeline(LADDER.stages[3:])))
    planes = planes_like(LAYOUT)
    specs = LAYOUT.group_specs(3)
    flat, nested = LADDER.encode(planes, specs), outer.encode(planes, specs)
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    assert torch.equal(LADDER.decode(flat, specs)["k"], outer.decode(nested, specs)["k"])
    assert named_pipeline("raw").lossless
    assert not outer.lossless


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([{"stage": "zip"}], "unknown stage 'zip'"),
        ([{"stage": 3}], "unknown stage 3"),
        ([{"stage": "step", "colour": 1}], "no option 'colour'"),
        ([{"stage": "step", "levels": 0}], "levels must be"),
        ([{"stage": "step", "levels": 2.0}], "levels must be"),
        ([{"stage": "step", "levels": True}], "levels must be"),
        ([{"stage": "hadamard", "seed": -1}], "seed must be"),
    ],
)
def test_pipelines_that_cannot_be_are_refused(specs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        build_pipeline(specs)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(PipelineError, match="ladder-packed"):
        named_pipeline("ladder")


@pytest.mark.parametrize(
    ("dtype", "dim", "stages", "message"),
    [
        ("bfloat16", 44, ["hadamard"], "44 dimensions"),
        ("int8", 32, ["mean"], "not a float plane"),
        ("int8", 32, ["step"], "not a float plane"),
        ("bfloat16", 32, ["mean"], "end the pipeline with the stage 'raw'"),
    ],
)
def test_illegal_combinations_are_refused_without_data(dtype: str, dim: int, stages: list[str], message: str) -> None:
    layout = attention_layout("m", "r", layers=1, kv_heads=1, head_dim=dim, dtype=dtype, chunk_tokens=4)
    pipeline = build_pipeline([{"stage": stage} for stage in stages])
    planes = {name: torch.zeros(spec.shape, dtype=TORCH_DTYPES[dtype]) for name, spec in layout.planes.items()}
    with pytest.raises(PipelineError, match=message):
        encode(planes, layout, pipeline, key=chunk_keys(layout, range(4))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda planes: planes.pop("v"), "has the planes"),
        (lambda planes: planes.update(k=planes["k"].float()), "float32"),
        (lambda planes: planes.update(k=planes["k"][:2]), r"\[2, 16, 2, 32\]"),
    ],
)
def test_planes_that_are_not_the_layouts_are_refused(change: Any, message: str) -> None:
    planes = planes_like(LAYOUT)
    change(planes)
    with pytest.raises(PipelineError, match=message):
        encode(planes, LAYOUT, LADDER, key=KEY)


def test_a_frame_decodes_only_with_its_own_layout_and_key() -> None:
    frame = encode(planes_like(LAYOUT), LAYOUT, LADDER, key=KEY)
    other = dataclasses.replace(LAYOUT, revision="r2")
    with pytest.raises(LayoutMismatchError):
        decode(frame, other, key=KEY)
    with pytest.raises(LayoutMismatchError):
        decode(frame, LAYOUT, key=chunk_keys(LAYOUT, range(1, 17))[0])
    blob = blob_frame(KEY, memoryview(bytearray(16)), 16)
    with pytest.raises(LayoutMismatchError):
        decode(blob, LAYOUT, key=KEY)


def test_an_artefact_that_is_missing_is_named() -> None:
    frame = _forged(artefacts=("cd" * 32,))
    with pytest.raises(PipelineError, match="cd" * 32):
        decode(frame, LAYOUT, key=KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": ({"stage": "raw"},)},
        {"groups": (1, 2)},
        {"groups": (1 << 20,)},
        {"tokens": 17},
        {"pipeline": ({"stage": "step", "levels": 5}, {"stage": "raw"})},
    ],
)
def test_a_header_that_claims_other_sizes_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((FrameCorruptError, LayoutMismatchError, ValueError)):
        decode(_forged(**change), LAYOUT, key=KEY)


def test_segments_of_other_lengths_are_refused() -> None:
    frame = encode(planes_like(LAYOUT), LAYOUT, LADDER, key=KEY)
    parts = [bytes(view) for *_, view in frame.segments()]
    parts[0] = parts[0] + b"\0"
    with pytest.raises(FrameCorruptError, match="its pipeline makes"):
        decode(pack_frame(frame.head.header, parts), LAYOUT, key=KEY)


def test_bytes_that_no_encoder_writes_still_decode_within_bounds() -> None:
    frame = encode(planes_like(LAYOUT), LAYOUT, LADDER, key=KEY)
    parts = [b"\xff" * len(view) for *_, view in frame.segments()]
    found = decode(pack_frame(frame.head.header, parts), LAYOUT, key=KEY)
    assert found["k"].shape == LAYOUT.planes["k"].shape


def test_every_stage_is_listed_under_its_name() -> None:
    assert all(stage.name == name for name, stage in STAGES.items())


def _forged(**change: Any) -> Frame:
    """The frame with another header: sound in itself, but not what its pipeline makes."""
    frame = encode(planes_like(LAYOUT), LAYOUT, LADDER, key=KEY)
    header = dataclasses.replace(frame.head.header, **change)
    return pack_frame(header, [bytes(view) for *_, view in frame.segments()])
