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

from kvstore.codecs import (
    CALIBRATED,
    NAMED,
    Context,
    Pipeline,
    build_pipeline,
    decode,
    encode,
    encode_levels,
    named_pipeline,
)
from kvstore.codecs.artefact import load_artefact
from kvstore.codecs.context import known_specs
from kvstore.codecs.fast.quantise import reconstruct_rows
from kvstore.codecs.ref.classes import tables
from kvstore.codecs.ref.hadamard import rotate, rotation, unrotate
from kvstore.codecs.ref.nested import reconstruct
from kvstore.codecs.ref.pack import digits_per_byte, pack, packed_bytes, unpack
from kvstore.codecs.ref.step import digit, quantise, scale_of
from kvstore.codecs.registry import STAGES
from kvstore.codecs.stage import TORCH_DTYPES, is_context
from kvstore.errors import FrameCorruptError, LayoutMismatchError, PipelineError
from kvstore.frame import Frame, blob_frame, pack_frame
from kvstore.header import LOSSLESS_STAGES, profile_id
from kvstore.keys import chunk_keys
from kvstore.layout import ITEM_BYTES, Layout, PlaneSpec, attention_layout
from kvstore.profile import Level, Profile, Quality
from kvstore.profile_sets import DEFAULT, read_set
from tests.codec_cases import (
    BARE,
    BFLOAT16_ONLY,
    FLOATS,
    error,
    every_case,
    key_of,
    layout_for,
    of_dtype,
    planes_digest,
    planes_like,
    quantised,
    same_bits,
    stages_of,
    whole_chunk,
)
from tests.make_golden import (
    ARTEFACTS,
    GOLDEN,
    GOLDEN_CASES,
    committed,
    golden_artefacts,
    golden_case,
    golden_frame,
)

LAYOUT = BARE
KEY = key_of(LAYOUT)
LADDER = named_pipeline("ladder-packed")
LOSSLESS = [name for name in NAMED if named_pipeline(name).lossless]
LOSSY = [name for name in NAMED if name not in LOSSLESS]
CASES = every_case()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("group_layers", [0, 1, 2, 3])
def test_raw_gives_back_every_bit(dtype: str, group_layers: int) -> None:
    layout = of_dtype(LAYOUT, dtype)
    key = key_of(layout)
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
def test_packed_levels_have_the_distortion_that_the_header_says(dtype: str, group_layers: int) -> None:
    layout = of_dtype(LAYOUT, dtype)
    key = key_of(layout)
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
    key = key_of(layout)
    frame = encode(planes, layout, LADDER, key=key)
    decibels = [-10 * math.log10(level) for level in frame.head.header.distortion["k"]]
    assert decibels[0] > 6.2
    assert decibels[1] - decibels[0] > 8.8
    assert decibels[2] - decibels[1] > 9.2


def test_one_stored_copy_is_much_smaller_at_its_lower_levels() -> None:
    layout = attention_layout("m", "r", layers=4, kv_heads=2, head_dim=64)
    key = key_of(layout)
    frame = encode(planes_like(layout), layout, LADDER, key=key)
    ratios = [layout.chunk_bytes / frame.truncated(level).size_bytes for level in range(3)]
    assert [round(ratio, 1) for ratio in ratios] == [8.2, 4.5, 3.1]


@pytest.mark.parametrize(("name", "dtype"), GOLDEN_CASES)
def test_golden_frames_decode_to_what_was_encoded(name: str, dtype: str) -> None:
    frame, case = golden_frame(f"{name}-{dtype}"), golden_case(name, dtype)
    frame.verify(case.key)
    for level in range(frame.levels):
        held = frame.truncated(level)
        found = decode(held, case.layout, case.artefacts, key=case.key, token_ids=case.context.token_ids)
        for plane, x in planes_like(case.layout).items():
            errors = frame.head.header.distortion.get(plane)
            assert error(found[plane], x) <= (1.001 * errors[level] if errors else 0)


@pytest.mark.parametrize(("name", "dtype"), GOLDEN_CASES)
def test_levels_are_known_while_encoding_as_they_will_be_decoded(name: str, dtype: str) -> None:
    case = golden_case(name, dtype)
    planes = planes_like(case.layout)
    frame, levels = encode_levels(planes, case.layout, case.pipeline, key=case.key, context=case.context)
    assert frame == encode(planes, case.layout, case.pipeline, key=case.key, context=case.context)
    assert len(levels) == frame.levels
    for level, expected in enumerate(levels):
        held = frame.truncated(level)
        found = decode(held, case.layout, case.artefacts, key=case.key, token_ids=case.context.token_ids)
        assert all(same_bits(found[plane], x) for plane, x in expected.items())


