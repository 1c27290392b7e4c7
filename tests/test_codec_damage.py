"""Frames that no encoder wrote, soundly packed: planes of the right shapes or a typed error, never anything else.

Every pipeline that has a name is tried, and calibrated ones over heads, layers and token ids. `NUMBA_BOUNDSCHECK=1`
runs the same tests with every index of the compiled loops checked.
"""

import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.codecs import build_pipeline, decode
from kvstore.codecs.context import known_specs
from kvstore.codecs.rans import Rans
from kvstore.codecs.registry import STAGES
from kvstore.codecs.stage import is_context
from kvstore.errors import FrameError, PipelineError
from kvstore.frame import Frame, pack_frame
from kvstore.header import Header
from tests.codec_cases import TINY, Artefacts, Case, every_case, quantised

CASES = every_case()
FRAMES = {name: case.encode() for name, case in CASES.items()}
EVERY_ARTEFACT: Artefacts = {digest: data for case in CASES.values() for digest, data in case.artefacts.items()}
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def segments_of(frame: Frame) -> list[bytearray]:
    return [bytearray(view) for *_, view in frame.segments()]


def decode_or_refuse(frame: Frame, case: Case, artefacts: Mapping[str, bytes] | None = None) -> bool:
    """Whether a frame decodes; the planes have the layout's shapes, or the error says whose it is."""
    frame.verify(case.key)
    artefacts = case.artefacts if artefacts is None else artefacts
    try:
        found = decode(frame, case.layout, artefacts, key=case.key, token_ids=case.context.token_ids)
    except (FrameError, PipelineError) as exc:
        assert any(word in str(exc) for word in ("stage", "plane", "frame", "artefact", "token ids")), exc
        return False
    for name, spec in case.layout.planes.items():
        assert tuple(found[name].shape) == spec.shape
    return True


# Segments.


def flipped(draw: st.DrawFn, data: bytearray) -> bytearray:
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, min(len(data), 48) - 1)))
        data[place] ^= draw(st.integers(1, 255))
    return data


def cut(draw: st.DrawFn, data: bytearray) -> bytearray:
    return data[: draw(st.integers(0, len(data)))]


def replaced(draw: st.DrawFn, data: bytearray) -> bytearray:
    seed = draw(st.integers(0, 1 << 16))
    return bytearray(torch.randint(0, 256, (len(data),), generator=torch.Generator().manual_seed(seed)).tolist())


def extended(draw: st.DrawFn, data: bytearray) -> bytearray:
    return data + draw(st.binary(min_size=1, max_size=40))


def filled(draw: st.DrawFn, data: bytearray) -> bytearray:
    return bytearray([draw(st.sampled_from([0, 1, 127, 128, 255]))]) * len(data)


DAMAGE: tuple[Callable[[st.DrawFn, bytearray], bytearray], ...] = (flipped, cut, replaced, extended, filled)


@st.composite
def damaged_segments(draw: st.DrawFn, frame: Frame) -> Frame:
    """The frame with one or two segments damaged, one put in another's place, or all replaced."""
    parts = segments_of(frame)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(parts) - 1))
        if parts[at]:
            parts[at] = draw(st.sampled_from(DAMAGE))(draw, parts[at])
    if draw(st.booleans()):
        parts[draw(st.integers(0, len(parts) - 1))] = parts[draw(st.integers(0, len(parts) - 1))]
    header = frame.head.header
    # An empty level above 0 is no frame at all.
    start = 0
    for level, count in enumerate(header.segment_counts()):
        if level and not any(parts[start : start + count]):
            parts[start] = bytearray(1)
        start += count
    packed = pack_frame(header, parts)
    return packed.truncated(draw(st.integers(0, packed.levels - 1)))


@pytest.mark.parametrize("name", CASES)
def test_damaged_segments_decode_or_are_refused(name: str) -> None:
    @QUICK
    @given(damaged_segments(FRAMES[name]))
    def check(frame: Frame) -> None:
        decode_or_refuse(frame, CASES[name])

    check()


@pytest.mark.parametrize("name", CASES)
def test_every_segment_may_be_empty_or_all_ones(name: str) -> None:
    frame, case = FRAMES[name], CASES[name]
    parts = segments_of(frame)
    assert decode_or_refuse(pack_frame(frame.head.header, parts), case)
    for at in range(len(parts)):
        decode_or_refuse(pack_frame(frame.head.header, [*parts[:at], b"\xff" * len(parts[at]), *parts[at + 1 :]]), case)
        decode_or_refuse(pack_frame(frame.head.header, [*parts[:at], b"\0", *parts[at + 1 :]]), case)
    assert not decode_or_refuse(pack_frame(frame.head.header, [*parts[:-1], parts[-1] + bytes(1 << 20)]), case)


# Headers.


def values() -> st.SearchStrategy[Any]:
    """What JSON may have in place of an option."""
    numbers = st.one_of(st.integers(-2, 70), st.sampled_from([-(1 << 31), 255, 256, 257, 1600, 1 << 16, 1 << 40, 0.5]))
    words = st.sampled_from(["", "k", "v", "kv", "token", "channel", "plane", "layer", "0" * 64])
    one = st.one_of(st.none(), st.booleans(), numbers, words)
    return st.one_of(one, st.lists(one, max_size=3), st.dictionaries(words, one, max_size=1))


