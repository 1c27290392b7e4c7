"""Exact re-coding: the same numbers, bit for bit, under other coders, and back again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvstore.codecs import NAMED, Context, Pipeline, build_pipeline, decode, encode, named_pipeline
from kvstore.codecs.recode import recode, recoder
from kvstore.codecs.stage import Planes
from kvstore.errors import FrameCorruptError, LayoutMismatchError, PipelineError
from kvstore.frame import Frame, blob_frame, pack_frame, parse_frame
from kvstore.header import Behind
from kvstore.keys import chunk_keys
from kvstore.testing import make_frame
from tests.codec_cases import BARE, ROTARY, TINY, TOKEN_IDS, Case, case_of, key_of, planes_like, same_bits
from tests.frames import frame_bytes

Stages = Sequence[Any]
RANS: Stages = ({"stage": "rans"}, {"stage": "raw"})
PACKED: Stages = ({"stage": "rans", "packed_from": 1}, {"stage": "pack"}, {"stage": "raw"})
ZSTD: Stages = ({"stage": "zstd"}, {"stage": "raw"})
PACK: Stages = ({"stage": "pack"}, {"stage": "raw"})
ANS: Stages = ({"stage": "ans"}, {"stage": "raw"})
SQUEEZED: Stages = ({"stage": "rans"}, {"stage": "zstd", "level": 9}, {"stage": "raw"})

CASES: dict[str, tuple[str, Stages]] = {
    "fewer lanes": ("ladder", ({"stage": "rans", "lane_bytes": 4096}, {"stage": "raw"})),
    "rans to packed digits": ("ladder", PACKED),
    "rans to zstd": ("ladder", ZSTD),
    "rans under zstd": ("ladder", SQUEEZED),
    "repeats": ("ladder-repeats", PACKED),
    "calibrated": ("ladder-klt", PACKED),
    "joint, over layers": ("ladder-tokens", ZSTD),
    "weighted": ("ladder-weighted", PACK),
    "digits to zstd": ("ladder-packed", ZSTD),
    "digits to ans": ("ladder-packed", ANS),
    "nibbles to ans": ("kivi", ANS),
    "bits to zstd": ("raw", ZSTD),
    "bits to exponents": ("raw", NAMED["exponent-ans"]),
    "exponents to bits": ("splitzip", NAMED["raw"]),
}


def with_coders(case: Case, coders: Stages) -> Pipeline:
    """The stages of a case up to its last lossy one, and other coders."""
    shared, _ = case.pipeline.split()
    return build_pipeline([*shared.spec, *coders], case.artefacts)


def decoded(case: Case, frame: Frame) -> Planes:
    return decode(frame, case.layout, case.artefacts, key=case.key, token_ids=case.context.token_ids)


@pytest.mark.parametrize(("name", "group_layers"), [(name, n % 3) for n, name in enumerate(CASES)])
def test_the_numbers_are_those_of_the_frame_and_the_frame_comes_back(name: str, group_layers: int) -> None:
    method, coders = CASES[name]
    case = case_of(method)
    case = case._replace(context=replace(case.context, group_layers=group_layers))
    frame, other = case.encode(), with_coders(case, coders)
    found = recode(frame, other, case.layout)
    found.verify(case.key)
    assert found.id != frame.id
    assert found.id == case._replace(pipeline=other).encode().id, "as if it had been encoded so"
    assert contents(parse_frame(frame_bytes(found))) == contents(found)
    for level in range(frame.levels):
        exact = decoded(case, frame.truncated(level))
        again = decoded(case, found.truncated(level))
        assert all(same_bits(again[plane], exact[plane]) for plane in exact)
    back = recode(found, case.pipeline, case.layout)
    assert (back.id, contents(back)) == (frame.id, contents(frame))


def contents(frame: Frame) -> bytes:
    return b"".join(map(bytes, frame.buffers()))


def test_all_but_the_coders_of_the_header_stays() -> None:
    case = case_of("ladder-klt")
    first = case.encode()
    inexact = replace(first.head.header, behind=Behind(1, 0.25))
    frame = pack_frame(inexact, [view for _, _, _, view in first.segments()])
    header = recode(frame, with_coders(case, PACKED), case.layout).head.header
    assert replace(header, pipeline=inexact.pipeline, planes=inexact.planes) == inexact
    assert header.levels == inexact.levels
    assert [stage["stage"] for stage in header.pipeline][-3:] == ["rans", "pack", "raw"]


def test_tokens_that_are_kept_stay_kept() -> None:
    stages = [{"stage": "keep", "sinks": 2, "recent": 3}, *NAMED["ladder-packed"][:-2]]
    packed, ans = (build_pipeline([*stages, *coders]) for coders in (PACK, ANS))
    key = key_of(BARE)
    frame = encode(planes_like(BARE), BARE, packed, key=key, context=Context(last=True))
    found = recode(frame, ans, BARE)
    exact = decode(frame, BARE, key=key)
    assert all(same_bits(plane, exact[name]) for name, plane in decode(found, BARE, key=key).items())
    assert recode(found, packed, BARE).id == frame.id


def test_a_frame_of_the_same_pipeline_is_given_back_with_any_levels() -> None:
    case = case_of("ladder")
    frame = case.encode()
    assert recode(frame, case.pipeline, case.layout) is frame
    cut = frame.truncated(0)
    assert recode(cut, case.pipeline, case.layout) is cut
    parsed = parse_frame(frame_bytes(case_of("ladder-tokens").encode()))
    assert recode(parsed, case_of("ladder-tokens").pipeline, TINY) is parsed


@pytest.mark.parametrize(
    ("method", "stages", "message"),
    [
        ("ladder", NAMED["ladder-packed"], "differ from stage 1 on, where 'rope' is none"),
        ("ladder", NAMED["raw"], "where 'rope' is none"),
        ("raw", NAMED["ladder-packed"], "where 'mean' is none"),
        (
            "ladder-packed",
            [*NAMED["ladder-packed"][:2], {"stage": "step", "levels": 2}, *PACK],
            "stage 3 on, where 'step'",
        ),
        ("ladder-packed", [{"stage": "keep", "sinks": 1}, *NAMED["ladder-packed"]], "where 'mean' is none"),
        ("raw", [{"stage": "keep", "sinks": 1}, {"stage": "raw"}], "where 'keep' is none"),
        ("ladder-packed", [*NAMED["ladder-packed"][:3], *RANS], "and there is none of it"),
    ],
)
def test_pipelines_that_differ_in_anything_else_are_refused(method: str, stages: Stages, message: str) -> None:
    case = case_of(method)
    with pytest.raises(PipelineError, match=message):
        recode(case.encode(), build_pipeline(stages), case.layout)


def test_missing_levels_and_other_layouts_are_refused() -> None:
    case = case_of("ladder")
    frame, other = case.encode(), with_coders(case, ZSTD)
    with pytest.raises(PipelineError, match="needs all 3 levels of a frame, 2 are here"):
        recode(frame.truncated(1), other, case.layout)
    with pytest.raises(LayoutMismatchError):
        recode(frame, other, BARE)


def test_streams_that_no_coder_wrote_are_refused() -> None:
    case = case_of("ladder")
    frame = case.encode()
    parts = [bytearray(view) for _, _, _, view in frame.segments()]
    names = [name for level in frame.head.header.planes for name in level]
    parts[names.index("v.1")][-1] ^= 1
    with pytest.raises(FrameCorruptError, match=r"plane 'v\.1'"):
        recode(pack_frame(frame.head.header, parts), with_coders(case, ZSTD), case.layout)


def test_a_stack_gets_every_tier_its_coders_and_all_else_unchanged() -> None:
    case = case_of("ladder")
    frame, fast = case.encode(), with_coders(case, PACKED)
    recoded = recoder({"gpu": fast, "s3": with_coders(case, SQUEEZED)}, case.layout)
    assert recoded(frame, "host") is frame
    assert recoded(frame, "gpu").id == recode(frame, fast, case.layout).id
    assert recoded(recoded(frame, "s3"), "gpu").id == recoded(frame, "gpu").id
    blob = blob_frame(case.key, memoryview(bytearray(16)), 5)
    unknown = make_frame(chunk_keys(ROTARY, TOKEN_IDS)[1])
    raw = encode(planes_like(ROTARY), ROTARY, named_pipeline("raw"), key=case.key)
    other_layout = case_of("ladder-packed").encode()
    for left_alone in (frame.truncated(1), blob, unknown, raw, other_layout):
        assert recoded(left_alone, "gpu") is left_alone