def test_values_of_nested_indices_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    layers, tokens, heads, n = 2, 7, 3, 32
    index = torch.randint(-40, 41, (layers, tokens, heads, n), generator=generator, dtype=torch.int32)
    index[0, 0, 0, :4] = torch.tensor([0, 1, -1, 2_000_000])
    classes = torch.randint(-60, 30, (layers, 1, heads, n), generator=generator, dtype=torch.int32)
    offset = torch.randint(-10, 11, (layers, tokens, heads, 1), generator=generator, dtype=torch.int32)
    step = torch.rand(layers, tokens, heads, 1, generator=generator)
    found = torch.empty(index.shape)
    reconstruct_rows(
        index.view(-1, n).numpy(),
        classes.view(-1, n).numpy(),
        offset.view(-1).numpy(),
        step.view(-1).numpy(),
        tokens,
        heads,
        tables().shift,
        found.view(-1, n).numpy(),
    )
    assert torch.equal(found, reconstruct(index, classes + offset, step))


@pytest.mark.parametrize(("name", "dtype"), GOLDEN_CASES)
def test_the_indices_of_golden_frames_never_change(name: str, dtype: str) -> None:
    # Arithmetic may differ in the last digit between machines; what entropy coders give back may not.
    file = f"{name}-{dtype}"
    assert planes_digest(quantised(golden_frame(file), golden_case(name, dtype))) == committed("planes")[file]