OPTIONS = sorted(
    {field.name for stage in STAGES.values() for field in dataclasses.fields(stage)} | {"stage", "nothing"}
)


@st.composite
def damaged_stages(draw: st.DrawFn, stages: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """A pipeline with a stage changed, dropped, doubled, moved or made up."""
    found = [dict(stage) for stage in stages]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found) - 1))
        kind = draw(st.sampled_from(["option", "option", "default", "drop", "double", "swap", "add"]))
        if kind == "option":
            option = draw(st.sampled_from([*found[at], *OPTIONS]))
            found[at][option] = draw(st.sampled_from(sorted(STAGES)) if option == "stage" else values())
            if not isinstance(found[at].get("stage"), str):
                found[at]["stage"] = "raw"
        elif kind == "default":
            found[at] = {"stage": found[at]["stage"]}
        elif kind == "drop" and len(found) > 1:
            del found[at]
        elif kind == "double":
            found.insert(draw(st.integers(0, len(found))), dict(found[at]))
        elif kind == "swap":
            other = draw(st.integers(0, len(found) - 1))
            found[at], found[other] = found[other], found[at]
        else:
            stage: dict[str, Any] = {"stage": draw(st.sampled_from(sorted(STAGES)))}
            if draw(st.booleans()):
                stage["artefact"] = draw(st.integers(0, 1))
            found.insert(draw(st.integers(0, len(found))), stage)
    return tuple(found)


@st.composite
def damaged_headers(draw: st.DrawFn, header: Header) -> Header:
    """A header with some of its fields changed, each within what the format allows."""
    planes = [list(level) for level in header.planes]
    layers = sum(header.groups)
    changes: dict[str, st.SearchStrategy[Any]] = {
        "tokens": st.sampled_from([1, 15, 16, 17, 65536]),
        "first_position": st.one_of(st.integers(0, 40), st.just(1 << 40)),
        "groups": st.sampled_from([(layers,), (1,) * layers, (1, 2), (2, 1), (1, 1), (4,), (1 << 20,)]),
        "pipeline": damaged_stages(header.pipeline),
        "artefacts": st.sampled_from([(), header.artefacts * 2, header.artefacts[::-1], ("ab" * 32,)]),
        "planes": st.sampled_from([
            tuple(map(tuple, planes[::-1])),
            tuple(map(tuple, planes[:-1])) or (("k",),),
            tuple(tuple(level[::-1]) for level in planes),
            (*map(tuple, planes), ("k.9",)),
            tuple(tuple(f"{name}.x" for name in level) for level in planes),
        ]),
    }  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(sorted(changes)), min_size=1, max_size=2, unique=True))
    changed = dataclasses.replace(header, **{name: draw(changes[name]) for name in chosen})
    return dataclasses.replace(changed, distortion={})