def test_golden_artefacts_are_what_their_helper_makes() -> None:
    for file, make in ARTEFACTS.items():
        ((digest, data),) = golden_artefacts(file).items()
        ((_, made),) = make().items()
        found, fresh = load_artefact(data, digest), load_artefact(made)
        assert len(data) <= 60_000
        assert found.card == fresh.card
        assert {name: x.shape for name, x in found.tensors.items()} == {
            name: x.shape for name, x in fresh.tensors.items()
        }
        # Bases differ between linear algebra libraries, by a sign at least.
        assert all(torch.equal(found.tensors[name], fresh.tensors[name]) for name in ("k.mean", "v.weight", "probes"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_raw_frames_are_written_again_byte_for_byte(dtype: str) -> None:
    layout = of_dtype(LAYOUT, dtype)
    frame = encode(planes_like(layout), layout, named_pipeline("raw"), key=key_of(layout))
    assert (GOLDEN / f"raw-{dtype}-v1.kvf").read_bytes() == b"".join(frame.buffers())


MLA = Layout("mla", "r", {"latent": PlaneSpec("bfloat16", (2, 16, 1, 512))}, chunk_tokens=16)
MLA_REFUSED = {
    "kvserve": "stage 'minmax': there is no plane 'k' here, only latent",
    "cachegen": "stage 'absmax': there is no plane 'k' here, only latent",
    "kivi": "stage 'minmax': there is no plane 'k' here, only latent",
    "ladder-weighted": "stage 'importance': there is no plane 'k' here, only latent",
    "ladder-klt": "stage 'importance': there is no plane 'k' here, only latent",
    "ladder-tokens": "stage 'importance': there is no plane 'k' here, only latent",
    "kvtc": "stage 'rope' needs a plane 'k'",
}


MLA_REFUSED |= {name: "stage 'rope' needs a plane 'k'" for name in NAMED if "rope" in stages_of(name)}


@pytest.mark.parametrize("name", [name for name in NAMED if name not in MLA_REFUSED])
def test_an_mla_layout_goes_through_the_pipelines_that_name_no_plane(name: str) -> None:
    planes, key = planes_like(MLA), key_of(MLA)
    found = decode(encode(planes, MLA, named_pipeline(name), key=key), MLA, key=key)
    assert error(found["latent"], planes["latent"]) < 0.01


@pytest.mark.parametrize(("name", "message"), MLA_REFUSED.items())
def test_an_mla_layout_is_refused_without_data_by_all_others(name: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        CASES[name].pipeline.infer(known_specs(MLA, 2))


@pytest.mark.parametrize("name", [name for name in NAMED if name not in BFLOAT16_ONLY])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pipelines_take_every_float(name: str, dtype: str) -> None:
    layout = layout_for(name, dtype)
    named_pipeline(name).infer(known_specs(layout, layout.layers))


@pytest.mark.parametrize("name", BFLOAT16_ONLY)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_exponents_are_those_of_bfloat16(name: str, dtype: str) -> None:
    with pytest.raises(PipelineError, match=r"stage 'exponent': plane 'k' of .* is not a bfloat16 plane"):
        named_pipeline(name).infer(known_specs(layout_for(name, dtype), 3))


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_pipelines_give_back_every_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    planes = {
        plane: torch.randint(0, 256, (spec.size_bytes,), generator=generator, dtype=torch.uint8)
        .view(torch.bfloat16)
        .view(spec.shape)
        for plane, spec in LAYOUT.planes.items()
    }
    frame = encode(planes, LAYOUT, named_pipeline(name), key=KEY)
    found = decode(frame, LAYOUT, key=KEY)
    assert not frame.head.header.distortion
    assert all(same_bits(found[plane], x) for plane, x in planes.items())


CONSTANT_ERROR = {
    "ladder-packed": 0.0,  # the mean of equal bfloat16 values is one of them
    "ladder": 0.002,  # keys that are equal with rotary embedding are not equal without it
    "ladder-repeats": 0.002,
    "kvserve": 0.06,  # eight levels for a vector of V that the rotation spread
    "cachegen": 0.0,
    "kivi": 0.0,
    "fp8": 0.0,
    "turboquant": 0.011,  # what four bits do to any vector
}


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-20, 1e30])
def test_constant_planes_survive(name: str, value: float) -> None:
    case = CASES[name]
    planes = {plane: torch.full(spec.shape, value).bfloat16() for plane, spec in case.layout.planes.items()}
    found = decode(case.encode(planes), case.layout, key=case.key, token_ids=case.context.token_ids)
    for plane, x in planes.items():
        if name == "kvserve" and abs(value) < 1e-5:
            # Its ranges are never below that.
            assert float((found[plane] - x).abs().max()) < 1e-5
        else:
            assert error(found[plane], x) <= CONSTANT_ERROR[name]


@pytest.mark.parametrize("name", NAMED)
def test_zeros_stay_zeros(name: str) -> None:
    case = CASES[name]
    planes = {plane: torch.zeros(spec.shape).bfloat16() for plane, spec in case.layout.planes.items()}
    frame = case.encode(planes)
    found = decode(frame, case.layout, key=case.key, token_ids=case.context.token_ids)
    for plane in planes:
        # Min-max never has a range below 1e-5.
        assert float(found[plane].abs().max()) <= (1e-5 if name in ("kvserve", "kivi") else 0)


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
    key = key_of(layout)
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


@pytest.mark.parametrize("name", CASES)
def test_infer_says_what_encode_makes(name: str) -> None:
    case = CASES[name]
    group_layers = case.pipeline.group_layers or case.layout.layers
    specs = known_specs(case.layout, group_layers)
    _, chunk = whole_chunk(case)
    planes = {plane: x if plane.startswith(".") else x[:group_layers] for plane, x in chunk.items()}
    made = case.pipeline.encode({**planes, ".layer": torch.arange(group_layers)}, specs)
    inferred = {plane: spec for plane, spec in case.pipeline.infer(specs).items() if not is_context(plane)}
    assert made.keys() == inferred.keys()
    for plane, x in made.items():
        spec = inferred[plane]
        assert x.dtype == TORCH_DTYPES[spec.dtype]
        if spec.at_most:
            assert x.dim() == 1
            assert x.numel() <= spec.elements
        else:
            assert tuple(x.shape) == spec.shape


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_is_its_json(name: str) -> None:
    pipeline = CASES[name].pipeline
    assert build_pipeline(json.loads(json.dumps(pipeline.spec)), CASES[name].artefacts) == pipeline


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


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_pipelines_need_their_artefact(name: str) -> None:
    for artefacts in (None, {}, {"a": b"", "b": b""}):
        with pytest.raises(PipelineError, match=f"'{name}' needs one calibration artefact"):
            named_pipeline(name, artefacts)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(PipelineError, match=r"'lader'.*ladder-packed.*ladder-klt"):
        named_pipeline("lader")


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
        encode(planes, layout, pipeline, key=key_of(layout))


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


def test_a_storage_node_knows_which_stages_are_lossless() -> None:
    assert {name for name, stage in STAGES.items() if stage.lossless} == LOSSLESS_STAGES - {"blob"}


@pytest.mark.parametrize("name", CASES)
def test_a_frame_tells_which_profile_made_it(name: str) -> None:
    case = CASES[name]
    header = case.encode().head.header
    level = Level(2.0, 0.1, {"text-256": Quality(0.0, 0.0, 0.0, 1.0, 8)})
    written = json.loads(json.dumps([dict(stage) for stage in case.pipeline.spec]))
    profile = Profile("p01", tuple(written), case.pipeline.artefacts, 0.1, (level,) * header.levels)
    assert header.profile == profile.id
    assert header.lossless is profile.lossless is case.pipeline.lossless


def test_every_default_profile_is_written_as_its_frames_say_it() -> None:
    for profile in read_set(Path(DEFAULT)).profiles:
        assert profile_id(build_pipeline(profile.pipeline).spec) == profile.id


def _forged(**change: Any) -> Frame:
    """The frame with another header: sound in itself, but not what its pipeline makes."""
    frame = encode(planes_like(LAYOUT), LAYOUT, LADDER, key=KEY)
    header = dataclasses.replace(frame.head.header, **change)
    return pack_frame(header, [bytes(view) for *_, view in frame.segments()])