def packed_around(header: Header, parts: list[bytearray]) -> Frame | None:
    """A frame with as many of the parts as its header asks for; None where the format itself refuses it."""
    count = sum(header.segment_counts())
    try:
        return pack_frame(header, (parts * (count // len(parts) + 1))[:count])
    except (FrameError, ValueError):
        return None


@pytest.mark.parametrize("name", CASES)
def test_damaged_headers_decode_or_are_refused(name: str) -> None:
    @QUICK
    @given(damaged_headers(FRAMES[name].head.header))
    def check(header: Header) -> None:
        frame = packed_around(header, segments_of(FRAMES[name]))
        if frame is not None:
            decode_or_refuse(frame, CASES[name])

    check()


@pytest.mark.parametrize("name", CASES)
def test_headers_that_agree_with_themselves_decode_or_are_refused(name: str) -> None:
    # The worst that an attacker can write: a pipeline of his own, and just the planes and lengths that it makes.
    case = CASES[name]
    header = FRAMES[name].head.header

    @settings(QUICK, max_examples=40)
    @given(damaged_stages(header.pipeline), st.sampled_from([(3,), (1, 2), (2, 1), (1, 1, 1)]), st.integers(0, 1 << 16))
    def check(stages: tuple[Mapping[str, Any], ...], groups: tuple[int, ...], seed: int) -> None:
        frame = forged(case, header, stages, groups, seed)
        if frame is not None:
            decode_or_refuse(frame, case)

    check()


def forged(
    case: Case, header: Header, stages: tuple[Mapping[str, Any], ...], groups: tuple[int, ...], seed: int
) -> Frame | None:
    """Random segments of the lengths that a pipeline makes, None where it makes none."""
    try:
        named = [
            {**stage, "artefact": header.artefacts[stage["artefact"]]} if "artefact" in stage else stage
            for stage in stages
        ]
        pipeline = build_pipeline(named, case.artefacts)
        specs = [pipeline.infer(known_specs(case.layout, layers)) for layers in groups]
    except (PipelineError, IndexError, TypeError):
        return None
    coded = {name: spec for name, spec in specs[0].items() if not is_context(name)}
    levels = max(spec.level or 0 for spec in coded.values()) + 1
    planes = tuple(tuple(n for n, spec in coded.items() if (spec.level or 0) == level) for level in range(levels))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for level in planes:
        for spec in (inferred[name] for inferred in specs for name in level):
            size = min(spec.size_bytes, 5000) if spec.at_most else spec.size_bytes
            part = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
            if spec.at_most:
                # One lane of the version that coders write, so that they get further than their header.
                part[:4] = torch.tensor([0, 0, 5, 0])[: len(part)]
                part[8:10] = torch.tensor([(size - 10) // 2 & 255, (size - 10) // 2 >> 8])[: max(len(part) - 8, 0)]
            parts.append(bytearray(part.numpy().tobytes()))
    changed = dataclasses.replace(
        header, pipeline=stages, planes=planes, groups=groups, artefacts=header.artefacts, distortion={}
    )
    return packed_around(changed, parts) if all(planes) else None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STAGES)), st.integers(0, len(EVERY_ARTEFACT) - 1), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([(3,), (2, 1), (1, 1, 1)]),
    st.integers(0, 1 << 16),
)
def test_any_order_of_stages_decodes_or_is_refused(
    drawn: list[tuple[str, int, bool]], groups: tuple[int, ...], seed: int
) -> None:
    case = CASES["ladder-tokens"]._replace(artefacts=EVERY_ARTEFACT)
    header = dataclasses.replace(FRAMES["ladder-tokens"].head.header, artefacts=tuple(EVERY_ARTEFACT))
    takes = {
        name for name, stage in STAGES.items() if "artefact" in {field.name for field in dataclasses.fields(stage)}
    }
    stages: list[dict[str, Any]] = [
        {"stage": name, "artefact": number} if name in takes and bound else {"stage": name}
        for name, number, bound in drawn
    ]
    frame = forged(case, header, (*stages, {"stage": "raw"}), groups, seed)
    if frame is not None:
        decode_or_refuse(frame, case, EVERY_ARTEFACT)


def test_an_artefact_that_the_header_does_not_list_is_refused() -> None:
    header = FRAMES["ladder-klt"].head.header
    numbers: tuple[object, ...] = (-1, 1, 1 << 40, True, 0.0, "0", [0], {})
    for number in numbers:
        stages = tuple({**stage, "artefact": number} if "artefact" in stage else stage for stage in header.pipeline)
        frame = pack_frame(dataclasses.replace(header, pipeline=stages), segments_of(FRAMES["ladder-klt"]))
        with pytest.raises(FrameError, match=r"stage 'importance' names artefact .* of 1"):
            decode(frame, TINY, CASES["ladder-klt"].artefacts, key=header.key)


def test_an_artefact_that_is_not_here_is_named_by_its_digest() -> None:
    for name, case in CASES.items():
        for digest in case.artefacts:
            with pytest.raises(PipelineError, match=digest):
                decode(FRAMES[name], case.layout, {}, key=case.key, token_ids=case.context.token_ids)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_side_planes_that_are_soundly_coded_may_say_anything(data: st.DataObject) -> None:
    # Checksums and streams are right here; what the numbers say is not what an encoder writes.
    name = data.draw(st.sampled_from([name for name in CASES if "ladder" in name and name != "ladder-packed"]))
    frame, case = FRAMES[name], CASES[name]
    coder = next(stage for stage in case.pipeline.stages if isinstance(stage, Rans))
    specs = quantised(frame, case)[0][0]
    parts = segments_of(frame)
    places = [at for at, (_, _, plane, _) in enumerate(frame.segments()) if specs[plane].dtype == "int8"]
    for at in data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True)):
        _, group, plane, _ = list(frame.segments())[at]
        shape = quantised(frame, case)[group][0][plane].shape
        low, high = data.draw(st.sampled_from([(-127, 127), (50, 70), (-70, -50), (0, 0), (127, 127), (-127, -127)]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        numbers = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
        parts[at] = bytearray(coder._pack_integers(numbers).numpy().tobytes())
    decode_or_refuse(pack_frame(frame.head.header, parts), case)


def test_damage_takes_no_memory_worth_speaking_of() -> None:
    for name in CASES:
        case, frame = CASES[name], FRAMES[name]
        decode_or_refuse(frame, case)
        for byte in (b"\0", b"\x0c", b"\xff"):
            parts = [bytearray(byte * len(part)) for part in segments_of(frame)]
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            decode_or_refuse(pack_frame(frame.head.header, parts), case)
            # In kilobytes; whatever the bytes claim, the layout bounds what is allocated for them.
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


@pytest.mark.long
@pytest.mark.skipif("NUMBA_BOUNDSCHECK" in os.environ, reason="this is the run with checked bounds")
def test_compiled_loops_stay_within_their_arrays(tmp_path: Any) -> None:
    # An index out of range is an IndexError there, which no test expects. Machine code is cached apart.
    environ = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    chosen = "side_planes or damaged_segments and (kvserve or cachegen or ladder-tokens or ladder-klt-packed)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
